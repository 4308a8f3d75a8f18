"""Bytes both ways between two streams until both sides are done, within bounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from sandboxd.egress.gate import Bounds, Connection

__all__ = ["pump"]

_CHUNK = 256 << 10


async def pump(
    inside: trio.SocketStream,
    connection: Connection,
    bounds: Bounds,
    check: Callable[[bytes], Awaitable[bytes | None]] | None = None,
) -> str:
    """Copy until both directions ended; what ended it: closed, reset, idle, volume, lifetime, or
    refused by ``check``.

    An end of one direction is passed on, so that protocols that half-close work (shutdown(2)).
    ``check`` sees what comes from inside and gives what may go on; None ends it.
    """
    outside = connection.stream
    ended = "closed"
    begun = trio.current_time()
    life = trio.CancelScope(deadline=begun + bounds.lifetime)
    still = trio.CancelScope(deadline=begun + bounds.idle)
    with life, still:
        async with trio.open_nursery() as nursery:

            def end(reason: str) -> None:
                nonlocal ended
                ended = reason
                nursery.cancel_scope.cancel()

            async def one_way(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                try:
                    while data := await source.receive_some(_CHUNK):
                        if source is inside:
                            if check is not None:
                                allowed = await check(bytes(data))
                                if allowed is None:
                                    return end("refused")
                                data = allowed
                            connection.sent += len(data)
                        else:
                            connection.received += len(data)
                        if connection.sent + connection.received > bounds.volume:
                            return end("volume")
                        await sink.send_all(data)
                        still.deadline = trio.current_time() + bounds.idle
                    await sink.send_eof()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    end("reset")
                return None

            nursery.start_soon(one_way, inside, outside)
            nursery.start_soon(one_way, outside, inside)
    if life.cancelled_caught:
        return "lifetime"
    return "idle" if still.cancelled_caught else ended
