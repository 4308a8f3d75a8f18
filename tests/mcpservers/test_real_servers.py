"""Real MCP servers, imported from an mcpServers file, through an unmodified MCP client."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_daemon import RealDaemon, directories
from real_servers import accept, call, client_agent, import_file, install_npm, install_pip, text

pytestmark = pytest.mark.clients

KEY = "sk-live-0123456789abcdef0123"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The npm packages, and the virtual environment, in a place that sandboxes can show."""
    with directories() as place:
        yield install_npm(place.base), install_pip(place.base / "venv")


@pytest.fixture
def daemon() -> Iterator[RealDaemon]:
    with directories() as daemon:
        client_agent(daemon)
        daemon.start()
        yield daemon


def test_four_real_servers_are_imported_and_work(
    daemon: RealDaemon, packages: tuple[Path, Path]
) -> None:
    npx = "@modelcontextprotocol/server-"
    got = import_file(
        daemon,
        {
            "files": {"command": "npx", "args": ["-y", f"{npx}filesystem", "/workspace"]},
            "memory": {
                "command": "npx",
                "args": ["-y", f"{npx}memory"],
                "env": {"MEMORY_FILE_PATH": "/tmp/memory.jsonl"},
            },
            "Everything": {
                "type": "stdio",
                "command": "npx",
                "args": ["-y", f"{npx}everything"],
                "env": {"SERVICE_API_KEY": KEY, "LOG_LEVEL": "debug"},
            },
            "git": {"command": "uvx", "args": ["mcp-server-git"]},
            "time": {"command": "uvx", "args": ["mcp-server-time", "--local-timezone=UTC"]},
        },
        *packages,
    )
    assert [server["name"] for server in got["servers"]] == [
        *("files", "memory", "everything", "mcp-git", "time")
    ]
    cleaned = got["cleaned"]["mcpServers"]["Everything"]["env"]
    assert cleaned == {"SERVICE_API_KEY": "${SERVICE_API_KEY}", "LOG_LEVEL": "debug"}
    manifest = daemon.paths.config / "tools/mcp-git/tool.yaml"
    manifest.write_text(manifest.read_text() + "workspace: rw\n")
    accept(daemon, "files", "memory", "everything", "mcp-git", "time")
    workspace = daemon.paths.workspaces / "client"
    subprocess.run(["git", "init", "--quiet", workspace], check=True)
    owner = workspace.stat()
    for path in (workspace, *workspace.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)
    saw = call(
        daemon,
        ("files__write_file", {"path": "/workspace/note.txt", "content": "written"}),
        ("files__read_text_file", {"path": "/workspace/note.txt"}),
        ("files__read_text_file", {"path": "/etc/passwd"}),
        (
            "memory__create_entities",
            {"entities": [{"name": "tea", "entityType": "drink", "observations": ["hot"]}]},
        ),
        ("memory__read_graph", {}),
        ("everything__get-sum", {"a": 2, "b": 3}),
        ("everything__get-env", {}),
        ("everything__get-tiny-image", {}),
        ("everything__trigger-long-running-operation", {"duration": 1, "steps": 3}),
        ("mcp-git__git_status", {"repo_path": "/workspace"}),
        ("time__get_current_time", {"timezone": "UTC"}),
    )
    written, read, outside, _, graph, added, env, image, long, status, now = saw["calls"]
    assert "Successfully wrote" in text(written)
    assert text(read) == "written"
    assert outside["error"] is True
    assert "tea" in text(graph)
    assert graph["structured"]["entities"][0]["name"] == "tea"
    assert "5" in text(added)
    # The server has its key, and nobody who asks it learns it.
    assert json.loads(text(env))["SERVICE_API_KEY"] == "[redacted:SERVICE_API_KEY]"
    assert json.loads(text(env))["LOG_LEVEL"] == "debug"
    assert any(block["type"] == "image" for block in image["content"])
    assert long["progress"] == sorted(long["progress"])
    assert len(long["progress"]) >= 2
    assert "note.txt" in text(status)
    assert json.loads(text(now))["timezone"] == "UTC"
    everything = json.dumps([saw, got]) + daemon.log.read_text() + json.dumps(daemon.audit())
    assert KEY not in everything
    left = subprocess.run(
        ["grep", "-rlF", KEY, daemon.paths.config, daemon.paths.state, daemon.paths.runtime],
        capture_output=True,
        text=True,
        check=False,
    )
    assert left.stdout == ""


def test_an_import_lists_what_it_cannot_start_and_changes_nothing(
    daemon: RealDaemon, packages: tuple[Path, Path]
) -> None:
    path = daemon.base / "mcp.json"
    servers = {
        "good": {
            "command": "npx",
            "args": ["@modelcontextprotocol/server-memory"],
            "env": {"KEY": KEY},
        },
        "old": {"command": "npx", "args": ["@modelcontextprotocol/server-memory@0.0.1"]},
    }
    path.write_text(json.dumps({"mcpServers": servers}))
    where = ("--agent", "client", "--packages", str(packages[0]))
    done = daemon.ctl("tools", "import", str(path), *where)
    assert done.returncode == 2
    assert "old: the file wants @modelcontextprotocol/server-memory 0.0.1, and" in done.stderr
    assert list((daemon.paths.config / "tools").iterdir()) == []
    assert daemon.call("env.list", agent="client")["variables"] == []
    dry = daemon.ctl("tools", "import", str(path), *where, "--only", "good", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert KEY not in dry.stdout + dry.stderr
    assert daemon.call("env.list", agent="client")["variables"] == []
    real = daemon.ctl("tools", "import", str(path), *where, "--only", "good")
    assert real.returncode == 0, real.stderr
    assert [v["name"] for v in daemon.call("env.list", agent="client")["variables"]] == ["KEY"]
