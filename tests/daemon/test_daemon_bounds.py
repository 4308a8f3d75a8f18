"""What a session does too much of is bounded, and the daemon and other sessions go on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from real_daemon import RealDaemon, directories, until
from test_daemon_calls import AGENT, calls, text

#: Makes all its calls at once, 32 on each of 32 connections, and counts what comes back. The
#: first line is printed when only calls that run or wait are left.
CROWD = """
import collections, json, os, select, socket, sys
count, left_over = int(sys.argv[1]), int(sys.argv[2])
seen, texts, pending = collections.Counter(), set(), {}
connections = []
for first in range(0, count, 32):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.environ["SANDBOXD_SOCKET"])
    about = {"name": "crowd", "version": "1"}
    lines = [
        {"id": 0, "method": "initialize", "params": {"protocolVersion": "2025-06-18",
            "capabilities": {}, "clientInfo": about}},
        {"method": "notifications/initialized"},
    ]
    for line in lines:
        sock.sendall(json.dumps({"jsonrpc": "2.0", **line}).encode() + b"\\n")
    file = sock.makefile("rb")
    file.readline()
    connections.append((sock, file, min(32, count - first)))
for number in range(32):
    for sock, file, share in connections:
        if number < share:
            params = {"name": "hold", "arguments": {}}
            line = {"jsonrpc": "2.0", "id": number + 1, "method": "tools/call", "params": params}
            sock.sendall(json.dumps(line).encode() + b"\\n")
buffers = {sock: b"" for sock, _, _ in connections}
told = False
while sum(seen.values()) < count:
    for sock in select.select(list(buffers), [], [])[0]:
        *whole, buffers[sock] = (buffers[sock] + sock.recv(65536)).split(b"\\n")
        for line in whole:
            result = json.loads(line)["result"]
            outcome = result["_meta"]["sandboxd/outcome"]
            seen[outcome] += 1
            if outcome == "busy":
                texts.add(result["content"][0]["text"])
    if not told and sum(seen.values()) == count - left_over:
        told = True
        print(json.dumps({"seen": seen, "texts": sorted(texts)}), flush=True)
print(json.dumps({"seen": seen}), flush=True)
"""

#: Each takes all it can get, says so in the workspace, and goes on for ever.
BOMBS = {
    "forks": """
while True:
    try:
        os.fork()
    except OSError:
        full()
""",
    "memory": """
blocks = []
while True:
    try:
        blocks.append(bytearray(1 << 20))
    except MemoryError:
        full()
""",
    "files": """
fd = os.open("/tmp/large", os.O_WRONLY | os.O_CREAT)
while True:
    try:
        os.write(fd, bytes(1 << 20))
    except OSError as failure:
        assert failure.errno == errno.ENOSPC
        full()
""",
    "inodes": """
for number in itertools.count():
    try:
        os.mknod(f"/tmp/{number}")
    except OSError as failure:
        assert failure.errno == errno.ENOSPC
        full()
""",
}
_BEFORE = """#!/usr/bin/env python3
import errno, itertools, os
def full():
    os.close(os.open("/workspace/full", os.O_WRONLY | os.O_CREAT))
"""
_INPUT = "input: {type: object, additionalProperties: false}\n"


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealDaemon]:
    """Agents ``caller`` and ``crowd``, and tools that take and take."""
    with directories() as made:
        made.python_agent("caller", AGENT, tools=f"[fine, {', '.join(BOMBS)}]")
        made.python_agent("crowd", CROWD, tools="[hold]")
        made.tool("fine", "#!/bin/sh\necho fine\n", _INPUT)
        made.tool(
            "hold",
            "#!/bin/sh\nuntil [ -e /workspace/go ]; do sleep 0.1; done\n",
            f"{_INPUT}workspace: rw\n",
        )
        for name, code in BOMBS.items():
            limits = "{memory: 96M, processes: 30, tmp_size: 4M}"
            made.tool(
                name,
                _BEFORE + code,
                f"{_INPUT}workspace: rw\ntimeout: 300s\nlimits: {limits}\n",
            )
        made.start()
        yield made


@contextmanager
def running(daemon: RealDaemon, agent: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """``sandboxctl run`` in the background; killed at the end, which ends its session."""
    command = [*(sys.executable, "-m", "sandboxd.cli", "--config", str(daemon.paths.config))]
    command += ["--state", str(daemon.paths.state), "--runtime", str(daemon.paths.runtime)]
    process = subprocess.Popen(
        [*command, "run", agent, "--", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        until(lambda: daemon.call("session.list")["sessions"] == [])


def works_for_others(daemon: RealDaemon) -> None:
    """Another session's call comes to its end, and so does an operator's question."""
    (fine,) = calls(daemon, ("fine", {}))
    assert text(fine) == "fine\n"
    assert len(daemon.call("session.list")["sessions"]) == 1


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_a_tool_leaves_everybody_else_alone(daemon: RealDaemon, bomb: str) -> None:
    full = daemon.paths.workspaces / "caller" / "full"
    with running(daemon, "caller", json.dumps([(bomb, {})])) as process:
        until(lambda: full.exists() or process.poll() is not None, told=lambda: bomb)
        assert process.poll() is None, process.stderr
        for _ in range(3):
            works_for_others(daemon)
        full.unlink()
        until(full.exists)  # it is at it still
    full.unlink()


def test_a_thousand_calls_at_once_queue_up_to_a_limit_and_no_other_session_waits(
    daemon: RealDaemon,
) -> None:
    go: Path = daemon.paths.workspaces / "crowd" / "go"
    most = 8 + 64  # running, and waiting: what one session may have
    with running(daemon, "crowd", "1000", str(most)) as process:
        assert process.stdout is not None
        told: dict[str, Any] = json.loads(process.stdout.readline())
        assert told["seen"] == {"busy": 1000 - most}
        for said in told["texts"]:
            assert "8 calls running, 64 waiting" in said
            assert "hint: wait for running calls to end, then call again" in said
        works_for_others(daemon)
        go.touch()
        assert json.loads(process.stdout.readline())["seen"] == {"busy": 1000 - most, "ok": most}
        assert process.wait(60) == 0
    assert daemon.call("audit.verify")["ok"]
