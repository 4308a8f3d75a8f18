"""``sandboxctl tools import`` with a daemon: all of it, or nothing, and no value anywhere else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from real_daemon import RealDaemon

SERVER = Path(__file__).parents[1] / "mcpservers/stdio_server.py"
KEY = "sk-live-0123456789abcdef0123"


@pytest.fixture
def imported(configured: RealDaemon) -> RealDaemon:
    """A daemon, an agent without tools, and ``mcp.json`` with one server and its key."""
    agent = "version: 1\ndescription: an agent\ncommand: [/bin/true]\n"
    configured.write("agents/helper.yaml", agent)
    folder = configured.base / "servers"
    folder.mkdir()
    program = folder / "kit-server"
    program.write_text(f"#!{sys.executable}\n{SERVER.read_text()}")
    program.chmod(0o755)
    server = {"command": str(program), "env": {"TOKEN": KEY, "LOG_LEVEL": "debug"}}
    (configured.base / "mcp.json").write_text(json.dumps({"mcpServers": {"Kit": server}}))
    configured.start()
    return configured


def variables(daemon: RealDaemon) -> list[str]:
    return [row["name"] for row in daemon.call("env.list", agent="helper")["variables"]]


def folders(daemon: RealDaemon) -> list[str]:
    return sorted(path.name for path in (daemon.paths.config / "tools").glob("*"))


def test_a_file_is_imported_and_its_server_works(imported: RealDaemon) -> None:
    done = imported.ctl("tools", "import", str(imported.base / "mcp.json"), "--agent", "helper")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mcpServers"]["Kit"]["env"] == {
        "TOKEN": "${TOKEN}",
        "LOG_LEVEL": "debug",
    }
    assert "add to tools in agents/helper.yaml: kit" in done.stderr
    assert (variables(imported), folders(imported)) == (["TOKEN"], ["kit"])
    agent = imported.paths.config / "agents/helper.yaml"
    agent.write_text(agent.read_text() + "tools: [kit]\n")
    imported.call("reload")
    accepted = imported.ctl("tools", "accept", "kit", "--yes")
    assert accepted.returncode == 0, accepted.stderr
    ran = imported.ctl("tools", "run", "kit__tell", "--agent", "helper")
    assert ran.returncode == 0, ran.stderr
    assert "it is [redacted:TOKEN]" in ran.stdout
    left = [imported.paths.config, imported.paths.state, imported.paths.runtime, imported.log]
    found = subprocess.run(["grep", "-rlF", KEY, *left], capture_output=True, text=True)
    assert found.stdout == ""
    assert KEY not in done.stdout + done.stderr + accepted.stdout + ran.stdout + ran.stderr


def test_what_fails_late_is_taken_back(imported: RealDaemon) -> None:
    file = str(imported.base / "mcp.json")
    (imported.paths.config / "agents/other.yaml").write_text("version: 1\nnonsense: true\n")
    done = imported.ctl("tools", "import", file, "--agent", "helper")
    assert done.returncode == 2
    assert "unknown key 'nonsense'" in done.stderr
    assert "nothing was imported" in done.stderr
    assert (variables(imported), folders(imported)) == ([], [])
    (imported.paths.config / "agents/other.yaml").unlink()
    dry = imported.ctl("tools", "import", file, "--agent", "helper", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout)["servers"][0]["variables"] == ["TOKEN"]
    assert (variables(imported), folders(imported)) == ([], [])
    assert imported.ctl("tools", "import", file, "--agent", "helper").returncode == 0
    again = imported.ctl("tools", "import", file, "--agent", "helper")
    assert again.returncode == 2
    assert "there is a tool kit already" in again.stderr
    assert KEY not in done.stderr + dry.stdout + again.stderr


def test_an_agent_that_is_not_there_gets_nothing(imported: RealDaemon) -> None:
    done = imported.ctl("tools", "import", str(imported.base / "mcp.json"), "--agent", "nobody")
    assert done.returncode == 3
    assert "no agent 'nobody'" in done.stderr
    assert folders(imported) == []
