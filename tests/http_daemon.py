"""A daemon with HTTP on and two teams' agents, and clients with keys for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from real_daemon import RealDaemon, directories

#: An agent that waits to be stopped, and one of another team.
WAITS = 'echo "started with $GREETING"; exec sleep 86000'


@contextmanager
def served(http: str = "listen: 127.0.0.1:0") -> Iterator[RealDaemon]:
    with directories() as daemon:
        daemon.write("sandboxd.yaml", "version: 1\nteams: {other: {name: The Others}}\n")
        daemon.http(http)
        daemon.agent("worker", WAITS)
        daemon.agent("second", WAITS)
        daemon.agent("foreign", WAITS, team="other")
        daemon.agent("failing", "exit 3")
        daemon.start()
        yield daemon


def new_key(daemon: RealDaemon, role: str = "owner", **more: Any) -> str:
    return str(daemon.call("keys.create", role=role, label=f"a {role}", **more)["secret"])


def client_of(daemon: RealDaemon, bearer: str) -> httpx2.Client:
    """A client as an application has it; the caller closes it."""
    return httpx2.Client(
        base_url=daemon.url, headers={"authorization": f"Bearer {bearer}"}, timeout=30
    )
