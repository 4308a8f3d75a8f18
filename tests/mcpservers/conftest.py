"""A broker of real parts whose agent has an MCP server of the tests' own."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from mcp_support import Broker, Servers

from sandboxd.isolation.client import open_launcher


@pytest.fixture
async def servers(
    tmp_path: Path, start_launcher: Callable[[str], socket.socket]
) -> AsyncIterator[Servers]:
    async with open_launcher(start_launcher("root")) as launcher:
        broker = Broker(tmp_path, launcher, None)
        try:
            yield Servers(broker)
        finally:
            broker.close()
