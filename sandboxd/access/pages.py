"""Who is signed in: the table of the dashboard's pages, and the codes of one-time links.

All of it is in memory, so a restart of the daemon signs everybody out. Neither a page's token nor
a link's code is kept: what is looked up is their SHA-256, which tells nothing of them (both have
256 random bits).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sandboxd.access.roles import Principal
from sandboxd.errors import Conflict
from sandboxd.secret import Secret

__all__ = ["ABSOLUTE", "IDLE", "LINK_LIFETIME", "Page", "Pages", "room_for_one_more", "same"]

#: Seconds until a page ends that nobody uses (what its script asks by itself is no use of it), and
#: until it ends in any case.
IDLE = 30 * 60.0
ABSOLUTE = 12 * 3600.0

#: Seconds that the code of a one-time link is valid.
LINK_LIFETIME = 120.0

#: Pages of one key, pages in all, links that wait, and requests of one page at the same time.
_OF_ONE_KEY = 32
_PAGES = 2000
_LINKS = 64
_AT_ONCE = 8


def _awake() -> float:
    """Seconds that also pass while the host is asleep, and that no clock setting changes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(eq=False)
class Page:
    """One signed-in browser."""

    principal: Principal
    began: float
    used: float
    #: Stands in every form; a foreign page can't know it.
    csrf: str = field(repr=False)
    #: Requests that it has under way.
    running: int = 0
    #: What its tabs remember while it is open; nothing secret.
    memory: dict[str, Any] = field(default_factory=dict, repr=False)


class Pages:
    """The pages of one daemon."""

    def __init__(self, clock: Callable[[], float] = _awake) -> None:
        self._clock = clock
        self._pages: OrderedDict[bytes, Page] = OrderedDict()
        self._links: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def open(self, principal: Principal) -> tuple[Secret, Page]:
        """Sign in; gives the token that the browser keeps, and the page.

        The oldest pages of the same key, and then of anybody, make room. Raises Conflict for a
        principal that can't have a page.
        """
        if principal.kind == "token" or principal.team is None:
            raise Conflict("a page of the dashboard belongs to an API key or a one-time link")
        self._sweep()
        own = [at for at, page in self._pages.items() if page.principal.key == principal.key]
        for at in own[: max(0, len(own) - _OF_ONE_KEY + 1)]:
            del self._pages[at]
        while len(self._pages) >= _PAGES:
            self._pages.popitem(last=False)
        token, now = secrets.token_urlsafe(32), self._clock()
        page = Page(replace(principal, kind="page"), now, now, secrets.token_urlsafe(32))
        self._pages[_digest(token)] = page
        return Secret(token.encode()), page

    def find(self, token: str, *, used: bool) -> Page | None:
        """The page of a token, unless it is over; ``used``: by a person, not by its script."""
        at = _digest(token)
        page = self._pages.get(at)
        if page is None:
            return None
        if self._over(page):
            del self._pages[at]
            return None
        if used:
            page.used = self._clock()
        return page

    def close(self, token: str) -> None:
        """Sign out. Nothing happens where the page is over already."""
        self._pages.pop(_digest(token), None)

    async def end_key(self, key: str) -> None:
        """End every page and link that rests on this API key, at once."""
        self.end(lambda principal: principal.key == key)

    def end(self, ends: Callable[[Principal], bool]) -> int:
        """End the pages and links of these principals; how many pages there were."""
        self._sweep()
        found = [at for at, page in self._pages.items() if ends(page.principal)]
        for at in found:
            del self._pages[at]
        for at in [at for at, (who, _) in self._links.items() if ends(who)]:
            del self._links[at]
        return len(found)

    def link(self, principal: Principal) -> Secret:
        """A code that signs ``principal`` in, once and within :data:`LINK_LIFETIME` seconds."""
        while len(self._links) >= _LINKS:
            self._links.popitem(last=False)
        code = secrets.token_urlsafe(32)
        self._links[_digest(code)] = (principal, self._clock() + LINK_LIFETIME)
        return Secret(code.encode())

    def redeem(self, code: str) -> Principal | None:
        """Whom a link's code signs in; None for one that is used, over or unknown."""
        found = self._links.pop(_digest(code), None)
        if found is None or self._clock() >= found[1]:
            return None
        return found[0]

    def _sweep(self) -> None:
        for at in list(self._ended()):
            del self._pages[at]

    def _ended(self) -> Iterator[bytes]:
        return (at for at, page in self._pages.items() if self._over(page))

    def _over(self, page: Page) -> bool:
        now = self._clock()
        return now >= page.used + IDLE or now >= page.began + ABSOLUTE


def same(given: str, expected: str) -> bool:
    """Whether two texts are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())


def room_for_one_more(page: Page) -> bool:
    """Whether the page may have one more request under way."""
    return page.running < _AT_ONCE


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
