"""WebSocket through a gateway: a handshake like any request, then bytes both ways (RFC 6455).

What the upstream sends is searched for the credential. In a frame it can't be masked, for a frame
says how long it is; so the connection ends before any of it is passed on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import h11
import httpcore2
import trio

from sandboxd.egress.forward import Headers
from sandboxd.egress.search import BROKEN, search
from sandboxd.egress.wire import Client, Refused
from sandboxd.redact.stream import Redactor

__all__ = ["handshake", "switch", "wants_websocket"]

_CHUNK = 64 << 10
#: What a handshake needs; extensions would compress frames, which then can't be searched.
_KEPT = frozenset(
    (b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-protocol", b"origin")
)
_BACK = frozenset((b"sec-websocket-accept", b"sec-websocket-protocol", b"upgrade", b"connection"))


def wants_websocket(request: h11.Request) -> bool:
    """Whether the client wants to go on in WebSocket on this connection."""
    return any(n == b"upgrade" and v.lower() == b"websocket" for n, v in request.headers)


def handshake(headers: Headers, request: h11.Request) -> Headers:
    """The headers of a handshake: ``headers``, those of any request, and its own."""
    kept = [(n, v) for n, v in headers if not n.startswith(b"sec-websocket-") and n != b"origin"]
    own = [(n, v) for n, v in request.headers if n in _KEPT]
    return [*kept, (b"connection", b"Upgrade"), (b"upgrade", b"websocket"), *own]


async def switch(client: Client, response: httpcore2.Response, redactor: Redactor) -> None:
    """After the upstream's 101: pass it on, then bytes until either side ends.

    Raises Refused when the upstream wants extensions that nobody offered.
    """
    headers = [(n.lower(), v) for n, v in response.headers]
    if any(name == b"sec-websocket-extensions" for name, _ in headers):
        raise Refused(502, "the upstream wants extensions of WebSocket that nobody offered")
    kept = [(n, v) for n, v in headers if n in _BACK]
    await client.send(h11.InformationalResponse(status_code=101, headers=kept))
    outside: httpcore2.AsyncNetworkStream = response.extensions["network_stream"]

    async def out() -> None:
        data = client.rest()
        while data or (data := bytes(await client.stream.receive_some(_CHUNK))):
            await outside.write(data)
            data = b""

    async def pieces() -> AsyncIterator[bytes]:
        while data := await outside.read(_CHUNK):
            yield data

    async def give(data: bytes) -> None:
        if redactor.hits:
            raise trio.BrokenResourceError("the credential came back")
        await client.stream.send_all(data)

    async def until_its_end(way: int) -> None:
        try:
            await (out() if way == 0 else search(pieces(), redactor, give))
        except (trio.BrokenResourceError, trio.ClosedResourceError, *BROKEN):
            pass  # either way it is over
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for way in range(2):
            nursery.start_soon(until_its_end, way)
