"""Keys are made, listed, rotated and ended; what ended stays ended, and nothing rests on it."""

from __future__ import annotations

import sqlite3
import time

import pytest
import trio
from access_parts import HOST, Parts, Running

from sandboxd.access.control import Access
from sandboxd.access.keys import checked_label, prefix_of
from sandboxd.access.roles import Principal
from sandboxd.errors import (
    Conflict,
    Denied,
    Invalid,
    NotFound,
    StoreError,
    Unauthenticated,
)


class TestMaking:
    async def test_who_may_make_which(self, parts: Parts) -> None:
        _, text = await parts.key_of("owner", team="blue")
        owner = await parts.access.authenticate(text)
        made, _ = await parts.key_of("operator", team="blue", by=owner)
        assert (made.team, made.created_by) == ("blue", owner.name)
        for team in ("red", "default", "nobody"):
            with pytest.raises(NotFound, match="no team"):
                await parts.key_of("viewer", team=team, by=owner)
        with pytest.raises(NotFound, match="no team 'nobody'"):
            await parts.key_of(team="nobody")

    async def test_who_made_which_is_known(self, parts: Parts) -> None:
        maker, text = await parts.key_of("owner")
        owner = await parts.access.authenticate(text)
        made = [(await parts.key_of("viewer", by=owner))[0] for _ in range(2)]
        await parts.access.deactivate(made[0].id, by=owner)
        await parts.access.deactivate(maker.id, by=HOST)
        assert [key.id for key in parts.access.made_by(maker, HOST)] == [made[1].id]

    async def test_nobody_makes_more_than_they_have(self, parts: Parts) -> None:
        _, text = await parts.key_of("owner", agents=["crawler"])
        owner = await parts.access.authenticate(text)
        made, _ = await parts.key_of("viewer", agents=["crawler"], by=owner)
        assert made.agents == ("crawler",)
        with pytest.raises(Denied, match="can't make one for all"):
            await parts.key_of("viewer", by=owner)
        with pytest.raises(NotFound, match="no agent 'mailer'"):
            await parts.key_of("viewer", agents=["mailer"], by=owner)
        _, text = await parts.key_of("operator")
        operator = await parts.access.authenticate(text)
        with pytest.raises(Denied, match="can't make one of the role owner"):
            await parts.key_of("owner", by=operator)

    async def test_agents_are_of_the_team(self, parts: Parts) -> None:
        with pytest.raises(NotFound, match="no agent 'cook'"):
            await parts.key_of(agents=["cook"])
        made, _ = await parts.key_of(team="blue", agents=["cook", "cook"])
        assert made.agents == ("cook",)

    async def test_a_developer_has_named_agents(self, parts: Parts) -> None:
        with pytest.raises(Invalid, match="named agents"):
            await parts.key_of("developer")

    @pytest.mark.parametrize("role", ["", "host", "application", "OWNER", "root"])
    async def test_other_roles_are_none_of_keys(self, parts: Parts, role: str) -> None:
        with pytest.raises(Invalid, match="is not a role of API keys"):
            await parts.key_of(role)

    @pytest.mark.parametrize("label", ["", " ", "a\nb", "\x1b[2J", "x" * 65, "an_sk_" + "0" * 40])
    def test_labels_are_one_printable_line_and_no_key(self, label: str) -> None:
        with pytest.raises(Invalid) as caught:
            checked_label(label)
        assert "0000" not in f"{caught.value}{caught.value.hint}"

    async def test_it_is_recorded_without_the_key(self, parts: Parts) -> None:
        key, text = await parts.key_of(label="web shop", agents=["crawler"])
        (record,) = parts.events("key.created")
        assert record["key"] == key.id
        assert record["prefix"] == key.prefix == text[:12] == prefix_of(text)
        assert (record["label"], record["role"], record["by"]) == ("web shop", "operator", "root")
        assert (record["team"], record["agents"]) == ("default", ["crawler"])
        assert text[:13] not in repr(parts.audit.tail(100))


