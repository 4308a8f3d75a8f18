"""Who is let in: by a key, by a token, and nobody else, with the same words for all of them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import trio
from access_parts import HOST, Parts

from sandboxd.access.roles import Principal
from sandboxd.access.tokens import LEEWAY, MAX_BEARER
from sandboxd.errors import Denied, Invalid, NotFound, SandboxdError, Unauthenticated


async def refused(parts: Parts, bearer: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await parts.access.authenticate(bearer)
    assert (caught.value.code, caught.value.exit_code) == ("invalid_api_key", 4)
    return f"{caught.value.message} {caught.value.hint}"


async def token_for(parts: Parts, principal: Principal, **options: Any) -> str:
    token = await parts.access.issue_token(principal, **options)
    return token.token.reveal().decode()


async def test_a_key_is_who_it_was_made_for(parts: Parts) -> None:
    key, text = await parts.key_of("developer", agents=["crawler", "mailer"], label="ann, laptop")
    assert re.fullmatch(r"an_sk_[0-9a-f]{64}", text)
    found = await parts.access.authenticate(text)
    assert found == Principal(
        "key",
        f"ann, laptop ({text[:12]})",
        "developer",
        "default",
        frozenset({"crawler", "mailer"}),
        key.id,
    )
    assert text not in repr((key, found))


async def test_a_key_is_in_none_of_the_files(parts: Parts) -> None:
    _, text = await parts.key_of()
    parts.reopen()
    assert (await parts.access.authenticate(text)).role == "operator"
    for path in parts.directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert text.encode()[:14] not in content, path
            assert bytes.fromhex(text[6:]) not in content, path


async def test_keys_are_all_different(parts: Parts) -> None:
    made = [await parts.key_of() for _ in range(20)]
    assert len({text for _, text in made}) == len({key.id for key, _ in made}) == 20


async def test_everything_else_reads_the_same(parts: Parts) -> None:
    gone, gone_text = await parts.key_of()
    await parts.access.deactivate(gone.id, by=HOST)
    _, old_text = await parts.key_of(lifetime=60.0)
    _, good = await parts.key_of()
    parts.now += 61
    wrong = good[:-1] + ("0" if good[-1] != "0" else "1")
    odd = ["", " ", "\0", good + " ", good[:-1], good.upper(), good + good, "é" * 70, "\udc80"]
    texts = [gone_text, old_text, wrong, "an_sk_" + "0" * 64, *odd, "x" * (MAX_BEARER + 1)]
    assert len({await refused(parts, text) for text in texts}) == 1
    assert (await parts.access.authenticate(good)).role == "operator"


def calls_of(function: Callable[[], Any]) -> list[str]:
    """Every function that runs, in order."""
    seen: list[str] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "c_call"):
            seen.append(arg.__name__ if event == "c_call" else frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return seen


async def test_each_refusal_takes_the_same_steps(parts: Parts) -> None:
    """Constant work: nothing about a key can be learnt from how long it takes to refuse it."""
    gone, gone_text = await parts.key_of()
    await parts.access.deactivate(gone.id, by=HOST)
    _, good = await parts.key_of(lifetime=3600.0)
    near = good[:-1] + ("0" if good[-1] != "0" else "1")

    def attempt(text: str) -> list[str]:
        def run() -> None:
            assert parts.access._by_key(text) is None

        return calls_of(run)

    unknown = attempt("an_sk_" + os.urandom(32).hex())
    assert "KeyRing.hash" in " ".join(unknown)
    for text in (near, gone_text, "an_sk_" + "0" * 64, "nonsense"):
        assert attempt(text) == unknown


class TestTokens:
    async def test_a_token_reaches_what_its_key_and_its_scope_reach(self, parts: Parts) -> None:
        key, text = await parts.key_of()
        one = await parts.access.authenticate(text)
        bearer = await token_for(parts, one, agents=["crawler"], subject="ann@example.org")
        found = await parts.access.authenticate(bearer)
        assert found.reaches("default", "crawler")
        assert not found.reaches("default", "mailer")
        assert not found.reaches("blue", "cook")
        assert (found.kind, found.role, found.key) == ("token", "application", key.id)
        assert found.subject == "ann@example.org"
        assert found.name == f"a test ({text[:12]}) for ann@example.org"
        assert bearer not in repr(found)

    async def test_without_a_scope_it_reaches_what_its_key_reaches(self, parts: Parts) -> None:
        _, text = await parts.key_of(agents=["crawler"])
        bearer = await token_for(parts, await parts.access.authenticate(text))
        found = await parts.access.authenticate(bearer)
        assert found.agents == frozenset({"crawler"})
        assert found.subject is None
        _, text = await parts.key_of()
        bearer = await token_for(parts, await parts.access.authenticate(text))
        assert (await parts.access.authenticate(bearer)).agents is None

    async def test_its_times(self, parts: Parts) -> None:
        _, text = await parts.key_of()
        one = await parts.access.authenticate(text)
        for asked, lives in ((None, 3600), (60.0, 60), (0.5, 1), (86400.0, 86400), (1e9, 86400)):
            token = await parts.access.issue_token(one, lifetime=asked)
            assert token.expires_at - parts.now == lives
        bearer = await token_for(parts, one, lifetime=60.0)
        parts.now += 60 + LEEWAY - 1
        await parts.access.authenticate(bearer)
        parts.now += 1
        await refused(parts, bearer)

    async def test_it_lives_no_longer_than_its_key(self, parts: Parts) -> None:
        _, text = await parts.key_of(lifetime=100.0)
        one = await parts.access.authenticate(text)
        token = await parts.access.issue_token(one)
        assert token.expires_at - parts.now == 100
        parts.now += 100
        await refused(parts, token.token.reveal().decode())

    async def test_it_makes_no_tokens(self, parts: Parts) -> None:
        _, text = await parts.key_of()
        bearer = await token_for(parts, await parts.access.authenticate(text))
        holder = await parts.access.authenticate(bearer)
        with pytest.raises(Denied, match="a token can't make tokens"):
            await parts.access.issue_token(holder)

    @pytest.mark.parametrize("role", ["viewer", "developer"])
    async def test_readers_make_no_tokens(self, parts: Parts, role: str) -> None:
        _, text = await parts.key_of(role, agents=["crawler"])
        with pytest.raises(Denied, match=f"a key of the role {role} can't make tokens"):
            await parts.access.issue_token(await parts.access.authenticate(text))

    async def test_agents_out_of_reach_do_not_exist(self, parts: Parts) -> None:
        _, text = await parts.key_of(agents=["crawler"])
        one = await parts.access.authenticate(text)
        texts = set()
        for slug in ("mailer", "cook", "nobody"):
            with pytest.raises(NotFound) as caught:
                await parts.access.issue_token(one, agents=["crawler", slug])
            texts.add(f"{caught.value}{caught.value.hint}".replace(slug, "X"))
        assert len(texts) == 1
        for agents in ([], ["crawler"] * 33):
            with pytest.raises(Invalid):
                await parts.access.issue_token(one, agents=agents)

    @pytest.mark.parametrize("subject", ["x" * 201, "a\nb", "\x1b[31m", "key_0123456789ab"])
    async def test_odd_users_are_refused(self, parts: Parts, subject: str) -> None:
        _, text = await parts.key_of()
        with pytest.raises(Invalid) as caught:
            await parts.access.issue_token(await parts.access.authenticate(text), subject=subject)
        assert subject not in str(caught.value)

    async def test_a_token_of_a_key_that_ended_is_refused(self, parts: Parts) -> None:
        key, text = await parts.key_of()
        bearer = await token_for(parts, await parts.access.authenticate(text))
        assert (await parts.access.authenticate(bearer)).key == key.id
        await parts.access.deactivate(key.id, by=HOST)
        await refused(parts, bearer)
        parts.reopen()
        await refused(parts, bearer)

    async def test_another_installations_token_is_refused(self, parts: Parts) -> None:
        _, text = await parts.key_of()
        bearer = await token_for(parts, await parts.access.authenticate(text))
        (parts.directory / "other").mkdir()
        other = Parts(parts.directory / "other")
        try:
            await refused(other, bearer)
            await refused(other, text)
        finally:
            other.close()

    async def test_a_token_is_recorded_before_it_exists(self, parts: Parts) -> None:
        key, text = await parts.key_of()
        one = await parts.access.authenticate(text)
        token = await parts.access.issue_token(one, agents=["crawler"], subject="ann")
        (record,) = parts.events("token.created")
        assert record["token"] == token.jti
        assert (record["key"], record["agents"], record["subject"]) == (key.id, ["crawler"], "ann")
        assert record["by"] == one.name
        parts.audit.close()
        with pytest.raises(SandboxdError):
            await parts.access.issue_token(one)


async def test_the_last_use_is_seen_at_once_and_written_later(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandboxd.access.uses.EVERY", 0.05)
    key, text = await parts.key_of()
    bearer = await token_for(parts, await parts.access.authenticate(text))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.access.run)
        parts.now += 100
        await parts.access.authenticate(text)
        assert parts.access.find(key.id, HOST).last_used_at == parts.now
        (row,) = parts.vault.credentials.api_keys()
        assert row.last_used_at is None  # no request waited for a disk
        with trio.fail_after(20):
            while row.last_used_at != parts.now:
                await trio.sleep(0.01)
                (row,) = parts.vault.credentials.api_keys()
        parts.now += 5
        await parts.access.authenticate(bearer)  # the key's last use, too
        nursery.cancel_scope.cancel()
    last = parts.now
    assert parts.reopen().find(key.id, HOST).last_used_at == last
