"""The unmodified Python MCP client, inside an agent's sandbox, through the bridge."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from expected_session import TOKEN, assert_recorded, assert_seen
from real_daemon import RealDaemon

CLIENT = Path(__file__).parent / "python_client.py"


@pytest.mark.soak
@pytest.mark.parametrize(("mode", "version"), [("auto", "2026-07-28"), ("legacy", "2025-11-25")])
def test_the_python_client_works_with_and_without_a_handshake(
    daemon: RealDaemon, mode: str, version: str
) -> None:
    daemon.agent(
        "client",
        f"exec {sys.executable} -I /opt/client.py {mode}",
        tools="[use, fail, talk, long]",
        mounts=f"[{{source: {CLIENT}, target: /opt/client.py}}]",
    )
    daemon.start()
    daemon.set("client", TOKEN=TOKEN)
    done = daemon.run("client")
    assert done.returncode == 0, done.stderr
    saw = json.loads(done.stdout)
    assert saw["version"] == version
    assert_seen(saw)
    assert_recorded(daemon)
