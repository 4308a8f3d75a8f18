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
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio

from sandboxd.audit import AuditLog
from sandboxd.errors import Conflict, KernelError, NotFound, SandboxdError, Unavailable
from sandboxd.isolation.client import Launcher, Process
from sandboxd.isolation.uids import UidPool
from sandboxd.names import agent_slug, new_session_id, shown
from sandboxd.paths import Paths
from sandboxd.policy import Agent, Config
from sandboxd.policy.decide import SessionTerms, session_terms
from sandboxd.sessions import streams
from sandboxd.sessions.changes import Changes
from sandboxd.sessions.exec import Execs
from sandboxd.sessions.files import Files
from sandboxd.sessions.layers import provided
from sandboxd.sessions.output import Recorder
from sandboxd.sessions.session import Ending, Session
from sandboxd.sessions.spec import agent_spec, check_agent
from sandboxd.vault.store import SessionRecord
from sandboxd.vault.vault import Vault

__all__ = ["Manager", "Request", "Started"]

#: Detached sessions whose recorded output is kept, each at most twice output.MAX_LOG.
MAX_LOGS = 100

#: How long a stopped agent has to leave by itself.
GRACE_SECONDS = 5.0

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
        bridge: bytes,
        nursery: trio.Nursery,
    ) -> None:
        self._paths, self._config, self._vault, self._audit = paths, config, vault, audit
        self._launcher, self._uids, self._serve, self._bridge = launcher, uids, serve, bridge
        self._nursery = nursery
        #: What sessions changed in copy-on-write workspaces.
        self.changes = Changes(paths=paths, launcher=launcher, uids=uids, audit=audit)
        #: Programs beside agents; ``exec(session, argv, ...)`` runs one.
        self.exec = Execs(audit).run
        #: What is in the workspaces of live sessions.
        self.files = Files(launcher=launcher, uids=uids, audit=audit)
        self._closing = False
        self._starting = 0
        self._unwritten: list[SessionRecord] = []
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

    def workspace_of(self, agent: Agent, terms: SessionTerms) -> Path | None:
        """The host directory that becomes /workspace; the default one is made here."""
        wanted = agent.workspace
        if terms.workspace == "none":
            return None
        if wanted.path is None:
            path = self._paths.workspaces / agent.slug
            _make(path)
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
        agent = config.agents.get(agent_slug(request.agent))
        if agent is None:
            raise NotFound(
                f"no agent {shown(request.agent)}",
                hint="known agents: "
                + (
                    ", ".join(sorted(config.agents))
                    or f"none; add one in {self._paths.config}/agents/"
                ),
            )
        if len(self._live) + self._starting >= config.settings.max_sessions:
            raise Conflict(
                f"{config.settings.max_sessions} sessions are running, which is the limit",
                hint="stop one (sandboxctl session stop), or raise max_sessions in sandboxd.yaml",
            )
        policy = config.policies[agent.policy]
        terms = session_terms(config, agent)
        offered = provided(terms.network, self._launcher)
        check_agent(agent, policy, terms, request.args, offered)
        id = new_session_id()
        self._starting += 1  # a place is taken before the first await, so the limit holds
        try:
            snapshot = await trio.to_thread.run_sync(self._vault.snapshot, agent.slug)
        finally:
            self._starting -= 1
        if self._closing:
            raise _stopping()
        session = Session(
            id=id,
            agent=agent,
            config=config,
            policy=policy,
            terms=terms,
            snapshot=snapshot,
            uid=self._uids.acquire(),
            workspace=None,
            directory=self._paths.sessions / id,
            by=request.by,
            args=request.args,
            tty=request.tty,
            attached=request.attach,
        )
        self._live[id] = session
        try:
            fds: tuple[int, ...] = await self._nursery.start(
                self._run, session, request, name=f"session {id}"
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

    async def stop_all(self, *, reason: str, grace: float = GRACE_SECONDS) -> None:
        """Refuse new sessions and end every live one."""
        self._closing = True
        async with trio.open_nursery() as nursery:
            for session in self.live:
                nursery.start_soon(partial(self.stop, session, reason=reason, grace=grace))

    async def clear_leftovers(self) -> list[str]:
        """Close the records and directories that a crash left open; returns the session ids.

        Their processes are gone already: the launcher was their pid namespace's init, and it ends
        with the daemon, however that one died.
        """
        leftover = await trio.to_thread.run_sync(partial(self._vault.sessions, include_ended=False))
        for record in leftover:
            ended = _ended(record, Ending(None, None, "the daemon died"))
            await self._audit.append(
                "session.ended", session=record.id, agent=record.agent, reason="the daemon died"
            )
            await trio.to_thread.run_sync(self._vault.put_session, ended)
        self._paths.sessions.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in self._paths.sessions.iterdir():
            shutil.rmtree(directory, ignore_errors=True)
        await trio.to_thread.run_sync(self._prune_logs)
        return [record.id for record in leftover]

    async def _run(
        self,
        session: Session,
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
                undo.callback(self._forget, session)
                session.workspace = self.workspace_of(session.agent, session.terms)
                _make(session.directory)
                undo.callback(shutil.rmtree, session.directory, ignore_errors=True)
                await self._note_start(session)
                try:
                    async with self._view(session):
                        await self._live_through(session, request, running)
                except BaseException as failure:
                    session.ending = session.ending or _failed_start(failure)
                    raise
                finally:
                    await self._note_end(session)
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
        self, session: Session, request: Request, running: Callable[[tuple[int, ...]], None]
    ) -> None:
        """Serve the broker socket while the agent's process lives; its calls end with it."""
        async with trio.open_nursery() as serving:
            await serving.start(partial(self._serve, session))
            fds = await self._launch(session, request, serving)
            session.tasks = serving
            running(fds)
            try:
                await self._until_end(session)
            finally:
                session.tasks = None
            serving.cancel_scope.cancel()

    async def _launch(
        self, session: Session, request: Request, serving: trio.Nursery
    ) -> tuple[int, ...]:
        if request.tty:
            ends = streams.terminal(request.rows, request.columns)
        elif request.attach:
            ends = streams.attached()
        else:
            ends = streams.recorded()
        try:
            spec = agent_spec(session, bridge=self._bridge, term=request.term)
            stdin, stdout, stderr = ends.child
            session.process = await self._launcher.launch(
                spec,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                extra=(session.overlay,) if session.overlay >= 0 else (),
            )
            if session.stop_reason or self._closing:
                raise Unavailable(
                    f"the session was stopped while it started: {session.stop_reason}"
                )
            ends.close_child()
            await self._keep(session, "running")
            if request.attach:
                return ends.take_operator()
            recorder = self._recorders[session.id] = Recorder(self._paths.logs / session.id)
            serving.start_soon(recorder.record, ends.take_operator()[0])
            await trio.to_thread.run_sync(self._prune_logs)
        except BaseException:
            if session.process is not None:
                with trio.CancelScope(shield=True), contextlib.suppress(Unavailable):
                    await session.process.kill()
                    await session.process.wait()
            raise
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

    async def _note_start(self, session: Session) -> None:
        await self._audit.append(
            "session.started",
            session=session.id,
            agent=session.agent.slug,
            policy=session.policy.name,
            by=session.by,
            generation=session.config.generation,
            workspace=str(session.workspace or ""),
            network=session.terms.network,
            lowered=list(session.terms.lowered),
            variables={name: v.version for name, v in session.snapshot.variables.items()},
        )
        await self._keep(session, "starting")

    async def _note_end(self, session: Session) -> None:
        ending = session.ending
        assert ending is not None
        with trio.CancelScope(shield=True):
            try:
                await self._audit.append(
                    "session.ended",
                    session=session.id,
                    agent=session.agent.slug,
                    exit_code=ending.code,
                    signal=ending.signal,
                    reason=ending.reason,
                    seconds=round(ending.at - session.started_at, 3),
                )
            finally:
                await self._keep(session, "ended")

    async def _keep(self, session: Session, state: str) -> None:
        ending = session.ending
        record = SessionRecord(
            id=session.id,
            agent=session.agent.slug,
            policy=session.policy.name,
            state=state,
            started_at=session.started_at,
            ended_at=ending.at if ending else None,
            exit_code=ending.code if ending else None,
            exit_signal=ending.signal if ending else None,
            reason=ending.reason if ending else "",
            by=session.by,
            variables={name: v.version for name, v in session.snapshot.variables.items()},
            workspace=str(session.workspace or ""),
        )
        try:
            await trio.to_thread.run_sync(self._vault.put_session, record)
            while self._unwritten:  # what a full disk kept from being written
                await trio.to_thread.run_sync(self._vault.put_session, self._unwritten[0])
                del self._unwritten[0]
        except SandboxdError:
            if ending is not None:
                self._unwritten.append(record)
            raise

    def _prune_logs(self) -> None:
        """Keep the recorded output of the newest sessions; the disk is not the agents'."""
        with contextlib.suppress(FileNotFoundError):
            kept = sorted(self._paths.logs.iterdir(), key=lambda d: d.stat().st_mtime)
            for directory in kept[:-MAX_LOGS]:
                if directory.name not in self._live:
                    shutil.rmtree(directory, ignore_errors=True)

    def _forget(self, session: Session) -> None:
        del self._live[session.id]
        self._recorders.pop(session.id, None)
        self._uids.release(session.uid)


async def _ending_of(process: Process, session: Session) -> Ending:
    try:
        exit = await process.wait()
    except Unavailable:
        return Ending(None, signal.SIGKILL, "the launcher died")
    how = "out of memory" if exit.oom else "exited" if exit.signal is None else "killed"
    reason = session.stop_reason or how
    return Ending(exit.code, exit.signal, reason)


def _stopping() -> Unavailable:
    return Unavailable("the daemon is stopping and starts nothing any more")


def _make(directory: Path) -> None:
    """Make a private directory. KernelError says where and why it can't be."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as failure:
        raise KernelError("mkdir", failure.errno or 0, str(directory)) from None


def _failed_start(failure: BaseException) -> Ending:
    if isinstance(failure, BaseExceptionGroup):
        failure = _single(failure)
    if isinstance(failure, KernelError):
        return Ending(None, None, f"failed to start: {failure.message}")
    return Ending(None, None, f"failed to start: {_name(failure)}")


def _ended(record: SessionRecord, ending: Ending) -> SessionRecord:
    fields: dict[str, Any] = {
        "state": "ended",
        "ended_at": time.time(),
        "exit_code": ending.code,
        "exit_signal": ending.signal,
        "reason": ending.reason,
    }
    return SessionRecord(**{**_fields(record), **fields})


def _fields(record: SessionRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in SessionRecord.__annotations__}


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one expected error inside a nursery's group, or the group itself."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
        found = found.exceptions[0]
    return found if isinstance(found, SandboxdError) else group


def _name(failure: BaseException) -> str:
    return failure.message if isinstance(failure, SandboxdError) else type(failure).__name__