class TestFinding:
    async def test_by_id_by_beginning_and_by_the_key_itself(self, parts: Parts) -> None:
        key, text = await parts.key_of()
        await parts.key_of()
        for named in (key.id, key.prefix, text):
            assert parts.access.find(named, HOST).id == key.id

    async def test_what_is_out_of_reach_does_not_exist(self, parts: Parts) -> None:
        key, text = await parts.key_of()
        _, blue_text = await parts.key_of("owner", team="blue")
        blue = await parts.access.authenticate(blue_text)
        seen = set()
        for named in (key.id, key.prefix, "key_000000000000"):
            with pytest.raises(NotFound) as caught:
                parts.access.find(named, blue)
            seen.add(f"{caught.value} {caught.value.hint}".replace(named, "X"))
        assert len(seen) == 1
        with pytest.raises(NotFound) as caught:
            parts.access.find(text, blue)
        assert text[:13] not in f"{caught.value}{caught.value.hint}"
        assert [one.team for one in await parts.access.list_keys(blue)] == ["blue"]
        with pytest.raises(NotFound):
            await parts.access.deactivate(key.id, by=blue)
        with pytest.raises(NotFound):
            await parts.access.rotate(key.id, overlap=60.0, by=blue)
        await parts.access.authenticate(text)

    async def test_a_key_for_some_agents_sees_keys_for_those(self, parts: Parts) -> None:
        _, text = await parts.key_of("owner", agents=["crawler"])
        owner = await parts.access.authenticate(text)
        inside, _ = await parts.key_of("viewer", agents=["crawler"])
        wider, _ = await parts.key_of("viewer", agents=["crawler", "mailer"])
        all_, _ = await parts.key_of("viewer")
        seen = [key.id for key in parts.access.keys(owner)]
        assert inside.id in seen
        assert not {wider.id, all_.id} & set(seen)


