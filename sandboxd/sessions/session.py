"""One session: an agent's process with the versions, policy and workspace it began with."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from sandboxd.isolation.client import Process
from sandboxd.policy import Agent, Config, Policy
from sandboxd.policy.decide import SessionTerms
from sandboxd.vault.vault import Snapshot

__all__ = ["Ending", "Session"]


@dataclass(frozen=True)
class Ending:
    """Why and how a session ended: ``code`` or ``signal`` of its program, and a reason to show."""

    code: int | None
    signal: int | None
    reason: str
    at: float = field(default_factory=time.time)


@dataclass(eq=False)
class Session:
    """A live session. Everything it may do was fixed when it started."""

    id: str
    agent: Agent
    config: Config
    policy: Policy
    terms: SessionTerms
    snapshot: Snapshot
    uid: int
    workspace: Path | None
    directory: Path
    by: str
    args: tuple[str, ...]
    tty: bool
    attached: bool
    #: On whose API key, token and application's user it rests; "" where on none.
    key: str = ""
    token: str = ""
    subject: str = ""
    #: Plain variables of this session alone, besides those of the agent's file.
    environment: Mapping[str, str] = field(default_factory=dict)
    #: Seconds until it is stopped; None: it runs as long as it likes.
    lifetime: float | None = None
    started_at: float = field(default_factory=time.time)
    #: The mount namespace that holds the copy-on-write view of the workspace; -1: there is none.
    overlay: int = -1
    #: Variables that its way out adds to the agent's environment.
    way_out: Mapping[bytes, bytes] = field(default_factory=dict)
    #: The session's own broker socket, listening.
    listener: socket.socket | None = None
    process: Process | None = None
    #: Work on behalf of the session while it runs; cancelled, and waited for, when it ends.
    tasks: trio.Nursery | None = None
    stop_reason: str = ""
    ending: Ending | None = None
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def team(self) -> str:
        """The agent's team when the session started."""
        return self.agent.team

    @property
    def about(self) -> dict[str, str]:
        """Whom a record of this session concerns."""
        return {"session": self.id, "agent": self.agent.slug, "team": self.team}

    @property
    def ends_at(self) -> float | None:
        """When its lifetime is over."""
        return None if self.lifetime is None else self.started_at + self.lifetime

    @property
    def pid(self) -> int:
        """The sandbox's init on the host, 0 before it runs."""
        return self.process.pid if self.process else 0

    @property
    def socket(self) -> Path:
        """The session's own broker socket, on the host."""
        return self.directory / "broker.sock"

    @property
    def state(self) -> str:
        if self.ending is not None:
            return "ended"
        return "running" if self.process is not None else "starting"
