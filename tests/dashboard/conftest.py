"""A real daemon with two teams, agents, a tool and keys of every role; and a browser of sorts."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from real_daemon import RealDaemon, directories

TEAMS = "teams:\n  red: {name: Red}\n  blue: {name: Blue}\n"

PUBLISH = """\
input: {type: object, properties: {to: {type: string}}, required: [to], additionalProperties: false}
argv: ["{to}"]
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


class Pages:
    """The dashboard over plain HTTP, as a browser without scripts meets it."""

    def __init__(self, url: str) -> None:
        self.client = httpx2.Client(base_url=url, headers={"origin": url}, timeout=30)
        self.url = url

    def sign_in(self, key: str) -> httpx2.Response:
        return self.client.post("/sign-in", data={"key": key})

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.client.get(path, headers=headers)

    def read(self, path: str) -> str:
        """A page's text; it has to be there."""
        got = self.get(path)
        assert got.status_code == 200, (path, got.status_code, got.text)
        return got.text

    @property
    def csrf(self) -> str:
        return mark_of(self.read("/tools"))

    def post(self, path: str, **fields: str) -> httpx2.Response:
        return self.client.post(path, data={"csrf": self.csrf, **fields})


def mark_of(page: str) -> str:
    found = re.search(r'<meta name="csrf" content="([^"]+)">', page)
    assert found is not None, page
    return found[1]


def told(page: str) -> str:
    """What a page says without its tags, blanks as one."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


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


def new_key(daemon: RealDaemon, team: str, role: str, **more: Any) -> dict[str, Any]:
    label = f"{role} of {team}"
    got: dict[str, Any] = daemon.call("keys.create", team=team, role=role, label=label, **more)
    return got


@pytest.fixture
def owner(daemon: RealDaemon, keys: dict[str, str]) -> Pages:
    return signed_in(daemon, keys["owner"])


def signed_in(daemon: RealDaemon, key: str) -> Pages:
    pages = Pages(daemon.url)
    got = pages.sign_in(key)
    assert got.status_code == 303, got.text
    return pages
