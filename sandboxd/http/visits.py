"""Who uses an agent's tools over HTTP, from the first request to long after the last.

A *visit* is one API key or token at one agent, or at one live session of it. It stands where a
session stands for calls: it has an id in the records, its share of the slots, its bound on denials.
It ends when nobody has asked anything for a while, when the key or token does, or with the session
that it is at; calls that run then are cancelled, and their trees dead, before it is over.

What a call gets is what a session that started at this moment would get: the configuration in force
and the newest variables, but no workspace. A visit at a live session has that session's.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import attrs
import trio
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

from sandboxd.access.roles import Principal
from sandboxd.admin.params import thread
from sandboxd.admin.reach import no_agent
from sandboxd.admin.standing import Standing
from sandboxd.broker.calls import Session
from sandboxd.broker.mcp import tool_server
from sandboxd.errors import SandboxdError, Unavailable, where
from sandboxd.policy.model import Tool, Workspace
from sandboxd.running import Daemon

__all__ = ["MAX_BODY", "MAX_REQUESTS", "Visit", "Visits", "idle"]

#: Bytes of one message; as on the session socket.
MAX_BODY = 4 << 20
#: Requests that one visit may have open; as one connection of the session socket.
MAX_REQUESTS = 32
#: Visits at once, and of one API key with all of its tokens.
MAX_VISITS, MAX_OF_KEY = 512, 64
#: Handshakes (of protocols before 2026) that one visit keeps: clients make new ones and forget to
#: end them. And the seconds without a request after which they, and then the visit, are over.
MAX_HANDSHAKES, HANDSHAKE_IDLE, VISIT_IDLE = 32, 600.0, 660.0

#: Seconds that what was kept ready for a visit may take to end with it.
_ENDING = 5.0

_log = logging.getLogger(__name__)

# The SDK's own account of handshakes names their ids, which are their holders' alone.
logging.getLogger("mcp.server").setLevel(logging.WARNING)

_Key = tuple[str, str, str, str, str]


@dataclass(eq=False)
class Visit:
    """One visit. ``at`` is the live session's id, or empty."""

    principal: Principal
    agent: str
    at: str
    manager: StreamableHTTPSessionManager
    id: str = field(default_factory=lambda: "v-" + secrets.token_hex(8))
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    reason: str = "its key or token ended"
    open: set[trio.CancelScope] = field(default_factory=set)
    idle_since: float = field(default_factory=trio.current_time)
    #: Requests of handshake protocols that are open: by handshake and their own id.
    ids: set[tuple[str, int | str]] = field(default_factory=set)
    #: Handshakes, the one that was used last at the end.
    handshakes: OrderedDict[str, None] = field(default_factory=OrderedDict)
    closed: trio.Event = field(default_factory=trio.Event)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Around what one request does: the visit's end is its end, and waits for it.

        Raises Unavailable in the place of what was cancelled for that.
        """
        with trio.CancelScope() as scope:
            self.open.add(scope)
            if self.scope.cancel_called:
                scope.cancel()
            try:
                yield
            finally:
                self.open.discard(scope)
                self.idle_since = trio.current_time()
                self.closed.set()
        if scope.cancelled_caught:
            raise Unavailable(f"the request was ended: {self.reason}")

    def forgotten(self) -> str:
        """The handshake that is to make room for a new one, or "" while there is room.

        The one that was used least lately, of those with no open request.
        """
        if len(self.handshakes) < MAX_HANDSHAKES:
            return ""
        busy = {handshake for handshake, _ in self.ids}
        return next((one for one in self.handshakes if one not in busy), "")

    async def end_requests(self) -> None:
        """Cancel what is open, and wait for it."""
        for scope in self.open:
            scope.cancel()
        while self.open:
            self.closed = trio.Event()
            await self.closed.wait()


class Visits:
    """Every visit of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._visits: dict[_Key, Visit] = {}
        self._turn = trio.Lock()
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Visits can be made inside; leaving ends them all."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield
            finally:
                self._nursery = None
                for visit in self._visits.values():
                    visit.reason = "the daemon stopped"
                nursery.cancel_scope.cancel()

    async def enter(self, principal: Principal, agent: str, at: str) -> Visit:
        """The visit of this key or token there, begun if it isn't.

        Whether it may be there is the caller's to decide. Raises Unauthenticated when the
        credential ended meanwhile, Unavailable where there are too many.
        """
        key = _key(principal, agent, at)
        async with self._turn:
            visit = self._visits.get(key)
            if visit is None or visit.scope.cancel_called:
                if self._nursery is None:
                    raise Unavailable("the daemon is stopping and starts nothing any more")
                self._make_room(principal)
                visit = self._new(principal, agent, at)
                try:
                    await self._nursery.start(self._live, key, visit)
                except BaseExceptionGroup as group:
                    raise _single(group) from None
            return visit

    def _new(self, principal: Principal, agent: str, at: str) -> Visit:
        async def session() -> Session:
            return await self._session(visit)

        manager = StreamableHTTPSessionManager(
            tool_server(self._daemon.calls, agent, session, _lacking),
            session_idle_timeout=HANDSHAKE_IDLE,
            max_request_body_size=MAX_BODY,
            max_sessions=MAX_HANDSHAKES + MAX_REQUESTS,
        )
        visit = Visit(principal, agent, at, manager)
        return visit

    async def _session(self, visit: Visit) -> Session:
        """What the next call of a visit is made in."""
        daemon = self._daemon
        if visit.at:
            return daemon.sessions.get(visit.at)
        config = daemon.config
        agent = config.agents.get(visit.agent)
        if agent is None or not visit.principal.reaches(agent.team, agent.slug):
            raise no_agent(visit.agent)  # by a reload a moment ago
        snapshot = await thread(daemon.vault.of(agent.team).snapshot, agent.slug)
        # Without a session there are no files: whatever needs them is denied, and recorded so.
        nowhere = attrs.evolve(agent, workspace=Workspace(mode="none"))
        return Standing(nowhere, config, snapshot, None, id=visit.id)

    async def _live(
        self,
        key: _Key,
        visit: Visit,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Own one visit, from its first record to its last."""
        daemon, principal = self._daemon, visit.principal
        who = {
            "visit": visit.id,
            "agent": visit.agent,
            "team": principal.team,
            "session": visit.at or visit.id,
        }
        begun = False
        try:
            with visit.scope, daemon.access.held(principal):
                await daemon.audit.append(
                    "visit.began",
                    **who,
                    by=principal.name,
                    key=principal.key,
                    token=principal.token,
                    subject=principal.subject,
                )
                begun = True
                async with trio.open_nursery() as nursery, visit.manager.run():
                    self._visits[key] = visit
                    task_status.started()
                    if visit.at:
                        nursery.start_soon(self._end_with, visit)
                    await idle(visit)
                    visit.reason = "nobody asked anything for a while"
                    visit.scope.cancel()
        except SandboxdError as failure:
            if not begun:
                raise
            _log.info("a visit ended: %s", failure.message)
        except Exception as failure:  # noqa: BLE001  # one visit must not end the daemon
            _log.error("a visit ended: %s", where(failure))
        finally:
            visit.scope.cancel()
            with trio.move_on_after(_ENDING, shield=True):
                await visit.end_requests()
            if self._visits.get(key) is visit:
                del self._visits[key]
            if begun:
                await self._put_away(visit, who)

    async def _put_away(self, visit: Visit, who: dict[str, str | None]) -> None:
        with trio.move_on_after(_ENDING, shield=True):
            if not visit.at:
                await self._daemon.calls.end_session(visit.id)
                self._daemon.calls.forget(visit.id)
            try:
                await self._daemon.audit.append("visit.ended", **who, reason=visit.reason)
            except SandboxdError as failure:
                _log.error("a visit's end can't be recorded: %s", failure.message)

    async def _end_with(self, visit: Visit) -> None:
        session = next((one for one in self._daemon.sessions.live if one.id == visit.at), None)
        if session is not None:
            await session.ended.wait()
        visit.reason = "its session ended"
        visit.scope.cancel()

    def _make_room(self, principal: Principal) -> None:
        """End the visit that was left alone for longest where one more would be too many."""
        same = [v for v in self._visits.values() if v.principal.key == principal.key]
        for found, most in ((same, MAX_OF_KEY), (list(self._visits.values()), MAX_VISITS)):
            if len(found) < most:
                continue
            idle = [visit for visit in found if not visit.open]
            if not idle:
                raise Unavailable(
                    f"{most} visits are under way, which is the limit", hint="try again later"
                )
            oldest = min(idle, key=lambda visit: visit.idle_since)
            oldest.reason = "others needed its place"
            oldest.scope.cancel()


async def idle(visit: Visit) -> None:
    """Returns once no request was open for VISIT_IDLE seconds."""
    while True:
        left = visit.idle_since + VISIT_IDLE - trio.current_time()
        if visit.open:
            left = VISIT_IDLE
        elif left <= 0:
            return
        await trio.sleep(left)


def _lacking(session: Session, tool: Tool) -> str:
    if isinstance(session, Standing) and tool.workspace != "none":
        return "it needs a workspace: name a live session in the address, ?session=ID"
    return ""


def _key(principal: Principal, agent: str, at: str) -> _Key:
    return (principal.name, principal.key or "", principal.token or "", agent, at)


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one expected error inside a nursery's group, or the group itself."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
        found = found.exceptions[0]
    return found if isinstance(found, SandboxdError) else group
