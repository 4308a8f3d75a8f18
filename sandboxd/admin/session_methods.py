"""Sessions over the admin socket: start, watch, signal, stop, read their output."""

from __future__ import annotations

import base64
import signal
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

import trio

from sandboxd.admin.offers import take_named
from sandboxd.admin.params import bounded, iso, param, slug, strings, thread
from sandboxd.admin.reach import live_of, records_of
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.broker.serverrun import Running
from sandboxd.errors import Invalid, NotFound
from sandboxd.names import shown
from sandboxd.policy.egress import egress_lines
from sandboxd.running import Daemon
from sandboxd.sessions.layers import layers
from sandboxd.sessions.manager import GRACE_SECONDS, Request, Started
from sandboxd.sessions.output import read_log
from sandboxd.sessions.session import Ending, Session
from sandboxd.sessions.usage import Usage, usage, usages
from sandboxd.vault.store import SessionRecord

__all__ = ["SessionMethods", "find_record"]


#: Why a session ended whose operator went away.
_LEFT = "its operator left"


class SessionMethods:
    """``session.*``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {
            "session.start": self.start,
            "session.run": self.run,
            "session.wait": self.wait,
            "session.list": self.list_,
            "session.show": self.show,
            "session.stop": self.stop,
            "session.signal": self.signal,
            "session.logs": self.logs,
        }

    async def start(self, caller: Caller, params: dict[str, Any]) -> Reply:
        request = _request(caller, params)
        if request.tty and not request.attach:
            raise Invalid("a terminal needs somebody attached to it")
        if request.attach and not caller.attachable:
            raise Invalid(
                "nobody can be attached to a session over HTTP",
                hint="session.run streams its output; session.start leaves it in the background",
            )
        started = await self._start(request)
        session = started.session
        if request.attach:

            async def gone() -> None:
                if not session.ended.is_set():
                    await self._daemon.sessions.stop(session, reason=_LEFT)

            caller.on_disconnect(gone)
        return Reply({"id": session.id, "pid": session.pid}, started.fds)

    async def run(self, caller: Caller, params: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """A session in the foreground where no descriptor can be passed: its id, its output as it
        comes, how it ended. It ends when its caller leaves.
        """
        request = _request(caller, params)
        if request.tty or request.attach:
            raise Invalid("session.run has neither a terminal nor standard input")
        session = (await self._start(request)).session
        try:
            yield {"id": session.id, "pid": session.pid}
            directory = self._daemon.boot.paths.logs / session.id
            recorder = self._daemon.sessions.recorder(session.id)
            async with aclosing(read_log(directory, recorder, follow=True)) as chunks:
                async for chunk in chunks:
                    yield {"data": base64.b64encode(chunk).decode()}
            await session.ended.wait()
        finally:
            if not session.ended.is_set():
                with trio.CancelScope(shield=True):
                    await self._daemon.sessions.stop(session, reason=_LEFT)
        assert session.ending is not None
        yield {"ended": _ended(session.ending)}

    async def _start(self, request: Request) -> Started:
        await take_named(self._daemon, request.agent)
        # A client that leaves right now must not leave a session that nobody knows of.
        with trio.CancelScope(shield=True):
            started = await self._daemon.sessions.start(request)
        return started  # noqa: RET504 - mypy takes the scope for one that swallows errors

    async def wait(self, caller: Caller, params: dict[str, Any]) -> Reply:
        id = param(params, "id", str)
        live = next((s for s in self._daemon.sessions.live if s.id == id), None)
        if live is not None:
            await live.ended.wait()
            if live.ending is not None:  # known also when it could not be recorded
                return Reply(_ended(live.ending))
        record = await find_record(self._daemon, id)
        return Reply(
            {
                "exit_code": record.exit_code,
                "signal": record.exit_signal,
                "reason": record.reason,
            }
        )

    async def list_(self, caller: Caller, params: dict[str, Any]) -> Reply:
        live = {session.id: session for session in live_of(self._daemon, caller.principal)}
        rows = [self._live_row(session) for session in live.values()]
        if params.get("usage"):
            used = await thread(usages, [session.pid for session in live.values()])
            rows = [{**row, "usage": _used(one)} for row, one in zip(rows, used, strict=True)]
        if params.get("all"):
            records = await records_of(self._daemon, caller.principal)
            rows += [_record_row(record) for record in records if record.id not in live]
        return Reply({"sessions": sorted(rows, key=lambda row: str(row["started_at"]))})

    async def show(self, caller: Caller, params: dict[str, Any]) -> Reply:
        id = param(params, "id", str)
        try:
            session = self._daemon.sessions.get(id)
        except NotFound:
            record = await find_record(self._daemon, id)
            return Reply(
                {
                    **_record_row(record),
                    "environment": None,
                    "workspace": record.workspace,
                    **self._changes(record.id),
                    "variables": dict(record.variables),
                    "network": None,
                    "isolation": [],
                    "tools": [],
                    "servers": [],
                }
            )
        used = await thread(usage, session.pid)
        return Reply(
            {
                **self._live_row(session),
                "environment": sorted(session.environment),
                "usage": _used(used),
                "workspace": str(session.workspace or ""),
                **self._changes(session.id),
                "variables": {n: v.version for n, v in session.snapshot.variables.items()},
                "network": session.terms.network,
                "egress": egress_lines(session.terms.egress),
                "isolation": layers(
                    session.terms.network,
                    self._daemon.launcher,
                    session.terms.lowered,
                    egress=session.terms.egress.egress.stated,
                ),
                "tools": [tool.name for tool in self._daemon.calls.tools(session)],
                "servers": [
                    _server_row(one) for one in self._daemon.calls.servers.live(session.id)
                ],
            }
        )

    async def stop(self, caller: Caller, params: dict[str, Any]) -> Reply:
        session = self._daemon.sessions.get(param(params, "id", str))
        grace = params.get("grace")
        if grace is not None and (isinstance(grace, bool) or not isinstance(grace, (int, float))):
            raise Invalid("grace is a number of seconds")
        ending = await self._daemon.sessions.stop(
            session,
            reason=f"stopped by {caller.name}",
            grace=GRACE_SECONDS if grace is None else max(0.0, min(float(grace), 3600.0)),
        )
        return Reply(
            {
                "id": session.id,
                "state": "ended",
                "exit_code": ending.code,
                "exit_signal": ending.signal,
                "reason": ending.reason,
            }
        )

    async def signal(self, caller: Caller, params: dict[str, Any]) -> Reply:
        session = self._daemon.sessions.get(param(params, "id", str))
        number = param(params, "signal", int)
        if number not in signal.valid_signals():
            raise Invalid(f"{number} is not a signal")
        if session.process is not None:
            await session.process.signal(number)
        return Reply({})

    async def logs(self, caller: Caller, params: dict[str, Any]) -> AsyncGenerator[Any, None]:
        id = param(params, "id", str)
        try:
            id = self._daemon.sessions.get(id).id
        except NotFound:
            id = (await find_record(self._daemon, id)).id
        directory = self._daemon.boot.paths.logs / id
        recorder = self._daemon.sessions.recorder(id)
        follow = bool(params.get("follow"))
        async with aclosing(read_log(directory, recorder, follow=follow)) as chunks:
            async for chunk in chunks:
                yield {"data": base64.b64encode(chunk).decode()}

    def _changes(self, id: str) -> dict[str, Any]:
        """What became of the changes of a copy-on-write workspace; None where it was none."""
        layers = self._daemon.sessions.changes.state(id)
        return {"changes": None if layers is None else layers.state}

    def _live_row(self, session: Session) -> dict[str, Any]:
        return {
            "id": session.id,
            "agent": session.agent.slug,
            "team": session.team,
            "policy": session.policy.name,
            "state": session.state,
            "pid": session.pid,
            "started_at": iso(session.started_at),
            "ended_at": None,
            "exit_code": None,
            "exit_signal": None,
            "reason": session.stop_reason,
            "by": session.by,
            "calls": self._daemon.calls.in_flight(session.id),
            "key": session.key or None,
            "subject": session.subject or None,
            "ends_at": iso(session.ends_at),
            "calls_running": self._daemon.calls.running(session.id),
            "calls_waiting": self._daemon.calls.approvals.count(session.id),
            "lowered": list(session.terms.lowered),
        }


def _request(caller: Caller, params: dict[str, Any]) -> Request:
    return Request(
        agent=slug(params),
        args=tuple(strings(params, "args")) if "args" in params else (),
        by=caller.name,
        tty=bool(params.get("tty")),
        attach=bool(params.get("attach")),
        rows=bounded(params, "rows", 24),
        columns=bounded(params, "cols", 80),
        term=str(params.get("term") or ""),
        team=caller.principal.team or "",
        key=caller.principal.key or "",
        token=caller.principal.token or "",
        subject=caller.principal.subject or "",
        environment=_environment(params),
        lifetime=_lifetime(params),
    )


def _environment(params: dict[str, Any]) -> dict[str, str]:
    values = param(params, "environment", dict) if params.get("environment") is not None else {}
    if not all(isinstance(value, str) for value in values.values()):
        raise Invalid("parameter environment maps names to texts")
    return values


def _lifetime(params: dict[str, Any]) -> float | None:
    value = params.get("lifetime")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Invalid("lifetime is a number of seconds")
    return float(value)


def _ended(ending: Ending) -> dict[str, Any]:
    return {"exit_code": ending.code, "signal": ending.signal, "reason": ending.reason}


async def find_record(daemon: Daemon, id: str) -> SessionRecord:
    """A session, live or ended, by its id or an unambiguous beginning of it. NotFound otherwise."""
    records = await thread(partial(daemon.vault.sessions, include_ended=True))
    found = [r for r in records if r.id == id or (id and r.id.startswith(id))]
    if len(found) != 1:
        raise NotFound(
            f"no session {shown(id)}" if not found else f"{shown(id)} is ambiguous",
            hint="see: sandboxctl session list --all",
        )
    return found[0]


def _used(used: Usage) -> dict[str, Any]:
    return {"processes": used.processes, "memory": used.memory, "cpu_seconds": used.cpu}


def _server_row(running: Running) -> dict[str, Any]:
    return {
        "id": running.id,
        "server": running.server.name,
        "pid": running.pid,
        "started_at": iso(running.started_at),
        "lifetime": running.server.lifetime,
        "calls": running.total,
        "variables": dict(running.versions),
    }


def _record_row(record: SessionRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "agent": record.agent,
        "team": record.team,
        "policy": record.policy,
        "state": record.state,
        "pid": None,
        "started_at": iso(record.started_at),
        "ended_at": iso(record.ended_at),
        "exit_code": record.exit_code,
        "exit_signal": record.exit_signal,
        "reason": record.reason,
        "by": record.by,
        "calls": [],
        "key": record.key or None,
        "subject": record.subject or None,
        "ends_at": None,
        "calls_running": 0,
        "calls_waiting": 0,
        "lowered": [],
    }
