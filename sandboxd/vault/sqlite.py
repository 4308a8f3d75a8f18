"""The embedded store: one SQLite file in WAL mode, every commit on disk before it returns."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandboxd.errors import StoreError
from sandboxd.files import fsync_directory, open_private
from sandboxd.names import shown
from sandboxd.vault.store import (
    ApiKeyRow,
    Header,
    KeyRow,
    RevocationRow,
    SessionRecord,
    VariableRow,
)

__all__ = ["MIGRATIONS", "SqliteStore"]

#: Marks the file as ours in its header (https://www.sqlite.org/fileformat.html#application_id).
APPLICATION_ID = 0x73626F78  # "sbox"

#: How long to wait for another writer.
_BUSY_MS = 10_000

#: How many ended sessions are remembered.
_ENDED_SESSIONS = 1000

_SCHEMA_1 = (
    """CREATE TABLE header (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        store BLOB NOT NULL, created_at REAL NOT NULL, key_check BLOB NOT NULL,
        generation INTEGER NOT NULL, digest BLOB NOT NULL
    )""",
    """CREATE TABLE keys (
        purpose TEXT NOT NULL, team TEXT NOT NULL, id INTEGER NOT NULL,
        created_at REAL NOT NULL, nonce BLOB NOT NULL, wrapped BLOB NOT NULL,
        PRIMARY KEY (purpose, team, id)
    ) WITHOUT ROWID""",
    """CREATE TABLE variables (
        team TEXT NOT NULL, agent TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
        live INTEGER NOT NULL, revoked_up_to INTEGER NOT NULL, key_id INTEGER NOT NULL,
        nonce BLOB NOT NULL, ciphertext BLOB NOT NULL, fingerprint TEXT NOT NULL,
        set_at REAL NOT NULL, set_by TEXT NOT NULL, digest BLOB NOT NULL,
        last_used_at REAL, used_digest BLOB NOT NULL,
        PRIMARY KEY (team, agent, name)
    )""",
    """CREATE TABLE sessions (
        team TEXT NOT NULL, id TEXT NOT NULL, agent TEXT NOT NULL, policy TEXT NOT NULL,
        state TEXT NOT NULL, started_at REAL NOT NULL, ended_at REAL, exit_code INTEGER,
        exit_signal INTEGER, reason TEXT NOT NULL, started_by TEXT NOT NULL,
        variables TEXT NOT NULL, workspace TEXT NOT NULL,
        PRIMARY KEY (team, id)
    )""",
)

#: What a session rests on.
_SCHEMA_2 = (
    "ALTER TABLE sessions ADD COLUMN api_key TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE sessions ADD COLUMN token TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE sessions ADD COLUMN subject TEXT NOT NULL DEFAULT ''",
)

#: Who may come in over HTTP.
_SCHEMA_3 = (
    """CREATE TABLE api_keys (
        id TEXT NOT NULL PRIMARY KEY, team TEXT NOT NULL, label TEXT NOT NULL, role TEXT NOT NULL,
        agents TEXT NOT NULL, prefix TEXT NOT NULL, hash BLOB NOT NULL, created_at REAL NOT NULL,
        created_by TEXT NOT NULL, expires_at REAL, ended_at REAL, ended_by TEXT NOT NULL,
        replaces TEXT NOT NULL, digest BLOB NOT NULL, last_used_at REAL, used_digest BLOB NOT NULL
    )""",
    """CREATE TABLE revocations (
        team TEXT NOT NULL, kind TEXT NOT NULL, what TEXT NOT NULL, at REAL NOT NULL,
        revoked_by TEXT NOT NULL, digest BLOB NOT NULL,
        PRIMARY KEY (team, kind, what)
    )""",
)

#: Statements that lead from each schema version to the next; the last one is ours.
MIGRATIONS: tuple[tuple[str, ...], ...] = (_SCHEMA_1, _SCHEMA_2, _SCHEMA_3)

_HEADER = "store, created_at, key_check, generation, digest"
_KEY = "purpose, team, id, created_at, nonce, wrapped"
_VARIABLE = (
    "team, agent, name, version, live, revoked_up_to, key_id, nonce, ciphertext, fingerprint, "
    "set_at, set_by, digest, last_used_at, used_digest"
)
_API_KEY = (
    "id, team, label, role, agents, prefix, hash, created_at, created_by, expires_at, ended_at, "
    "ended_by, replaces, digest, last_used_at, used_digest"
)
_REVOCATION = "team, kind, what, at, revoked_by, digest"
_SESSION = (
    "id, agent, policy, state, started_at, ended_at, exit_code, exit_signal, reason, started_by, "
    "variables, workspace, team, api_key, token, subject"
)


class SqliteStore:
    """The :class:`~sandboxd.vault.store.Store` protocol over one file. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open ``path``, or create it with mode 0600.

        Raises :class:`Denied` when the file isn't private and :class:`StoreError` when it can't be
        opened, isn't a sandboxd store, is structurally damaged or was written by a newer version.
        """
        self._path = path
        _make_file(path)
        self._db = self._connect()
        try:
            with self._told("open"):
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    @contextlib.contextmanager
    def transaction(self, *, write: bool) -> Iterator[SqliteTransaction]:
        """One transaction: committed on leaving, rolled back whole on any error."""
        with self._told("write" if write else "read"):
            self._db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield SqliteTransaction(self._db)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def forget(self) -> None:
        """Overwrite the write-ahead log's copies of what was replaced, when nobody reads them."""
        with contextlib.suppress(sqlite3.Error):  # the next checkpoint does it
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        self.forget()
        self._db.close()

    def _connect(self) -> sqlite3.Connection:
        with self._told("open"):
            db = sqlite3.connect(
                self._path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False
            )
        # Damaged text must reach the digest check, which names the row, and not stop before it.
        db.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        return db

    def _prepare(self) -> None:
        # Nothing in the file is trusted: no functions out of its schema, no cell beyond its page.
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "temp_store=MEMORY"):
            self._db.execute(f"PRAGMA {pragma}")
        mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise StoreError(
                f"the file system of {self._path} can't hold the store: no write-ahead log",
                hint="put the state directory on a local file system (sqlite.org/wal.html)",
            )
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA secure_delete=ON")
        self._migrate()
        damage = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if damage != "ok":
            raise StoreError(
                f"the store {self._path} is corrupted: {' '.join(str(damage).split())}",
                hint="restore it from a backup",
            )
        if _schema(self._db) != _expected_schema():
            raise StoreError(
                f"the store {self._path} is corrupted: its tables are not the ones sandboxd made",
                hint="restore it from a backup",
            )

    def _migrate(self) -> None:
        """Bring the schema to our version in one transaction; refuse what isn't ours or newer."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            owner = self._db.execute("PRAGMA application_id").fetchone()[0]
            empty = not _schema(self._db)
            if not empty and owner != APPLICATION_ID:
                raise StoreError(f"{self._path} is not a sandboxd store")
            if version > len(MIGRATIONS):
                raise StoreError(
                    f"the store {self._path} has schema version {version}, newer than "
                    f"{len(MIGRATIONS)}, the newest this sandboxd knows",
                    hint="upgrade sandboxd; a downgrade needs a backup made before the upgrade",
                )
            if not empty and version < 1:
                raise StoreError(f"the store {self._path} is corrupted: no schema version")
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    self._db.execute(statement)
            if version < len(MIGRATIONS):
                self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _told(self, action: str) -> Iterator[None]:
        """SQLite's errors as ours. They name files and tables, never a bound value."""
        try:
            yield
            return
        except sqlite3.Error as error:
            reason, code = str(error), getattr(error, "sqlite_errorname", "")
        hints = {
            "SQLITE_FULL": "free some space; nothing was changed",
            "SQLITE_IOERR": "check the disk and its free space; nothing was changed",
            "SQLITE_READONLY": "sandboxd must be able to write the state directory",
            "SQLITE_CANTOPEN": "sandboxd must be able to write the state directory",
            "SQLITE_BUSY": "another process holds the store; stop it and try again",
            "SQLITE_CORRUPT": "restore it from a backup",
            "SQLITE_NOTADB": "restore it from a backup",
        }
        hint = next((text for key, text in hints.items() if code.startswith(key)), "")
        corrupted = code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))
        subject = f"the store {self._path}"
        said = f"{subject} is corrupted" if corrupted else f"can't {action} {subject}"
        raise StoreError(f"{said}: {reason}", hint=hint)


