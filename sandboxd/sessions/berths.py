"""Where sessions take place: id, uid, directory, socket and sandbox; one kept ready per agent.

To build a sandbox takes longer than all else of a session's start. So when an agent's session has
started, the like of it is prepared for the agent's next: a sandbox of its own, built and confined
to the last step, in which nothing ever ran and no one ever was. It has an id, a uid and a socket of
its own from the beginning, is used by one session or by none, and is taken only where it is what
would be built now: by the same spec, from the same files and directories.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from sandboxd.errors import Conflict, KernelError, SandboxdError, Unavailable
from sandboxd.isolation.client import Launcher, Process
from sandboxd.isolation.reuse import spare_key
from sandboxd.isolation.uids import UidPool
from sandboxd.isolation.wire import LaunchSpec
from sandboxd.names import new_session_id
from sandboxd.sessions.session import Session
from sandboxd.sessions.spec import agent_spec

__all__ = ["Berth", "Berths", "Bind", "make_directory"]

#: Agents that have one ready, the most recently started ones; and seconds until it is given up.
MOST_READY = 4
READY_LIMIT = 300.0
#: Seconds in which an agent begins undisturbed, before its next one's sandbox is built.
_PAUSE = 0.004

#: Makes the listening socket of a session at this path.
Bind = Callable[[Path], socket.socket]

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Berth:
    """A place for one session."""

    id: str
    uid: int
    directory: Path
    listener: socket.socket | None = None
    #: Its sandbox, which waits for a program; and what it was built from.
    process: Process | None = None
    key: object = None
    #: Set when it is there or can't be; None: nobody builds it beforehand.
    built: trio.Event | None = None
    taken: trio.Event = field(default_factory=trio.Event)

    async def vacate(self) -> None:
        """End the sandbox, and with it whatever is in there."""
        with trio.CancelScope(shield=True):
            if self.built is not None:
                await self.built.wait()
            process, self.process, self.key = self.process, None, None
            if process is not None:
                try:
                    await process.kill()
                    await process.wait()
                except Unavailable:
                    pass  # the launcher is gone, and with it the sandbox

    def close(self) -> None:
        """Close the socket and remove the directory. Idempotent."""
        if self.listener is not None:
            self.listener.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class Berths:
    """The berths of one daemon's sessions."""

    def __init__(
        self,
        *,
        sessions: Path,
        launcher: Launcher,
        uids: UidPool,
        bind: Bind,
        bridge: bytes,
        nursery: trio.Nursery,
    ) -> None:
        self._sessions, self._launcher, self._uids = sessions, launcher, uids
        self._bind, self._bridge, self._nursery = bind, bridge, nursery
        self._ready: dict[str, Berth] = {}  # the one that was made last is the last
        self._scopes: dict[str, trio.CancelScope] = {}
        self._closed = False

    def take(self, agent: str) -> Berth:
        """A berth for a session of ``agent``: one that is or gets ready, or a new one, still empty.

        :meth:`release` gives it back.
        """
        berth = self._ready.pop(agent, None)
        if berth is None:
            id = new_session_id()
            return Berth(id, self._uids.acquire(), self._sessions / id)
        berth.taken.set()
        return berth

    def open(self, berth: Berth) -> None:
        """Make the directory and the socket, where they aren't there. Raises SandboxdError."""
        if berth.listener is None:
            make_directory(berth.directory)
            berth.listener = self._bind(berth.directory / "broker.sock")

    def release(self, berth: Berth) -> None:
        """Nothing runs in there any more."""
        berth.close()
        self._uids.release(berth.uid)

    async def build(
        self, berth: Berth, spec: LaunchSpec, streams: tuple[int, int, int], *extra: int
    ) -> Process:
        """The berth's sandbox by ``spec``, which waits for its program: the one that is ready, if
        it is what would be built now. ``streams`` are those of the program to come.
        """
        vacant = _vacant(spec)
        if berth.built is not None:
            await berth.built.wait()
        if berth.key is not None and berth.key != spare_key(vacant):
            await berth.vacate()
        if berth.process is None:
            stdin, stdout, stderr = streams
            berth.process = await self._launcher.launch(
                vacant, stdin=stdin, stdout=stdout, stderr=stderr, extra=extra
            )
        return berth.process

    async def begin(self, berth: Berth, spec: LaunchSpec, streams: tuple[int, int, int]) -> Process:
        """Run the program of ``spec`` in the sandbox that was built for it."""
        assert berth.process is not None
        stdin, stdout, stderr = streams
        try:
            await berth.process.begin(spec, stdin=stdin, stdout=stdout, stderr=stderr)
        except Conflict:
            if berth.key is None:
                raise
            await berth.vacate()  # one that was ready, and ended meanwhile (out of memory, say)
            process = await self.build(berth, spec, streams)
            await process.begin(spec, stdin=stdin, stdout=stdout, stderr=stderr)
        return berth.process

    def prepare(self, session: Session) -> None:
        """Have one ready for the next session like this, unless it would be of no use."""
        agent = session.agent.slug
        if self._closed or agent in self._scopes or not _suits(session):
            return
        for oldest in list(self._scopes)[: max(0, len(self._scopes) - MOST_READY + 1)]:
            self._scopes[oldest].cancel()
        scope = self._scopes[agent] = trio.CancelScope()
        self._nursery.start_soon(self._tend, agent, session, scope, name=f"next of {agent}")

    def close(self) -> None:
        """Have none ready any more."""
        self._closed = True
        for scope in self._scopes.values():
            scope.cancel()

    async def _tend(self, agent: str, session: Session, scope: trio.CancelScope) -> None:
        berth = self.take("")
        berth.built = trio.Event()
        self._ready[agent] = berth
        try:
            with scope:
                try:
                    with trio.move_on_after(_PAUSE):
                        await berth.taken.wait()
                    await self._furnish(berth, session)
                finally:
                    berth.built.set()
                with trio.move_on_after(READY_LIMIT):
                    await berth.taken.wait()
        except (SandboxdError, OSError) as failure:
            # The next session is built when it is asked for, and tells its operator then.
            _log.info("none is ready for %s: %s", agent, type(failure).__name__)
        finally:
            del self._scopes[agent]
            if not berth.taken.is_set():
                if self._ready.get(agent) is berth:
                    del self._ready[agent]
                await berth.vacate()
                self.release(berth)

    async def _furnish(self, berth: Berth, session: Session) -> None:
        self.open(berth)
        like = dataclasses.replace(
            session, id=berth.id, uid=berth.uid, directory=berth.directory, process=None
        )
        spec = _vacant(agent_spec(like, bridge=self._bridge))
        berth.key = spare_key(spec)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            berth.process = await self._launcher.launch(spec, stdin=null, stdout=null, stderr=null)
        finally:
            os.close(null)


def make_directory(directory: Path) -> None:
    """Make a private directory. KernelError says where and why it can't be."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as failure:
        raise KernelError("mkdir", failure.errno or 0, str(directory)) from None


def _vacant(spec: LaunchSpec) -> LaunchSpec:
    return dataclasses.replace(spec, argv=(), env=(), cwd="/", waits=True)


def _suits(session: Session) -> bool:
    """Not where a part of the sandbox comes with the session: a terminal, a copy-on-write view, a
    way to a host, or the host's network with its resolver's files."""
    return (
        not session.tty
        and session.overlay < 0
        and session.terms.workspace != "overlay"
        and session.terms.network == "none"
        and not agent_spec(session, bridge=b"").listeners
    )
