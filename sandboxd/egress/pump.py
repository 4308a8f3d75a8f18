"""Bytes both ways between two streams until both sides are done, within bounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from sandboxd.egress.gate import Bounds, Connection
from sandboxd.egress.splice import Splice

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

            def moved(sent: int, received: int) -> bool:
                """Count; whether that was within bounds."""
                connection.sent += sent
                connection.received += received
                still.deadline = trio.current_time() + bounds.idle
                if connection.sent + connection.received <= bounds.volume:
                    return True
                end("volume")
                return False

            async def out() -> None:
                while data := await inside.receive_some(_CHUNK):
                    allowed = data if check is None else await check(bytes(data))
                    if allowed is None:
                        return end("refused")
                    if not moved(len(allowed), 0):
                        return None
                    await outside.send_all(allowed)
                return await outside.send_eof()

            async def back() -> None:
                with Splice(outside.socket.fileno(), inside.socket.fileno()) as splice:
                    while size := await splice.move():
                        if not moved(0, size):
                            return None
                return await inside.send_eof()

            async def one(way: Callable[[], Awaitable[None]]) -> None:
                try:
                    await way()
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                    end("reset")

            nursery.start_soon(one, out)
            nursery.start_soon(one, back)
    if life.cancelled_caught:
        return "lifetime"
    return "idle" if still.cancelled_caught else ended
