"""The smallest MCP client: newline-delimited JSON-RPC through the bridge ``sandboxd-mcp``."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from typing import Any

__all__ = ["Client"]

_VERSION = "2025-06-18"


class Client:
    """One connection, made by starting the bridge with ``environment`` added to the agent's.

    An answer may take ``patience`` seconds.
    """

    def __init__(self, environment: dict[str, str], patience: float = 60.0) -> None:
        self._patience = patience
        self._bridge = subprocess.Popen(
            ["sandboxd-mcp"],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self._bridge.pid
        self._buffer = b""
        self._last_id = 0
        #: Every byte that came back, to search.
        self.received: list[bytes] = []
        self.request(
            "initialize",
            protocolVersion=_VERSION,
            capabilities={},
            clientInfo={"name": "hostile-agent", "version": "1"},
        )
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def request(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask, and wait for the answer: the whole message, a result or an error."""
        return self.wait(self.submit(method, **params))

    def submit(self, method: str, **params: Any) -> int:
        """Ask without waiting; :meth:`wait` takes the number."""
        self._last_id += 1
        self.send({"jsonrpc": "2.0", "id": self._last_id, "method": method, "params": params})
        return self._last_id

    def call(self, tool: str, arguments: Any, **more: Any) -> dict[str, Any]:
        """``tools/call``, with anything else in its parameters."""
        return self.request("tools/call", name=tool, arguments=arguments, **more)

    def send(self, message: dict[str, Any]) -> None:
        self.send_raw(json.dumps(message).encode())

    def send_raw(self, line: bytes) -> None:
        assert self._bridge.stdin is not None
        self._bridge.stdin.write(line + b"\n")
        self._bridge.stdin.flush()

    def wait(self, id: int | None) -> dict[str, Any]:
        """The message with this id. TimeoutError or ConnectionError when it doesn't come."""
        deadline = time.monotonic() + self._patience
        while True:
            message = self._line(deadline)
            if "method" not in message and message.get("id") == id:
                return message

    def close(self) -> None:
        self._bridge.kill()
        self._bridge.communicate()

    def _line(self, deadline: float) -> dict[str, Any]:
        assert self._bridge.stdout is not None
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._bridge.stdout], [], [], left)[0]:
                raise TimeoutError("the broker did not answer")
            data = os.read(self._bridge.stdout.fileno(), 1 << 16)
            if not data:
                raise ConnectionError("the broker closed the connection")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        self.received.append(line)
        message: dict[str, Any] = json.loads(line)
        return message


def failed(message: dict[str, Any]) -> bool:
    """Whether the call was refused or the tool failed."""
    return "error" in message or bool(message["result"].get("isError"))
