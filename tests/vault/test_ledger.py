"""Whatever is changed in the store behind the vault's back is noticed, and the row is named."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from vault_support import PLAINTEXT, everything

from sandboxd.errors import StoreError
from sandboxd.secret import Secret
from sandboxd.vault import MasterKey, Vault
from sandboxd.vault.sqlite import MIGRATIONS

Reopen = Callable[..., Vault]


@pytest.fixture
def path(in_memory: Path) -> Path:
    return in_memory / "store.sqlite"


def columns(table: str) -> list[str]:
    with closing(sqlite3.connect(":memory:")) as db:
        for statement in MIGRATIONS[0]:
            db.execute(statement)
        return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


COLUMNS = {table: columns(table) for table in ("header", "keys", "variables")}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store with two agents, two versions, a removed variable, a revocation, a use."""
    path = tmp_path_factory.mktemp("original") / "store.sqlite"
    vault = Vault.open(path, MasterKey(Secret(bytes(range(32)))))
    vault.of("default").set("bot", {"A": Secret(PLAINTEXT), "B": Secret(b"b")}, by="ann")
    vault.of("default").set("bot", {"A": Secret(PLAINTEXT)}, by="ann")
    vault.of("default").set("other", {"A": Secret(PLAINTEXT), "GONE": Secret(b"g")}, by="bob")
    vault.of("default").remove("other", ["GONE"], by="bob")
    vault.of("default").revoke("bot", "A", up_to=1)
    vault.of("default").touch([("bot", "A", 2)], 1000.0)
    vault.close()
    return path


@pytest.fixture
def store(original: Path, path: Path) -> Path:
    """A copy of it, for one test to spoil."""
    for end in ("", ".guard"):
        shutil.copy(f"{original}{end}", f"{path}{end}")
    return path


def sql(path: Path, statement: str, *values: object) -> list[tuple[Any, ...]]:
    """As somebody with write access to the file would."""
    with closing(sqlite3.connect(path)) as db, db:
        return db.execute(statement, values).fetchall()


def flipped(value: Any) -> Any:
    """The value with its last bit flipped, or what is nearest to that."""
    if isinstance(value, bytes):
        return value[:-1] + bytes([value[-1] ^ 1]) if value else b"\1"
    if isinstance(value, str):
        return value[:-1] + chr(ord(value[-1]) ^ 1) if value else "\1"
    if value is None:
        return 1.0
    return value + 1


def refusal(reopen: Reopen) -> str:
    """Why the vault doesn't open."""
    with pytest.raises(StoreError) as caught:
        reopen()
    assert "hunter2" not in everything(caught.value)
    return str(caught.value)


def test_an_untouched_store_opens(store: Path, reopen: Reopen) -> None:
    vault = reopen()
    assert vault.unseal(vault.of("default").snapshot("bot").variables["A"]).reveal() == PLAINTEXT
    assert vault.warnings == ()


@pytest.mark.parametrize("column", COLUMNS["variables"])
@pytest.mark.parametrize(
    ("agent", "name", "version"), [("bot", "A", 2), ("bot", "B", 1), ("other", "GONE", 1)]
)
def test_a_flipped_byte_in_any_column_of_a_variable_is_refused_and_the_row_named(
    store: Path, reopen: Reopen, column: str, agent: str, name: str, version: int
) -> None:
    where = "WHERE agent = ? AND name = ?"
    ((value,),) = sql(store, f"SELECT {column} FROM variables {where}", agent, name)
    sql(store, f"UPDATE variables SET {column} = ? {where}", flipped(value), agent, name)
    said = refusal(reopen)
    told = {"agent": agent, "name": name, "version": version}
    if column in told:
        told[column] = flipped(value)
    team = " of team 'defaulu'" if column == "team" else ""
    assert (
        f"corrupted: variable '{told['name']}' of agent '{told['agent']}'{team}, version "
        f"{told['version']}: " in said
    )


@pytest.mark.parametrize("column", COLUMNS["keys"])
@pytest.mark.parametrize("purpose", ["integrity", "data"])
def test_a_flipped_byte_in_any_column_of_a_key_is_refused_as_corruption(
    store: Path, reopen: Reopen, column: str, purpose: str
) -> None:
    ((value,),) = sql(store, f"SELECT {column} FROM keys WHERE purpose = ?", purpose)
    sql(store, f"UPDATE keys SET {column} = ? WHERE purpose = ?", flipped(value), purpose)
    assert "the store is corrupted: " in refusal(reopen)