class TestEnding:
    async def test_what_rests_on_it_ends_and_nothing_else(self, parts: Parts) -> None:
        key, text = await parts.key_of()
        other, other_text = await parts.key_of()
        parts.running += [
            Running("s-1", key.id),
            Running("s-2", key.id, "tok_1", "ann"),
            Running("s-3", other.id),
            Running("s-4"),
        ]
        told: list[str] = []

        async def listener(id: str) -> None:
            with pytest.raises(Unauthenticated):  # it is refused already
                await parts.access.authenticate(text)
            told.append(id)

        parts.access.on_deactivated.append(listener)
        assert await parts.access.deactivate(key.id, by=HOST) == ["s-1", "s-2"]
        assert [one.id for one in parts.running] == ["s-3", "s-4"]
        assert parts.stopped[0] == ("s-1", "its API key was deactivated by root")
        assert told == [key.id]
        await parts.access.authenticate(other_text)
        (record,) = parts.events("key.deactivated")
        assert (record["key"], record["by"]) == (key.id, "root")
        shown = parts.access.find(key.id, HOST)
        assert (shown.deactivated_at, shown.deactivated_by) == (parts.now, "root")

    async def test_it_is_refused_while_sessions_end_and_on_disk_before(self, parts: Parts) -> None:
        key, _ = await parts.key_of()
        seen = []

        def look() -> None:
            (row,) = parts.vault.credentials.api_keys()
            seen.append((row.ended_at, parts.access.admits(key.id, "")))

        parts.meanwhile = look
        assert parts.access.admits(key.id, "")
        await parts.access.deactivate(key.id, by=HOST)
        assert set(seen) == {(parts.now, False)}

    async def test_it_stays_so_after_a_restart(self, parts: Parts) -> None:
        key, text = await parts.key_of()
        await parts.access.deactivate(key.id, by=HOST)
        access = parts.reopen()
        with pytest.raises(Unauthenticated):
            await access.authenticate(text)
        assert access.state(access.find(key.id, HOST)) == "deactivated"
        assert not access.admits(key.id, "")

    async def test_twice_is_once(self, parts: Parts) -> None:
        key, _ = await parts.key_of()
        await parts.access.deactivate(key.id, by=HOST)
        first = parts.access.find(key.id, HOST)
        parts.now += 10
        await parts.access.deactivate(key.id, by=Principal("host", "ann", "host", None))
        assert parts.access.find(key.id, HOST) == first

    async def test_who_is_cancelled_has_ended_it_all_the_same(self, parts: Parts) -> None:
        key, text = await parts.key_of()
        parts.running.append(Running("s-1", key.id))
        with trio.CancelScope() as scope:
            scope.cancel()
            await parts.access.deactivate(key.id, by=HOST)
        assert parts.running == []
        with pytest.raises(Unauthenticated):
            await parts.reopen().authenticate(text)

    async def test_what_can_not_be_recorded_ends_all_the_same(self, parts: Parts) -> None:
        key, text = await parts.key_of()
        parts.running.append(Running("s-1", key.id))
        parts.audit.close()
        with pytest.raises(StoreError, match="refused and its sessions are ended, but not dur"):
            await parts.access.deactivate(key.id, by=HOST)
        assert parts.running == []
        with pytest.raises(Unauthenticated):
            await parts.access.authenticate(text)

    async def test_what_the_store_can_not_keep_ends_all_the_same(self, parts: Parts) -> None:
        key, text = await parts.key_of()
        parts.running.append(Running("s-1", key.id))
        parts.vault.close()
        with pytest.raises(StoreError, match="but not durably"):
            await parts.access.deactivate(key.id, by=HOST)
        assert parts.running == []
        with pytest.raises(Unauthenticated):
            await parts.access.authenticate(text)
        assert not parts.access.admits(key.id, "")

    async def test_an_expired_key_ends_by_itself(self, parts: Parts) -> None:
        key, text = await parts.key_of(lifetime=0.2)
        parts.running.append(Running("s-1", key.id))
        started, began = parts.now, trio.current_time()
        ended = trio.Event()

        async def listener(id: str) -> None:
            assert id == key.id
            ended.set()

        parts.access.on_deactivated.append(listener)
        await parts.access.authenticate(text)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.access.run)
            with trio.fail_after(20):
                while not ended.is_set():
                    parts.now = started + trio.current_time() - began
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert parts.stopped == [("s-1", "its API key expired")]
        assert [record["key"] for record in parts.events("key.expired")] == [key.id]
        with pytest.raises(Unauthenticated):
            await parts.access.authenticate(text)

    async def test_a_key_of_a_team_that_is_gone_is_refused(self, parts: Parts) -> None:
        _, text = await parts.key_of("viewer", team="red")
        await parts.access.authenticate(text)
        (parts.directory / "config" / "sandboxd.yaml").write_text("version: 1\n")
        for slug in ("cook", "spy"):
            (parts.directory / "config" / "agents" / f"{slug}.yaml").unlink()
        parts.reload()
        with pytest.raises(Unauthenticated):
            await parts.access.authenticate(text)


