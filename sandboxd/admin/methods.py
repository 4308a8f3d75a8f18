"""What operators can ask of a running daemon. Each method checks its parameters, acts, audits."""

from __future__ import annotations

import base64
import binascii
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio

from sandboxd import __version__
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.errors import Invalid, NotFound, SandboxdError
from sandboxd.names import agent_slug, session_id, shown
from sandboxd.policy import decide
from sandboxd.secret import Secret
from sandboxd.sessions.layers import layers
from sandboxd.sessions.manager import GRACE_SECONDS, Request
from sandboxd.sessions.output import read_log
from sandboxd.sessions.session import Session
from sandboxd.sessions.usage import usage
from sandboxd.vault.store import SessionRecord

if TYPE_CHECKING:
    from sandboxd.daemon import Daemon

__all__ = ["Methods"]

T = TypeVar("T")


class Methods:
    """The methods of one daemon, by their wire names in :meth:`table`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {
            "status": self.status,
            "reload": self.reload,
            "config.check": self.config_check,
            "agents.list": self.agents_list,
            "tools.list": self.tools_list,
            "env.list": self.env_list,
            "env.set": self.env_set,
            "env.remove": self.env_remove,
            "session.start": self.session_start,
            "session.wait": self.session_wait,
            "session.list": self.session_list,
            "session.show": self.session_show,
            "session.stop": self.session_stop,
            "session.signal": self.session_signal,
            "session.logs": self.session_logs,
            "audit.tail": self.audit_tail,
            "audit.verify": self.audit_verify,
            "policy.explain": self.policy_explain,
        }

    # -- the daemon ---------------------------------------------------------------------------

    async def status(self, caller: Caller, params: dict[str, Any]) -> Reply:
        daemon, boot = self._daemon, self._daemon.boot
        return Reply(
            {
                "version": __version__,
                "pid": os.getpid(),
                "mode": daemon.launcher.mode,
                "user": boot.identity.name if boot.identity else caller.name,
                "uid": os.geteuid(),
                "started_at": _iso(daemon.started_at),
                "config": str(boot.paths.config),
                "state": str(boot.paths.state),
                "runtime": str(boot.paths.runtime),
                "generation": daemon.config.generation,
                "sessions": len(daemon.sessions.live),
                "calls": daemon.calls.running(),
                "key_custody": boot.custody,
                "warnings": list(daemon.config.warnings),
            }
        )

    async def reload(self, caller: Caller, params: dict[str, Any]) -> Reply:
        changed = await self._daemon.reload(caller.name)
        config = self._daemon.config
        return Reply(
            {
                "generation": config.generation,
                "changed": changed,
                "warnings": list(config.warnings),
            }
        )

    async def config_check(self, caller: Caller, params: dict[str, Any]) -> Reply:
        config = await self._daemon.check()
        return Reply(
            {
                "generation": config.generation,
                "changed": config.generation != self._daemon.config.generation,
                "warnings": list(config.warnings),
            }
        )

    async def agents_list(self, caller: Caller, params: dict[str, Any]) -> Reply:
        rows = []
        for slug, agent in sorted(self._daemon.config.agents.items()):
            rows.append(
                {
                    "slug": slug,
                    "description": agent.description,
                    "policy": agent.policy,
                    "tools": list(agent.tools),
                    "variables": len(await _thread(self._daemon.vault.list, slug)),
                    "sessions": sum(s.agent.slug == slug for s in self._daemon.sessions.live),
                }
            )
        return Reply({"agents": rows})

    async def tools_list(self, caller: Caller, params: dict[str, Any]) -> Reply:
        config = self._daemon.config
        wanted = set(config.tools)
        if params.get("agent") is not None:
            wanted = set(self._agent(params).tools)
        rows = [
            {
                "name": name,
                "description": tool.description,
                "secrets": [secret.variable for secret in tool.secrets],
                "network": tool.network,
                "workspace": tool.workspace,
                "timeout": float(tool.timeout),
                "source": tool.source,
            }
            for name, tool in sorted(config.tools.items())
            if name in wanted
        ]
        return Reply({"tools": rows})

    # -- variables ----------------------------------------------------------------------------

    async def env_list(self, caller: Caller, params: dict[str, Any]) -> Reply:
        slug = self._agent(params).slug
        variables = await _thread(self._daemon.vault.list, slug)
        return Reply(
            {
                "agent": slug,
                "variables": [
                    {
                        "name": v.name,
                        "version": v.version,
                        "set_at": _iso(v.set_at),
                        "set_by": v.set_by,
                        "last_used_at": _iso(v.last_used_at),
                        "fingerprint": v.fingerprint,
                        "size": v.size,
                    }
                    for v in variables
                ],
            }
        )

    async def env_set(self, caller: Caller, params: dict[str, Any]) -> Reply:
        slug = self._agent(params).slug
        encoded = _param(params, "values", dict)
        if not encoded:
            raise Invalid("no variable to set")
        values = {name: _decoded(name, text) for name, text in encoded.items()}
        vault = self._daemon.vault
        await self._daemon.audit.append(
            "env.set", agent=slug, names=sorted(values), by=caller.name, now=bool(params.get("now"))
        )
        async with self._told_when_failing("env.set", slug, caller):
            versions = await _thread(partial(vault.set, by=caller.name), slug, values)
        older = {name: version - 1 for name, version in versions.items()}
        cancelled = await self._revoke(caller, slug, older) if params.get("now") else 0
        return Reply(
            {
                "agent": slug,
                "versions": versions,
                "warnings": self._unused(slug, versions),
                "live_sessions": self._holding(slug, older),
                "cancelled_calls": cancelled,
            }
        )

    async def env_remove(self, caller: Caller, params: dict[str, Any]) -> Reply:
        slug = _slug(params)
        names = _strings(params, "names")
        await self._daemon.audit.append(
            "env.removed", agent=slug, names=sorted(names), by=caller.name
        )
        async with self._told_when_failing("env.removed", slug, caller):
            remove = partial(self._daemon.vault.remove, by=caller.name)
            versions = await _thread(remove, slug, names)
        cancelled = await self._revoke(caller, slug, versions) if params.get("now") else 0
        return Reply(
            {
                "agent": slug,
                "versions": versions,
                "live_sessions": self._holding(slug, versions),
                "cancelled_calls": cancelled,
            }
        )

    @asynccontextmanager
    async def _told_when_failing(
        self, action: str, slug: str, caller: Caller
    ) -> AsyncIterator[None]:
        """An action is recorded before it happens; one that then fails is recorded as failed."""
        try:
            yield
        except SandboxdError as failure:
            await self._daemon.audit.append(
                "admin.failed", action=action, agent=slug, by=caller.name, problem=failure.code
            )
            raise

    async def _revoke(self, caller: Caller, slug: str, versions: Mapping[str, int]) -> int:
        """Take old versions from live sessions and kill the calls that hold them."""
        cancelled = 0
        for name, version in versions.items():
            if version < 1:
                continue
            await self._daemon.audit.append(
                "env.revoked", agent=slug, name=name, up_to=version, by=caller.name
            )
            await _thread(partial(self._daemon.vault.revoke, up_to=version), slug, name)
            cancelled += await self._daemon.calls.cancel_using(slug, name, version)
        return cancelled

    def _holding(self, slug: str, versions: Mapping[str, int]) -> list[str]:
        """Live sessions whose snapshot still has one of these versions, unless it was revoked."""
        vault = self._daemon.vault
        return [
            session.id
            for session in self._daemon.sessions.live
            if session.agent.slug == slug
            and any(
                (sealed := session.snapshot.variables.get(name)) is not None
                and sealed.version <= version
                and not vault.is_revoked(sealed)
                for name, version in versions.items()
            )
        ]

    def _unused(self, slug: str, names: Mapping[str, int]) -> list[str]:
        """A warning for each variable that no tool of the agent declares: it would do nothing."""
        config = self._daemon.config
        declared = {
            secret.variable
            for tool in config.agents[slug].tools
            if tool in config.tools
            for secret in config.tools[tool].secrets
        }
        return [f"no tool of {slug} uses {name}" for name in sorted(names) if name not in declared]

    # -- sessions -----------------------------------------------------------------------------

    async def session_start(self, caller: Caller, params: dict[str, Any]) -> Reply:
        request = Request(
            agent=_slug(params),
            args=tuple(_strings(params, "args")) if "args" in params else (),
            by=caller.name,
            tty=bool(params.get("tty")),
            attach=bool(params.get("attach")),
            rows=_bounded(params, "rows", 24),
            columns=_bounded(params, "cols", 80),
            term=str(params.get("term") or ""),
        )
        if request.tty and not request.attach:
            raise Invalid("a terminal needs somebody attached to it")
        manager = self._daemon.sessions
        started = await manager.start(request)
        session = started.session
        if request.attach:

            async def gone() -> None:
                if not session.ended.is_set():
                    await manager.stop(session, reason="its operator left")

            caller.on_disconnect(gone)
        return Reply({"id": session.id, "pid": session.pid}, started.fds)

    async def session_wait(self, caller: Caller, params: dict[str, Any]) -> Reply:
        id = session_id(_param(params, "id", str))
        live = next((s for s in self._daemon.sessions.live if s.id == id), None)
        if live is not None:
            await live.ended.wait()
        record = await self._record(id)
        return Reply(
            {
                "exit_code": record.exit_code,
                "signal": record.exit_signal,
                "reason": record.reason,
            }
        )

    async def session_list(self, caller: Caller, params: dict[str, Any]) -> Reply:
        live = {session.id: session for session in self._daemon.sessions.live}
        rows = [self._live_row(session) for session in live.values()]
        if params.get("all"):
            records = await _thread(partial(self._daemon.vault.sessions, include_ended=True))
            rows += [_record_row(record) for record in records if record.id not in live]
        return Reply({"sessions": sorted(rows, key=lambda row: str(row["started_at"]))})

    async def session_show(self, caller: Caller, params: dict[str, Any]) -> Reply:
        id = _param(params, "id", str)
        try:
            session = self._daemon.sessions.get(id)
        except NotFound:
            record = await self._record(id)
            return Reply(
                {
                    **_record_row(record),
                    "workspace": record.workspace,
                    "variables": dict(record.variables),
                    "network": None,
                    "isolation": [],
                    "tools": [],
                }
            )
        used = await _thread(usage, session.pid)
        return Reply(
            {
                **self._live_row(session),
                "usage": {
                    "processes": used.processes,
                    "memory": used.memory,
                    "cpu_seconds": used.cpu,
                },
                "workspace": str(session.workspace or ""),
                "variables": {n: v.version for n, v in session.snapshot.variables.items()},
                "network": session.terms.network,
                "isolation": layers(session.terms.network, self._daemon.launcher.mode),
                "tools": [tool.name for tool in self._daemon.calls.tools(session)],
            }
        )

    async def session_stop(self, caller: Caller, params: dict[str, Any]) -> Reply:
        session = self._daemon.sessions.get(_param(params, "id", str))
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
            }
        )

    async def session_signal(self, caller: Caller, params: dict[str, Any]) -> Reply:
        session = self._daemon.sessions.get(_param(params, "id", str))
        number = _param(params, "signal", int)
        if number not in signal.valid_signals():
            raise Invalid(f"{number} is not a signal")
        if session.process is not None:
            await session.process.signal(number)
        return Reply({})

    async def session_logs(self, caller: Caller, params: dict[str, Any]) -> AsyncIterator[Any]:
        id = _param(params, "id", str)
        try:
            id = self._daemon.sessions.get(id).id
        except NotFound:
            id = (await self._record(id)).id
        directory = self._daemon.boot.paths.logs / id
        recorder = self._daemon.sessions.recorder(id)
        async for chunk in read_log(directory, recorder, follow=bool(params.get("follow"))):
            yield {"data": base64.b64encode(chunk).decode()}

    async def _record(self, id: str) -> SessionRecord:
        records = await _thread(partial(self._daemon.vault.sessions, include_ended=True))
        found = [r for r in records if r.id == id or (id and r.id.startswith(id))]
        if len(found) != 1:
            raise NotFound(
                f"no session {shown(id)}" if not found else f"{shown(id)} is ambiguous",
                hint="see: sandboxctl session list --all",
            )
        return found[0]

    def _live_row(self, session: Session) -> dict[str, Any]:
        return {
            "id": session.id,
            "agent": session.agent.slug,
            "policy": session.policy.name,
            "state": session.state,
            "pid": session.pid,
            "started_at": _iso(session.started_at),
            "ended_at": None,
            "exit_code": None,
            "exit_signal": None,
            "reason": session.stop_reason,
            "by": session.by,
            "calls_running": self._daemon.calls.running(session.id),
            "lowered": list(session.terms.lowered),
        }

    # -- audit and policy ---------------------------------------------------------------------

    async def audit_tail(self, caller: Caller, params: dict[str, Any]) -> AsyncIterator[Any]:
        count = _bounded(params, "n", 20, most=100_000)
        audit = self._daemon.audit
        last = 0
        for record in await _thread(audit.tail, count):
            last = max(last, record["seq"])
            yield record
        while params.get("follow"):
            await trio.sleep(0.2)
            for record in await _thread(audit.tail, 1000):
                if record["seq"] > last:
                    last = record["seq"]
                    yield record

    async def audit_verify(self, caller: Caller, params: dict[str, Any]) -> Reply:
        report = await _thread(self._daemon.audit.verify)
        return Reply(
            {
                "ok": report.ok,
                "records": report.records,
                "problem": None if report.first_bad is None else str(report.first_bad),
            }
        )

    async def policy_explain(self, caller: Caller, params: dict[str, Any]) -> Reply:
        agent = self._agent(params)
        tool, arguments = _param(params, "tool", str), params.get("arguments", {})
        config = self._daemon.config
        decision = decide(config, agent, tool, arguments)
        network = decision.network or "none"
        return Reply(
            {
                "verdict": decision.verdict,
                "rule": decision.rule,
                "reason": decision.reason,
                "argv": list(decision.argv),
                "inject": [
                    {"variable": s.variable, "as": s.as_name, "delivery": s.delivery}
                    for s in decision.inject
                ],
                "network": network,
                "limits": json.loads(json.dumps(attrs.asdict(decision.limits))),
                "isolation": layers(network, self._daemon.launcher.mode),
            }
        )

    def _agent(self, params: dict[str, Any]) -> Any:
        slug = _slug(params)
        agents = self._daemon.config.agents
        if slug not in agents:
            raise NotFound(
                f"no agent {shown(slug)}",
                hint="known agents: "
                + (", ".join(sorted(agents)) or "none")
                + "; after adding one: sandboxctl reload",
            )
        return agents[slug]


def _record_row(record: SessionRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "agent": record.agent,
        "policy": record.policy,
        "state": record.state,
        "pid": None,
        "started_at": _iso(record.started_at),
        "ended_at": _iso(record.ended_at),
        "exit_code": record.exit_code,
        "exit_signal": record.exit_signal,
        "reason": record.reason,
        "by": record.by,
        "calls_running": 0,
        "lowered": [],
    }


def _param(params: dict[str, Any], name: str, kind: type[T]) -> T:
    value = params.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise Invalid(f"parameter {name} must be of type {kind.__name__}")
    return value


def _slug(params: dict[str, Any]) -> str:
    return agent_slug(_param(params, "agent", str))


def _strings(params: dict[str, Any], name: str) -> list[str]:
    values = _param(params, name, list)
    if not all(isinstance(value, str) for value in values):
        raise Invalid(f"parameter {name} must be a list of strings")
    return values


def _bounded(params: dict[str, Any], name: str, default: int, *, most: int = 10_000) -> int:
    value = params.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise Invalid(f"parameter {name} must be a whole number from 1 to {most:,}")
    return value


def _decoded(name: str, text: Any) -> Secret:
    try:
        return Secret(base64.b64decode(text, validate=True))
    except (TypeError, ValueError, binascii.Error):
        raise Invalid(f"the value of {shown(name)} is not base64") from None


def _iso(at: float | None) -> str | None:
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def _thread(call: Any, *args: Any) -> Any:
    return await trio.to_thread.run_sync(call, *args)
