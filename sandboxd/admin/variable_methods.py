"""Variables over the admin socket: values go in, names and fingerprints come out."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from sandboxd.admin.params import iso, known_agent, param, slug, strings, thread
from sandboxd.admin.reach import no_agent
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.errors import Conflict, Invalid, NotFound, SandboxdError
from sandboxd.maskable import review
from sandboxd.names import agent_slug, shown, variable_name
from sandboxd.policy import DEFAULT_TEAM
from sandboxd.policy.explain import launched_for
from sandboxd.policy.model import SecretSpec
from sandboxd.running import Daemon
from sandboxd.secret import Secret
from sandboxd.sessions.session import Session

__all__ = ["VariableMethods"]


class VariableMethods:
    """``env.list``, ``env.set``, ``env.remove`` and ``env.revoke``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {
            "env.list": self.list_,
            "env.set": self.set_,
            "env.remove": self.remove,
            "env.revoke": self.revoke,
        }

    async def list_(self, caller: Caller, params: dict[str, Any]) -> Reply:
        team, agent = await self._place(caller, params, known=True)
        variables = await thread(self._daemon.vault.of(team).list, agent)
        return Reply(
            {
                "agent": agent,
                "team": team,
                "elsewhere": await self._elsewhere(caller, team, agent),
                "variables": [
                    {
                        "name": v.name,
                        "version": v.version,
                        "set_at": iso(v.set_at),
                        "set_by": v.set_by,
                        "last_used_at": iso(v.last_used_at),
                        "fingerprint": v.fingerprint,
                        "size": v.size,
                        "held_by": self._holding(team, agent, {v.name: v.version - 1}),
                    }
                    for v in variables
                ],
            }
        )

    async def set_(self, caller: Caller, params: dict[str, Any]) -> Reply:
        found = known_agent(self._daemon, params)
        team, agent = found.team, found.slug
        encoded = param(params, "values", dict)
        if not encoded:
            raise Invalid("no variable to set")
        # Names are checked before they are recorded: what stands for one is often a value.
        values = {variable_name(name): _decoded(name, text) for name, text in encoded.items()}
        now, force = bool(params.get("now")), bool(params.get("force"))
        weak, forced = review(values, plain=self._plain(agent), force=force)
        # Once begun it is done to the end: a client that leaves must not leave half of it.
        with trio.CancelScope(shield=True):
            await self._daemon.audit.append(
                "env.set",
                agent=agent,
                team=team,
                names=sorted(values),
                by=caller.name,
                now=now,
                forced=list(forced),
            )
            async with self._told_when_failing("env.set", team, agent, caller):
                put = partial(self._daemon.vault.of(team).set, by=caller.name)
                versions = await thread(put, agent, values)
                older = {name: version - 1 for name, version in versions.items()}
                cancelled = await self._revoke(caller, team, agent, older) if now else 0
        return Reply(
            {
                "agent": agent,
                "team": team,
                "versions": versions,
                "warnings": weak + self._unused(agent, versions),
                "live_sessions": self._holding(team, agent, older),
                "cancelled_calls": cancelled,
            }
        )

    async def remove(self, caller: Caller, params: dict[str, Any]) -> Reply:
        team, agent = await self._place(caller, params, known=False)
        variables = self._daemon.vault.of(team)
        names = [variable_name(name) for name in strings(params, "names")]
        now = bool(params.get("now"))
        with trio.CancelScope(shield=True):
            await self._daemon.audit.append(
                "env.removed", agent=agent, team=team, names=sorted(names), by=caller.name, now=now
            )
            async with self._told_when_failing("env.removed", team, agent, caller):
                # What is removed already can still be taken from the sessions that hold it.
                gone = self._held(team, agent, names) if now else {}
                there = {v.name for v in await thread(variables.list, agent)}
                wanted = [name for name in names if name in there or name not in gone]
                remove = partial(variables.remove, by=caller.name)
                versions = await thread(remove, agent, wanted) if wanted else {}
                versions = {**gone, **versions}
                cancelled = await self._revoke(caller, team, agent, versions) if now else 0
        return Reply(
            {
                "agent": agent,
                "team": team,
                "versions": versions,
                "live_sessions": self._holding(team, agent, versions),
                "cancelled_calls": cancelled,
            }
        )

    async def revoke(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """Take every version but the newest from live sessions: what ``set`` with ``now`` does."""
        team, agent = await self._place(caller, params, known=True)
        names = [variable_name(name) for name in strings(params, "names")]
        newest = {v.name: v.version for v in await thread(self._daemon.vault.of(team).list, agent)}
        if absent := [name for name in names if name not in newest]:
            raise NotFound(
                f"{agent} has no variable {shown(absent[0])}",
                hint=f"see: sandboxctl env list {agent}",
            )
        older = {name: newest[name] - 1 for name in names}
        lost = self._holding(team, agent, older)
        with trio.CancelScope(shield=True):
            cancelled = await self._revoke(caller, team, agent, older)
        return Reply(
            {
                "agent": agent,
                "team": team,
                "versions": older,
                "sessions": lost,
                "cancelled_calls": cancelled,
            }
        )

    async def _place(
        self, caller: Caller, params: dict[str, Any], *, known: bool
    ) -> tuple[str, str]:
        """The team and the agent whose variables are meant.

        Variables belong to the team that the agent was in when they were set. Those of a team that
        it left, and of an agent that is configured no more, are reached by naming the team.
        """
        agent, config = slug(params), self._daemon.config
        if params.get("team") is not None:
            team = agent_slug(param(params, "team", str))
            if not caller.principal.reaches(team, agent):
                raise no_agent(agent)
            return team, agent
        if known or agent in config.agents:
            return known_agent(self._daemon, params).team, agent
        teams = await thread(self._daemon.vault.teams_of, agent)
        if len(teams) > 1:
            raise Conflict(
                f"agents {agent} of several teams have variables: {', '.join(teams)}",
                hint="name one: --team TEAM",
            )
        return (teams or [DEFAULT_TEAM])[0], agent

    async def _elsewhere(self, caller: Caller, team: str, agent: str) -> list[str]:
        """Other teams in which the agent has variables: it was there before, or another was."""
        teams = await thread(self._daemon.vault.teams_of, agent)
        return [one for one in teams if one != team and caller.principal.reaches(one, agent)]

    @asynccontextmanager
    async def _told_when_failing(
        self, action: str, team: str, agent: str, caller: Caller
    ) -> AsyncIterator[None]:
        """An action is recorded before it happens; one that then fails is recorded as failed."""
        try:
            yield
        except SandboxdError as failure:
            about = {"agent": agent, "team": team, "by": caller.name}
            await self._daemon.audit.append(
                "admin.failed", action=action, **about, problem=failure.code
            )
            raise

    async def _revoke(
        self, caller: Caller, team: str, agent: str, versions: Mapping[str, int]
    ) -> int:
        """Take old versions from live sessions and kill the calls that hold them."""
        cancelled = 0
        for name, version in versions.items():
            if version < 1:
                continue
            about = {"agent": agent, "team": team, "name": name, "by": caller.name}
            await self._daemon.audit.append("env.revoked", up_to=version, **about)
            revoke = partial(self._daemon.vault.of(team).revoke, up_to=version)
            await thread(revoke, agent, name)
            cancelled += await self._daemon.calls.cancel_using(team, agent, name, version)
        return cancelled

    def _held(self, team: str, agent: str, names: Collection[str]) -> dict[str, int]:
        """The newest version of each name that a live session of the agent still may use."""
        held: dict[str, int] = {}
        for session in self._sessions(team, agent):
            variables = session.snapshot.variables
            for name in variables.keys() & set(names):
                if not self._daemon.vault.is_revoked(variables[name]):
                    held[name] = max(held.get(name, 0), variables[name].version)
        return held

    def _sessions(self, team: str, agent: str) -> list[Session]:
        """Live sessions that the agent began in this team."""
        live = self._daemon.sessions.live
        return [s for s in live if (s.team, s.agent.slug) == (team, agent)]

    def _holding(self, team: str, agent: str, versions: Mapping[str, int]) -> list[str]:
        """Live sessions whose snapshot still has one of these versions, unless it was revoked."""
        vault = self._daemon.vault
        return [
            session.id
            for session in self._sessions(team, agent)
            if any(
                (sealed := session.snapshot.variables.get(name)) is not None
                and sealed.version <= version
                and not vault.is_revoked(sealed)
                for name, version in versions.items()
            )
        ]

    def _declared(self, agent: str) -> list[SecretSpec]:
        """What the tools of the agent declare."""
        config = self._daemon.config
        tools = launched_for(config, config.agents[agent])
        return [secret for tool in tools for secret in tool.secrets]

    def _plain(self, agent: str) -> Collection[str]:
        """Variables that every tool of the agent takes as plain settings."""
        declared = self._declared(agent)
        secret = {spec.variable for spec in declared if spec.redact}
        return {spec.variable for spec in declared} - secret

    def _unused(self, agent: str, names: Mapping[str, int]) -> list[str]:
        """A warning for each variable that no tool of the agent declares: it would do nothing."""
        declared = {spec.variable for spec in self._declared(agent)}
        return [f"no tool of {agent} uses {name}" for name in sorted(names) if name not in declared]


def _decoded(name: str, text: Any) -> Secret:
    try:
        return Secret(base64.b64decode(text, validate=True))
    except (TypeError, ValueError, binascii.Error):
        raise Invalid(f"the value of {shown(name)} is not base64") from None
