"""The dashboard over the admin socket: a link that signs in once, and the end of its pages."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import trio

from sandboxd.access.pages import LINK_LIFETIME
from sandboxd.access.roles import Principal, Role
from sandboxd.access.scopes import has_team
from sandboxd.admin.params import iso, param, thread
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.errors import Denied, Invalid, NotFound, Unavailable
from sandboxd.names import shown
from sandboxd.running import Daemon

__all__ = ["DashboardMethods"]

#: What somebody on the admin socket can be on a page. A page is never the host's: what concerns
#: every team isn't done in a browser.
_ROLES: Mapping[str, Role] = {"owner": "owner", "operator": "operator", "viewer": "viewer"}

#: The team of who names none.
_TEAM = "default"

#: Seconds for which a verification of the whole log stands for the next one who asks.
_FRESH = 15.0


class DashboardMethods:
    """``dashboard.link``, ``dashboard.end`` and ``audit.state``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._verifying = trio.Lock()
        self._verified: tuple[float, dict[str, Any]] | None = None

    def table(self) -> Mapping[str, Method]:
        return {
            "dashboard.link": self.link,
            "dashboard.end": self.end,
            "audit.state": self.audit_state,
        }

    async def link(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """A path with a code in its fragment, and where this daemon serves it.

        Who holds an API key gets a page of that key. The host's operators get one of a team.
        """
        boot = self._daemon.boot
        if boot.http is None:
            raise Unavailable(
                "this daemon serves no HTTP, so it has no dashboard",
                hint="add 'http: {}' to sandboxd.yaml and restart the daemon",
            )
        principal = self._signing_in(caller.principal, params)
        await self._daemon.audit.append(
            "dashboard.link",
            by=caller.name,
            team=principal.team,
            role=principal.role,
            key=principal.key,
        )
        code = self._daemon.pages.link(principal)
        url = boot.http.url if boot.http.path is None else None
        return Reply(
            {
                "url": url,
                "path": f"/sign-in#code={code.reveal().decode()}",
                "team": principal.team,
                "role": principal.role,
                "valid_for": LINK_LIFETIME,
            }
        )

    async def end(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """End pages: the host's operators those of every team or of one, others their key's."""
        principal = caller.principal
        if principal.kind == "token":
            raise Denied("a token has no page of the dashboard")
        team = param(params, "team", str) if params.get("team") is not None else None
        self._check_team(team)

        def ends(one: Principal) -> bool:
            if principal.team is None:
                return team in (None, one.team)
            return one.key is not None and one.key == principal.key

        await self._daemon.audit.append(
            "dashboard.ended", by=caller.name, team=principal.team or team, key=principal.key
        )
        return Reply({"ended": self._daemon.pages.end(ends)})

    async def audit_state(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """Whether the log is whole, for who may read of it: no more, as it is every team's."""
        async with self._verifying:
            now = trio.current_time()
            if self._verified is None or now - self._verified[0] > _FRESH:
                report = await thread(self._daemon.audit.verify)
                at = iso(time.time())
                self._verified = (trio.current_time(), {"ok": report.ok, "checked_at": at})
        return Reply(self._verified[1])

    def _signing_in(self, principal: Principal, params: dict[str, Any]) -> Principal:
        role = param(params, "role", str) if params.get("role") is not None else None
        team = param(params, "team", str) if params.get("team") is not None else None
        if principal.kind == "token":
            raise Denied("a token can't sign in to the dashboard", hint="an API key can")
        if principal.team is not None:
            if role not in (None, principal.role) or team not in (None, principal.team):
                raise Invalid("the page of an API key has the key's team and role")
            return principal
        self._check_team(team)
        if role is not None and role not in _ROLES:
            raise Invalid(f"role is one of {', '.join(_ROLES)}")
        return Principal(
            "page", f"{principal.name} by link", _ROLES[role or "owner"], team or _TEAM
        )

    def _check_team(self, team: str | None) -> None:
        if team is not None and not has_team(self._daemon.config, team):
            raise NotFound(f"no team {shown(team)}", hint="teams are listed in sandboxd.yaml")
