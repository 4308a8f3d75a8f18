"""Real MCP servers from npm and PyPI: installed, imported and accepted as an operator would."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from real_daemon import RealDaemon

HERE = Path(__file__).parent
CLIENT = HERE / "real_client.py"


def install_npm(folder: Path) -> Path:
    """``folder`` with the servers of node/package-lock.json in it."""
    npm = shutil.which("npm")
    assert npm, "these tests need Node.js and npm"
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / "node" / name, folder)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return folder


def install_pip(folder: Path) -> Path:
    """``folder`` as a virtual environment with the servers of requirements.txt."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    pip = [folder / "bin/pip", "install", "--quiet", "-r", HERE / "requirements.txt"]
    subprocess.run(pip, check=True, timeout=300)
    return folder


def client_agent(daemon: RealDaemon, tools: str = "[]") -> None:
    """The agent ``client``, whose argument says what to call."""
    daemon.write(
        "agents/client.yaml",
        f"version: 1\ndescription: calls tools\nargs_allowed: true\ntools: {tools}\n"
        f"command: [{sys.executable}, -I, /opt/client/real_client.py]\n"
        f"mounts: [{{source: {CLIENT}, target: /opt/client/real_client.py}}]\n",
    )


def import_file(daemon: RealDaemon, servers: dict[str, Any], *packages: Path) -> dict[str, Any]:
    """``sandboxctl tools import`` of a file with ``servers``; what it printed."""
    path = daemon.base / "mcp.json"
    path.write_text(json.dumps({"mcpServers": servers}))
    options = [word for folder in packages for word in ("--packages", str(folder))]
    done = daemon.ctl("tools", "import", str(path), "--agent", "client", "--json", *options)
    assert done.returncode == 0, done.stderr
    got: dict[str, Any] = json.loads(done.stdout)
    return got


def accept(daemon: RealDaemon, *names: str) -> None:
    client_agent(daemon, json.dumps(list(names)))
    daemon.call("reload")
    for name in names:
        done = daemon.ctl("tools", "accept", name, "--yes")
        assert done.returncode == 0, done.stderr


def call(daemon: RealDaemon, *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """What an agent saw that made these calls."""
    done = daemon.run("client", json.dumps(calls), timeout=180)
    assert done.returncode == 0, done.stderr
    saw: dict[str, Any] = json.loads(done.stdout)
    return saw


def text(result: dict[str, Any]) -> str:
    assert not result["error"], result
    return "".join(block.get("text") or "" for block in result["content"])
