"""One tool call through a daemon's admin socket. Standard library only: sandboxctl uses it."""

from __future__ import annotations

import base64
from typing import Any

from sandboxd.admin.client import Client

__all__ = ["run_tool"]


def run_tool(client: Client, **params: Any) -> tuple[bytes, bytes, dict[str, Any]]:
    """Call ``tools.run``: standard output, standard error, and how it ended."""
    kept = {"stdout": bytearray(), "stderr": bytearray()}
    ended: dict[str, Any] = {}
    for item in client.stream("tools.run", **params):
        if "ended" in item:
            ended = item["ended"]
        else:
            kept[item["stream"]] += base64.b64decode(item["data"])
    return bytes(kept["stdout"]), bytes(kept["stderr"]), ended
