"""Unmodified MCP clients over HTTP: what an agent sees of its tools, a token's holder sees too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from expected_session import TOKEN, assert_recorded, assert_seen
from real_daemon import RealDaemon

HERE = Path(__file__).parent


@pytest.fixture
def served(daemon: RealDaemon) -> RealDaemon:
    """The same agent and tools as for the other clients; the agent itself isn't running."""
    daemon.agent("client", "exec sleep 88204", tools="[use, fail, talk, long]")
    daemon.http()
    daemon.start()
    daemon.set("client", TOKEN=TOKEN)
    return daemon


def seen(daemon: RealDaemon, *command: str, **environment: str) -> dict[str, Any]:
    """What a client told that has nothing but an address and a token for one agent."""
    key = daemon.call("keys.create", role="operator", label="of a test")["key"]["id"]
    token = daemon.call("tokens.create", key=key, agents=["client"])["token"]
    given = {"PATH": os.environ["PATH"], "MCP_URL": daemon.url + "/mcp", "MCP_TOKEN": token}
    done = subprocess.run(
        command,
        env=given | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert token not in daemon.log.read_text() + str(daemon.audit())
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.soak
@pytest.mark.parametrize(
    ("mode", "version"),
    [("auto", "2026-07-28"), pytest.param("legacy", "2025-11-25", marks=pytest.mark.clients)],
)
def test_the_python_client_works_over_http(served: RealDaemon, mode: str, version: str) -> None:
    saw = seen(served, sys.executable, "-I", str(HERE / "python_client.py"), mode)
    assert saw["version"] == version
    assert_seen(saw)
    assert_recorded(served)


@pytest.mark.clients
def test_the_node_client_works_over_http(served: RealDaemon, node: str) -> None:
    saw = seen(served, node, str(HERE / "node" / "client.mjs"))
    assert saw["server"] == "sandboxd"
    assert_seen(saw)
    assert_recorded(served)


@pytest.mark.clients
def test_the_fastmcp_client_works_over_http(served: RealDaemon, fastmcp: Path) -> None:
    program = str(HERE / "fastmcp_client.py")
    saw = seen(served, sys.executable, "-I", program, FASTMCP=str(fastmcp))
    assert saw["tools"] == ["fail", "long", "talk", "use"]
    assert saw["used"] == [f"grüße used {len(TOKEN)}\nit is [redacted:TOKEN]\n"]
    assert saw["progress"] == ["one [redacted:TOKEN]\n", "two\n"]
