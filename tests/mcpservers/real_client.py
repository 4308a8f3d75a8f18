"""An agent that uses the unmodified Python MCP SDK: makes the calls of a JSON list, prints what
it saw as one JSON object."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import trio
from mcp import StdioServerParameters
from mcp.client import Client


async def main() -> None:
    environment = {"SANDBOXD_SOCKET": os.environ["SANDBOXD_SOCKET"]}
    bridge = StdioServerParameters(command="sandboxd-mcp", env=environment)
    saw: dict[str, Any] = {"environment": dict(os.environ), "calls": []}
    async with Client(bridge) as client:
        saw["tools"] = [tool.name for tool in (await client.list_tools()).tools]
        for name, arguments in json.loads(sys.argv[1]):
            steps: list[float] = []

            async def progress(done: float, total: float | None, message: str | None) -> None:
                steps.append(done)  # noqa: B023 - used up before the next one is made

            result = await client.call_tool(name, arguments, progress_callback=progress)
            saw["calls"].append(
                {
                    "error": result.is_error,
                    "content": [b.model_dump(mode="json", by_alias=True) for b in result.content],
                    "structured": result.structured_content,
                    "progress": steps,
                }
            )
    json.dump(saw, sys.stdout)


trio.run(main)
