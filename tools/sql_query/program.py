"""Run one SQL statement against the database whose URL the caller never sees. Read-only by default.

Reads one JSON object on stdin (the arguments that tool.yaml describes) and writes one on stdout.
The first command line argument is the workspace, /workspace when absent. The environment holds
what the operator set for the agent:

``DATABASE_URL``
    ``postgresql://user:password@host:port/database?sslmode=...`` or ``sqlite:///path``, where the
    path is one below the workspace (``sqlite:////workspace/path`` says the same absolutely);
``SQL_QUERY_MODE``
    optional: ``read-write`` (or ``rw``) allows changes, anything else but ``read-only`` is refused.

Read-only is enforced by the database, not by reading the statement: SQLite opens the file with
``mode=ro`` and an authorizer, PostgreSQL runs the statement in a READ ONLY transaction that has
taken its snapshot (it can't be made READ WRITE then) and that ends with ROLLBACK.

Exit status: 0 done, 1 the database said no or can't be reached, 2 wrong arguments or settings,
4 refused. A message goes to stderr and holds neither the URL nor its password.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import re
import sqlite3
import ssl
import stat
import sys
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

TIMEOUT = 30  # seconds for the statement
MAX_ROWS, DEFAULT_ROWS = 10_000, 200
MAX_BYTES = 1_048_576  # of all rows as JSON
MAX_SQL = 100_000  # characters
BATCH = 50  # rows fetched at a time from PostgreSQL

READ_WORDS = ("select", "with", "values", "table", "show", "explain")
#: Statements that end the transaction around them, or stream what is not a result.
NEVER_WORDS = (
    *("begin", "start", "commit", "end", "rollback", "abort", "savepoint", "release", "prepare"),
    *("execute", "copy", "listen", "unlisten", "load"),
)
CURSOR_WORDS = ("select", "with", "values", "table")
#: In read-write mode: words of a query that no cursor can run (WITH ... INSERT, SELECT INTO).
CHANGES = re.compile(r"\b(into|insert|update|delete|merge)\b", re.IGNORECASE)


class Stop(Exception):
    """Ends the program with a status, a message and a hint."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.hint = status, message, hint


@dataclass
class Request:
    """One statement, its parameters and how much of the answer is wanted."""

    sql: str
    parameters: tuple[Any, ...]
    max_rows: int
    write: bool


@dataclass
class Answer:
    """Rows as JSON, bounded in number and bytes."""

    max_rows: int
    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    changed: int | None = None
    truncated: bool = False
    size: int = 0

    def take(self, rows: Iterable[Sequence[Any]]) -> bool:
        """Add rows until a bound is met; False when it was."""
        for row in rows:
            line = json.dumps([plain(v) for v in row], ensure_ascii=False, allow_nan=False)
            self.size += len(line.encode("utf-8", "replace")) + 2
            if len(self.rows) == self.max_rows or self.size > MAX_BYTES:
                self.truncated = True
                return False
            self.rows.append(line)
        return True

    def text(self) -> str:
        head = {"columns": self.columns, "row_count": len(self.rows), "truncated": self.truncated}
        if self.changed is not None:
            head["rows_changed"] = self.changed
        start = json.dumps(head, ensure_ascii=False)[:-1]
        return start + ', "rows": [' + ",\n".join(self.rows) + "]}"


def main(argv: list[str]) -> int:
    url = os.environ.get("DATABASE_URL", "")
    if not url:
        raise Stop(2, "DATABASE_URL is not set for this agent")
    request = read_request(os.environ.get("SQL_QUERY_MODE") or "read-only")
    scheme = url.partition(":")[0].lower().partition("+")[0]
    if scheme == "sqlite":
        answer = sqlite(url, argv[1] if len(argv) > 1 else "/workspace", request)
    elif scheme in ("postgresql", "postgres"):
        answer = postgresql(url, request)
    else:
        raise Stop(2, "DATABASE_URL is neither postgresql:// nor sqlite:///")
    sys.stdout.buffer.write(hide(answer.text()).encode("utf-8", "replace") + b"\n")
    return 0


