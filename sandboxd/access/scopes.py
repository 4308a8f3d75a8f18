"""Who may make which key, see it, and name which agents. Pure decisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from sandboxd.access.keys import ApiKey
from sandboxd.access.roles import KEY_ROLES, PERMISSIONS, Principal, Role
from sandboxd.errors import Denied, Invalid, NotFound
from sandboxd.names import shown
from sandboxd.policy import Config

__all__ = ["has_team", "key_role", "new_key_role", "reaches_key", "scope_of"]

MAX_AGENTS = 32


def reaches_key(by: Principal, key: ApiKey) -> bool:
    """Whether a principal can see a key: one of its team, for no agents beyond its own."""
    if by.team is None:
        return True
    return by.team == key.team and (
        by.agents is None or (key.agents is not None and by.agents >= set(key.agents))
    )


def scope_of(config: Config, principal: Principal, agents: Collection[str]) -> tuple[str, ...]:
    """The agents in order. NotFound for one that isn't known or in reach, Invalid for none."""
    if not 0 < len(agents) <= MAX_AGENTS:
        raise Invalid(f"name 1 to {MAX_AGENTS} agents, or none for all")
    for slug in agents:
        agent = config.agents.get(slug)
        if agent is None or not principal.reaches(agent.team, slug):
            raise NotFound(f"no agent {shown(slug)}", hint="see: sandboxctl agents")
    return tuple(sorted(set(agents)))


def new_key_role(
    config: Config, team: str, role: str, agents: Collection[str] | None, by: Principal
) -> Role:
    """The role of a key that ``by`` may make.

    Raises Invalid for a role or scope that makes no sense, NotFound for a team or agent out of
    reach, Denied for a key that could do more than who makes it.
    """
    checked = key_role(role)
    if not has_team(config, team) or by.team not in (None, team):
        raise NotFound(f"no team {shown(team)}", hint="teams are listed in sandboxd.yaml")
    if agents is None and checked == "developer":
        raise Invalid("a developer's key is for named agents", hint="name them: --agent AGENT")
    if agents is not None:
        scope_of(config, dataclasses.replace(by, team=team), agents)
    elif by.agents is not None:
        raise Denied("a key for some agents can't make one for all", hint="name the agents")
    if not PERMISSIONS[checked] <= PERMISSIONS[by.role]:
        raise Denied(f"a key of the role {by.role} can't make one of the role {checked}")
    return checked


def has_team(config: Config, team: str) -> bool:
    """Whether agents and keys can be of this team."""
    return config.settings.has_team(team)


def key_role(role: Any) -> Role:
    """A role that keys have. Raises Invalid."""
    for known in KEY_ROLES:
        if known == role:
            return known
    raise Invalid(
        f"{shown(str(role))} is not a role of API keys", hint=f"one of {', '.join(KEY_ROLES)}"
    )