class SqliteTransaction:
    """The :class:`~sandboxd.vault.store.Transaction` protocol."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def header(self) -> Header | None:
        row = self._db.execute(f"SELECT {_HEADER} FROM header WHERE one = 1").fetchone()
        return None if row is None else Header(*row)

    def put_header(self, header: Header) -> None:
        self._put("header", f"one, {_HEADER}", (1, *_values(header)))

    def key_rows(self) -> list[KeyRow]:
        rows = self._db.execute(f"SELECT {_KEY} FROM keys ORDER BY purpose, team, id")
        return [KeyRow(*row) for row in rows]

    def put_key(self, row: KeyRow) -> None:
        self._put("keys", _KEY, _values(row))

    def delete_key(self, purpose: str, team: str, key_id: int) -> None:
        self._db.execute(
            "DELETE FROM keys WHERE purpose = ? AND team = ? AND id = ?", (purpose, team, key_id)
        )

    def digests(self) -> Iterator[tuple[str, str, str, bytes]]:
        yield from self._db.execute(
            "SELECT team, agent, name, digest FROM variables ORDER BY team, agent, name"
        )

    def rows(self, team: str | None = None, agent: str | None = None) -> Iterator[VariableRow]:
        cursor = self._db.execute(
            f"SELECT {_VARIABLE} FROM variables WHERE (? IS NULL OR team = ?) "
            "AND (? IS NULL OR agent = ?) ORDER BY team, agent, name",
            (team, team, agent, agent),
        )
        for row in cursor:
            yield VariableRow(*row)

    def row(self, team: str, agent: str, name: str) -> VariableRow | None:
        row = self._db.execute(
            f"SELECT {_VARIABLE} FROM variables WHERE team = ? AND agent = ? AND name = ?",
            (team, agent, name),
        ).fetchone()
        return None if row is None else VariableRow(*row)

    def put_row(self, row: VariableRow) -> None:
        self._put("variables", _VARIABLE, _values(row))

    def put_used(
        self, team: str, agent: str, name: str, last_used_at: float, used_digest: bytes
    ) -> None:
        self._db.execute(
            "UPDATE variables SET last_used_at = ?, used_digest = ? "
            "WHERE team = ? AND agent = ? AND name = ?",
            (last_used_at, used_digest, team, agent, name),
        )

    def api_key_rows(self) -> list[ApiKeyRow]:
        rows = self._db.execute(f"SELECT {_API_KEY} FROM api_keys ORDER BY created_at, id")
        return [ApiKeyRow(*row) for row in rows]

    def put_api_key(self, row: ApiKeyRow) -> None:
        self._put("api_keys", _API_KEY, _values(row))

    def put_api_key_used(self, id: str, last_used_at: float, used_digest: bytes) -> None:
        self._db.execute(
            "UPDATE api_keys SET last_used_at = ?, used_digest = ? WHERE id = ?",
            (last_used_at, used_digest, id),
        )

    def revocation_rows(self) -> list[RevocationRow]:
        rows = self._db.execute(f"SELECT {_REVOCATION} FROM revocations ORDER BY team, kind, what")
        return [RevocationRow(*row) for row in rows]

    def put_revocation(self, row: RevocationRow) -> None:
        self._put("revocations", _REVOCATION, _values(row))

    def delete_revocations(self, before: float) -> None:
        self._db.execute("DELETE FROM revocations WHERE at < ?", (before,))

    def put_session(self, record: SessionRecord) -> None:
        values = (
            json.dumps(dict(value), sort_keys=True) if field == "variables" else value
            for field, value in vars(record).items()
        )
        self._put("sessions", _SESSION, tuple(values))
        if record.state == "ended":
            self._db.execute(
                "DELETE FROM sessions WHERE team = ? AND state = 'ended' AND id NOT IN (SELECT "
                "id FROM sessions WHERE team = ? AND state = 'ended' "
                "ORDER BY ended_at DESC LIMIT ?)",
                (record.team, record.team, _ENDED_SESSIONS),
            )

    def sessions(self, team: str | None, *, include_ended: bool) -> list[SessionRecord]:
        cursor = self._db.execute(
            f"SELECT {_SESSION} FROM sessions WHERE (? IS NULL OR team = ?) "
            "AND (? OR state <> 'ended') ORDER BY started_at, id",
            (team, team, include_ended),
        )
        return [_session(row) for row in cursor]

    def _put(self, table: str, columns: str, values: tuple[Any, ...]) -> None:
        marks = ", ".join("?" * len(values))
        self._db.execute(f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({marks})", values)


def _values(row: Header | KeyRow | VariableRow | ApiKeyRow | RevocationRow) -> tuple[Any, ...]:
    return tuple(vars(row).values())


def _session(row: tuple[Any, ...]) -> SessionRecord:
    columns = dict(zip(_SESSION.split(", "), row, strict=True))
    versions = None
    with contextlib.suppress(ValueError, TypeError):
        versions = json.loads(columns["variables"])
    if not isinstance(versions, dict) or not all(type(v) is int for v in versions.values()):
        raise StoreError(
            f"the record of session {shown(str(row[0]))} is corrupted",
            hint="restore the store from a backup",
        )
    columns["by"], columns["key"] = columns.pop("started_by"), columns.pop("api_key")
    return SessionRecord(**columns | {"variables": versions})


def _make_file(path: Path) -> None:
    """Make it when it's missing. SQLite gives its companion files the mode of this one."""
    try:
        # O_PATH: closing any other descriptor of the file would drop the locks that another
        # connection of this process holds on it (fcntl(2), "Record locking").
        fd = open_private(path, os.O_PATH, "the store")
    except FileNotFoundError:
        try:
            fd = open_private(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, "the store")
            os.fsync(fd)
            fsync_directory(path.parent)
        except OSError as error:
            raise StoreError(
                f"can't create the store {path}: {error.strerror}",
                hint="sandboxd must be able to write the state directory",
            ) from None
    except OSError as error:
        raise StoreError(
            f"can't open the store {path}: {error.strerror}",
            hint="sandboxd must be able to write the state directory",
        ) from None
    os.close(fd)


def _schema(db: sqlite3.Connection) -> set[tuple[str, str, str | None]]:
    return set(db.execute("SELECT type, name, sql FROM sqlite_master").fetchall())


def _expected_schema() -> set[tuple[str, str, str | None]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        for statements in MIGRATIONS:
            for statement in statements:
                db.execute(statement)
        return _schema(db)
