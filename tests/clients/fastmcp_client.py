"""The unmodified fastmcp client, in an agent or over HTTP. Prints what it saw as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

sys.path.insert(0, os.environ.get("FASTMCP", "/opt/site"))

from fastmcp import Client
from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from fastmcp.exceptions import ToolError


async def main() -> None:
    saw: dict[str, Any] = {"environment": sorted(os.environ)}
    transport: Any
    if url := os.environ.get("MCP_URL"):
        bearer = {"Authorization": f"Bearer {os.environ['MCP_TOKEN']}"}
        transport = StreamableHttpTransport(url, headers=bearer)
    else:
        environment = {"SANDBOXD_SOCKET": os.environ["SANDBOXD_SOCKET"]}
        transport = StdioTransport("sandboxd-mcp", [], env=environment)
    steps: list[str | None] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        steps.append(message)

    async with Client(transport) as client:
        saw["tools"] = sorted(tool.name for tool in await client.list_tools())
        saw["used"] = [
            block.text for block in (await client.call_tool("use", {"word": "grüße"})).content
        ]
        try:
            await client.call_tool("fail", {})
        except ToolError as error:
            saw["failed"] = str(error)
        await client.call_tool("talk", {}, progress_handler=progress)
        saw["progress"] = steps
    print(json.dumps(saw))


asyncio.run(main())