@pytest.mark.parametrize("column", [c for c in COLUMNS["header"] if c != "one"])
def test_a_flipped_byte_in_any_column_of_the_header_is_refused_as_corruption(
    store: Path, reopen: Reopen, column: str
) -> None:
    ((value,),) = sql(store, f"SELECT {column} FROM header")
    sql(store, f"UPDATE header SET {column} = ?", flipped(value))
    assert "the store is corrupted: " in refusal(reopen)


@pytest.mark.parametrize("column", COLUMNS["variables"])
@pytest.mark.parametrize("value", [None, 7, "text", b"\xff", float("inf")])
def test_a_value_of_another_type_in_any_column_is_refused(
    store: Path, reopen: Reopen, column: str, value: object
) -> None:
    where = "WHERE rowid = (SELECT rowid FROM variables WHERE agent = 'bot' AND name = 'A')"
    ((before,),) = sql(store, f"SELECT {column} FROM variables {where}")
    try:
        sql(store, f"UPDATE variables SET {column} = ? {where}", value)
    except sqlite3.IntegrityError:
        assert value is None  # NOT NULL
        return
    assert sql(store, f"SELECT COUNT(*) FROM variables WHERE {column} IS ?", value) != [(0,)]
    assert value != before
    assert "the store is corrupted: variable" in refusal(reopen)


def test_text_that_is_not_utf8_is_refused_and_the_row_named(store: Path, reopen: Reopen) -> None:
    sql(store, "UPDATE variables SET set_by = CAST(x'ff' AS TEXT) WHERE name = 'B'")
    assert "variable 'B' of agent 'bot'" in refusal(reopen)


def test_every_flipped_byte_of_the_file_is_refused_or_harmless(
    store: Path, reopen: Reopen, path: Path
) -> None:
    """Never a different answer: whatever still opens says exactly what it said before."""
    good = path.read_bytes()
    guard = path.with_name(path.name + ".guard").read_bytes()
    expected = None
    opened = 0
    # A prime stride reaches every page and every kind of content, in a second or two.
    for at in [None, *range(0, len(good), 211)]:
        for name in ("-wal", "-shm"):
            path.with_name(path.name + name).unlink(missing_ok=True)
        path.with_name(path.name + ".guard").write_bytes(guard)
        changed = bytearray(good)
        if at is not None:
            changed[at] ^= 0x10
        path.write_bytes(changed)
        try:
            vault = reopen()
        except StoreError:
            continue
        state = [
            (v, vault.unseal(vault.of("default").snapshot(agent).variables[v.name]).reveal())
            for agent in ("bot", "other")
            for v in vault.of("default").list(agent)
        ]
        vault.close()
        expected = expected or state
        assert state == expected
        opened += 1
    assert 1 <= opened < len(good) / 211


@pytest.mark.parametrize(
    ("move", "named"),
    [
        ("SET agent = 'thief' WHERE agent = 'bot' AND name = 'A'", "'A' of agent 'thief'"),
        ("SET name = 'C' WHERE agent = 'bot' AND name = 'A'", "'C' of agent 'bot'"),
        ("SET version = 3 WHERE agent = 'bot' AND name = 'A'", "version 3"),
        ("SET version = 1 WHERE agent = 'bot' AND name = 'A'", "version 1"),
        ("SET team = 'evil' WHERE agent = 'bot' AND name = 'A'", "'A' of agent 'bot'"),
    ],
)
def test_a_row_moved_to_another_agent_name_version_or_team_is_refused(
    store: Path, reopen: Reopen, move: str, named: str
) -> None:
    sql(store, f"UPDATE variables {move}")
    said = refusal(reopen)
    assert named in said
    assert "changed or moved" in said


def test_a_row_copied_over_another_agent_s_is_refused(store: Path, reopen: Reopen) -> None:
    columns = ", ".join(c for c in COLUMNS["variables"] if c not in ("agent",))
    sql(
        store,
        f"INSERT OR REPLACE INTO variables (agent, {columns}) "
        f"SELECT 'other', {columns} FROM variables WHERE agent = 'bot' AND name = 'A'",
    )
    assert "'A' of agent 'other', version 2" in refusal(reopen)


