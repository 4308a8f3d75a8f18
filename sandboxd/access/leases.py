"""Requests that are being served, each for as long as what its caller showed holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import trio

from sandboxd.access.roles import Principal

__all__ = ["Leases"]

#: Seconds that what was cancelled may take to be gone.
LEAVING = 10.0


@dataclass(eq=False)
class _Lease:
    principal: Principal
    scope: trio.CancelScope
    outer: _Lease | None


#: What the running task serves, and through it who asks: they are not cancelled by themselves.
_serving: ContextVar[_Lease | None] = ContextVar("sandboxd_serving", default=None)


class Leases:
    """All requests that rest on a key."""

    def __init__(self) -> None:
        self._held: set[_Lease] = set()
        self._left = trio.Event()

    @contextmanager
    def hold(self, principal: Principal, seconds: float | None) -> Iterator[trio.CancelScope]:
        """A cancel scope around what is served, which ends after ``seconds`` or by :meth:`end`."""
        with trio.CancelScope() as scope:
            if seconds is not None:
                scope.deadline = trio.current_time() + seconds
            lease = _Lease(principal, scope, _serving.get())
            token = _serving.set(lease)
            self._held.add(lease)
            try:
                yield scope
            finally:
                self._held.discard(lease)
                self._left.set()
                with contextlib.suppress(ValueError):  # it is left in another context
                    _serving.reset(token)

    async def end(self, rests: Callable[[Principal], bool]) -> int:
        """Cancel what is served to these principals and wait until it is gone; how many it were.

        Not the request that this runs in: its caller is to get an answer.
        """
        own, lease = set(), _serving.get()
        while lease is not None:
            own.add(lease)
            lease = lease.outer
        ending = {one for one in self._held - own if rests(one.principal)}
        for one in ending:
            one.scope.cancel()
        with trio.move_on_after(LEAVING):
            while ending & self._held:
                self._left = trio.Event()
                await self._left.wait()
        return len(ending)
