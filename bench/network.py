"""A small request and a large download through a sandbox's proxy, beside the same without one.

One server, one client program. It runs on the host and connects by itself, and it runs in a session
and goes by way of the proxy; both are asked in turn, and say how long it took them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from bench import stage
from bench.measure import Variant, interleave, ratio, row

__all__ = ["DIRECT", "PROXIED", "SIZE", "measure"]

DIRECT, PROXIED = "direct", "through the proxy"
#: Bytes of a large download.
SIZE = 256 << 20

SERVER = """
import socket, threading
piece = memoryview(bytes(1 << 20))
def serve(client):
    with client, client.makefile("rb") as asked:
        for line in asked:
            left = int(line)
            while left:
                left -= client.send(piece[:min(left, len(piece))])
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
while True:
    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()
"""
#: For each size that it reads, a new connection and that many bytes; it says the seconds.
CLIENT = """
import os, socket, sys, time
where = ("127.0.0.1", int(sys.argv[1]))
proxy = os.environ.get("HTTPS_PROXY", "").removeprefix("http://")
buffer = bytearray(1 << 20)
for line in sys.stdin:
    began, left = time.perf_counter(), int(line)
    if proxy:
        host, _, port = proxy.rpartition(":")
        client = socket.create_connection((host, int(port)))
        target = b"%s:%d" % (where[0].encode(), where[1])
        client.sendall(b"CONNECT " + target + b" HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        head = b""
        while not head.endswith(b"\\r\\n\\r\\n"):
            head += client.recv(1)
        assert b" 200 " in head, head
    else:
        client = socket.create_connection(where)
    with client:
        client.sendall(line.encode())
        while left:
            left -= client.recv_into(buffer)
    print(time.perf_counter() - began, flush=True)
"""


async def measure(rounds: int) -> dict[str, Any]:
    """Both ways, interleaved: so many small requests, and a few downloads of :data:`SIZE`."""
    with ExitStack() as given:
        server = given.enter_context(_started([sys.executable, "-I", "-c", SERVER]))
        port = int(_said(server))
        direct = given.enter_context(
            _started([sys.executable, "-I", "-c", CLIENT, str(port)], env={})
        )
        on = given.enter_context(stage.open_stage(files=_agent(port)))
        started, fds = on.client.call_with_fds(
            "session.start", agent="fetcher", args=[], tty=False, attach=True
        )
        asks = given.enter_context(os.fdopen(fds[0], "w"))
        answers = given.enter_context(os.fdopen(fds[1]))
        given.callback(os.close, fds[2])
        given.callback(on.client.call, "session.stop", id=started["id"], grace=0)

        def ways(size: int) -> list[Variant]:
            async def alone() -> float:
                assert direct.stdin is not None
                print(size, file=direct.stdin, flush=True)
                return float(_said(direct))

            async def proxied() -> float:
                print(size, file=asks, flush=True)
                return float(answers.readline())

            return [
                Variant(DIRECT, alone, ours=False),
                Variant(PROXIED, proxied, ours=False),
            ]

        small, large = ways(1), ways(SIZE)
        await interleave(small, rounds)
        await interleave(large, max(1, rounds // 10))
    return {
        "small": [row(variant) for variant in small],
        "large": [row(variant) for variant in large],
        "size": SIZE,
        "latency": ratio(small[1].times, small[0].times),
        "throughput": ratio(large[0].times, large[1].times),
        "lacking": [],
    }


def _agent(port: int) -> dict[str, str]:
    quoted = json.dumps
    command = [sys.executable, "-I", "-c", CLIENT, str(port)]
    return {
        "agents/fetcher.yaml": f"""\
version: 1
description: downloads through the proxy
command: {quoted(command)}
policy: fetchers
egress:
  allow:
    - host: 127.0.0.1
      ports: [{port}]
""",
        "policies/fetchers.yaml": f"""\
version: 1
description: what the fetcher reaches at most
extends: default
egress:
  - host: 127.0.0.1
    ports: [{port}]
""",
    }


@contextmanager
def _started(
    command: list[str], env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()
