"""Tokens that end before their time, the keys that sign them, and requests that end with both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from access_parts import HOST, Parts, Running

from sandboxd.access.roles import Principal
from sandboxd.access.tokens import LEEWAY, Token
from sandboxd.errors import Denied, Invalid, NotFound, Unauthenticated


async def holder(parts: Parts) -> Principal:
    _, text = await parts.key_of()
    return await parts.access.authenticate(text)


def bearer(token: Token) -> str:
    return token.token.reveal().decode()


async def accepted(parts: Parts, token: Token) -> bool:
    try:
        await parts.access.authenticate(bearer(token))
    except Unauthenticated:
        return False
    return True


class TestOneToken:
    async def test_it_and_its_sessions_end_and_no_other(self, parts: Parts) -> None:
        one = await holder(parts)
        gone, kept = [await parts.access.issue_token(one, subject="ann") for _ in range(2)]
        parts.running += [
            Running("s-1", str(one.key), gone.jti, "ann"),
            Running("s-2", str(one.key), kept.jti, "ann"),
            Running("s-3", str(one.key)),
        ]
        assert await parts.access.revoke_token(gone.jti, team="default", by=HOST) == ["s-1"]
        assert [await accepted(parts, token) for token in (gone, kept)] == [False, True]
        assert not parts.access.admits(str(one.key), gone.jti)
        parts.reopen()
        assert [await accepted(parts, token) for token in (gone, kept)] == [False, True]
        (record,) = parts.events("token.revoked")
        assert (record["token"], record["team"], record["by"]) == (gone.jti, "default", "root")

    async def test_a_team_revokes_its_own_only(self, parts: Parts) -> None:
        token = await parts.access.issue_token(await holder(parts))
        _, text = await parts.key_of("operator", team="blue")
        blue = await parts.access.authenticate(text)
        with pytest.raises(NotFound):
            await parts.access.revoke_token(token.jti, team="default", by=blue)
        assert await parts.access.revoke_token(token.jti, team="blue", by=blue) == []
        assert await accepted(parts, token)
        assert parts.access.read_token(bearer(token), blue) is None
        assert parts.access.read_token(bearer(token), HOST) == ("default", token.jti)

    @pytest.mark.parametrize("jti", ["", "tok_", "tok_" + "0" * 23, "tok_" + "G" * 24, "a.b.c"])
    async def test_what_is_no_id_is_told_and_not_quoted(self, parts: Parts, jti: str) -> None:
        with pytest.raises(Invalid, match="not the id of a token") as caught:
            await parts.access.revoke_token(jti, team="default", by=HOST)
        assert not jti or jti not in str(caught.value)

    async def test_what_was_revoked_stays_so_when_the_clock_is_set_back(self, parts: Parts) -> None:
        token = await parts.access.issue_token(await holder(parts))
        await parts.access.revoke_token(token.jti, team="default", by=HOST)
        for back in (60, 3600, 0):
            parts.now -= back
            assert not await accepted(parts, token)

    async def test_old_revocations_are_forgotten_long_after_their_tokens(
        self, parts: Parts
    ) -> None:
        for days in (0, 15, 40):
            parts.now += days * 86400
            await parts.access.revoke_token(f"tok_{days:024}", team="default", by=HOST)
        kept = [row.what for row in parts.vault.credentials.revocations()]
        assert kept == [f"tok_{40:024}"]


class TestAUser:
    async def test_all_tokens_made_until_now_end(self, parts: Parts) -> None:
        one = await holder(parts)
        before = [await parts.access.issue_token(one, subject=name) for name in ("ann", "bob")]
        nameless = await parts.access.issue_token(one)
        parts.running += [
            Running("s-1", str(one.key), before[0].jti, "ann"),
            Running("s-2", str(one.key), before[1].jti, "bob"),
            Running("s-3", str(one.key), "", ""),
        ]
        assert await parts.access.revoke_user("ann", team="default", by=HOST) == ["s-1"]
        after = await parts.access.issue_token(one, subject="ann")  # in the same second
        for _ in range(2):
            found = [await accepted(parts, token) for token in (*before, nameless, after)]
            assert found == [False, True, True, True]
            parts.reopen()

    async def test_a_key_for_some_agents_ends_no_tokens_for_others(self, parts: Parts) -> None:
        _, text = await parts.key_of(agents=["crawler"])
        one = await parts.access.authenticate(text)
        with pytest.raises(Denied, match="a key for some agents can't revoke"):
            await parts.access.revoke_user("ann", team="default", by=one)

    async def test_a_later_revocation_is_not_moved_back(self, parts: Parts) -> None:
        one = await holder(parts)
        await parts.access.revoke_user("ann", team="default", by=HOST)
        token = await parts.access.issue_token(one, subject="ann")
        parts.now += 10
        await parts.access.revoke_user("ann", team="default", by=HOST)
        assert not await accepted(parts, token)
        parts.now -= 20
        await parts.access.revoke_user("ann", team="default", by=HOST)
        parts.reopen()
        parts.now += 20
        assert not await accepted(parts, token)


class TestSigningKeys:
    async def test_a_rotation_signs_nobody_out(self, parts: Parts) -> None:
        one = await holder(parts)
        old = await parts.access.issue_token(one, lifetime=86400.0)
        parts.running.append(Running("s-1", str(one.key), old.jti))
        (first,) = (await parts.access.jwks())["keys"]
        parts.now += 10
        assert await parts.access.rotate_signing_key(by=HOST) == []
        new = await parts.access.issue_token(one)
        for _ in range(2):
            assert [await accepted(parts, token) for token in (old, new)] == [True, True]
            assert len((await parts.access.jwks())["keys"]) == 2
            parts.reopen()
        assert len(parts.running) == 1
        parts.now += 86400 + LEEWAY
        assert first not in (await parts.access.jwks())["keys"]
        await parts.access.rotate_signing_key(by=HOST)
        assert [row.id for row in parts.vault.credentials.signing_keys()] == [2, 3]

    async def test_a_key_that_leaked_takes_its_tokens_and_their_sessions_along(
        self, parts: Parts
    ) -> None:
        one = await holder(parts)
        old = await parts.access.issue_token(one)
        parts.running += [Running("s-1", str(one.key), old.jti), Running("s-2", str(one.key))]
        assert await parts.access.rotate_signing_key(now=True, by=HOST) == ["s-1"]
        for _ in range(2):
            assert not await accepted(parts, old)
            assert len((await parts.access.jwks())["keys"]) == 1
            parts.reopen()
        assert await accepted(parts, await parts.access.issue_token(one))

    async def test_two_that_need_the_first_key_make_one(self, parts: Parts) -> None:
        one = await holder(parts)
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(parts.access.issue_token, one)
                nursery.start_soon(parts.access.jwks)
        assert len(parts.vault.credentials.signing_keys()) == 1


class TestRequests:
    """What is being served when its key or token ends."""

    async def serve(self, parts: Parts, principal: Principal, ends: Callable[[], object]) -> str:
        """How a request of the principal ended when ``ends`` ran in its middle."""
        how = "ran on"
        begun = trio.Event()

        async def request() -> None:
            nonlocal how
            try:
                with parts.access.held(principal):
                    begun.set()
                    try:
                        await trio.sleep(5)
                    finally:
                        how = "was cancelled"
            except Unauthenticated:
                how += " and refused"

        with trio.move_on_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(request)
                await begun.wait()
                result = ends()
                if hasattr(result, "__await__"):
                    await result
                assert how != "ran on"  # gone when the end is reported
        return how

    async def test_they_end_with_their_key(self, parts: Parts) -> None:
        one = await holder(parts)
        how = await self.serve(parts, one, lambda: parts.access.deactivate(str(one.key), by=HOST))
        assert how == "was cancelled and refused"
        with pytest.raises(Unauthenticated), parts.access.held(one):
            raise AssertionError("it must not begin")

    async def test_they_end_with_their_token_and_with_its_user(self, parts: Parts) -> None:
        one = await holder(parts)
        first, second = [await parts.access.issue_token(one, subject="ann") for _ in range(2)]
        asks = [await parts.access.authenticate(bearer(token)) for token in (first, second)]
        how = await self.serve(
            parts,
            asks[0],
            lambda: parts.access.revoke_token(first.jti, team="default", by=HOST),
        )
        assert how == "was cancelled and refused"
        parts.access.check(asks[1])
        how = await self.serve(
            parts, asks[1], lambda: parts.access.revoke_user("ann", team="default", by=HOST)
        )
        assert how == "was cancelled and refused"
        for one in asks:
            with pytest.raises(Unauthenticated):
                parts.access.check(one)

    async def test_they_end_when_their_token_expires(
        self, parts: Parts, autojump_clock: trio.testing.MockClock
    ) -> None:
        token = await parts.access.issue_token(await holder(parts), lifetime=60.0)
        principal = await parts.access.authenticate(bearer(token))
        began = trio.current_time()
        with pytest.raises(Unauthenticated), parts.access.held(principal):
            await trio.sleep(1000)
        assert trio.current_time() - began == 60 + LEEWAY

    async def test_those_of_others_go_on(self, parts: Parts) -> None:
        one, other = await holder(parts), await holder(parts)
        async with trio.open_nursery() as nursery:
            with parts.access.held(other):
                await parts.access.deactivate(str(one.key), by=HOST)
                await trio.lowlevel.checkpoint()  # not cancelled
            nursery.cancel_scope.cancel()

    async def test_who_ends_their_own_key_gets_an_answer(self, parts: Parts) -> None:
        _, text = await parts.key_of("owner")
        owner = await parts.access.authenticate(text)
        with parts.access.held(owner):
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:  # also from a task below

                    async def end() -> None:
                        with parts.access.held(owner):
                            await parts.access.deactivate(str(owner.key), by=owner)

                    nursery.start_soon(end)
            await trio.lowlevel.checkpoint()
        with pytest.raises(Unauthenticated):
            parts.access.check(owner)

    async def test_the_hosts_operators_rest_on_nothing(self, parts: Parts) -> None:
        with parts.access.held(HOST):
            await parts.access.rotate_signing_key(now=True, by=HOST)
            await trio.lowlevel.checkpoint()
