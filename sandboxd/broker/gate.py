"""How many tool calls run at once: a bound for the host, one for each session, and a fair queue."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from sandboxd.errors import Unavailable

__all__ = ["Busy", "Gate"]


class Busy(Unavailable):
    """Too many calls are running and waiting already."""

    code = "busy"


@dataclass(eq=False)
class _Waiter:
    granted: trio.Event = field(default_factory=trio.Event)


@dataclass
class _Queue:
    running: int = 0
    waiting: deque[_Waiter] = field(default_factory=deque)


class Gate:
    """Slots for calls. Within a session first come is first served; sessions take turns.

    ``total`` and ``per_session`` calls run at once, ``queue`` more may wait in each session, each
    for at most ``patience`` seconds.
    """

    def __init__(self, *, total: int, per_session: int, queue: int, patience: float) -> None:
        self.total, self.per_session = total, per_session
        self.queue, self.patience = queue, patience
        self.running = 0
        #: Sessions with calls; the next to be served first.
        self._sessions: OrderedDict[str, _Queue] = OrderedDict()

    @asynccontextmanager
    async def slot(self, session: str) -> AsyncIterator[None]:
        """A slot for the length of the block. Raises :class:`Busy`, at once or after patience."""
        await self._acquire(session)
        try:
            yield
        finally:
            self._release(session)

    async def _acquire(self, session: str) -> None:
        queue = self._sessions.setdefault(session, _Queue())
        if len(queue.waiting) >= self.queue:
            raise _busy(f"this session has {queue.running} calls running, {self.queue} waiting")
        waiter = _Waiter()
        queue.waiting.append(waiter)
        self._serve()
        if waiter.granted.is_set():
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        try:
            with trio.move_on_after(self.patience):
                await waiter.granted.wait()
                return
        except BaseException:
            self._abandon(session, queue, waiter)
            raise
        if not waiter.granted.is_set():
            self._abandon(session, queue, waiter)
            raise _busy(f"no slot became free in {self.patience:g} s")

    def _abandon(self, session: str, queue: _Queue, waiter: _Waiter) -> None:
        if waiter.granted.is_set():  # granted while it was being cancelled: pass it on
            self._release(session)
        else:
            queue.waiting.remove(waiter)
            self._forget(session)

    def _release(self, session: str) -> None:
        self.running -= 1
        self._sessions[session].running -= 1
        self._forget(session)
        self._serve()

    def _serve(self) -> None:
        """Give free slots to the sessions in turn."""
        while self.running < self.total:
            ready = (
                session
                for session, queue in self._sessions.items()
                if queue.waiting and queue.running < self.per_session
            )
            session = next(ready, None)
            if session is None:
                return
            queue = self._sessions[session]
            self.running += 1
            queue.running += 1
            queue.waiting.popleft().granted.set()
            self._sessions.move_to_end(session)

    def _forget(self, session: str) -> None:
        queue = self._sessions[session]
        if not queue.running and not queue.waiting:
            del self._sessions[session]


def _busy(message: str) -> Busy:
    return Busy(message, hint="wait for running calls to end, then call again")
