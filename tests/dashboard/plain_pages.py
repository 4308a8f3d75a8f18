"""The dashboard over plain HTTP, as a browser without scripts meets it."""

from __future__ import annotations

import html
import re
from typing import Any, ClassVar

import httpx2
from real_daemon import RealDaemon


class Pages:
    """The dashboard over plain HTTP, as a browser without scripts meets it."""

    #: Those of one test, closed at its end.
    opened: ClassVar[list[httpx2.Client]] = []

    def __init__(self, url: str) -> None:
        self.client = httpx2.Client(base_url=url, headers={"origin": url}, timeout=30)
        self.opened.append(self.client)
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


def new_key(daemon: RealDaemon, team: str, role: str, **more: Any) -> dict[str, Any]:
    label = f"{role} of {team}"
    got: dict[str, Any] = daemon.call("keys.create", team=team, role=role, label=label, **more)
    return got


def signed_in(daemon: RealDaemon, key: str) -> Pages:
    pages = Pages(daemon.url)
    got = pages.sign_in(key)
    assert got.status_code == 303, got.text
    return pages
