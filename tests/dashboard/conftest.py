"""A real daemon with two teams, agents, a tool and keys of every role; and a browser of sorts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from plain_pages import Pages, new_key, signed_in
from real_daemon import RealDaemon, directories

TEAMS = "teams:\n  red: {name: Red}\n  blue: {name: Blue}\n  empty: {name: Nobody yet}\n"

PUBLISH = """\
input:
  type: object
  properties: {to: {type: string}, text: {type: string}}
  required: [to]
  additionalProperties: false
argv: ["{to}"]
stdin: json
secrets: [{variable: TOKEN}]
"""

CAREFUL = """\
version: 1
description: publishing to production waits for a person
approval_timeout: 60s
rules:
  - deny: publish
    when: {to: [moon]}
    reason: nobody reads it there
  - ask: publish
    when: {to: [production]}
    reason: customers see it
  - allow: publish
"""


@pytest.fixture(scope="package")
def daemon() -> Iterator[RealDaemon]:
    with directories() as configured:
        configured.write("sandboxd.yaml", "version: 1\n" + TEAMS)
        configured.http()
        configured.write("policies/careful.yaml", CAREFUL)
        configured.tool("publish", '#!/bin/sh\necho "sent with $TOKEN to $1"\n', PUBLISH)
        for slug, team in (("writer", "red"), ("reader", "red"), ("spy", "blue")):
            keys: dict[str, Any] = {"team": team, "tools": "[publish]", "policy": "careful"}
            configured.agent(slug, "exec sleep 1000", **keys)
        configured.start()
        yield configured


@pytest.fixture(scope="package")
def keys(daemon: RealDaemon) -> dict[str, str]:
    """An API key of each role of team red, and the owner's of team blue."""
    made = {}
    for role in ("owner", "operator", "developer", "viewer"):
        agents = {"agents": ["writer"]} if role == "developer" else {}
        made[role] = new_key(daemon, "red", role, **agents)["secret"]
    made["blue"] = new_key(daemon, "blue", "owner")["secret"]
    return made


@pytest.fixture
def owner(daemon: RealDaemon, keys: dict[str, str]) -> Pages:
    return signed_in(daemon, keys["owner"])


@pytest.fixture
def session(daemon: RealDaemon) -> Iterator[str]:
    """A live session of the agent writer, which has its variable."""
    daemon.set("writer", TOKEN="correct-horse-battery-staple-1729")
    id = daemon.call("session.start", agent="writer")["id"]
    yield id
    if any(row["id"] == id for row in daemon.call("session.list")["sessions"]):
        daemon.call("session.stop", id=id, grace=0)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while Pages.opened:
        Pages.opened.pop().close()