def read_request(mode: str) -> Request:
    if mode not in ("read-only", "ro", "read-write", "rw"):
        raise Stop(2, "SQL_QUERY_MODE is neither read-only nor read-write")
    try:
        arguments = json.load(sys.stdin)
    except (ValueError, RecursionError):
        raise Stop(2, "stdin is not one JSON object") from None
    if not isinstance(arguments, dict):
        raise Stop(2, "stdin is not one JSON object")
    if extra := sorted(set(arguments) - {"sql", "parameters", "max_rows"}):
        raise Stop(2, f"unknown argument {extra[0][:40]!a}")
    sql = arguments.get("sql")
    if not isinstance(sql, str) or not sql.strip() or len(sql) > MAX_SQL or "\0" in sql:
        raise Stop(2, f"sql must be one statement of at most {MAX_SQL:,} characters")
    parameters = arguments.get("parameters", [])
    if not isinstance(parameters, list) or len(parameters) > 1000:
        raise Stop(2, "parameters must be a list of at most 1,000 values")
    if any(isinstance(value, dict | list) for value in parameters):
        raise Stop(2, "a parameter must be text, a number, true, false or null")
    max_rows = arguments.get("max_rows", DEFAULT_ROWS)
    if type(max_rows) is not int or not 1 <= max_rows <= MAX_ROWS:
        raise Stop(2, f"max_rows must be a whole number from 1 to {MAX_ROWS:,}")
    return Request(sql, tuple(parameters), max_rows, mode in ("read-write", "rw"))


# --- SQLite ---

#: https://www.sqlite.org/c3ref/c_alter_table.html; not all have a name in Python 3.11.
READ_ACTIONS = {20, 21, 31, 33}  # READ, SELECT, FUNCTION, RECURSIVE
WRITE_ACTIONS = READ_ACTIONS | {
    *range(1, 19),  # CREATE_* and DROP_* of tables, indexes, triggers, views; DELETE, INSERT
    *(23, 26, 27, 28, 29, 30),  # UPDATE, ALTER_TABLE, REINDEX, ANALYZE, CREATE_VTABLE, DROP_VTABLE
}
PRAGMA_ACTION, FUNCTION_ACTION, CREATE_VTABLE = 19, 31, 29
READ_PRAGMAS = {
    *("table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo"),
    *("foreign_key_list", "foreign_key_check", "database_list", "collation_list"),
    *("function_list", "compile_options", "integrity_check", "quick_check"),
}
VIRTUAL_TABLES = {"fts3", "fts4", "fts5", "rtree"}


def sqlite(url: str, workspace: str, request: Request) -> Answer:
    path = sqlite_path(url, workspace)
    mode = "rw" if request.write else "ro"
    answer = Answer(request.max_rows)
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{urllib.parse.quote(path)}?mode={mode}", uri=True, timeout=5)
        ) as database:
            guard(database, request.write)
            cursor = database.execute(request.sql, request.parameters)
            if cursor.description:
                answer.columns = [column[0] for column in cursor.description]
                answer.take(cursor)
            if request.write:
                answer.changed = max(cursor.rowcount, 0)
                cursor.close()
                database.commit()
    except sqlite3.Warning:  # Python 3.11's way to refuse a second statement
        raise Stop(4, "only one statement at a time") from None
    except sqlite3.Error as error:
        raise sqlite_stop(str(error), request.write) from None
    except OverflowError:
        raise Stop(2, "a number is too large for SQLite") from None
    return answer


def guard(database: sqlite3.Connection, write: bool) -> None:
    """Leave only what reading (or writing) rows of this one file needs."""
    database.text_factory = lambda data: data.decode("utf-8", "replace")
    database.execute("PRAGMA trusted_schema = OFF")  # https://www.sqlite.org/security.html
    database.execute("PRAGMA cell_size_check = ON")
    if not write:
        database.execute("PRAGMA query_only = ON")
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    actions = WRITE_ACTIONS if write else READ_ACTIONS

    def authorize(action: int, one: str | None, two: str | None, *_: str | None) -> int:
        allowed = action in actions or (write and action in (22, 32))  # TRANSACTION, SAVEPOINT
        if action == PRAGMA_ACTION:
            allowed = (one or "").lower() in READ_PRAGMAS
        elif action == FUNCTION_ACTION:
            allowed = (two or "").lower() not in ("load_extension", "fts3_tokenizer")
        elif action == CREATE_VTABLE and allowed:
            allowed = (two or "").lower() in VIRTUAL_TABLES
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    database.set_authorizer(authorize)
    deadline = time.monotonic() + TIMEOUT
    database.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)


def sqlite_stop(message: str, write: bool) -> Stop:
    if "one statement" in message:
        return Stop(4, "only one statement at a time")
    if "authoriz" in message or "prohibited" in message or "readonly" in message:
        if write:
            return Stop(4, "the statement reaches beyond this database, which is never allowed")
        return read_only_stop()
    if message == "interrupted":
        return Stop(1, f"the statement took more than {TIMEOUT} seconds")
    if "unable to open" in message:
        return Stop(
            1,
            "the database file can't be opened",
            "a database in WAL mode needs its -shm file, or a workspace that the tool may write",
        )
    return Stop(1, f"SQLite: {message[:500]}")


