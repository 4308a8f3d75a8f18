"""What operators can ask of a running daemon. Each method checks its parameters, acts, audits."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import Any

import trio

from sandboxd import __version__
from sandboxd.admin.agent_methods import AgentMethods
from sandboxd.admin.approval_methods import ApprovalMethods
from sandboxd.admin.change_methods import ChangeMethods
from sandboxd.admin.dashboard_methods import DashboardMethods
from sandboxd.admin.exec_methods import ExecMethods
from sandboxd.admin.file_methods import FileMethods
from sandboxd.admin.key_methods import KeyMethods
from sandboxd.admin.params import bounded, iso, known_agent, known_tool, param, thread
from sandboxd.admin.reach import agents_of, live_of, sees_record, tools_of
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.admin.server_methods import ServerMethods
from sandboxd.admin.session_methods import SessionMethods
from sandboxd.admin.tool_methods import ToolMethods
from sandboxd.admin.variable_methods import VariableMethods
from sandboxd.errors import Denied
from sandboxd.policy.explain import describe_tool, explain_call, explain_egress, outlook
from sandboxd.running import Daemon
from sandboxd.sessions.layers import layers

__all__ = ["Methods"]


class Methods:
    """The methods of one daemon, by their wire names in :meth:`table`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {
            **AgentMethods(self._daemon).table(),
            **VariableMethods(self._daemon).table(),
            **ServerMethods(self._daemon).table(),
            **SessionMethods(self._daemon).table(),
            **ExecMethods(self._daemon).table(),
            **ChangeMethods(self._daemon).table(),
            **FileMethods(self._daemon).table(),
            **ToolMethods(self._daemon).table(),
            **ApprovalMethods(self._daemon).table(),
            **KeyMethods(self._daemon).table(),
            **DashboardMethods(self._daemon).table(),
            "status": self.status,
            "reload": self.reload,
            "config.check": self.config_check,
            "tools.list": self.tools_list,
            "audit.tail": self.audit_tail,
            "audit.verify": self.audit_verify,
            "policy.explain": self.policy_explain,
            "policy.egress": self.policy_egress,
            "policy.outlook": self.policy_outlook,
            "tools.show": self.tools_show,
        }

    # -- the daemon ---------------------------------------------------------------------------

    async def status(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """The daemon for its operators; for a team's principal what of it is the team's."""
        daemon, boot, principal = self._daemon, self._daemon.boot, caller.principal
        if principal.team is not None:
            live = live_of(daemon, principal)
            return Reply(
                {
                    "version": __version__,
                    "started_at": iso(daemon.started_at),
                    "name": principal.own_name,
                    "team": principal.team,
                    "role": principal.role,
                    "sessions": len(live),
                    "calls": sum(daemon.calls.running(session.id) for session in live),
                    "approvals": sum(daemon.calls.approvals.count(s.id) for s in live)
                    if principal.may("approvals.read")
                    else 0,
                }
            )
        return Reply(
            {
                "version": __version__,
                "pid": os.getpid(),
                "mode": daemon.launcher.mode,
                "user": boot.identity.name if boot.identity else caller.name,
                "uid": os.geteuid(),
                "started_at": iso(daemon.started_at),
                "config": str(boot.paths.config),
                "state": str(boot.paths.state),
                "runtime": str(boot.paths.runtime),
                "http": boot.http.url if boot.http is not None else None,
                "generation": daemon.config.generation,
                "sessions": len(daemon.sessions.live),
                "calls": daemon.calls.running(),
                "approvals": len(daemon.calls.approvals.waiting),
                "key_custody": boot.custody,
                "warnings": daemon.warnings(),
            }
        )

    async def reload(self, caller: Caller, params: dict[str, Any]) -> Reply:
        changed = await self._daemon.reload(caller.name)
        return Reply(
            {
                "generation": self._daemon.config.generation,
                "changed": changed,
                "warnings": self._daemon.warnings(),
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

    async def tools_list(self, caller: Caller, params: dict[str, Any]) -> Reply:
        config = self._daemon.config
        wanted = tools_of(self._daemon, caller.principal)
        if params.get("agent") is not None:
            wanted = set(known_agent(self._daemon, params).tools)
        rows = [
            {
                "name": name,
                "description": tool.description,
                "secrets": [secret.variable for secret in tool.secrets],
                "shown": [secret.variable for secret in tool.secrets if not secret.redact],
                "network": tool.network,
                "workspace": tool.workspace,
                "timeout": float(tool.timeout),
                "source": tool.source,
            }
            for name, tool in sorted(config.tools.items())
            if name in wanted
        ]
        return Reply({"tools": rows})

    # -- audit and policy ---------------------------------------------------------------------

    async def audit_tail(self, caller: Caller, params: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """The last ``n`` records that the caller may see, then each new one.

        With ``since`` those after the record of that number instead, found without a search.
        """
        audit, principal = self._daemon.audit, caller.principal
        count = bounded(params, "n", 20, least=0, most=100_000)
        seen = audit.newest
        recent = partial(audit.tail, count)
        if principal.team is not None:
            sees = partial(sees_record, principal)
            recent = partial(recent, where=sees, having=f'"team":"{principal.team}"'.encode())
        if params.get("since") is not None:
            since = bounded(params, "since", 0, least=0, most=1 << 53)
            recent = partial(audit.tail, 100_000, after=since)
        records = await thread(recent)
        while True:
            for record in records:
                seen = max(seen, record["seq"])
                if sees_record(principal, record):
                    yield record
            if not params.get("follow"):
                return
            await trio.sleep(0.2)
            fresh = await thread(partial(audit.tail, 100_000, after=seen))
            records = [record for record in fresh if record["seq"] > seen]

    async def audit_verify(self, caller: Caller, params: dict[str, Any]) -> Reply:
        report = await thread(self._daemon.audit.verify)
        return Reply(
            {
                "ok": report.ok,
                "records": report.records,
                "problem": report.problem or None,
            }
        )

    async def policy_explain(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """The decision, and of each variable the version that the next session would get."""
        daemon, agent = self._daemon, known_agent(self._daemon, params)
        tool = param(params, "tool", str)
        found = explain_call(daemon.config, agent, tool, params.get("arguments", {}))
        variables = await thread(daemon.vault.of(agent.team).list, agent.slug)
        versions = {v.name: v.version for v in variables}
        for item in found["inject"]:
            item["version"] = versions.get(item["variable"])
        isolation = layers(
            found["network"], daemon.launcher, found["lowered"], egress=bool(found["egress"])
        )
        return Reply({**found, "isolation": isolation})

    async def policy_egress(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """What the agent, or one of its tools, may reach; and whether ``target`` is of it."""
        agent = known_agent(self._daemon, params)
        tool = known_tool(self._daemon, params) if params.get("tool") else None
        target, method = str(params.get("target") or ""), str(params.get("method") or "")
        return Reply(explain_egress(self._daemon.config, agent, tool, target, method))

    async def policy_outlook(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """What each agent can do: by the configuration in force, or by what the files say now."""
        host = caller.principal.team is None
        if params.get("files") and not host:
            raise Denied(
                "the configuration's files are the host's: its agents are everybody's",
                hint="leave 'files' away: what is in force is shown",
            )
        config = await self._daemon.check() if params.get("files") else self._daemon.config
        found = await thread(partial(outlook, config, servers=bool(params.get("servers"))))
        if not host:
            seen = agents_of(self._daemon, caller.principal)
            found = {slug: rows for slug, rows in found.items() if slug in seen}
        return Reply(
            {
                "generation": config.generation,
                "outlook": found,
                "warnings": list(config.warnings) if host else [],
            }
        )

    async def tools_show(self, caller: Caller, params: dict[str, Any]) -> Reply:
        found = describe_tool(self._daemon.config, known_tool(self._daemon, params))
        seen = agents_of(self._daemon, caller.principal)
        return Reply({**found, "agents": [slug for slug in found["agents"] if slug in seen]})
