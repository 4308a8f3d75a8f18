"""Who asks, and what they may do: principals, roles and permissions. Pure, total, deny by default.

An operator on the admin socket is a *host* principal, who may do everything for every team. All
others belong to one team, and nothing here lets them reach another one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

__all__ = ["KEY_ROLES", "PERMISSIONS", "Kind", "Permission", "Principal", "Role"]

#: What a method or a route needs. ``host`` is for what concerns all teams: configuration, daemon.
Permission = Literal[
    "agents.read",
    "agents.delete",
    "env.read",
    "env.write",
    "sessions.read",
    "sessions.run",  # start, stop, signal, exec, files
    "changes.read",
    "changes.land",
    "approvals.read",
    "approvals.decide",
    "tools.read",
    "policies.read",
    "audit.read",
    "keys.read",
    "keys.manage",
    "tokens.create",
    "tokens.revoke",
    "call",  # tools through MCP over HTTP
    "host",
]

#: ``application`` is the role of a token: sandboxes and tools of the agents that it names.
Role = Literal["host", "owner", "operator", "developer", "viewer", "application"]

#: The roles that an API key can have.
KEY_ROLES: tuple[Role, ...] = ("owner", "operator", "developer", "viewer")

#: How a principal proved itself: the admin socket's peer, an API key, a token, a dashboard's page.
Kind = Literal["host", "key", "token", "page"]

_VIEWER: frozenset[Permission] = frozenset(
    (
        "agents.read",
        "env.read",
        "sessions.read",
        "changes.read",
        "approvals.read",
        "tools.read",
        "policies.read",
        "audit.read",
    )
)
_DEVELOPER: frozenset[Permission] = _VIEWER | {"env.write"}
_OPERATOR: frozenset[Permission] = _DEVELOPER | {
    "sessions.run",
    "changes.land",
    "approvals.decide",
    "tokens.create",
    "tokens.revoke",
    "call",
    "keys.read",
}
_OWNER: frozenset[Permission] = _OPERATOR | {"keys.manage", "agents.delete"}

PERMISSIONS: Mapping[Role, frozenset[Permission]] = MappingProxyType(
    {
        "host": frozenset(get_args(Permission)),
        "owner": _OWNER,
        "operator": _OPERATOR,
        "developer": _DEVELOPER,
        "viewer": _VIEWER,
        "application": frozenset(("agents.read", "sessions.read", "sessions.run", "call")),
    }
)


@dataclass(frozen=True)
class Principal:
    """Who asks.

    ``name`` is for records and people and holds nothing secret: a login name, or a key's prefix
    and label. ``team`` None: all teams. ``agents`` None: every agent of the team. ``key`` is the
    id of the API key that this rests on, also by way of a token or of a dashboard's page;
    ``token`` the token's ``jti``; ``subject`` the application's user that the token is for;
    ``issued_at`` and ``expires_at`` the token's times, in seconds since 1970.
    """

    kind: Kind
    name: str
    role: Role
    team: str | None
    agents: frozenset[str] | None = None
    key: str | None = None
    token: str | None = None
    subject: str | None = None
    issued_at: float | None = None
    expires_at: float | None = None

    @property
    def own_name(self) -> str:
        """How it is named to itself: who holds a token learns nothing of the key behind it."""
        return (self.subject or "a token") if self.kind == "token" else self.name

    def may(self, permission: Permission) -> bool:
        """Whether the role has this permission at all."""
        return permission in PERMISSIONS[self.role]

    def reaches(self, team: str, agent: str | None = None) -> bool:
        """Whether this team, and of it this agent, is in reach at all."""
        if self.team is None:
            return True
        return self.team == team and (
            self.agents is None or (agent is not None and agent in self.agents)
        )