def sqlite_path(url: str, workspace: str) -> str:
    """The database file below the workspace, reached without a single symbolic link."""
    where = "DATABASE_URL must be sqlite:///path/below/the/workspace"
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.unquote(parts.path)
    if parts.netloc or not path.startswith("/") or parts.query or parts.fragment:
        raise Stop(2, where)
    path = path[1:]
    if path.startswith("/"):  # four slashes: absolute, as in SQLAlchemy's URLs
        inside = os.path.relpath(path, "/workspace")
        if path != os.path.normpath(path) or inside.startswith(".."):
            raise Stop(4, "the database file is outside the workspace", where)
        path = inside
    names = path.split("/")
    if not path or "\0" in path or any(name in ("", ".", "..") for name in names):
        raise Stop(4, "the database file is outside the workspace", where)
    try:
        folder = os.open(workspace, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        raise Stop(1, "this agent has no workspace for the database file to be in") from None
    try:
        for name in names[:-1]:
            deeper = os.open(
                name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder
            )
            os.close(folder)
            folder = deeper
        kind = os.stat(names[-1], dir_fd=folder, follow_symlinks=False).st_mode
    except NotADirectoryError:
        raise Stop(4, "the way to the database file leads over a symbolic link or file") from None
    except OSError as error:
        raise Stop(1, f"the database file: {error.strerror}") from None
    finally:
        os.close(folder)
    if not stat.S_ISREG(kind):
        raise Stop(4, "the database file is a symbolic link or no regular file")
    return os.path.join(workspace, path)


# --- PostgreSQL ---


def postgresql(url: str, request: Request) -> Answer:
    try:
        from pg8000.core import CoreConnection  # type: ignore[import-untyped]
        from pg8000.exceptions import (  # type: ignore[import-untyped]
            DatabaseError,
            InterfaceError,
        )
    except ImportError:
        raise Stop(
            1,
            "the PostgreSQL driver is not installed",
            "install it beside the daemon: pip install 'sandboxd[postgres]'",
        ) from None
    options = postgresql_options(url)
    word = first_word(request.sql)
    if word in NEVER_WORDS:
        raise Stop(4, f"{word.upper()} is not possible here: each call is one transaction")
    if not request.write and word not in READ_WORDS:
        raise read_only_stop()
    answer = Answer(request.max_rows)
    try:
        with CoreConnection(**options) as connection:
            run_postgresql(connection, request, word, answer)
    except DatabaseError as error:
        raise postgresql_stop(error.args[0] if error.args else {}) from None
    except ssl.SSLCertVerificationError as error:
        raise Stop(
            1, f"the database server's certificate is not trusted ({error.verify_message})"
        ) from None
    except InterfaceError as error:
        if str(error) == "Server refuses SSL":
            raise Stop(
                1,
                "the database server offers no TLS",
                "where the way to it is trusted, add ?sslmode=disable to DATABASE_URL",
            ) from None
        raise Stop(1, "the database server can't be reached, or it closed the connection") from None
    return answer


def run_postgresql(connection: Any, request: Request, word: str, answer: Answer) -> None:
    """One statement in one transaction.

    The extended protocol parses exactly one statement (PostgreSQL manual, section 55.2.3), so
    nothing can follow a COMMIT hidden in the text.
    """
    if not request.write:
        refuse_superuser(connection)
    connection.execute_simple("BEGIN" if request.write else "BEGIN TRANSACTION READ ONLY")
    # The first query fixes the transaction's mode: from here on READ WRITE is an error (SET
    # TRANSACTION, and set_config() too).
    connection.execute_simple("SELECT 1")
    if word in CURSOR_WORDS and not (request.write and CHANGES.search(request.sql)):
        fetch_by_cursor(connection, request, answer)
    else:
        result = connection.execute_unnamed(request.sql, request.parameters)
        if result.columns:
            answer.columns = [column["name"] for column in result.columns]
            answer.take(result.rows)
        if request.write:
            answer.changed = max(result.row_count, 0)
    connection.execute_simple("COMMIT" if request.write else "ROLLBACK")


def fetch_by_cursor(connection: Any, request: Request, answer: Answer) -> None:
    """In small batches, so that the tool never holds more than it may give."""
    connection.execute_unnamed(
        f"DECLARE sandboxd_rows NO SCROLL CURSOR FOR {request.sql}", request.parameters
    )
    more = True
    while more:
        result = connection.execute_simple(f"FETCH FORWARD {BATCH} FROM sandboxd_rows")
        answer.columns = [column["name"] for column in result.columns or ()]
        more = answer.take(result.rows) and len(result.rows) == BATCH


def refuse_superuser(connection: Any) -> None:
    """A superuser writes files and runs programs on the server from a read-only transaction."""
    result = connection.execute_simple("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
    if result.rows != [[False]]:
        raise Stop(
            4,
            "the database role is a superuser, for whom read-only does not hold",
            "use a role that may only read, or let the operator set SQL_QUERY_MODE=read-write",
        )


def postgresql_options(url: str) -> dict[str, Any]:
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or 5432
        query = urllib.parse.parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        raise Stop(2, "DATABASE_URL is not a well-formed URL") from None
    if unknown := sorted(set(query) - {"sslmode", "host", "application_name"}):
        raise Stop(2, f"DATABASE_URL has an option {unknown[0]!a} that this tool doesn't know")
    last = {name: values[-1] for name, values in query.items()}
    host = last.get("host") or parts.hostname or "localhost"
    host = urllib.parse.unquote(host)
    database = urllib.parse.unquote(parts.path.lstrip("/"))
    user = urllib.parse.unquote(parts.username or "")
    if not user or not database:
        raise Stop(2, "DATABASE_URL names no user or no database")
    options: dict[str, Any] = {
        "user": user,
        "password": urllib.parse.unquote(parts.password) if parts.password else None,
        "database": database,
        "application_name": last.get("application_name", "sandboxd sql_query"),
        "timeout": TIMEOUT + 5,
        "startup_params": {
            "statement_timeout": str(TIMEOUT * 1000),
            "idle_in_transaction_session_timeout": str(TIMEOUT * 1000),
        },
    }
    local = host.startswith("/") or host in ("localhost", "127.0.0.1", "::1")
    if host.startswith("/"):
        options["unix_sock"] = f"{host}/.s.PGSQL.{port}"
    else:
        options |= {"host": host, "port": port}
    options["ssl_context"] = tls(last.get("sslmode", "disable" if local else "verify-full"))
    return options


def tls(sslmode: str) -> ssl.SSLContext | bool:
    """libpq's words, but never its silent fallback to plain text."""
    if sslmode == "disable":
        return False
    context = ssl.create_default_context()
    if sslmode == "verify-full":
        return context
    context.check_hostname = False
    if sslmode == "require":
        context.verify_mode = ssl.CERT_NONE
    elif sslmode != "verify-ca":
        raise Stop(2, "DATABASE_URL's sslmode is not disable, require, verify-ca or verify-full")
    return context


def postgresql_stop(fields: dict[str, str]) -> Stop:
    code, message = fields.get("C", ""), fields.get("M", "unknown error")
    # read_only_sql_transaction; a cursor says it in its own words, before the transaction can
    if code == "25006" or message.startswith(("DECLARE CURSOR must not", "SELECT ... INTO is not")):
        return read_only_stop()
    if code == "57014":
        return Stop(1, f"the statement took more than {TIMEOUT} seconds")
    if code == "42601" and "multiple commands" in message:
        return Stop(4, "only one statement at a time")
    if code.startswith("28"):
        return Stop(1, "the database server refuses the user or its password")
    detail = " ".join(filter(None, (fields.get("D"), fields.get("H"))))
    return Stop(1, f"PostgreSQL: {message[:1000]} ({code})", detail[:1000])


def first_word(sql: str) -> str:
    """The statement's first word in lower case, past blanks, comments and parentheses."""
    at, depth = 0, 0
    while at < len(sql):
        if depth:  # comments nest in PostgreSQL (manual, section 4.1.5)
            if sql.startswith("*/", at):
                depth, at = depth - 1, at + 2
            elif sql.startswith("/*", at):
                depth, at = depth + 1, at + 2
            else:
                at += 1
        elif sql.startswith("/*", at):
            depth, at = 1, at + 2
        elif sql.startswith("--", at):
            ends = re.compile(r"[\r\n]|$").search(sql, at)
            at = ends.end() if ends else len(sql)
        elif sql[at] in " \t\n\r\f(":
            at += 1
        else:
            break
    match = re.compile(r"[A-Za-z_]*").match(sql, at)
    return match[0].lower() if match else ""


# --- both ---


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it; bytes as ``{"base64": ...}``, what JSON lacks as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)


def read_only_stop() -> Stop:
    return Stop(
        4,
        "refused: this database is open for reading only",
        "the operator allows changes with SQL_QUERY_MODE=read-write",
    )


def secrets() -> Iterator[str]:
    """The URL and its password, as they stand there and decoded."""
    url = os.environ.get("DATABASE_URL", "")
    yield url
    with contextlib.suppress(ValueError):
        password = urllib.parse.urlsplit(url).password or ""
        yield password
        yield urllib.parse.unquote(password)


def hide(text: str) -> str:
    for secret in secrets():
        if len(secret) >= 6:  # shorter ones are words that any table may hold
            text = text.replace(secret, "[redacted:DATABASE_URL]")
    return text


def end(status: int, message: str, hint: str = "") -> NoReturn:
    text = f"sql_query: {message}\n" + (f"hint: {hint}\n" if hint else "")
    sys.stderr.write(hide(text))
    sys.exit(status)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except Stop as stop:
        end(stop.status, stop.message, stop.hint)
    except Exception as error:  # noqa: BLE001  # a traceback could show the URL
        end(1, f"unexpected {type(error).__name__}")
