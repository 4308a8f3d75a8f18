"""A thread of one's own for blocking work that is short and frequent.

A pool's thread is reached through a limiter, a context and a callback in the event loop, which for
the shortest system calls costs more than they do. Here an order goes through a queue, and its end
makes a descriptor readable (eventfd(2)).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import trio

__all__ = ["Worker"]

Action = Callable[[], None]


class Worker:
    """Does one thing at a time. Used from one event loop, or where none runs."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._orders: SimpleQueue[tuple[Action, Action] | None] = SimpleQueue()
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self.busy = False

    def start(self, action: Action, after: Action) -> None:
        """Begin it; not while :attr:`busy`. ``after`` follows once its end was told.

        Neither may raise: nobody would hear of it.
        """
        assert not self.busy
        self.busy = True
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._orders, self._ended), name=self._name, daemon=True
            )
            self._thread.start()
        self._orders.put((action, after))

    async def wait(self) -> None:
        """Return once the action has ended. One task at a time."""
        while self.busy:
            await trio.lowlevel.wait_readable(self._ended)
            self._collect()

    def close(self) -> None:
        """Let it finish, and end the thread. Idempotent; nothing can be started any more."""
        if self._ended < 0:
            return
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join()
        self._collect()
        os.close(self._ended)
        self._ended = -1

    def _collect(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._ended)
            self.busy = False


def _work(orders: SimpleQueue[tuple[Action, Action] | None], ended: int) -> None:
    while (order := orders.get()) is not None:
        action, after = order
        try:
            action()
        finally:
            os.eventfd_write(ended, 1)
        after()