def test_swapped_ciphertexts_are_refused(store: Path, reopen: Reopen) -> None:
    sql(
        store,
        "UPDATE variables SET (nonce, ciphertext) = (SELECT nonce, ciphertext FROM variables "
        "WHERE agent = 'other' AND name = 'A') WHERE agent = 'bot' AND name = 'A'",
    )
    assert "'A' of agent 'bot'" in refusal(reopen)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM variables WHERE agent = 'bot' AND name = 'A'",
        "DELETE FROM variables WHERE name = 'GONE'",
        "DELETE FROM variables",
        "DELETE FROM keys WHERE purpose = 'data'",
    ],
)
def test_a_deleted_row_is_noticed(store: Path, reopen: Reopen, statement: str) -> None:
    sql(store, statement)
    assert "was removed, added or put back to an older state" in refusal(reopen)


def test_a_variable_put_back_to_its_older_version_is_noticed(
    reopen: Reopen, path: Path, tmp_path: Path
) -> None:
    vault = reopen()
    vault.of("default").set("bot", {"A": Secret(b"old")}, by="ann")
    vault.close()
    shutil.copy(path, tmp_path / "old")
    vault = reopen()
    vault.of("default").set("bot", {"A": Secret(b"new")}, by="ann")
    vault.of("default").revoke("bot", "A", up_to=1)
    vault.close()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("ATTACH ? AS old", (str(tmp_path / "old"),))
        db.execute("INSERT OR REPLACE INTO variables SELECT * FROM old.variables")
    assert "put back to an older state" in refusal(reopen)


def test_a_store_put_back_whole_is_noticed_by_its_guard(
    reopen: Reopen, path: Path, tmp_path: Path
) -> None:
    vault = reopen()
    vault.of("default").set("bot", {"A": Secret(b"old")}, by="ann")
    vault.close()
    shutil.copy(path, tmp_path / "old")
    vault = reopen()
    vault.of("default").revoke("bot", "A", up_to=1)
    vault.close()
    shutil.copy(tmp_path / "old", path)
    with pytest.raises(StoreError, match="rolled back: it is at change 2 and was at 3") as caught:
        reopen()
    assert "if this one was restored on purpose, remove" in caught.value.hint
    path.with_name(path.name + ".guard").unlink()  # as the hint says
    vault = reopen()
    assert "whether the store was rolled back can't be told" in vault.warnings[0]
    assert reopen().warnings == ()


def test_a_store_emptied_or_replaced_is_noticed_by_its_guard(
    store: Path, reopen: Reopen, tmp_path: Path, key: MasterKey
) -> None:
    Vault.open(tmp_path / "another.sqlite", key).close()
    shutil.copy(tmp_path / "another.sqlite", store)
    assert "is another store's" in refusal(reopen)
    store.write_bytes(b"")
    assert "the store is empty, and" in refusal(reopen)
    store.unlink()
    assert "the store is empty, and" in refusal(reopen)


def test_a_changed_guard_is_noticed(store: Path, reopen: Reopen) -> None:
    guard = store.with_name(store.name + ".guard")
    good = guard.read_bytes()
    for at in range(len(good)):
        guard.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert "rollback guard" in refusal(reopen)
    guard.write_bytes(good)
    reopen()


def test_a_guard_that_can_not_be_written_is_told_and_the_change_stands(
    vault: Vault, path: Path, reopen: Reopen
) -> None:
    blocked = path.with_name(path.name + ".guard.new")
    blocked.mkdir()
    assert vault.of("default").set("bot", {"A": Secret(b"1")}, by="ann") == {"A": 1}
    assert "can't be written" in vault.warnings[0]
    blocked.rmdir()
    vault.of("default").set("bot", {"B": Secret(b"1")}, by="ann")
    assert vault.warnings == ()
    blocked.mkdir()
    vault.of("default").set("bot", {"A": Secret(b"2")}, by="ann")
    blocked.rmdir()
    listed = reopen().of("default").list("bot")  # a guard that lags is fine
    assert [v.version for v in listed] == [2, 1]


def test_a_store_without_its_header_is_corrupted(store: Path, reopen: Reopen) -> None:
    sql(store, "DELETE FROM header")
    assert "its header is gone" in refusal(reopen)


def test_a_wrong_key_is_told_apart_from_corruption(
    store: Path, reopen: Reopen, other_key: MasterKey
) -> None:
    with pytest.raises(StoreError, match=f"^wrong key: the master key {other_key.id} did not"):
        reopen(other_key)
    sql(store, "UPDATE keys SET wrapped = zeroblob(48) WHERE purpose = 'integrity'")
    assert "corrupted: its integrity key was changed" in refusal(reopen)


