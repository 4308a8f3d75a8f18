"""A session as the broker sees one: what a call needs to know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from sandboxd.policy.model import Agent, Config
from sandboxd.vault.vault import Snapshot

__all__ = ["Session", "about", "belongs"]


class Session(Protocol):
    """What a call needs to know of the session that makes it."""

    @property
    def id(self) -> str: ...
    @property
    def config(self) -> Config:
        """The configuration in force when the session started: a reload changes nothing for it."""
        ...

    @property
    def agent(self) -> Agent: ...
    @property
    def snapshot(self) -> Snapshot: ...
    @property
    def workspace(self) -> Path | None: ...
    @property
    def overlay(self) -> int:
        """The mount namespace of the workspace's copy-on-write view, or -1."""
        ...

    @property
    def uid(self) -> int: ...


def about(session: Session) -> dict[str, str]:
    """Whom a record of a session concerns."""
    agent = session.agent
    return {"agent": agent.slug, "team": agent.team, "session": session.id}


def belongs(session: Session, team: str, agent: str) -> bool:
    """Whether a session is of this agent, in this team."""
    return (session.agent.team, session.agent.slug) == (team, agent)
