"""Bytes on their way into a sandbox, searched for credentials as they stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import httpcore2
import trio

from sandboxd.redact.stream import Redactor

__all__ = ["BROKEN", "search", "told"]

#: What httpcore raises when an upstream fails, or what goes to it is not HTTP.
BROKEN = (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError)

#: Seconds that held-back bytes may wait for more: a stream of events must flow.
_RELAX = 0.05


def told(failure: Exception) -> str:
    """What a client may be told of one of :data:`BROKEN`.

    The text of a ProtocolError is h11's, which quotes the header that it takes offence at: the one
    with the credential, or an upstream's that repeats it.
    """
    if isinstance(failure, httpcore2.ProtocolError):
        return "what was sent or came back is not as HTTP says"
    return str(failure)


async def search(
    pieces: AsyncIterator[bytes], redactor: Redactor, send: Callable[[bytes], Awaitable[None]]
) -> None:
    """Send ``pieces`` on as they come, what may be the beginning of a credential a moment later.

    Raises BrokenResourceError when either side breaks off.
    """
    sender, receiver = trio.open_memory_channel[bytes](0)
    broken = False

    async def read() -> None:
        nonlocal broken
        async with sender:
            try:
                async for piece in pieces:
                    await sender.send(piece)
            except BROKEN:
                broken = True

    async def give(data: bytes) -> None:
        if data:
            await send(data)

    try:
        async with trio.open_nursery() as nursery, receiver:
            nursery.start_soon(read)
            while True:
                piece = None
                with trio.move_on_after(_RELAX) as waited:
                    piece = await _next(receiver)
                if waited.cancelled_caught:
                    await give(redactor.relax())
                    piece = await _next(receiver)
                if piece is None:
                    break
                await give(redactor.feed(piece))
            await give(redactor.flush())
    except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        broken = True
    if broken:
        raise trio.BrokenResourceError("one side broke off")


async def _next(receiver: trio.MemoryReceiveChannel[bytes]) -> bytes | None:
    """The next piece; None at the end."""
    try:
        return await receiver.receive()
    except trio.EndOfChannel:
        return None