def test_a_wrong_key_changes_nothing(store: Path, reopen: Reopen, other_key: MasterKey) -> None:
    before = sql(store, "SELECT * FROM header"), sql(store, "SELECT * FROM keys")
    with pytest.raises(StoreError, match="wrong key"):
        reopen(other_key)
    assert (sql(store, "SELECT * FROM header"), sql(store, "SELECT * FROM keys")) == before
    reopen()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE variables SET ciphertext = zeroblob(33) WHERE agent = 'bot' AND name = 'A'",
        "UPDATE variables SET revoked_up_to = 0 WHERE agent = 'bot' AND name = 'A'",
        "DELETE FROM variables WHERE agent = 'bot' AND name = 'B'",
        "UPDATE header SET generation = 1",
    ],
)
def test_a_store_changed_while_it_is_open_is_noticed_at_the_next_use(
    store: Path, reopen: Reopen, statement: str
) -> None:
    vault = reopen()
    sql(store, statement)
    for use in (
        lambda: vault.of("default").snapshot("bot"),
        lambda: vault.of("default").list("bot"),
        lambda: vault.of("default").set("bot", {"A": Secret(PLAINTEXT)}, by="ann"),
        lambda: vault.of("default").remove("bot", ["A"], by="ann"),
        lambda: vault.of("default").revoke("bot", "A", up_to=2),
        vault.rotate_data_key,
    ):
        with pytest.raises(StoreError, match="corrupted") as caught:
            use()
        assert "hunter2" not in everything(caught.value)


def test_a_store_rolled_back_while_it_is_open_is_noticed(reopen: Reopen, path: Path) -> None:
    vault = reopen()
    vault.of("default").set("bot", {"A": Secret(b"old")}, by="ann")
    saved = {t: sql(path, f"SELECT * FROM {t}") for t in ("header", "variables")}
    vault.of("default").revoke("bot", "A", up_to=1)
    with closing(sqlite3.connect(path)) as db, db:
        for table, rows in saved.items():
            marks = ", ".join("?" * len(rows[0]))
            db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", rows)
    with pytest.raises(StoreError, match="rolled back: it is at change 2 and was at 3"):
        vault.of("default").snapshot("bot")


def test_a_corrupted_session_record_is_named(store: Path, reopen: Reopen) -> None:
    vault = reopen()
    for variables in ("{", '["A"]', '{"A": "x"}', '{"A": true}'):
        sql(
            store,
            "INSERT OR REPLACE INTO sessions VALUES "
            "('default','s-1','bot','p','ended',1,2,0,NULL,'','ann',?,'','','','')",
            variables,
        )
        with pytest.raises(StoreError, match="session 's-1' is corrupted"):
            vault.sessions(include_ended=True)


def test_no_error_of_a_change_shows_plaintext_or_keys(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, key: MasterKey
) -> None:
    """Whatever breaks between the plaintext and the disk: nothing that could be logged has it."""
    from sandboxd.vault import ledger, sqlite
    from sandboxd.vault.envelope import Box

    vault.of("default").set("bot", {"A": Secret(PLAINTEXT)}, by="ann")

    def broken(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    uses = {
        "set": lambda: vault.of("default").set("bot", {"A": Secret(PLAINTEXT)}, by="ann"),
        "rotate": vault.rotate_data_key,
        "rekey": lambda: vault.rekey(key),
    }
    secrets = [repr(PLAINTEXT)[2:-1], *(repr(key.derive(p))[2:12] for p in ("wrap", "id"))]
    tried = 0
    for owner, attribute in (
        (sqlite.SqliteTransaction, "put_row"),
        (sqlite.SqliteTransaction, "put_key"),
        (sqlite.SqliteTransaction, "put_header"),
        (Box, "seal"),
        (ledger.Ledger, "signed"),
        (ledger.Ledger, "fingerprint"),
    ):
        for use in uses.values():
            with monkeypatch.context() as patch:
                patch.setattr(owner, attribute, broken)
                try:
                    use()
                except RuntimeError as error:
                    tried += 1
                    shown = everything(error)
                    assert not [s for s in secrets if s in shown]
    assert tried >= 11
    assert vault.unseal(vault.of("default").snapshot("bot").variables["A"]).reveal() == PLAINTEXT
