"""The end of what rests on a key or a token: sessions, requests, pages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from sandboxd.access.leases import Leases
from sandboxd.access.roles import Principal

__all__ = ["Dependent", "Ending", "StopWhere"]


class Dependent(Protocol):
    """A session, as far as it rests on a key."""

    @property
    def id(self) -> str: ...
    @property
    def team(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def token(self) -> str: ...
    @property
    def subject(self) -> str: ...


#: Ends every session of which the first argument is true, giving the second as the reason.
StopWhere = Callable[[Callable[[Dependent], bool], str], Awaitable[Sequence[Dependent]]]


class Ending:
    """What ends is gone when these return. Who calls them has refused it first."""

    def __init__(self, stop: StopWhere) -> None:
        self._stop = stop
        self.leases = Leases()
        #: Told the id of each key that was deactivated or expired.
        self.listeners: list[Callable[[str], Awaitable[None]]] = []

    async def of_key(self, id: str, reason: str) -> list[str]:
        """End all that rests on a key; the ids of the ended sessions."""
        sessions = await self.where(lambda one: one.key == id, lambda one: one.key == id, reason)
        for told in self.listeners:
            await told(id)
        return sessions

    async def where(
        self,
        rests: Callable[[Dependent], bool],
        asks: Callable[[Principal], bool],
        reason: str,
    ) -> list[str]:
        """End these sessions and these principals' requests; the ids of the sessions."""
        ended = {one.id: None for one in await self._stop(rests, reason)}
        await self.leases.end(asks)
        # A request that could not be cancelled may have started one more before it left.
        ended |= {one.id: None for one in await self._stop(rests, reason)}
        return list(ended)
