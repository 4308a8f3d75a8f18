"""The unmodified Node MCP client (@modelcontextprotocol/sdk), inside an agent's sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from expected_session import TOKEN, assert_recorded, assert_seen
from real_daemon import RealDaemon

pytestmark = pytest.mark.clients

FOLDER = Path(__file__).parent / "node"


def test_the_node_client_works(daemon: RealDaemon, node: str) -> None:
    daemon.agent(
        "client",
        f"exec {node} /opt/client/client.mjs",
        tools="[use, fail, talk, long]",
        mounts=f"[{{source: {FOLDER}, target: /opt/client}}]",
    )
    daemon.start()
    daemon.set("client", TOKEN=TOKEN)
    done = daemon.run("client")
    assert done.returncode == 0, done.stderr
    saw = json.loads(done.stdout)
    assert saw["server"] == "sandboxd"
    assert_seen(saw)
    assert_recorded(daemon)
