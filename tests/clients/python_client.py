"""The unmodified Python MCP SDK, in an agent or over HTTP. Prints what it saw as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import httpx2
import trio
from mcp import StdioServerParameters
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError


def text(result: Any) -> list[str]:
    return [block.text for block in result.content]


async def server(opened: contextlib.AsyncExitStack) -> Any:
    """The bridge to the session's socket, or where it is told to go over HTTP."""
    url = os.environ.pop("MCP_URL", "")
    if url:
        bearer = {"Authorization": f"Bearer {os.environ.pop('MCP_TOKEN')}"}
        http = await opened.enter_async_context(httpx2.AsyncClient(headers=bearer, timeout=60))
        return streamable_http_client(url, http_client=http)
    environment = {"SANDBOXD_SOCKET": os.environ["SANDBOXD_SOCKET"]}
    return StdioServerParameters(command="sandboxd-mcp", env=environment)


async def main() -> None:
    mode = sys.argv[1]
    saw: dict[str, Any] = {"environment": sorted(os.environ)}
    async with contextlib.AsyncExitStack() as opened:
        client = await opened.enter_async_context(Client(await server(opened), mode=mode))
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
