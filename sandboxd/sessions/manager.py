"""Starts, stops and remembers sessions. One task owns one session from its socket to its record.

A session's task makes everything in order and undoes it in reverse: uid, directory, broker
socket, audit record, process; then it waits for the process and closes the record. Nothing of a
session can outlive its task, and no task outlives the manager's nursery.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from sandboxd.audit import AuditLog
from sandboxd.errors import Conflict, Invalid, KernelError, NotFound, SandboxdError, Unavailable
from sandboxd.isolation.client import Launcher, Process
from sandboxd.isolation.uids import UidPool
from sandboxd.names import agent_slug, shown
from sandboxd.paths import Paths
from sandboxd.policy import DEFAULT_TEAM, Agent, Config
from sandboxd.policy.decide import SessionTerms, session_terms
from sandboxd.sessions import streams
from sandboxd.sessions.berths import Berth, Berths, Bind, make_directory
from sandboxd.sessions.changes import Changes
from sandboxd.sessions.exec import Execs
from sandboxd.sessions.files import Files
from sandboxd.sessions.layers import provided
from sandboxd.sessions.output import Recorder
from sandboxd.sessions.records import Records, both
from sandboxd.sessions.session import Ending, Session
from sandboxd.sessions.spec import agent_spec, check_agent
from sandboxd.vault.vault import Snapshot, Vault

__all__ = ["Manager", "Request", "Started"]

#: How long a stopped agent has to leave by itself.
GRACE_SECONDS = 5.0

#: A session that is to end by itself ends within a month.
MAX_LIFETIME = 31 * 86_400

_log = logging.getLogger(__name__)


class Serve(Protocol):
    """Serves a session's broker socket until cancelled; started() once it listens."""

    async def __call__(
        self, session: Session, *, task_status: trio.TaskStatus[None] = ...
    ) -> None: ...


@dataclass(frozen=True)
class Request:
    """What an operator asks for."""

    agent: str
    args: tuple[str, ...] = ()
    by: str = ""
    tty: bool = False
    attach: bool = False
    rows: int = 24
    columns: int = 80
    term: str = ""
    #: Who asks belongs to this team; agents of others are as unknown to it. "": to none.
    team: str = ""
    #: The API key, token and application's user that the session rests on.
    key: str = ""
    token: str = ""
    subject: str = ""
    #: Plain variables for the agent, of this session alone. Not for secrets: the agent sees them.
    environment: Mapping[str, str] = field(default_factory=dict)
    #: Seconds until it is stopped.
    lifetime: float | None = None


@dataclass(frozen=True)
class Started:
    """A running session and, when attached, the operator's ends of its streams to pass on."""

    session: Session
    fds: tuple[int, ...]


