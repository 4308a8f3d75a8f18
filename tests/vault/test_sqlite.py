"""The file below the vault: schema, permissions, crashes, full and read-only disks."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from vault_support import PLAINTEXT, everything

from sandboxd.errors import Denied, StoreError
from sandboxd.secret import Secret
from sandboxd.vault import MasterKey, Vault
from sandboxd.vault.sqlite import APPLICATION_ID, MIGRATIONS, SqliteStore

Reopen = Callable[..., Vault]

VALUE = Secret(PLAINTEXT)
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

#: What every child process of these tests starts with; the key is the ``key`` fixture's.
PRELUDE = """
import os, signal, sys
from pathlib import Path
from sandboxd.secret import Secret
from sandboxd.vault import MasterKey, Vault
from sandboxd.vault.sqlite import SqliteTransaction
path, key = Path(sys.argv[1]), MasterKey(Secret(bytes(range(32))))
"""


def child(code: str, path: Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def sql(path: Path, *statements: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        return [row for statement in statements for row in db.execute(statement).fetchall()]


def test_the_file_is_ours_durable_and_wal(vault: Vault, path: Path) -> None:
    assert sql(path, "PRAGMA application_id", "PRAGMA user_version", "PRAGMA journal_mode") == [
        (APPLICATION_ID,),
        (len(MIGRATIONS),),
        ("wal",),
    ]
    connection = vault._ledger._store._db  # type: ignore[attr-defined]
    settings = {
        name: connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("synchronous", "secure_delete", "trusted_schema", "temp_store")
    }
    full, memory = 2, 2
    assert settings == {
        "synchronous": full,
        "secure_delete": 1,
        "trusted_schema": 0,
        "temp_store": memory,
    }


def test_a_newer_schema_is_refused_and_left_alone(reopen: Reopen, path: Path) -> None:
    reopen().close()
    newer = len(MIGRATIONS) + 1
    sql(path, f"PRAGMA user_version={newer}")
    with pytest.raises(StoreError, match=f"schema version {newer}, newer than") as caught:
        reopen()
    assert "upgrade sandboxd" in caught.value.hint
    assert sql(path, "PRAGMA user_version") == [(newer,)]


def test_a_schema_version_set_back_is_refused(reopen: Reopen, path: Path) -> None:
    reopen().close()
    sql(path, "PRAGMA user_version=0")
    with pytest.raises(StoreError, match="corrupted: no schema version"):
        reopen()


def test_a_migration_runs_once_and_whole(
    reopen: Reopen, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reopen().of("default").set("bot", {"A": VALUE}, by="ann")
    extra = ("CREATE TABLE extra (a)", "CREATE TABLE broken (a, a)")
    monkeypatch.setattr("sandboxd.vault.sqlite.MIGRATIONS", (*MIGRATIONS, extra))
    with pytest.raises(StoreError, match="duplicate column"):
        reopen()
    assert sql(path, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    assert sql(path, "SELECT name FROM sqlite_master WHERE name = 'extra'") == []
    monkeypatch.setattr("sandboxd.vault.sqlite.MIGRATIONS", (*MIGRATIONS, extra[:1]))
    for _ in range(2):
        assert [v.name for v in reopen().of("default").list("bot")] == ["A"]
    assert sql(path, "PRAGMA user_version") == [(len(MIGRATIONS) + 1,)]


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"hunter2, not a database" * 100, "is corrupted"), (b"\0" * 4096, "is corrupted")],
)
def test_a_file_that_is_no_database_is_refused_and_left_alone(
    reopen: Reopen, path: Path, content: bytes, why: str
) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match=why) as caught:
        reopen()
    assert "hunter2" not in everything(caught.value)
    assert path.read_bytes() == content


def test_another_program_s_database_is_refused_and_left_alone(reopen: Reopen, path: Path) -> None:
    sql(path, "CREATE TABLE theirs (a)")
    path.chmod(0o600)
    with pytest.raises(StoreError, match="is not a sandboxd store"):
        reopen()
    assert sql(path, "SELECT name FROM sqlite_master") == [("theirs",)]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER UPDATE ON variables BEGIN DELETE FROM variables; END",
        "CREATE TABLE extra (a)",
        "CREATE VIEW extra AS SELECT 1",
        "DROP TABLE sessions",
        "ALTER TABLE sessions ADD COLUMN extra",
    ],
)
def test_a_changed_schema_is_refused(reopen: Reopen, path: Path, statement: str) -> None:
    reopen().close()
    sql(path, statement)
    with pytest.raises(StoreError, match="not the ones sandboxd made"):
        reopen()


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o606])
def test_a_store_open_to_others_is_refused(reopen: Reopen, path: Path, mode: int) -> None:
    reopen().close()
    path.chmod(mode)
    with pytest.raises(Denied, match=f"the store {path} has mode {mode:04o}"):
        reopen()


def test_a_symbolic_link_and_a_directory_are_refused(reopen: Reopen, path: Path) -> None:
    path.symlink_to("elsewhere")
    with pytest.raises(Denied, match="is a symbolic link"):
        reopen()
    path.unlink()
    path.mkdir()
    with pytest.raises(Denied, match="is not a regular file"):
        reopen()


def test_a_store_in_a_missing_directory_is_a_store_error(tmp_path: Path, key: MasterKey) -> None:
    with pytest.raises(StoreError, match=r"can't create the store .*: No such file") as caught:
        Vault.open(tmp_path / "none" / "store.sqlite", key)
    assert "state directory" in caught.value.hint


def test_a_store_is_private_whatever_the_umask(reopen: Reopen, path: Path) -> None:
    old = os.umask(0)
    try:
        reopen().of("default").set("bot", {"A": VALUE}, by="ann")
    finally:
        os.umask(old)
    assert [oct(each.stat().st_mode & 0o777) for each in path.parent.iterdir()] == ["0o600"] * 4


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """The directory and what is in it can't be written by this process."""
    if os.geteuid() != 0:
        directory.chmod(0o500)
        try:
            yield
        finally:
            directory.chmod(0o700)
        return
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def can_mount() -> bool:
    """Whether this root may mount: in a container it often may not."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "none", directory], capture_output=True, check=False
        )
        if done.returncode == 0:
            subprocess.run(["umount", directory], check=True)
        return done.returncode == 0


def test_a_read_only_directory_is_told_and_nothing_is_made(tmp_path: Path, key: MasterKey) -> None:
    if os.geteuid() == 0 and not can_mount():
        pytest.skip("root that may not mount writes everywhere")
    with read_only(tmp_path), pytest.raises(StoreError, match="can't create the store") as caught:
        Vault.open(tmp_path / "store.sqlite", key)
    assert "must be able to write the state directory" in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_an_existing_store_in_a_read_only_directory_is_told(tmp_path: Path, reopen: Reopen) -> None:
    if os.geteuid() == 0 and not can_mount():
        pytest.skip("root that may not mount writes everywhere")
    reopen().close()
    with read_only(tmp_path), pytest.raises(StoreError, match="can't open the store") as caught:
        reopen()
    assert "must be able to write the state directory" in caught.value.hint
    reopen()


@AS_ROOT
def test_a_full_disk_fails_the_change_whole_and_leaves_the_store_usable(
    tmp_path: Path, key: MasterKey
) -> None:
    if not can_mount():
        pytest.skip("needs to mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=768k", "none", disk], check=True)
    try:
        vault = Vault.open(disk / "store.sqlite", key)
        vault.of("default").set("bot", {"A": VALUE}, by="ann")
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        big = {f"BIG_{n}": Secret(PLAINTEXT + b"x" * 100_000) for n in range(8)}
        with pytest.raises(StoreError, match="can't write the store") as caught:
            vault.of("default").set("bot", {"A": Secret(b"new"), **big}, by="ann")
        assert "space" in caught.value.hint
        assert "hunter2" not in everything(caught.value)
        assert [(v.name, v.version) for v in vault.of("default").list("bot")] == [("A", 1)]
        ballast.unlink()
        assert vault.of("default").set("bot", {"A": Secret(b"newer")}, by="ann") == {"A": 2}
        vault.close()
        vault = Vault.open(disk / "store.sqlite", key)
        assert vault.unseal(vault.of("default").snapshot("bot").variables["A"]).reveal() == b"newer"
        vault.close()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_file_size_limit_fails_the_change_whole_and_leaves_the_store_usable(
    reopen: Reopen, path: Path
) -> None:
    reopen().of("default").set("bot", {"A": Secret(b"old")}, by="ann")
    reopen().close()
    limit = 256 * 1024
    code = """
