"""Which agents, sessions, questions and records a principal can see at all.

Everything that an admin method shows or touches for one team goes through these few functions.
What is out of reach does not exist: it is missing from lists, and naming it gets the NotFound of a
name that nobody ever used, hint included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from sandboxd.access.roles import Principal
from sandboxd.admin.params import thread
from sandboxd.errors import NotFound
from sandboxd.names import shown
from sandboxd.policy import Agent
from sandboxd.running import Daemon
from sandboxd.sessions.session import Session
from sandboxd.vault.store import SessionRecord

__all__ = [
    "agents_of",
    "live_of",
    "no_agent",
    "question_of",
    "records_of",
    "sees_agent",
    "sees_record",
    "sees_session",
    "session_of",
    "tools_of",
]


def agents_of(daemon: Daemon, principal: Principal) -> dict[str, Agent]:
    """The configured agents in reach, by slug, in order."""
    return {
        slug: agent
        for slug, agent in sorted(daemon.config.agents.items())
        if principal.reaches(agent.team, slug)
    }


def sees_agent(daemon: Daemon, principal: Principal, slug: str) -> bool:
    """Whether the agent is configured and in reach; the host's operators see any slug."""
    if principal.team is None:
        return True
    agent = daemon.config.agents.get(slug)
    return agent is not None and principal.reaches(agent.team, slug)


def no_agent(slug: str) -> NotFound:
    """What every agent out of reach gets, whether it exists or not."""
    return NotFound(f"no agent {shown(slug)}", hint="see: sandboxctl agents")


def tools_of(daemon: Daemon, principal: Principal) -> set[str]:
    """Tools that the principal may read about: all, or those that an agent in reach lists."""
    known: set[str] = set(daemon.config.tools)
    if principal.team is None:
        return known
    return known & {t for agent in agents_of(daemon, principal).values() for t in agent.tools}


def sees_session(principal: Principal, session: Session | SessionRecord) -> bool:
    """Whether a session, live or ended, is in reach.

    A token's sessions are those that its own user started; without a user, those of this token.
    """
    agent = session.agent if isinstance(session, SessionRecord) else session.agent.slug
    if not principal.reaches(session.team, agent):
        return False
    if principal.kind != "token":
        return True
    if principal.subject:
        return session.subject == principal.subject
    return bool(principal.token) and session.token == principal.token


def live_of(daemon: Daemon, principal: Principal) -> list[Session]:
    """Live sessions in reach, oldest first."""
    return [session for session in daemon.sessions.live if sees_session(principal, session)]


async def records_of(daemon: Daemon, principal: Principal) -> list[SessionRecord]:
    """The records of all sessions in reach, live and ended."""
    found = await thread(partial(daemon.vault.sessions, include_ended=True))
    return [record for record in found if sees_session(principal, record)]


async def session_of(
    daemon: Daemon, principal: Principal, id: str, *, live_only: bool = False
) -> str:
    """The whole id of a session in reach, named by it or by an unambiguous beginning.

    A live one goes before ended ones. NotFound otherwise, as for an id that never was.
    """
    live = [session.id for session in live_of(daemon, principal)]
    found = _matching(live, id)
    if not found and not live_only:
        found = _matching([record.id for record in await records_of(daemon, principal)], id)
    if len(found) == 1:
        return found[0]
    if found:
        raise NotFound(f"{shown(id)} is ambiguous", hint="give more of it: sandboxctl session list")
    if live_only:
        raise NotFound(f"no live session {shown(id)}", hint="see: sandboxctl session list")
    raise NotFound(f"no session {shown(id)}", hint="see: sandboxctl session list --all")


def question_of(daemon: Daemon, principal: Principal, id: str, *, abbreviated: bool) -> str:
    """The whole id of a question in reach that waits or was answered lately. NotFound otherwise."""
    seen = {
        key
        for key, (team, agent) in daemon.calls.approvals.asked().items()
        if principal.reaches(team, agent)
    }
    if id in seen:
        return id
    waiting = [one.question.id for one in daemon.calls.approvals.waiting if one.question.id in seen]
    found = _matching(waiting, id) if abbreviated else []
    if len(found) == 1:
        return found[0]
    if found:
        raise NotFound(f"{shown(id)} is ambiguous", hint="sandboxctl approvals list")
    raise NotFound(f"no call {shown(id)} waits for approval", hint="sandboxctl approvals list")


def sees_record(principal: Principal, record: Mapping[str, Any]) -> bool:
    """Whether an audit record concerns what the principal reaches.

    Records without a team are the host's: the daemon's own life, configuration, acceptances.
    """
    if principal.team is None:
        return True
    team, agent = record.get("team"), record.get("agent")
    return isinstance(team, str) and principal.reaches(
        team, agent if isinstance(agent, str) else None
    )


def _matching(ids: list[str], given: str) -> list[str]:
    if given in ids:
        return [given]
    return list(_beginning(ids, given)) if given else []


def _beginning(ids: list[str], given: str) -> Iterator[str]:
    return (id for id in ids if id.startswith(given))
