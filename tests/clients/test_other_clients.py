"""Two more unmodified MCP clients, inside an agent's sandbox: they list and call everything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from expected_session import TOKEN
from real_daemon import RealDaemon

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
# The last version that runs by itself: later ones look for a file of the repository around it.
INSPECTOR = "/opt/client/node_modules/@modelcontextprotocol/inspector-cli/build/cli.js"


def test_the_inspector_lists_and_calls_everything(daemon: RealDaemon, node: str) -> None:
    inspect = f"{node} {INSPECTOR} --cli sandboxd-mcp -e SANDBOXD_SOCKET=$SANDBOXD_SOCKET --method"
    daemon.agent(
        "client",
        f"""
        set -e
        {inspect} tools/list
        printf '\\036'
        {inspect} tools/call --tool-name use --tool-arg word=grüße
        printf '\\036'
        {inspect} tools/call --tool-name fail
        printf '\\036'
        {inspect} tools/call --tool-name talk
        """,
        tools="[use, fail, talk]",
        mounts=f"[{{source: {HERE / 'node'}, target: /opt/client}}]",
    )
    daemon.start()
    daemon.set("client", TOKEN=TOKEN)
    done = daemon.run("client")
    assert done.returncode == 0, done.stderr
    listed, *results = [json.loads(part) for part in done.stdout.split("\x1e")]
    assert {tool["name"] for tool in listed["tools"]} == {"use", "fail", "talk"}
    used, failed, talked = [texts(result) for result in results]
    assert used == [f"grüße used {len(TOKEN)}\nit is [redacted:TOKEN]\n"]
    assert failed == ["out\n", "err\n", "fail ended with status 3"]
    assert results[1]["isError"] is True
    assert talked == ["one [redacted:TOKEN]\ntwo\n"]
    assert TOKEN not in done.stdout + str(daemon.audit())


def test_the_fastmcp_client_lists_and_calls_everything(daemon: RealDaemon, fastmcp: Path) -> None:
    daemon.agent(
        "client",
        f"exec {sys.executable} -I /opt/client.py",
        tools="[use, fail, talk]",
        mounts=f"[{{source: {HERE / 'fastmcp_client.py'}, target: /opt/client.py}}, "
        f"{{source: {fastmcp}, target: /opt/site}}]",
    )
    daemon.start()
    daemon.set("client", TOKEN=TOKEN)
    done = daemon.run("client")
    assert done.returncode == 0, done.stderr
    saw = json.loads(done.stdout)
    assert "TOKEN" not in saw["environment"]
    assert saw["tools"] == ["fail", "talk", "use"]
    assert saw["used"] == [f"grüße used {len(TOKEN)}\nit is [redacted:TOKEN]\n"]
    assert saw["failed"] == "out\n"  # its error holds the first block
    assert saw["progress"] == ["one [redacted:TOKEN]\n", "two\n"]
    assert TOKEN not in done.stdout + str(daemon.audit())


def texts(result: dict[str, Any]) -> list[str]:
    return [block["text"] for block in result["content"]]