vault = Vault.open(path, key)
try:
    large = {f"B{n}": Secret(b"x" * 100_000) for n in range(4)}
    vault.of("default").set("bot", {"A": Secret(b"new"), **large}, by="ann")
except Exception as error:
    print(type(error).__name__, [v.version for v in vault.of("default").list("bot")])
print(vault.of("default").set("bot", {"A": Secret(b"small")}, by="ann"))
"""
    limited = child(
        code,
        path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    out, err = limited.communicate(timeout=60)
    assert (out, err) == ("StoreError [1]\n{'A': 2}\n", "")
    vault = reopen()
    assert [(v.name, v.version) for v in vault.of("default").list("bot")] == [("A", 2)]


def test_a_full_database_is_told_as_such(vault: Vault) -> None:
    connection = vault._ledger._store._db  # type: ignore[attr-defined]
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages + 2}")
    with pytest.raises(StoreError, match="database or disk is full") as caught:
        vault.of("default").set("bot", {"A": Secret(PLAINTEXT * 5000)}, by="ann")
    assert "nothing was changed" in caught.value.hint
    assert "hunter2" not in everything(caught.value)
    assert vault.of("default").list("bot") == []
    assert vault.of("default").set("bot", {"A": Secret(b"small")}, by="ann") == {"A": 1}


@pytest.mark.parametrize("row", [1, 2, 3])
def test_killed_in_the_middle_of_a_transaction_nothing_is_half_applied(
    reopen: Reopen, path: Path, row: int
) -> None:
    vault = reopen()
    vault.of("default").set(
        "bot", {"A": Secret(b"1"), "B": Secret(b"1"), "C": Secret(b"1")}, by="ann"
    )
    vault.close()
    code = f"""
