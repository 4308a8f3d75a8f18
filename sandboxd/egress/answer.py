"""An upstream's answer on its way back into a sandbox: searched for credentials as it streams."""

from __future__ import annotations

from collections.abc import Iterable

import h11
import httpcore2
import trio

from sandboxd.egress.forward import passed_on
from sandboxd.egress.wire import Client, Refused
from sandboxd.redact.stream import Redactor
from sandboxd.secret import Secret

__all__ = ["BROKEN", "send_back"]

#: What httpcore raises when an upstream fails; no text of theirs quotes a header.
BROKEN = (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError)

_NOT_BACK = frozenset((b"set-cookie", b"content-length", b"alt-svc", b"strict-transport-security"))
#: Seconds that held-back bytes may wait for more: a stream of events must flow.
_RELAX = 0.05


async def send_back(
    client: Client,
    response: httpcore2.Response,
    redactor: Redactor,
    values: Iterable[Secret],
    *,
    cookies: bool = False,
) -> None:
    """Pass an answer on. Raises Refused when it can't be searched, before any of it is sent.

    Raises BrokenResourceError when it breaks off: the client learns by the end of its connection
    that it isn't whole.
    """
    encoding = dict(response.headers).get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b""):
        raise Refused(502, "the upstream's answer is compressed, and can't be searched")
    dropped = _NOT_BACK - {b"set-cookie"} if cookies else _NOT_BACK
    headers = passed_on([(n.lower(), v) for n, v in response.headers])
    kept = [(n, _without(v, values)) for n, v in headers if n not in dropped]
    bodiless = response.status in (204, 304) or response.status < 200
    if not bodiless and not any(name == b"transfer-encoding" for name, _ in kept):
        kept.append((b"transfer-encoding", b"chunked"))
    await client.send(h11.Response(status_code=response.status, headers=kept))
    await _stream(client, response, redactor)
    await client.send(h11.EndOfMessage())


def _without(value: bytes, secrets: Iterable[Secret]) -> bytes:
    for secret in secrets:
        value = value.replace(secret.reveal(), b"[redacted]")
    return value


async def _stream(client: Client, response: httpcore2.Response, redactor: Redactor) -> None:
    """The body as it comes, what may be the beginning of a credential a moment later."""
    sender, receiver = trio.open_memory_channel[bytes](0)
    broken = False

    async def read() -> None:
        nonlocal broken
        async with sender:
            try:
                async for piece in response.aiter_stream():
                    await sender.send(piece)
            except BROKEN:
                broken = True

    async def send(data: bytes) -> None:
        if data:
            await client.send(h11.Data(data=data))

    try:
        async with trio.open_nursery() as nursery, receiver:
            nursery.start_soon(read)
            while True:
                piece = None
                with trio.move_on_after(_RELAX) as waited:
                    piece = await _next(receiver)
                if waited.cancelled_caught:
                    await send(redactor.relax())
                    piece = await _next(receiver)
                if piece is None:
                    break
                await send(redactor.feed(piece))
            await send(redactor.flush())
    except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        broken = True
    if broken:
        raise trio.BrokenResourceError("the answer broke off")


async def _next(receiver: trio.MemoryReceiveChannel[bytes]) -> bytes | None:
    """The next piece; None at the end."""
    try:
        return await receiver.receive()
    except trio.EndOfChannel:
        return None
