"""The configured agents over the admin socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sandboxd.admin.params import iso, known_agent, thread
from sandboxd.admin.reach import agents_of, live_of
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.policy import Agent
from sandboxd.policy.decide import session_terms
from sandboxd.policy.explain import launched_for
from sandboxd.running import Daemon
from sandboxd.vault.vault import Variable

__all__ = ["AgentMethods"]


class AgentMethods:
    """``agents.*``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {"agents.list": self.list_, "agents.show": self.show}

    async def list_(self, caller: Caller, params: dict[str, Any]) -> Reply:
        rows = []
        live = live_of(self._daemon, caller.principal)
        for slug, agent in agents_of(self._daemon, caller.principal).items():
            rows.append(
                {
                    **_named(agent),
                    "variables": len(await self._variables(agent)),
                    "sessions": sum((s.team, s.agent.slug) == (agent.team, slug) for s in live),
                }
            )
        return Reply({"agents": rows})

    async def show(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """One agent whole. Who may not read variables gets null for them."""
        agent, config = known_agent(self._daemon, params), self._daemon.config
        principal, team = caller.principal, config.settings.teams.get(agent.team)
        terms = session_terms(config, agent)
        return Reply(
            {
                **_named(agent),
                "team_name": team.name if team else None,
                "source": agent.source,
                "args_allowed": agent.args_allowed,
                "network": terms.network,
                "workspace": terms.workspace,
                "lowered": list(terms.lowered),
                "environment": sorted(agent.environment),
                "variables": self._rows(agent, await self._variables(agent))
                if principal.may("env.read")
                else None,
                "sessions": [
                    {"id": s.id, "state": s.state, "started_at": iso(s.started_at), "by": s.by}
                    for s in live_of(self._daemon, principal)
                    if (s.team, s.agent.slug) == (agent.team, agent.slug)
                ],
            }
        )

    async def _variables(self, agent: Agent) -> list[Variable]:
        return await thread(self._daemon.vault.of(agent.team).list, agent.slug)

    def _rows(self, agent: Agent, held: list[Variable]) -> list[dict[str, Any]]:
        """The variables that are set, and those that a tool declares and nobody set."""
        rows: dict[str, dict[str, Any]] = {v.name: _variable(v.name, v.version) for v in held}
        for tool in launched_for(self._daemon.config, agent):
            for spec in tool.secrets:
                row = rows.setdefault(spec.variable, _variable(spec.variable, None))
                row["required"] = row["required"] or spec.required
                row["tools"].append(tool.name)
        return sorted(rows.values(), key=lambda row: str(row["name"]))


def _variable(name: str, version: int | None) -> dict[str, Any]:
    return {"name": name, "version": version, "required": False, "tools": []}


def _named(agent: Agent) -> dict[str, Any]:
    return {
        "slug": agent.slug,
        "team": agent.team,
        "description": agent.description,
        "policy": agent.policy,
        "tools": list(agent.tools),
    }