real, calls = SqliteTransaction.put_row, []
def put_row(self, row):
    real(self, row)
    calls.append(row)
    if len(calls) == {row}:
        os.kill(os.getpid(), signal.SIGKILL)
SqliteTransaction.put_row = put_row
vault = Vault.open(path, key)
# Larger than SQLite's page cache, so that uncommitted pages reach the disk.
vault._ledger._store._db.execute("PRAGMA cache_size=1")
vault.of("default").set("bot", {{name: Secret(b"2" * 60_000) for name in "ABC"}}, by="ann")
"""
    killed = child(code, path)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    vault = reopen()
    assert [(v.name, v.version, v.size) for v in vault.of("default").list("bot")] == [
        ("A", 1, 1),
        ("B", 1, 1),
        ("C", 1, 1),
    ]
    assert vault.of("default").set("bot", {"A": Secret(b"3")}, by="ann") == {"A": 2}


def test_killed_at_any_moment_all_variables_have_one_version_that_was_promised(
    reopen: Reopen, path: Path
) -> None:
    """A version that the child reported is there; what it hadn't reported is there whole or not."""
    code = """
vault = Vault.open(path, key)
while True:
    values = {n: Secret(os.urandom(1000).hex()) for n in "ABCD"}
    versions = vault.of("default").set("bot", values, by="ann")
    if versions["A"] % 7 == 0:
        vault.rotate_data_key()
    print(versions["A"], flush=True)
"""
    promised = 0
    for lines in (1, 3, 10):
        process = child(code, path)
        assert process.stdout is not None
        try:
            first = [process.stdout.readline() for _ in range(lines)]
        finally:
            process.kill()
            rest = process.communicate(timeout=60)[0].split("\n")
        promised = int(first[-1])
        promised = max([promised, *(int(line) for line in rest[:-1])])
        versions = {v.name: v.version for v in reopen().of("default").list("bot")}
        assert set(versions) == set("ABCD")
        assert len(set(versions.values())) == 1
        assert versions["A"] in (promised, promised + 1)
        reopen().close()


def test_killed_while_the_store_is_made_the_next_start_makes_it(reopen: Reopen, path: Path) -> None:
    code = """
def put_header(self, header):
    os.kill(os.getpid(), signal.SIGKILL)
SqliteTransaction.put_header = put_header
Vault.open(path, key)
"""
    killed = child(code, path)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert path.exists()
    assert reopen().of("default").set("bot", {"A": VALUE}, by="ann") == {"A": 1}


def test_killed_between_commit_and_guard_the_store_opens(reopen: Reopen, path: Path) -> None:
    reopen().of("default").set("bot", {"A": VALUE}, by="ann")
    reopen().close()
    code = """
from sandboxd.vault.guard import Guard
vault = Vault.open(path, key)
Guard.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
vault.of("default").set("bot", {"A": Secret(b"new")}, by="ann")
"""
    killed = child(code, path)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    vault = reopen()
    assert [v.version for v in vault.of("default").list("bot")] == [2]
    assert vault.warnings == ()


def test_processes_that_set_at_once_give_every_version_once(reopen: Reopen, path: Path) -> None:
    reopen().close()
    code = """
vault = Vault.open(path, key)
for _ in range(8):
    print(vault.of("default").set("bot", {"A": Secret(b"x"), "B": Secret(b"x")}, by="ann")["B"])
"""
    children = [child(code, path) for _ in range(2)]
    output = [process.communicate(timeout=60) for process in children]
    assert [err for _, err in output] == ["", ""]
    assert sorted(int(v) for out, _ in output for v in out.split()) == list(range(1, 17))
    assert {v.version for v in reopen().of("default").list("bot")} == {16}


def test_a_store_locked_by_another_writer_is_told(vault: Vault, path: Path) -> None:
    vault._ledger._store._db.execute("PRAGMA busy_timeout=50")  # type: ignore[attr-defined]
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="database is locked") as caught:
            vault.of("default").set("bot", {"A": VALUE}, by="ann")
        assert "another process holds the store" in caught.value.hint
        other.execute("ROLLBACK")
    assert vault.of("default").set("bot", {"A": VALUE}, by="ann") == {"A": 1}


def test_opening_a_second_time_keeps_the_first_one_s_locks(path: Path) -> None:
    """fcntl(2): closing any descriptor of a file drops the process's locks on it."""
    first = SqliteStore(path)
    with first.transaction(write=True):
        pass
    # In WAL mode every connection holds a shared lock on these bytes (SQLite: os.h, SHARED_FIRST).
    code = """
import fcntl
try:
    fcntl.lockf(path.open("r+b"), fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)
except BlockingIOError:
    print("locked")
else:
    print("free")
"""
    assert child(code, path).communicate(timeout=60) == ("locked\n", "")
    SqliteStore(path).close()
    assert child(code, path).communicate(timeout=60) == ("locked\n", "")
    first.close()
    assert child(code, path).communicate(timeout=60) == ("free\n", "")
