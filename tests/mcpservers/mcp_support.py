"""A broker of real parts whose agent has an MCP server of the tests' own."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

sys.path.append(str(Path(__file__).parents[1] / "broker"))

from broker_parts import AGENT, Broker, StandIn

from sandboxd.broker.chosen import choose
from sandboxd.broker.result import CallResult
from sandboxd.policy.decide import launch_terms
from sandboxd.policy.definitions import Definition
from sandboxd.policy.mcpserver import Pin, with_pins

SERVER = Path(__file__).parent / "stdio_server.py"


class Servers:
    """A broker, the server ``kit`` in its configuration, and what was accepted of it."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.pins: dict[str, Pin] = {}

    def server(self, name: str = "kit", /, **manifest: Any) -> None:
        directory = self.broker.config_dir / "tools" / name
        directory.mkdir(exist_ok=True)
        shutil.copy(SERVER, directory / "server.py")
        keys: dict[str, Any] = {
            "version": 1,
            "kind": "mcp",
            "name": name,
            "description": "a server of the tests",
            "program": "server.py",
            "runtime": "python",
            "timeout": "20s",
            **manifest,
        }
        (directory / "tool.yaml").write_text(json.dumps(keys))
        if name not in self.broker.tools:
            self.broker.tools.append(name)
        self.broker._config = None

    def session(self, id: str = "s-0000000000000001") -> StandIn:
        session = self.broker.session(id)
        session.config = with_pins(session.config, self.pins)
        session.agent = session.config.agents[AGENT]
        return session

    async def probe(self, name: str = "kit") -> tuple[tuple[Definition, ...], tuple[str, ...]]:
        session = self.session("s-00000000000000ff")
        server = session.config.servers[name]
        terms = launch_terms(session.config, session.agent, server.launch)
        chosen, _, _ = choose(self.broker.vault, terms, session.snapshot)
        return await self.broker.calls.servers.probe(session, server, chosen)

    async def accept(self, name: str = "kit") -> Pin:
        definitions, _ = await self.probe(name)
        self.pins[name] = Pin(name, definitions, "tester", time.time())
        return self.pins[name]

    @asynccontextmanager
    async def attached(self, id: str = "s-0000000000000001") -> AsyncIterator[StandIn]:
        session = self.session(id)
        async with self.broker.calls.servers.attached(session):
            yield session

    async def call(
        self, tool: str, arguments: Any = None, *, session: StandIn | None = None, **more: Any
    ) -> CallResult:
        session = session or self.session()
        return await self.broker.calls.call(session, f"kit__{tool}", arguments or {}, **more)


def text_of(result: CallResult) -> str:
    assert result.content is not None, result
    return "".join(block.get("text", "") for block in result.content)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)
