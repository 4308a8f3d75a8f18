"""Agents over the admin socket: shown, and deleted with all that is theirs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import trio

from sandboxd.admin.params import iso, known_agent, thread
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.errors import Denied, SandboxdError, Unavailable
from sandboxd.policy import Agent
from sandboxd.running import Daemon

__all__ = ["AgentMethods"]


class AgentMethods:
    """``agents.show`` and ``agents.delete``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {"agents.show": self.show, "agents.delete": self.delete}

    async def show(self, caller: Caller, params: dict[str, Any]) -> Reply:
        agent = known_agent(self._daemon, params)
        live = [one for one in self._daemon.sessions.live if one.agent.slug == agent.slug]
        return Reply(
            {
                "slug": agent.slug,
                "description": agent.description,
                "team": agent.team,
                "policy": agent.policy,
                "tools": list(agent.tools),
                "program": Path(agent.command[0]).name,
                "changed_at": iso(await thread(_changed, self._file(agent))),
                "sessions": len(live),
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
            raise

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
