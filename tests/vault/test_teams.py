"""Teams in one store: each has its own key and variables, and what is another's isn't there."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from sandboxd.errors import Denied, NotFound, StoreError
from sandboxd.secret import Secret
from sandboxd.vault import MasterKey, SessionRecord, Vault
from sandboxd.vault.sqlite import MIGRATIONS

Reopen = Callable[..., Vault]
STORES = Path(__file__).with_name("stores")


@pytest.fixture
def path(in_memory: Path) -> Path:
    return in_memory / "store.sqlite"


def value_of(vault: Vault, team: str, name: str = "A") -> bytes:
    return vault.unseal(vault.of(team).snapshot("bot").variables[name]).reveal()


def test_the_same_agent_in_two_teams_has_two_sets_of_variables(reopen: Reopen) -> None:
    vault = reopen()
    red, blue = vault.of("red"), vault.of("blue")
    assert red.set("bot", {"A": Secret(b"of red")}, by="ann") == {"A": 1}
    assert blue.list("bot") == []
    assert blue.snapshot("bot").variables == {}
    with pytest.raises(NotFound, match="no variable 'A'"):
        blue.remove("bot", ["A"], by="ann")
    with pytest.raises(NotFound, match="no variable 'A'"):
        blue.revoke("bot", "A", up_to=1)
    assert blue.set("bot", {"A": Secret(b"of blue")}, by="bob") == {"A": 1}
    assert vault.teams_of("bot") == ["blue", "red"]
    vault = reopen()
    assert (value_of(vault, "red"), value_of(vault, "blue")) == (b"of red", b"of blue")
    assert vault.of("red").list("bot")[0].set_by == "ann"
    assert vault.teams_of("bot") == ["blue", "red"]


def test_equal_values_of_two_teams_do_not_look_equal(vault: Vault) -> None:
    marks = set()
    for team in ("red", "blue"):
        vault.of(team).set("bot", {"A": Secret(b"the same")}, by="ann")
        marks.add(vault.of(team).list("bot")[0].fingerprint)
    assert len(marks) == 2


def test_a_version_of_one_team_does_not_open_as_another_s(vault: Vault) -> None:
    vault.of("red").set("bot", {"A": Secret(b"of red")}, by="ann")
    vault.of("blue").set("bot", {"A": Secret(b"of blue")}, by="ann")
    sealed = vault.of("red").snapshot("bot").variables["A"]
    for team in ("blue", "none"):
        with pytest.raises(StoreError, match="does not authenticate"):
            vault.unseal(dataclasses.replace(sealed, team=team))
    assert vault.unseal(sealed).reveal() == b"of red"


def test_a_revocation_concerns_one_team(reopen: Reopen) -> None:
    vault = reopen()
    for team in ("red", "blue"):
        vault.of(team).set("bot", {"A": Secret(b"x")}, by="ann")
    vault.of("red").revoke("bot", "A", up_to=1)
    for restarted in (False, True):
        each = reopen() if restarted else vault
        assert value_of(each, "blue") == b"x"
        with pytest.raises(Denied, match="is revoked"):
            value_of(each, "red")


def test_a_team_s_data_key_is_made_with_its_first_value(reopen: Reopen, path: Path) -> None:
    def keys() -> list[str]:
        with closing(sqlite3.connect(path)) as db:
            rows = db.execute("SELECT team FROM keys WHERE purpose = 'data' ORDER BY team")
            return [row[0] for row in rows]

    vault = reopen()
    assert keys() == []
    vault.of("red").list("bot")
    assert keys() == []
    vault.of("red").set("bot", {"A": Secret(b"x")}, by="ann")
    vault.of("blue").set("bot", {"A": Secret(b"x")}, by="ann")
    vault.of("red").set("bot", {"A": Secret(b"y"), "B": Secret(b"z")}, by="ann")
    assert keys() == ["blue", "red"]


def test_a_change_that_fails_leaves_no_key_behind(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise StoreError("no")

    with monkeypatch.context() as patch:
        patch.setattr("sandboxd.vault.sqlite.SqliteTransaction.put_row", broken)
        with pytest.raises(StoreError, match="no"):
            vault.of("red").set("bot", {"A": Secret(b"x")}, by="ann")
    assert vault.of("red").set("bot", {"A": Secret(b"y")}, by="ann") == {"A": 1}
    assert value_of(vault, "red") == b"y"


def test_a_new_master_key_and_new_data_keys_serve_every_team(
    reopen: Reopen, other_key: MasterKey
) -> None:
    vault = reopen()
    for team in ("red", "blue", "default"):
        vault.of(team).set("bot", {"A": Secret(team.encode())}, by="ann")
    before = {team: vault.of(team).snapshot("bot").variables["A"] for team in ("red", "blue")}
    vault.rekey(other_key)
    vault.rotate_data_key()
    vault.rotate_data_key()
    for team, sealed in before.items():
        assert vault.unseal(sealed).reveal() == team.encode()  # a live session's
    vault = reopen(other_key)
    for team in ("red", "blue", "default"):
        assert value_of(vault, team) == team.encode()
        assert vault.of(team).snapshot("bot").variables["A"].key_id == 3
    for sealed in before.values():
        with pytest.raises(StoreError, match="does not authenticate"):
            vault.unseal(sealed)


def test_a_variable_moved_to_another_team_in_the_file_is_told(reopen: Reopen, path: Path) -> None:
    reopen().of("red").set("bot", {"A": Secret(b"x")}, by="ann")
    reopen().of("blue").set("bot", {"B": Secret(b"x")}, by="ann")
    reopen().close()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE variables SET team = 'blue' WHERE name = 'A'")
    with pytest.raises(StoreError, match="variable 'A' of agent 'bot' of team 'blue', version 1:"):
        reopen()


def test_a_data_key_moved_to_another_team_in_the_file_is_told(reopen: Reopen, path: Path) -> None:
    reopen().of("red").set("bot", {"A": Secret(b"x")}, by="ann")
    reopen().close()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE keys SET team = 'blue' WHERE purpose = 'data'")
    with pytest.raises(StoreError, match="'data' key 1 of team 'blue' was changed or moved"):
        reopen()


def columns(table: str) -> list[str]:
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(next(text for text in MIGRATIONS[0] if f"TABLE {table} " in text))
        return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


@pytest.mark.parametrize("table", ["variables", "keys"])
def test_a_flipped_value_in_any_column_of_a_second_team_is_told(
    reopen: Reopen, path: Path, table: str
) -> None:
    reopen().of("red").set("bot", {"A": Secret(b"x")}, by="ann")
    reopen().of("blue").set("bot", {"A": Secret(b"y")}, by="ann")
    reopen().close()
    good = path.read_bytes()
    for column in columns(table):
        path.write_bytes(good)
        with closing(sqlite3.connect(path)) as db, db:
            where = f"WHERE rowid = (SELECT MAX(rowid) FROM {table} WHERE team = 'blue')"
            if table == "keys":
                where = "WHERE team = 'blue'"
            ((value,),) = db.execute(f"SELECT {column} FROM {table} {where}").fetchall()
            changed = (
                value + (b"x" if isinstance(value, bytes) else "x")
                if isinstance(value, str | bytes)
                else (value or 0) + 1
            )
            db.execute(f"UPDATE {table} SET {column} = ? {where}", (changed,))
        with pytest.raises(StoreError, match="the store is corrupted: "):
            reopen()
    path.write_bytes(good)
    assert value_of(reopen(), "blue") == b"y"


# -- a store of the schema before teams ----------------------------------------------------------


@pytest.fixture
def old_store(path: Path) -> Path:
    """As the daemon before this schema left it: two agents, a revocation, two sessions."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript((STORES / "schema1.sql").read_text())
    path.chmod(0o600)
    guard = path.with_name(path.name + ".guard")
    guard.write_bytes((STORES / "schema1.guard").read_bytes())
    guard.chmod(0o600)
    return path


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def test_an_older_store_opens_with_all_that_is_in_it(old_store: Path, reopen: Reopen) -> None:
    assert version_of(old_store) == 1
    for _ in range(2):
        vault = reopen()
        assert vault.warnings == ()
        assert value_of(vault, "default") == b"hunter3"
        assert value_of(vault, "default", "B") == b"b"
        listed = vault.of("default").list("bot")
        assert [(v.name, v.version, v.fingerprint, v.last_used_at) for v in listed] == [
            ("A", 2, "79dc8612a35d790c", 1500.0),
            ("B", 1, "204ac1de5ef54be6", None),
        ]
        assert vault.teams_of("bot") == ["default"]
        running, ended = vault.sessions(include_ended=True)
        assert running == SessionRecord(
            id="s-0123456789abcdef",
            agent="bot",
            policy="default",
            state="running",
            started_at=1000.25,
            ended_at=None,
            exit_code=None,
            exit_signal=None,
            reason="",
            by="ann",
            variables={"A": 2},
            workspace="/w",
            team="default",
        )
        assert (ended.exit_code, ended.ended_at, ended.key) == (3, 1100.5, "")
        audit = vault.subkey("audit").reveal().hex()
        assert audit == "d6c54d3b1e040256a318fbd78ee293d0ac89d67663de0098fe1ab5c8cd3009f3"
    assert version_of(old_store) == len(MIGRATIONS)
    vault = reopen()
    vault.of("default").set("bot", {"A": Secret(b"new")}, by="ann")
    vault.of("red").set("bot", {"A": Secret(b"of red")}, by="ann")
    vault = reopen()
    assert (value_of(vault, "default"), value_of(vault, "red")) == (b"new", b"of red")


def test_an_older_store_that_was_tampered_with_is_refused(old_store: Path, reopen: Reopen) -> None:
    with closing(sqlite3.connect(old_store)) as db, db:
        db.execute("UPDATE variables SET revoked_up_to = 0 WHERE name = 'A'")
    with pytest.raises(StoreError, match="variable 'A' of agent 'bot', version 2: its row was"):
        reopen()


def test_a_migration_that_is_cut_off_is_done_by_the_next_start(
    old_store: Path, reopen: Reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = (MIGRATIONS[0], (*MIGRATIONS[1][:2], "SELECT power_failed()"), *MIGRATIONS[2:])
    with monkeypatch.context() as patch:
        patch.setattr("sandboxd.vault.sqlite.MIGRATIONS", cut)
        with pytest.raises(StoreError, match="power_failed"):
            reopen()
    assert version_of(old_store) == 1
    assert value_of(reopen(), "default") == b"hunter3"
