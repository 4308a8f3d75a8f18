"""What each admin method needs: a permission, and which of its parameters say whom it concerns.

A method that has no line here is not served. Whoever adds a method adds its line; the gate
(:mod:`sandboxd.admin.perform`) does the rest before the method sees its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from sandboxd.access.roles import Permission

__all__ = ["NEEDS", "Need", "Scope"]

#: Where the team and the agent that a call concerns come from. In every case but ``own`` and
#: ``host`` what the caller can't reach is NotFound, with the same words as what doesn't exist.
#:
#: ``agent``     parameter ``agent``, which has to be there
#: ``agent?``    the same where it is there; without it the method shows what its caller reaches
#: ``session``   parameter ``id``, a session live or ended; it becomes the whole id
#: ``live``      the same, live sessions only
#: ``place``     parameter ``session`` (live) where it is there, else parameter ``agent``
#: ``approval``  parameter ``id``, a question that waits or was answered; an abbreviation becomes
#:               the whole id where ``abbreviated``
#: ``team``      each of a list ``agents``, where it is there; parameter ``team`` is filled in for a
#:               caller of one team
#: ``own``       the method itself looks at ``caller.principal``: lists, and what concerns nobody
#: ``host``      everything: no team's principal may
#:
#: A parameter ``team``, whatever the method, may name no other than the caller's own.
Scope = Literal["agent", "agent?", "session", "live", "place", "approval", "team", "own", "host"]


@dataclass(frozen=True)
class Need:
    """What one method asks of its caller."""

    permission: Permission
    scope: Scope
    #: Whether the beginning of an approval's id is enough: for looking only.
    abbreviated: bool = False
    #: Whether the method reads about a parameter ``tool``, which has to be in reach where it is
    #: there. Not for what decides about a call: that answers alike for every tool not listed.
    tool: bool = False


NEEDS: Mapping[str, Need] = MappingProxyType(
    {
        "status": Need("agents.read", "own"),
        "reload": Need("host", "host"),
        "config.check": Need("host", "host"),
        "agents.list": Need("agents.read", "own"),
        "agents.show": Need("agents.read", "agent"),
        "agents.delete": Need("agents.delete", "agent"),
        "env.list": Need("env.read", "agent"),
        "env.set": Need("env.write", "agent"),
        "env.remove": Need("env.write", "agent"),
        "env.revoke": Need("env.write", "agent"),
        "session.start": Need("sessions.run", "agent"),
        "session.run": Need("sessions.run", "agent"),
        "session.list": Need("sessions.read", "own"),
        "session.show": Need("sessions.read", "session"),
        "session.wait": Need("sessions.read", "session"),
        "session.logs": Need("sessions.read", "session"),
        "session.stop": Need("sessions.run", "live"),
        "session.signal": Need("sessions.run", "live"),
        "session.exec": Need("sessions.run", "live"),
        "session.diff": Need("changes.read", "session"),
        "session.apply": Need("changes.land", "session"),
        "session.discard": Need("changes.land", "session"),
        "session.files.read": Need("sessions.run", "live"),
        "session.files.write": Need("sessions.run", "live"),
        "session.files.remove": Need("sessions.run", "live"),
        "session.files.list": Need("sessions.run", "live"),
        "session.files.info": Need("sessions.run", "live"),
        "session.files.exists": Need("sessions.run", "live"),
        "session.files.mkdir": Need("sessions.run", "live"),
        "session.files.rename": Need("sessions.run", "live"),
        "approvals.list": Need("approvals.read", "own"),
        "approvals.watch": Need("approvals.read", "own"),
        "approvals.show": Need("approvals.read", "approval", abbreviated=True),
        "approvals.approve": Need("approvals.decide", "approval"),
        "approvals.deny": Need("approvals.decide", "approval"),
        "tools.list": Need("tools.read", "agent?"),
        "tools.show": Need("tools.read", "own", tool=True),
        "tools.pins": Need("tools.read", "own"),
        "tools.run": Need("call", "place"),
        "tools.place": Need("call", "place"),
        # Acceptances hold for every team's agents.
        "tools.inspect": Need("host", "host"),
        "tools.accept": Need("host", "host"),
        "tools.forget": Need("host", "host"),
        "policy.explain": Need("policies.read", "agent"),
        "policy.egress": Need("policies.read", "agent", tool=True),
        "policy.outlook": Need("policies.read", "own"),
        "keys.list": Need("keys.read", "team"),
        "keys.show": Need("keys.read", "own"),
        "keys.create": Need("keys.manage", "team"),
        "keys.deactivate": Need("keys.manage", "own"),
        "keys.rotate": Need("keys.manage", "own"),
        "tokens.create": Need("tokens.create", "team"),
        "tokens.revoke": Need("tokens.revoke", "team"),
        # The key signs every team's tokens.
        "tokens.rotate_key": Need("host", "host"),
        "tokens.jwks": Need("agents.read", "own"),
        "audit.tail": Need("audit.read", "own"),
        "audit.state": Need("audit.read", "own"),
        "dashboard.link": Need("agents.read", "own"),
        "dashboard.end": Need("agents.read", "own"),
        # One chain holds every team's records, and it is whole or it isn't.
        "audit.verify": Need("host", "host"),
    }
)
