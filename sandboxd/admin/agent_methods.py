"""Agents over the admin socket: listed, shown, and deleted with all that is theirs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import trio

from sandboxd.admin.params import iso, known_agent, thread
from sandboxd.admin.reach import agents_of, live_of
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.errors import Conflict, Denied, SandboxdError, Unavailable
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
        return {
            "agents.list": self.list_,
            "agents.show": self.show,
            "agents.delete": self.delete,
        }

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
                "changed_at": iso(await thread(_changed, self._file(agent))),
                "program": Path(agent.command[0]).name,
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

    async def delete(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """Take an agent out of the configuration, stop its sessions, remove its variables.

        Its file stays beside the others under a name that is not read, to be had back. Denied
        where the file is not the daemon's to change: a key is no reason to write what belongs to
        root. What was begun is done to the end, also when who asked is gone.
        """
        agent = known_agent(self._daemon, params)
        file = self._file(agent)
        kept = file.with_name(f"{file.name}.deleted-{int(time.time())}")
        await thread(_check_ours, file)
        await self._check_nothing_staged()
        with trio.CancelScope(shield=True):
            await self._daemon.audit.append(
                "agent.deleted", agent=agent.slug, team=agent.team, by=caller.name, kept=kept.name
            )
            await self._take_out(caller, file, kept)
            ended = await self._daemon.sessions.stop_where(
                lambda one: one.agent.slug == agent.slug and one.team == agent.team,
                f"its agent was deleted by {caller.name}",
            )
            removed = await self._forget_variables(caller, agent)
        return Reply(
            {
                "slug": agent.slug,
                "kept": kept.name,
                "ended_sessions": [one.id for one in ended],
                "removed_variables": removed,
            }
        )

    async def _take_out(self, caller: Caller, file: Path, kept: Path) -> None:
        """Rename the file and reload; or rename it back, and say why not."""
        try:
            await thread(file.rename, kept)
        except OSError as failure:
            raise Unavailable(f"{file} can't be renamed: {failure.strerror}") from None
        try:
            await self._daemon.reload(caller.name)
        except SandboxdError:
            await thread(kept.rename, file)
            # What is wrong, and in whose file, is for the host's operators alone.
            raise Conflict(
                "the configuration can't be loaded without it, so nothing was deleted",
                hint="the host's operators see why: sandboxctl config check",
            ) from None

    async def _check_nothing_staged(self) -> None:
        """Deleting one team's agent must not put in force what the host's operators are writing,
        nor tell what is wrong with it."""
        try:
            config = await self._daemon.check()
        except SandboxdError:
            raise _staged() from None
        if config.generation != self._daemon.config.generation:
            raise _staged()

    async def _forget_variables(self, caller: Caller, agent: Agent) -> list[str]:
        """A later agent of the same name must not begin with this one's secrets."""
        variables = self._daemon.vault.of(agent.team)
        names = sorted(v.name for v in await thread(variables.list, agent.slug))
        if names:
            await self._daemon.audit.append(
                "env.removed",
                agent=agent.slug,
                team=agent.team,
                names=names,
                by=caller.name,
                now=True,
            )
            await thread(partial(variables.remove, by=caller.name), agent.slug, names)
        return names

    def _file(self, agent: Agent) -> Path:
        return self._daemon.boot.paths.config / agent.source

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


def _staged() -> Conflict:
    return Conflict(
        "the configuration's files are not what is in force: somebody is changing them",
        hint="try again when the host's operators have put them in force: sandboxctl reload",
    )


def _changed(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _check_ours(file: Path) -> None:
    """Both the file and its directory belong to the daemon's user: it may take the file away."""
    try:
        owners = {file.stat().st_uid, file.parent.stat().st_uid}
    except OSError as failure:
        raise Unavailable(f"{file} can't be looked at: {failure.strerror}") from None
    if owners != {os.geteuid()} or not os.access(file.parent, os.W_OK):
        raise Denied(
            f"agent {file.stem} comes from a file that this daemon may not change",
            hint=f"whoever owns the host's configuration removes agents/{file.name} and runs: "
            "sandboxctl reload",
        )
