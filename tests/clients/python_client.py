"""An agent that uses the unmodified Python MCP SDK. Prints what it saw as one JSON object."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import trio
from mcp import StdioServerParameters
from mcp.client import Client
from mcp.shared.exceptions import MCPError


def text(result: Any) -> list[str]:
    return [block.text for block in result.content]


async def main() -> None:
    mode = sys.argv[1]
    environment = {"SANDBOXD_SOCKET": os.environ["SANDBOXD_SOCKET"]}
    bridge = StdioServerParameters(command="sandboxd-mcp", env=environment)
    saw: dict[str, Any] = {"environment": sorted(os.environ)}
    async with Client(bridge, mode=mode) as client:
        saw["version"] = client.session.protocol_version
        saw["tools"] = {
            tool.name: tool.annotations.title if tool.annotations else None
            for tool in (await client.list_tools()).tools
        }
        used = await client.call_tool("use", {"word": "grüße"})
        saw["used"] = [used.is_error, text(used)]
        failed = await client.call_tool("fail", {})
        saw["failed"] = [failed.is_error, text(failed)]
        refused = await client.call_tool("use", {"word": 5})
        saw["refused"] = [refused.is_error, text(refused)]
        try:
            await client.call_tool("nothing", {})
        except MCPError as error:
            saw["unknown"] = [error.code, error.message]

        steps: list[str | None] = []

        async def progress(done: float, total: float | None, message: str | None) -> None:
            steps.append(message)

        await client.call_tool("talk", {}, progress_callback=progress)
        saw["progress"] = steps
        with trio.move_on_after(1) as scope:
            await client.call_tool("long", {})
        saw["cancelled"] = scope.cancelled_caught
        again = await client.call_tool("use", {"word": "again"})
        saw["again"] = text(again)
    json.dump(saw, sys.stdout)


trio.run(main)
