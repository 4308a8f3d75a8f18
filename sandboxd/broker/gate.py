"""How many tool calls run at once: bounds for the host, each session and tool, and a fair queue."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from sandboxd.errors import Unavailable
from sandboxd.policy.model import Tool

__all__ = ["Bounds", "Busy", "Gate", "Share"]


@dataclass(frozen=True)
class Bounds:
    """How many calls run and wait, and for how many seconds one waits at most."""

    total: int = 16
    per_session: int = 8
    queue: int = 64
    patience: float = 60.0


class Busy(Unavailable):
    """Too many calls are running and waiting already."""

    code = "busy"


@dataclass(frozen=True)
class Share:
    """What one tool's calls may take of the slots: in all sessions together, and in each.

    None: no bound of its own.
    """

    tool: str
    total: int | None = None
    per_session: int | None = None

    @classmethod
    def of(cls, tool: Tool) -> Share:
        return cls(tool.name, tool.concurrency.total, tool.concurrency.per_session)


@dataclass(eq=False)
class _Waiter:
    share: Share
    granted: trio.Event = field(default_factory=trio.Event)


@dataclass
class _Queue:
    running: Counter[str] = field(default_factory=Counter)  # by tool
    waiting: deque[_Waiter] = field(default_factory=deque)


class Gate:
    """Slots for calls. Within a session first come is first served; sessions take turns.

    ``total`` and ``per_session`` calls run at once, ``queue`` more may wait in each session, each
    for at most ``patience`` seconds. A call that waits for its own tool holds no slot, and lets
    calls of other tools behind it pass.
    """

    def __init__(self, *, total: int, per_session: int, queue: int, patience: float) -> None:
        self.total, self.per_session = total, per_session
        self.queue, self.patience = queue, patience
        self.running = 0
        self._tools: Counter[str] = Counter()  # running calls
        #: Sessions with calls; the next to be served first.
        self._sessions: OrderedDict[str, _Queue] = OrderedDict()

    @asynccontextmanager
    async def slot(self, session: str, share: Share | None = None) -> AsyncIterator[None]:
        """A slot for the length of the block. Raises :class:`Busy`, at once or after patience."""
        share = share or Share("")
        await self._acquire(session, share)
        try:
            yield
        finally:
            self._release(session, share.tool)

    async def _acquire(self, session: str, share: Share) -> None:
        queue = self._sessions.setdefault(session, _Queue())
        if len(queue.waiting) >= self.queue:
            running = queue.running.total()
            raise _busy(f"this session has {running} calls running, {self.queue} waiting")
        waiter = _Waiter(share)
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
            why = self._why(queue, share)
            self._abandon(session, queue, waiter)
            raise _busy(f"no slot became free in {self.patience:g} s{why}")

    def _abandon(self, session: str, queue: _Queue, waiter: _Waiter) -> None:
        if waiter.granted.is_set():  # granted while it was being cancelled: pass it on
            self._release(session, waiter.share.tool)
        else:
            queue.waiting.remove(waiter)
            self._forget(session)

    def _release(self, session: str, tool: str) -> None:
        self.running -= 1
        for running in (self._tools, self._sessions[session].running):
            running[tool] -= 1
            if not running[tool]:
                del running[tool]
        self._forget(session)
        self._serve()

    def _serve(self) -> None:
        """Give free slots to the sessions in turn."""
        while self.running < self.total:
            session, waiter = next(self._ready(), ("", None))
            if waiter is None:
                return
            queue = self._sessions[session]
            self.running += 1
            self._tools[waiter.share.tool] += 1
            queue.running[waiter.share.tool] += 1
            queue.waiting.remove(waiter)
            waiter.granted.set()
            self._sessions.move_to_end(session)

    def _ready(self) -> Iterator[tuple[str, _Waiter]]:
        """Of each session the first call that could run now."""
        for session, queue in self._sessions.items():
            if queue.running.total() < self.per_session:
                for waiter in queue.waiting:
                    if self._fits(queue, waiter.share):
                        yield session, waiter
                        break

    def _fits(self, queue: _Queue, share: Share) -> bool:
        tool = share.tool
        return (share.total is None or self._tools[tool] < share.total) and (
            share.per_session is None or queue.running[tool] < share.per_session
        )

    def _why(self, queue: _Queue, share: Share) -> str:
        if self._fits(queue, share):
            return ""
        if share.per_session is not None and queue.running[share.tool] >= share.per_session:
            return f": {share.tool} runs {share.per_session} at a time in one session"
        return f": {share.tool} runs {share.total} at a time"

    def _forget(self, session: str) -> None:
        queue = self._sessions[session]
        if not queue.running and not queue.waiting:
            del self._sessions[session]


def _busy(message: str) -> Busy:
    return Busy(message, hint="wait for running calls to end, then call again")
