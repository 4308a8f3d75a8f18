"""API keys and tokens over the admin socket: made, listed, rotated, ended. A key is told once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sandboxd.access.keys import ApiKey
from sandboxd.access.roles import Principal
from sandboxd.access.tokens import LONGEST_LIFETIME
from sandboxd.admin.params import iso, param, strings
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.durations import LONGEST, duration
from sandboxd.errors import Denied, Invalid
from sandboxd.policy import DEFAULT_TEAM
from sandboxd.running import Daemon

__all__ = ["KeyMethods"]

#: How long a rotated key goes on by default: as long as the longest token of it.
_OVERLAP = LONGEST_LIFETIME


class KeyMethods:
    """``keys.*`` and ``tokens.*``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {
            "keys.list": self.list_,
            "keys.show": self.show,
            "keys.create": self.create,
            "keys.deactivate": self.deactivate,
            "keys.rotate": self.rotate,
            "tokens.create": self.create_token,
            "tokens.revoke": self.revoke_token,
            "tokens.rotate_key": self.rotate_signing_key,
            "tokens.jwks": self.jwks,
        }

    async def list_(self, caller: Caller, params: dict[str, Any]) -> Reply:
        team = param(params, "team", str) if params.get("team") is not None else None
        keys = await self._daemon.access.list_keys(caller.principal, team)
        if not params.get("all", True):
            keys = [key for key in keys if self._daemon.access.state(key) == "active"]
        return Reply({"keys": [self._row(key, caller.principal) for key in keys]})

    async def show(self, caller: Caller, params: dict[str, Any]) -> Reply:
        return Reply(self._row(self._key(caller.principal, params), caller.principal))

    async def create(self, caller: Caller, params: dict[str, Any]) -> Reply:
        key, secret = await self._daemon.access.create_key(
            team=_team(params),
            role=param(params, "role", str),
            label=param(params, "label", str),
            agents=strings(params, "agents") if params.get("agents") is not None else None,
            lifetime=_seconds(params, "expires_in"),
            by=caller.principal,
        )
        return Reply({"key": self._row(key, caller.principal), "secret": secret.reveal().decode()})

    async def deactivate(self, caller: Caller, params: dict[str, Any]) -> Reply:
        access, key = self._daemon.access, self._key(caller.principal, params)
        sessions = await access.deactivate(key.id, by=caller.principal)
        ended = access.find(key.id, caller.principal)
        return Reply({"key": self._row(ended, caller.principal), "ended_sessions": sessions})

    async def rotate(self, caller: Caller, params: dict[str, Any]) -> Reply:
        access, old = self._daemon.access, self._key(caller.principal, params)
        overlap = _seconds(params, "overlap", zero=True)
        key, secret, sessions = await access.rotate(
            old.id,
            overlap=_OVERLAP if overlap is None else overlap,
            lifetime=_seconds(params, "expires_in"),
            by=caller.principal,
        )
        return Reply(
            {
                "key": self._row(key, caller.principal),
                "secret": secret.reveal().decode(),
                "replaced": self._row(access.find(old.id, caller.principal), caller.principal),
                "ended_sessions": sessions,
            }
        )

    async def create_token(self, caller: Caller, params: dict[str, Any]) -> Reply:
        access, by = self._daemon.access, caller.principal
        if params.get("key") is not None:
            key = access.find(param(params, "key", str), by)
            if by.kind != "host" and key.id != by.key:
                # Such a token would outlive the key that it was made with.
                raise Denied("a key makes tokens of its own", hint="leave away which key")
            by = key.principal
        token = await access.issue_token(
            by,
            strings(params, "agents") if params.get("agents") is not None else None,
            param(params, "subject", str) if params.get("subject") is not None else None,
            _seconds(params, "expires_in", LONGEST_LIFETIME),
            by=caller.name,
        )
        return Reply(
            {
                "token": token.token.reveal().decode(),
                "id": token.jti,
                "expires_at": iso(token.expires_at),
            }
        )

    async def revoke_token(self, caller: Caller, params: dict[str, Any]) -> Reply:
        access, by, team = self._daemon.access, caller.principal, _team(params)
        if params.get("subject") is not None:
            subject = param(params, "subject", str)
            sessions = await access.revoke_user(subject, team=team, by=by)
            return Reply({"subject": subject, "team": team, "ended_sessions": sessions})
        id = param(params, "id", str)
        known = access.read_token(id, by) if id.count(".") == 2 else None
        if known is not None:
            team, id = known
        sessions = await access.revoke_token(id, team=team, by=by)
        return Reply({"id": id, "team": team, "ended_sessions": sessions})

    async def rotate_signing_key(self, caller: Caller, params: dict[str, Any]) -> Reply:
        access = self._daemon.access
        sessions = await access.rotate_signing_key(
            now=params.get("now") is True, by=caller.principal
        )
        return Reply({**await access.jwks(), "ended_sessions": sessions})

    async def jwks(self, caller: Caller, params: dict[str, Any]) -> Reply:
        return Reply(await self._daemon.access.jwks())

    def _key(self, by: Principal, params: dict[str, Any]) -> ApiKey:
        return self._daemon.access.find(param(params, "key", str), by)

    def _row(self, key: ApiKey, by: Principal) -> dict[str, Any]:
        return {
            "id": key.id,
            "prefix": key.prefix,
            "label": key.label,
            "team": key.team,
            "role": key.role,
            "agents": None if key.agents is None else list(key.agents),
            "state": self._daemon.access.state(key),
            "created_at": iso(key.created_at),
            "created_by": key.created_by,
            "last_used_at": iso(key.last_used_at),
            "expires_at": iso(key.expires_at),
            "deactivated_at": iso(key.deactivated_at),
            "deactivated_by": key.deactivated_by or None,
            "replaces": key.replaces or None,
            "made_keys": [one.id for one in self._daemon.access.made_by(key, by)],
            "sessions": [one.id for one in self._daemon.sessions.live if one.key == key.id],
        }


def _team(params: dict[str, Any]) -> str:
    return param(params, "team", str) if params.get("team") is not None else str(DEFAULT_TEAM)


def _seconds(
    params: dict[str, Any], name: str, most: float = LONGEST, *, zero: bool = False
) -> float | None:
    """A duration as text: 30s, 15m, 12h, 90d; a number alone is seconds."""
    given = params.get(name)
    if given is None:
        return None
    if not isinstance(given, str):
        raise Invalid(f"parameter {name} is a duration: 30s, 15m, 12h, 90d")
    return duration(given, most=most, zero=zero)
