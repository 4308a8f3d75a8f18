"""Who is signed in to the dashboard, and for how long. The clock is the test's."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from sandboxd.access.pages import ABSOLUTE, IDLE, LINK_LIFETIME, Pages
from sandboxd.access.roles import Principal
from sandboxd.errors import Conflict

ANNA = Principal("key", "anna (an_sk_91be02)", "owner", "red", None, "key_1")
BEN = Principal("key", "ben (an_sk_3f9a1c)", "viewer", "blue", None, "key_2")
LINK = Principal("page", "root by link", "owner", "red")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pages(clock: Clock) -> Pages:
    return Pages(clock)


def signed_in(pages: Pages, principal: Principal) -> str:
    return pages.open(principal)[0].reveal().decode()


def test_a_token_finds_its_page_and_no_other(pages: Pages) -> None:
    anna, ben = signed_in(pages, ANNA), signed_in(pages, BEN)
    found = pages.find(anna, used=True)
    assert found is not None
    assert (found.principal.name, found.principal.kind) == (ANNA.name, "page")
    assert found.principal.key == "key_1"
    other = pages.find(ben, used=True)
    assert other is not None
    assert other.csrf != found.csrf
    assert pages.find(anna + "x", used=True) is None
    assert pages.find("", used=True) is None
    assert pages.find("\ud800", used=True) is None


def test_a_page_that_nobody_uses_ends(pages: Pages, clock: Clock) -> None:
    token = signed_in(pages, ANNA)
    clock.now += IDLE - 1
    assert pages.find(token, used=True) is not None
    clock.now += IDLE - 1
    assert pages.find(token, used=True) is not None
    clock.now += IDLE
    assert pages.find(token, used=True) is None


def test_what_its_script_asks_keeps_no_page_open(pages: Pages, clock: Clock) -> None:
    token = signed_in(pages, ANNA)
    for _ in range(int(IDLE) // 60 - 1):
        clock.now += 60
        assert pages.find(token, used=False) is not None
    clock.now += 60
    assert pages.find(token, used=False) is None


def test_a_page_ends_in_any_case(pages: Pages, clock: Clock) -> None:
    token = signed_in(pages, ANNA)
    while clock.now < 1000 + ABSOLUTE - 60:
        clock.now += 60
        assert pages.find(token, used=True) is not None
    clock.now += 60
    assert pages.find(token, used=True) is None


async def test_the_end_of_a_key_ends_its_pages_and_links_at_once(pages: Pages) -> None:
    first, second, other = (signed_in(pages, who) for who in (ANNA, ANNA, BEN))
    by_link, code = signed_in(pages, LINK), pages.link(ANNA).reveal().decode()
    await pages.end_key("key_1")
    assert pages.find(first, used=True) is None
    assert pages.find(second, used=True) is None
    assert pages.redeem(code) is None
    assert pages.find(other, used=True) is not None
    assert pages.find(by_link, used=True) is not None


def test_a_link_signs_in_once_and_soon(pages: Pages, clock: Clock) -> None:
    code, late = (pages.link(LINK).reveal().decode() for _ in range(2))
    assert pages.redeem("x" + code) is None
    assert pages.redeem(code) == LINK
    assert pages.redeem(code) is None
    clock.now += LINK_LIFETIME
    assert pages.redeem(late) is None


def test_signing_out_ends_the_page(pages: Pages) -> None:
    token = signed_in(pages, ANNA)
    pages.close(token)
    assert pages.find(token, used=True) is None
    pages.close(token)


def test_what_has_no_page(pages: Pages) -> None:
    token = Principal("token", "shop", "application", "red", frozenset({"a"}), "key_1", "jti")
    host = Principal("host", "root", "host", None)
    for principal in (token, host):
        with pytest.raises(Conflict):
            pages.open(principal)


def test_pages_of_one_key_are_bounded_and_the_oldest_goes_first(pages: Pages) -> None:
    other = signed_in(pages, BEN)
    tokens = [signed_in(pages, ANNA) for _ in range(40)]
    assert len(pages) == 32 + 1
    assert pages.find(tokens[7], used=True) is None
    assert pages.find(tokens[8], used=True) is not None
    assert pages.find(other, used=True) is not None


@pytest.mark.parametrize("made", [lambda p: p.open(ANNA)[0], lambda p: p.link(ANNA)])
def test_neither_tokens_nor_codes_are_kept(pages: Pages, made: Callable[[Pages], object]) -> None:
    secret = made(pages).reveal()  # type: ignore[attr-defined]
    kept = [o for o in gc.get_referrers(secret) if type(o).__name__ in ("Page", "OrderedDict")]
    assert not kept
    assert secret.decode() not in repr(vars(pages))
