"""What operators can ask of a running daemon. Each method checks its parameters, acts, audits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import Any

import trio

from sandboxd import __version__
from sandboxd.admin.approval_methods import ApprovalMethods
from sandboxd.admin.change_methods import ChangeMethods
from sandboxd.admin.params import bounded, iso, known_agent, known_tool, param, thread
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.admin.server_methods import ServerMethods
from sandboxd.admin.session_methods import SessionMethods
from sandboxd.admin.tool_methods import ToolMethods
from sandboxd.admin.variable_methods import VariableMethods
from sandboxd.errors import StoreError
from sandboxd.policy.explain import describe_tool, explain_call, outlook
from sandboxd.running import Daemon
from sandboxd.sessions.layers import layers

__all__ = ["Methods"]


class Methods:
    """The methods of one daemon, by their wire names in :meth:`table`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {
            **VariableMethods(self._daemon).table(),
            **ServerMethods(self._daemon).table(),
            **SessionMethods(self._daemon).table(),
            **ChangeMethods(self._daemon).table(),
            **ToolMethods(self._daemon).table(),
            **ApprovalMethods(self._daemon).table(),
            "status": self.status,
            "reload": self.reload,
            "config.check": self.config_check,
            "agents.list": self.agents_list,
            "tools.list": self.tools_list,
            "audit.tail": self.audit_tail,
            "audit.verify": self.audit_verify,
            "policy.explain": self.policy_explain,
            "policy.outlook": self.policy_outlook,
            "tools.show": self.tools_show,
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
                "started_at": iso(daemon.started_at),
                "config": str(boot.paths.config),
                "state": str(boot.paths.state),
                "runtime": str(boot.paths.runtime),
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

    async def agents_list(self, caller: Caller, params: dict[str, Any]) -> Reply:
        rows = []
        for slug, agent in sorted(self._daemon.config.agents.items()):
            rows.append(
                {
                    "slug": slug,
                    "description": agent.description,
                    "policy": agent.policy,
                    "tools": list(agent.tools),
                    "variables": len(await thread(self._daemon.vault.list, slug)),
                    "sessions": sum(s.agent.slug == slug for s in self._daemon.sessions.live),
                }
            )
        return Reply({"agents": rows})

    async def tools_list(self, caller: Caller, params: dict[str, Any]) -> Reply:
        config = self._daemon.config
        wanted = set(config.tools)
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
        audit = self._daemon.audit
        count = bounded(params, "n", 20, least=0, most=100_000)
        with contextlib.suppress(StoreError):  # which must not keep anybody from reading
            await audit.settle()
        seen = max(0, audit.last - count)
        while True:
            for record in await thread(audit.tail, audit.last - seen):
                if record["seq"] > seen:
                    seen = record["seq"]
                    yield record
            if not params.get("follow"):
                return
            await trio.sleep(0.2)

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
        versions = {v.name: v.version for v in await thread(daemon.vault.list, agent.slug)}
        for item in found["inject"]:
            item["version"] = versions.get(item["variable"])
        return Reply(
            {**found, "isolation": layers(found["network"], daemon.launcher, found["lowered"])}
        )

    async def policy_outlook(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """What each agent can do: by the configuration in force, or by what the files say now."""
        config = await self._daemon.check() if params.get("files") else self._daemon.config
        return Reply(
            {
                "generation": config.generation,
                "outlook": await thread(
                    partial(outlook, config, servers=bool(params.get("servers")))
                ),
                "warnings": list(config.warnings),
            }
        )

    async def tools_show(self, caller: Caller, params: dict[str, Any]) -> Reply:
        return Reply(describe_tool(self._daemon.config, known_tool(self._daemon, params)))
