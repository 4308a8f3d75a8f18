"""An upstream that keeps what it was asked, behind TLS."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import h11
import trio

#: The name in its certificate.
HOST = "api.model.test"


@dataclass
class Upstream:
    """What the upstream saw, and how it answers."""

    answer: Callable[[Any, h11.Connection], Awaitable[None]] | None = None
    requests: list[tuple[h11.Request, bytes]] = field(default_factory=list)
    connections: int = 0

    async def serve(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.connections += 1
        wire = h11.Connection(h11.SERVER)
        request, body = None, b""
        try:
            while True:
                event = wire.next_event()
                if event is h11.NEED_DATA:
                    wire.receive_data(await stream.receive_some())
                elif isinstance(event, h11.Request):
                    request, body = event, b""
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    assert request is not None
                    self.requests.append((request, body))
                    if self.answer is not None:
                        await self.answer(stream, wire)
                    else:
                        await say(stream, wire, 200, b"hello")
                    wire.start_next_cycle()
                else:
                    return
        except (trio.BrokenResourceError, h11.ProtocolError):
            return


async def say(
    stream: Any, wire: h11.Connection, status: int, *pieces: bytes, **headers: str
) -> None:
    """A whole answer, each piece in a message of its own."""
    named = [(n.replace("_", "-"), v) for n, v in headers.items()]
    if pieces:
        named.append(("transfer-encoding", "chunked"))
    await stream.send_all(wire.send(h11.Response(status_code=status, headers=named)))
    for piece in pieces:
        await stream.send_all(wire.send(h11.Data(data=piece)))
    await stream.send_all(wire.send(h11.EndOfMessage()))
