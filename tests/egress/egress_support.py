"""A proxy on a real socket with servers behind it, all on loopback, for tests of the egress room.

The servers' addresses are loopback ones, so the rules of these tests name them; that an address
which no rule names is refused is a test of its own.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from sandboxd.egress.dial import Dialer
from sandboxd.egress.gate import Bounds, Gate
from sandboxd.egress.proxy import serve_proxy
from sandboxd.policy.destinations import (
    Address,
    AddressRange,
    DestinationRule,
    HostPattern,
    Port,
)

LOOPBACK = (AddressRange("127.0.0.0/8"),)

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@dataclass
class Records:
    """What was recorded, in order; ``fail`` makes the log unwritable."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    fail: Exception | None = None

    async def __call__(self, event: str, **fields: Any) -> None:
        if self.fail is not None:
            raise self.fail
        self.rows.append({"event": event, **fields})

    def of(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == event]


class Names:
    """The broker's resolver of a test: names to addresses, and how often each was asked."""

    def __init__(self, **names: str | Sequence[str]) -> None:
        self.table = {
            name.replace("_", "."): [value] if isinstance(value, str) else list(value)
            for name, value in names.items()
        }
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[Address]:
        self.asked.append(host)
        await trio.lowlevel.checkpoint()
        return [ipaddress.ip_address(text) for text in self.table[host]]


def rule(host: str, *ports: int, **more: Any) -> DestinationRule:
    more.setdefault("addresses", LOOPBACK)
    named = tuple(map(Port, ports))
    return DestinationRule(HostPattern(host), ports=named, source="agents/crawler.yaml:9", **more)


@asynccontextmanager
async def server(handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A TCP server; yields its port."""
    async with trio.open_nursery() as nursery:

        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await handler(stream)

        listeners = await trio.open_tcp_listeners(0, host=host)
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@dataclass
class Proxy:
    """A proxy that listens on ``port``, its records and its resolver."""

    port: int
    records: Records
    names: Names
    gate: Gate
    clients: list[trio.SocketStream] = field(default_factory=list)

    async def connect(self) -> trio.SocketStream:
        """A client, closed with the proxy if not before."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        self.clients.append(stream)
        return stream

    async def ask(self, text: str | bytes) -> bytes:
        """Send raw bytes and read all that comes until the proxy closes."""
        async with await self.connect() as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(text.encode() if isinstance(text, str) else text)
            return await all_of(stream)

    async def tunnel(self, target: str) -> tuple[trio.SocketStream, bytes]:
        """CONNECT; the open stream and the head of the answer."""
        stream = await self.connect()
        await stream.send_all(connect_to(target))
        return stream, await until(stream, b"\r\n\r\n")


@asynccontextmanager
async def proxy(
    *lists: Sequence[DestinationRule],
    names: Names | None = None,
    bounds: Bounds | None = None,
    records: Records | None = None,
) -> AsyncIterator[Proxy]:
    names, records = names or Names(), records or Records()
    gate = Gate(
        lists=lists,
        who={"session": "s-1", "agent": "crawler"},
        record=records,
        dialer=Dialer(names),
        explain="sandboxctl policy egress crawler",
        bounds=bounds or Bounds(),
    )
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(serve_proxy, listener, gate)
        one = Proxy(listener.socket.getsockname()[1], records, names, gate)
        yield one
        for client in one.clients:
            await client.aclose()
        nursery.cancel_scope.cancel()


def connect_to(target: str) -> bytes:
    """A CONNECT request."""
    return f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode("latin-1")


async def all_of(stream: trio.SocketStream) -> bytes:
    data = b""
    with contextlib.suppress(trio.BrokenResourceError):
        while chunk := await stream.receive_some():
            data += chunk
    return data


async def until(stream: trio.SocketStream, end: bytes) -> bytes:
    data = b""
    while end not in data:
        chunk = await stream.receive_some()
        if not chunk:
            break
        data += chunk
    return data


async def echo(stream: trio.SocketStream) -> None:
    """Sends back what comes, until the other side is done."""
    async for chunk in stream:
        await stream.send_all(chunk)
