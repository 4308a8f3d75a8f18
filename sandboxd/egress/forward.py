"""One plain HTTP request to the host that it names, and the response back, both as streams.

What concerns one connection only is not passed on (RFC 9110, 7.6.1), and each message is written
anew by h11: what two servers could read as two different requests never leaves in that form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import h11
import trio

from sandboxd.egress.gate import Bounds, Connection
from sandboxd.egress.wire import MAX_HEAD, Client, Refused

__all__ = ["forward", "headers_for", "in_a_header", "passed_on"]

Headers = list[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    (
        b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"upgrade",
        b"transfer-encoding", b"proxy-authorization", b"proxy-authenticate",
        b"proxy-authentication-info", b"expect",
    )
)  # fmt: skip

#: What a header's value may be (RFC 9110, 5.5): no blank at either end, and no control character.
_VALUE = re.compile(rb"[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?")


def in_a_header(value: bytes) -> bytes:
    """``value``, which holds a credential. Raises Refused, without it, when it can't be there."""
    if not _VALUE.fullmatch(value):
        raise Refused(
            502,
            "the credential can't stand in a header: it has more than one line, a control "
            "character or a blank at an end",
            "the operator sets it anew, without what came along in copying it",
        )
    return value


def headers_for(request: h11.Request, authority: str) -> Headers:
    """The headers to send on. Raises Refused when Host names another host than the address."""
    hosts = [value for name, value in request.headers if name == b"host"]
    if len(hosts) > 1 or (hosts and hosts[0].decode("latin-1").lower() != authority.lower()):
        raise Refused(400, "the Host header names another host than the address")
    kept = passed_on(request.headers)
    return [(b"host", authority.encode("latin-1")), *(h for h in kept if h[0] != b"host")]


def passed_on(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Without the headers that concern one connection, or that Connection names."""
    named = {
        word.strip().lower()
        for name, value in headers
        if name == b"connection"
        for word in value.split(b",")
    }
    kept = [(n, v) for n, v in headers if n not in _HOP_BY_HOP and n not in named]
    if any(name == b"transfer-encoding" for name, _ in headers):
        # Both lengths at once is how requests are smuggled; the encoding is what counts.
        kept = [(n, v) for n, v in kept if n != b"content-length"]
        kept.append((b"transfer-encoding", b"chunked"))
    return kept


async def forward(
    client: Client,
    connection: Connection,
    bounds: Bounds,
    method: str,
    path: str,
    headers: Headers,
) -> str:
    """Send the request, pass the response on; how it ended, for the record."""
    wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    outcome = "lifetime"

    async def send(event: h11.Event) -> None:
        data = wire.send(event)
        if data:
            connection.sent += len(data)
            await connection.stream.send_all(data)

    async def upload() -> None:
        while (piece := await client.body()) is not None:
            await send(h11.Data(data=piece))
        await send(h11.EndOfMessage())

    async def download() -> str:
        while True:
            event = wire.next_event()
            if event is h11.NEED_DATA:
                with trio.fail_after(bounds.idle):
                    data = await connection.stream.receive_some(64 << 10)
                connection.received += len(data)
                if connection.sent + connection.received > bounds.volume:
                    return "volume"
                wire.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                continue
            elif isinstance(event, h11.Response):
                await client.send(
                    h11.Response(
                        status_code=event.status_code,
                        headers=passed_on(event.headers),
                        reason=event.reason,
                    )
                )
            elif isinstance(event, h11.Data):
                await client.send(h11.Data(data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                await client.send(h11.EndOfMessage())
                return "closed"
            else:
                return "reset"

    request = h11.Request(method=method, target=path, headers=[*headers, (b"connection", b"close")])
    refused: list[Refused] = []
    with trio.move_on_after(bounds.lifetime):
        try:
            await send(request)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(upload)
                outcome = await download()
                nursery.cancel_scope.cancel()
        except* (h11.ProtocolError, trio.BrokenResourceError):
            outcome = "reset"
        except* trio.TooSlowError:
            outcome = "idle"
        except* Refused as group:  # the client's body is not what its head said
            outcome = "refused"
            refused += [one for one in group.exceptions if isinstance(one, Refused)]
    if refused:
        await client.answer(refused[0].status, refused[0].message, refused[0].hint)
    elif outcome != "closed":
        await client.answer(502, f"{connection.destination} did not answer as HTTP says")
    return outcome
