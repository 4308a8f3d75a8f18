"""Somebody in an agent's place: what one call needs of a session, where no session lives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sandboxd.names import new_session_id
from sandboxd.policy import Agent, Config
from sandboxd.vault.vault import Snapshot

__all__ = ["Standing"]


@dataclass(frozen=True)
class Standing:
    """A :class:`sandboxd.broker.session.Session` for one call, with what is in force now.

    It has no copy-on-write view, and so nothing that needs a session's own uid.
    """

    agent: Agent
    config: Config
    snapshot: Snapshot
    workspace: Path | None
    id: str = field(default_factory=new_session_id)
    overlay: int = -1
    uid: int = -1