class TestRotation:
    async def test_both_work_for_the_overlap(self, parts: Parts) -> None:
        old, old_text = await parts.key_of(agents=["crawler"], label="shop")
        new, secret, ended = await parts.access.rotate(old.id, overlap=3600.0, by=HOST)
        new_text = secret.reveal().decode()
        assert ended == []
        assert (new.team, new.role, new.label, new.agents) == (
            old.team,
            old.role,
            old.label,
            old.agents,
        )
        assert (new.replaces, new.expires_at) == (old.id, None)
        for _ in range(2):
            await parts.access.authenticate(old_text)
            await parts.access.authenticate(new_text)
            parts.reopen()
        parts.now += 3600
        await parts.access.authenticate(new_text)
        with pytest.raises(Unauthenticated):
            await parts.access.authenticate(old_text)
        (record,) = parts.events("key.rotated")
        assert (record["key"], record["replaces"], record["overlap"]) == (new.id, old.id, 3600.0)

    async def test_without_an_overlap_the_old_one_ends_at_once(self, parts: Parts) -> None:
        old, old_text = await parts.key_of()
        parts.running.append(Running("s-1", old.id))
        _, secret, ended = await parts.access.rotate(old.id, overlap=0.0, by=HOST)
        assert ended == ["s-1"]
        with pytest.raises(Unauthenticated):
            await parts.access.authenticate(old_text)
        await parts.access.authenticate(secret.reveal().decode())

    async def test_a_rotation_never_lengthens_the_old_one(self, parts: Parts) -> None:
        old, _ = await parts.key_of(lifetime=100.0)
        new, _, _ = await parts.access.rotate(old.id, overlap=3600.0, by=HOST)
        assert parts.access.find(old.id, HOST).expires_at == old.expires_at
        assert new.expires_at == parts.now + 100.0  # as long as the old one lived

    async def test_what_ended_or_was_rotated_is_not_rotated(self, parts: Parts) -> None:
        old, _ = await parts.key_of()
        new, _, _ = await parts.access.rotate(old.id, overlap=60.0, by=HOST)
        with pytest.raises(Conflict, match="was rotated already"):
            await parts.access.rotate(old.id, overlap=60.0, by=HOST)
        await parts.access.deactivate(new.id, by=HOST)
        with pytest.raises(Conflict, match="is deactivated"):
            await parts.access.rotate(new.id, overlap=60.0, by=HOST)


async def test_a_clock_set_back_before_a_start_revives_nothing(parts: Parts) -> None:
    """The store remembers a later time than the host now says."""
    parts.now = time.time() + 7200
    _, ended_text = await parts.key_of(lifetime=60.0)
    parts.now += 3600
    _, text = await parts.key_of()
    access = Access(
        parts.vault,
        parts.audit,
        config=lambda: parts.config,
        stop=parts.stop,
    )
    await access.authenticate(text)
    with pytest.raises(Unauthenticated):
        await access.authenticate(ended_text)
    (warning,) = access.warnings
    assert "clock" in warning
    assert parts.access.warnings == []


class TestTheStore:
    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("ended_at", None),
            ("expires_at", 4e9),
            ("role", "owner"),
            ("team", "blue"),
            ("agents", "null"),
            ("label", "another"),
            ("hash", b"\0" * 32),
            ("last_used_at", 1.0),
            ("replaces", "key_0"),
        ],
    )
    async def test_a_changed_row_is_told_by_the_keys_id(
        self, parts: Parts, column: str, value: object
    ) -> None:
        key, _ = await parts.key_of("viewer", agents=["crawler"], lifetime=60.0)
        await parts.access.deactivate(key.id, by=HOST)
        with sqlite3.connect(parts.directory / "store.sqlite") as database:
            database.execute(f"UPDATE api_keys SET {column} = ?", (value,))
        database.close()
        with pytest.raises(StoreError, match=f"API key '{key.id}'"):
            await parts.access.list_keys(HOST)
        parts.close()
        with pytest.raises(StoreError, match="corrupted"):
            parts.open()
        with sqlite3.connect(parts.directory / "store.sqlite") as database:
            database.execute("DELETE FROM api_keys")
        database.close()
        with pytest.raises(StoreError, match="removed, added or put back"):
            parts.open()

    async def test_a_removed_revocation_is_told(self, parts: Parts) -> None:
        await parts.access.revoke_token("tok_" + "0" * 24, team="default", by=HOST)
        parts.close()
        with sqlite3.connect(parts.directory / "store.sqlite") as database:
            database.execute("DELETE FROM revocations")
        database.close()
        with pytest.raises(StoreError, match="removed, added or put back"):
            parts.open()

    async def test_keys_survive_a_new_master_key(self, parts: Parts) -> None:
        from sandboxd.secret import Secret
        from sandboxd.vault import MasterKey

        _, text = await parts.key_of()
        token = await parts.access.issue_token(await parts.access.authenticate(text))
        parts.key = MasterKey(Secret(bytes(32)))
        parts.vault.rekey(parts.key)
        access = parts.reopen()
        await access.authenticate(text)
        await access.authenticate(token.token.reveal().decode())
