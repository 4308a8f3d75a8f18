"""The agent that calls: runs in a real agent sandbox, makes the calls it is told to, and reports.

One line of JSON on standard input is one order, one line on standard output the answer. Standard
library only, one thread, plain sockets: what is measured is the broker, as nearly as a client can.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from typing import Any

__all__ = ["main"]

_VERSION = "2025-06-18"


class _Connection:
    """One MCP connection to the session's broker, over which one call runs at a time."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(os.environ["SANDBOXD_SOCKET"])
        self._buffer = b""
        self._last = 0
        self.began = 0.0
        about = {"name": "bench", "version": "1"}
        self.send("initialize", protocolVersion=_VERSION, capabilities={}, clientInfo=about)
        self.line()
        self.sock.sendall(b'{"jsonrpc":"2.0","method":"notifications/initialized"}\n')

    def send(self, method: str, **params: Any) -> None:
        self._last += 1
        message = {"jsonrpc": "2.0", "id": self._last, "method": method, "params": params}
        line = json.dumps(message).encode() + b"\n"
        self.began = time.perf_counter()
        self.sock.sendall(line)

    def line(self) -> bytes:
        """The next whole line."""
        while b"\n" not in self._buffer:
            data = self.sock.recv(1 << 16)
            if not data:
                raise SystemExit("the broker closed the connection")
            self._buffer += data
        found, _, self._buffer = self._buffer.partition(b"\n")
        return found


def main() -> None:
    """Serve orders until standard input ends."""
    connections: list[_Connection] = []
    for text in sys.stdin:
        order = json.loads(text)
        while len(connections) < order["callers"]:
            connections.append(_Connection())
        answer = _carry_out(order, connections[: order["callers"]])
        print(json.dumps(answer), flush=True)


def _carry_out(order: dict[str, Any], connections: list[_Connection]) -> dict[str, Any]:
    """``calls`` calls by as many callers as there are connections: each asks again once answered.

    With ``ping`` nothing is called: what the line and the protocol cost alone.
    """
    seconds: list[float] = []
    replies: list[str] = []
    left = order["calls"]
    with select.epoll() as ready:
        by_fd = {connection.sock.fileno(): connection for connection in connections}
        for fd in by_fd:
            ready.register(fd, select.EPOLLIN)

        def ask(connection: _Connection) -> None:
            if order.get("ping"):
                connection.send("ping")
            else:
                connection.send("tools/call", name=order["tool"], arguments={})

        began = time.perf_counter()
        for connection in connections[:left]:
            ask(connection)
            left -= 1
        waiting = order["calls"] - left
        while waiting:
            for fd, _ in ready.poll():
                connection = by_fd[fd]
                reply = connection.line()
                seconds.append(time.perf_counter() - connection.began)
                if left:
                    ask(connection)
                    left -= 1
                else:
                    waiting -= 1
                wrong = b'"isError":true' in reply or b'"error"' in reply
                if wrong or order.get("replies") or order.get("holds", "").encode() not in reply:
                    replies.append(reply.decode())
        elapsed = time.perf_counter() - began
    return {"seconds": seconds, "elapsed": elapsed, "replies": replies[:4]}


if __name__ == "__main__":
    main()