class Manager:
    """All sessions of one daemon."""

    def __init__(
        self,
        *,
        paths: Paths,
        config: Callable[[], Config],
        vault: Vault,
        audit: AuditLog,
        launcher: Launcher,
        uids: UidPool,
        serve: Serve,
        bind: Bind,
        bridge: bytes,
        nursery: trio.Nursery,
    ) -> None:
        """``bind`` makes a session's socket, which ``serve`` serves."""
        self._paths, self._config, self._vault = paths, config, vault
        self._launcher, self._serve, self._bridge = launcher, serve, bridge
        self._nursery = nursery
        self._berths = Berths(
            sessions=paths.sessions,
            launcher=launcher,
            uids=uids,
            bind=bind,
            bridge=bridge,
            nursery=nursery,
        )
        #: What sessions changed in copy-on-write workspaces.
        self.changes = Changes(paths=paths, launcher=launcher, uids=uids, audit=audit)
        #: Programs beside agents; ``exec(session, argv, ...)`` runs one.
        self.exec = Execs(audit).run
        #: What is in the workspaces of live sessions.
        self.files = Files(launcher=launcher, uids=uids, audit=audit)
        self._closing = False
        #: Asked at the moment that a session takes its place: raises when it may not any more,
        #: because what it rests on ended while the request was on its way.
        self.admit: Callable[[Request], None] = lambda request: None
        self._records = Records(vault, audit)
        self._live: dict[str, Session] = {}
        self._recorders: dict[str, Recorder] = {}

    @property
    def live(self) -> list[Session]:
        """Sessions that have not ended, oldest first."""
        return list(self._live.values())

    def get(self, id: str) -> Session:
        """A live session by its id or an unambiguous beginning of it. NotFound otherwise."""
        found = [s for key, s in self._live.items() if key == id or key.startswith(id)]
        if len(found) != 1 or not id:
            raise NotFound(
                f"no live session {shown(id)}" if not found else f"{shown(id)} is ambiguous",
                hint="see: sandboxctl session list",
            )
        return found[0]

    def recorder(self, id: str) -> Recorder | None:
        """The recorder of a live detached session."""
        return self._recorders.get(id)

    def _agent(self, config: Config, request: Request) -> Agent:
        agent = config.agents.get(agent_slug(request.agent))
        if agent is not None and request.team in ("", agent.team):
            return agent
        known = [slug for slug, one in config.agents.items() if request.team in ("", one.team)]
        where = "" if request.team else f"; add one in {self._paths.config}/agents/"
        raise NotFound(
            f"no agent {shown(request.agent)}",
            hint="known agents: " + (", ".join(sorted(known)) or f"none{where}"),
        )

    def workspace_of(self, agent: Agent, terms: SessionTerms) -> Path | None:
        """The host directory that becomes /workspace; the default one is made here."""
        wanted = agent.workspace
        if terms.workspace == "none":
            return None
        if wanted.path is None:
            # No slug has a dot: neither team nor agent can be taken for another.
            own = agent.slug if agent.team == DEFAULT_TEAM else f"{agent.team}.{agent.slug}"
            path = self._paths.workspaces / own
            make_directory(path)
            return path
        return Path(wanted.path)

    async def start(self, request: Request) -> Started:
        """Start a session; returns when its program runs.

        Raises NotFound for an unknown agent, Denied or Invalid for what its configuration does
        not allow, Conflict when there are too many, StoreError when it can't be recorded, and
        KernelError or Unavailable when the sandbox can't be built. Nothing is left behind then.
        """
        if self._closing:
            raise _stopping()
        config = self._config()
        agent = self._agent(config, request)
        if len(self._live) >= config.settings.max_sessions:
            raise Conflict(
                f"{config.settings.max_sessions} sessions are running, which is the limit",
                hint="stop one (sandboxctl session stop), or raise max_sessions in sandboxd.yaml",
            )
        policy = config.policies[agent.policy]
        terms = session_terms(config, agent)
        offered = provided(terms.network, self._launcher)
        check_agent(agent, policy, terms, request.args, request.environment, offered)
        if request.lifetime is not None and not 0 < request.lifetime <= MAX_LIFETIME:
            raise Invalid(f"a session's lifetime is more than 0 and at most {MAX_LIFETIME:,} s")
        self.admit(request)
        berth = self._berths.take(agent.slug)
        # A place is taken before the first await: the limit holds, and stop_where finds it.
        session = Session(
            id=berth.id,
            agent=agent,
            config=config,
            policy=policy,
            terms=terms,
            snapshot=Snapshot(agent.team, agent.slug, {}),
            uid=berth.uid,
            workspace=None,
            directory=berth.directory,
            by=request.by,
            args=request.args,
            tty=request.tty,
            attached=request.attach,
            key=request.key,
            token=request.token,
            subject=request.subject,
            environment=dict(request.environment),
            lifetime=request.lifetime,
        )
        self._live[berth.id] = session
        try:
            variables = self._vault.of(agent.team)
            session.snapshot = await trio.to_thread.run_sync(variables.snapshot, agent.slug)
            if self._closing:
                raise _stopping()
            if session.stop_reason:
                raise _stopped_early(session)
        except BaseException as failure:
            session.ending = _failed_start(failure)
            await berth.vacate()
            self._forget(session, berth)
            session.ended.set()
            raise
        try:
            fds: tuple[int, ...] = await self._nursery.start(
                self._run, session, berth, request, name=f"session {id}"
            )
        except BaseExceptionGroup as group:
            raise _single(group) from None
        return Started(session, fds)

    async def stop(self, session: Session, *, reason: str, grace: float = GRACE_SECONDS) -> Ending:
        """SIGTERM, then after ``grace`` seconds SIGKILL for the whole tree; returns its ending.

        Once asked for it happens, also when who asked is gone. A session that is still starting
        ends before its program does anything.
        """
        session.stop_reason = session.stop_reason or reason
        self._nursery.start_soon(self._end, session, grace)
        await session.ended.wait()
        assert session.ending is not None
        return session.ending

    async def _end(self, session: Session, grace: float) -> None:
        process = session.process
        if process is None or session.ended.is_set():
            return  # a starting one looks at its stop_reason
        with contextlib.suppress(Unavailable):  # the launcher is gone, and with it the process
            if grace > 0:
                await process.signal(signal.SIGTERM)
                await process.signal(signal.SIGCONT)  # a stopped agent can't end itself
                with trio.move_on_after(grace):
                    await session.ended.wait()
            if not session.ended.is_set():
                await process.kill()

    async def stop_where(
        self, predicate: Callable[[Session], bool], reason: str, grace: float = 0.0
    ) -> list[Session]:
        """End every session that matches, all at once; returns them when they have ended.

        Once asked for it happens, also when who asked is gone. One that is still starting ends
        before its program does anything.
        """
        found = [session for session in self.live if predicate(session)]
        for session in found:
            session.stop_reason = session.stop_reason or reason
            self._nursery.start_soon(self._end, session, grace)
        for session in found:
            await session.ended.wait()
        return found

    async def stop_all(self, *, reason: str, grace: float = GRACE_SECONDS) -> None:
        """Refuse new sessions and end every live one."""
        self._closing = True
        self._berths.close()
        async with trio.open_nursery() as nursery:
            for session in self.live:
                nursery.start_soon(partial(self.stop, session, reason=reason, grace=grace))

    async def clear_leftovers(self) -> list[str]:
        """Close the records and directories that a crash left open; returns the session ids.

        Their processes are gone already: the launcher was their pid namespace's init, and it ends
        with the daemon, however that one died.
        """
        leftover = await self._records.close_leftovers()
        self._paths.sessions.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in self._paths.sessions.iterdir():
            shutil.rmtree(directory, ignore_errors=True)
        await trio.to_thread.run_sync(self._prune_logs)
        return leftover

    async def _run(
        self,
        session: Session,
        berth: Berth,
        request: Request,
        *,
        task_status: trio.TaskStatus[tuple[int, ...]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Own one session. An error before started() is the caller's; later ones are logged."""
        started = False

        def running(fds: tuple[int, ...]) -> None:
            nonlocal started
            started = True
            task_status.started(fds)

        try:
            with ExitStack() as undo:
                undo.callback(self._forget, session, berth)
                session.workspace = self.workspace_of(session.agent, session.terms)
                self._berths.open(berth)
                session.listener = berth.listener
                number = self._records.starts(session)
                try:
                    async with self._view(session):
                        await self._live_through(session, berth, request, number, running)
                except BaseException as failure:
                    session.ending = session.ending or _failed_start(failure)
                    raise
                finally:
                    await berth.vacate()
                    await self._records.ended(session)
        except Exception as failure:
            if not started:
                raise
            # One session's trouble (a full disk, say) must not take the daemon along.
            _log.error("session %s: %s", session.id, _name(failure))
        finally:
            session.ending = session.ending or Ending(None, None, "failed to start")
            session.ended.set()

    @asynccontextmanager
    async def _view(self, session: Session) -> AsyncIterator[None]:
        """A copy-on-write view of the workspace for the session's length, where it has one."""
        if session.terms.workspace != "overlay" or session.workspace is None:
            yield
            return
        session.overlay = await self.changes.begin(
            session.id,
            session.agent.slug,
            session.team,
            session.workspace,
            quota=session.agent.workspace.quota or 0,
            uid=session.uid,
        )
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self.changes.end(session.id)

    async def _live_through(
        self,
        session: Session,
        berth: Berth,
        request: Request,
        number: int,
        running: Callable[[tuple[int, ...]], None],
    ) -> None:
        """Serve the broker socket while the agent's process lives; its calls end with it."""
        async with trio.open_nursery() as serving:
            await serving.start(partial(self._serve, session))
            fds = await self._launch(session, berth, request, number, serving)
            session.tasks = serving
            running(fds)
            self._berths.prepare(session)
            if session.lifetime is not None:
                serving.start_soon(self._end_in_time, session, session.lifetime)
            try:
                await self._until_end(session)
            finally:
                session.tasks = None
            serving.cancel_scope.cancel()

    async def _end_in_time(self, session: Session, lifetime: float) -> None:
        await trio.sleep(lifetime)
        await self.stop(session, reason="its time is over")

    async def _launch(
        self,
        session: Session,
        berth: Berth,
        request: Request,
        number: int,
        serving: trio.Nursery,
    ) -> tuple[int, ...]:
        """Start the program, once its start (record ``number``) is recorded for good."""
        if request.tty:
            ends = streams.terminal(request.rows, request.columns)
        elif request.attach:
            ends = streams.attached()
        else:
            ends = streams.recorded()
        try:
            spec = agent_spec(session, bridge=self._bridge, term=request.term)
            with self._records.outlet(session) as outlet:
                session.way_out, spec = outlet.environment, outlet.complete(spec)
                extra = (*([session.overlay] if session.overlay >= 0 else ()), *outlet.fds)
                await both(
                    partial(self._records.started, session, number),
                    partial(self._berths.build, berth, spec, ends.child, *extra),
                )
                outlet.take()
            serving.start_soon(outlet.serve)
            if session.stop_reason or self._closing:
                raise _stopped_early(session)
            session.process = await self._berths.begin(berth, spec, ends.child)
            ends.close_child()
            if request.attach:
                return ends.take_operator()
            recorder = self._recorders[session.id] = Recorder(self._paths.logs / session.id)
            serving.start_soon(recorder.record, ends.take_operator()[0])
            serving.start_soon(trio.to_thread.run_sync, self._prune_logs)
        finally:
            ends.close()
        return ()

    async def _until_end(self, session: Session) -> None:
        process = session.process
        assert process is not None
        try:
            session.ending = await _ending_of(process, session)
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await process.kill()
                session.ending = await _ending_of(process, session)
            raise
        recorder = self._recorders.get(session.id)
        if recorder is not None:
            with trio.move_on_after(2):  # every writer is dead: what is left is in the pipe
                while not recorder.done:
                    async with recorder.changed:
                        await recorder.changed.wait()

    def _prune_logs(self) -> None:
        self._records.prune(self._paths.logs, self._live)

    def _forget(self, session: Session, berth: Berth) -> None:
        del self._live[session.id]
        self._recorders.pop(session.id, None)
        self._berths.release(berth)


async def _ending_of(process: Process, session: Session) -> Ending:
    try:
        exit = await process.wait()
    except Unavailable:
        return Ending(None, signal.SIGKILL, "the launcher died")
    how = "out of memory" if exit.oom else "exited" if exit.signal is None else "killed"
    reason = session.stop_reason or how
    return Ending(exit.code, exit.signal, reason)


def _stopped_early(session: Session) -> Unavailable:
    return Unavailable(f"the session was stopped while it started: {session.stop_reason}")


def _stopping() -> Unavailable:
    return Unavailable("the daemon is stopping and starts nothing any more")


def _failed_start(failure: BaseException) -> Ending:
    if isinstance(failure, BaseExceptionGroup):
        failure = _single(failure)
    if isinstance(failure, KernelError):
        return Ending(None, None, f"failed to start: {failure.message}")
    return Ending(None, None, f"failed to start: {_name(failure)}")


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one expected error inside a nursery's group, or the group itself."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
        found = found.exceptions[0]
    return found if isinstance(found, SandboxdError) else group


def _name(failure: BaseException) -> str:
    return failure.message if isinstance(failure, SandboxdError) else type(failure).__name__
