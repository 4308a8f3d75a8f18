"""Accepting clients of one sandbox, so many at once and no more."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

import trio

__all__ = ["serve_each"]

_log = logging.getLogger(__name__)

#: What accept(2) answers while this machine or process has no room; the client waits meanwhile.
_NO_ROOM = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_PAUSE = 0.1


async def serve_each(
    listener: trio.SocketListener,
    handle: Callable[[trio.SocketStream], Awaitable[None]],
    most: int,
) -> NoReturn:
    """Run ``handle`` for each client, until cancelled; more than ``most`` wait to be accepted.

    The listener and each stream are closed. What ``handle`` raises ends that client alone.
    """
    places = trio.Semaphore(most)

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await handle(stream)
        except Exception as error:  # noqa: BLE001 - one client must not end the others
            # Only the class: an exception's text may quote what the client sent.
            _log.error("an egress connection failed: %s", type(error).__name__)
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)
            places.release()

    async with listener, trio.open_nursery() as nursery:
        while True:
            await places.acquire()
            try:
                stream = await listener.accept()
            except BaseException as failure:
                places.release()
                if not isinstance(failure, OSError) or failure.errno not in _NO_ROOM:
                    raise
                await trio.sleep(_PAUSE)
                continue
            nursery.start_soon(serve, stream)
    raise AssertionError("unreachable")
