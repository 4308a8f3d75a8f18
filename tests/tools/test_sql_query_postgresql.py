"""tools/sql_query on a real PostgreSQL server that this file starts and stops."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.services

PASSWORD = "pw-5d41402abc4b2a76"


@dataclass
class Server:
    """A cluster with the roles ``postgres`` (superuser), ``app`` and ``lone%40user``."""

    folder: Path
    port: int

    def url(self, user: str = "app", host: str = "127.0.0.1", options: str = "") -> str:
        return f"postgresql://{user}:{PASSWORD}@{host}:{self.port}/shop{options}"


def postgres_bin() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    which = shutil.which("pg_ctl")
    return found[-1].parent if found else Path(which).resolve().parent if which else None


@pytest.fixture(scope="module")
def server(certificate: Path) -> Iterator[Server]:
    programs = postgres_bin()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    unprivileged: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if os.geteuid() == 0:  # initdb refuses root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        unprivileged = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(*command: str | Path, **more: Any) -> None:
        subprocess.run(
            command,
            check=True,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": str(folder)},
            stdout=subprocess.DEVNULL,
            **unprivileged,
            **more,
        )

    data = folder / "data"
    passwords = folder / "password"
    passwords.write_text(PASSWORD)
    passwords.chmod(0o644)
    tls = folder / "server.pem"
    shutil.copy(certificate, tls)
    if unprivileged:
        os.chown(tls, unprivileged["user"], unprivileged["group"])
    tls.chmod(0o600)
    try:
        run(
            *(programs / "initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256"),
            *("--pwfile", passwords, "-E", "UTF8", "--locale=C", "--no-sync"),
        )
        options = (
            f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} "
            f"-c fsync=off -c ssl=on -c ssl_cert_file={tls} -c ssl_key_file={tls}"
        )
        run(programs / "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start")
        try:
            setup = f"""
                CREATE ROLE app LOGIN PASSWORD '{PASSWORD}';
                CREATE DATABASE shop OWNER app;
                \\connect shop
                SET ROLE app;
                CREATE TABLE items (id int PRIMARY KEY, name text, price numeric(8,2), raw bytea,
                                    made timestamptz, tags text[], more jsonb);
                INSERT INTO items VALUES
                  (1, 'tea', 2.50, '\\x00ff', '2026-01-02 03:04:05+00', '{{a,b}}', '{{"k": [1]}}'),
                  (2, 'café', NULL, NULL, NULL, NULL, NULL);
                CREATE FUNCTION sneak() RETURNS int LANGUAGE plpgsql AS
                  $$ BEGIN DELETE FROM items; RETURN 1; END $$;
                CREATE PROCEDURE leave() LANGUAGE plpgsql AS
                  $$ BEGIN COMMIT; DELETE FROM items; END $$;
            """
            run(
                *("psql", "-q", "-v", "ON_ERROR_STOP=1", "-X", "-d"),
                f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres",
                input=setup.encode(),
            )
            yield Server(folder, port)
        finally:
            run(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def query(run_tool: Any, server: Server, tmp_path: Path) -> Callable[..., Any]:
    def run(sql: str, *parameters: Any, max_rows: int = 100, **environment: str) -> Any:
        arguments = {"sql": sql, "parameters": list(parameters), "max_rows": max_rows}
        ran = run_tool(
            "sql_query", arguments, {"DATABASE_URL": server.url()} | environment, tmp_path
        )
        assert PASSWORD not in ran.everything
        return ran

    return run


@pytest.fixture
def items_stay(query: Any) -> Iterator[None]:
    """Whatever the test tried, the two rows are still there."""
    yield
    assert query("SELECT count(*) FROM items").answer["rows"] == [[2]]


def test_rows_come_back_with_their_columns(query: Any) -> None:
    answer = query("SELECT * FROM items ORDER BY id").answer
    assert answer["columns"] == ["id", "name", "price", "raw", "made", "tags", "more"]
    first, second = answer["rows"]
    made = first.pop(4)
    assert first == [1, "tea", "2.50", {"base64": "AP8="}, ["a", "b"], {"k": [1]}]
    assert made.startswith("2026-01-02T03:04:05")
    assert second == [2, "café", None, None, None, None, None]


def test_parameters_are_values_and_never_sql(query: Any) -> None:
    assert query("SELECT id FROM items WHERE name = $1", "tea").answer["rows"] == [[1]]
    assert query("SELECT id FROM items WHERE name = $1", "' OR true --").answer["rows"] == []
    assert query("SELECT $1::int + 1, $2::bool", 41, True).answer["rows"] == [[42, True]]


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO items (id) VALUES (9)",
        "UPDATE items SET name = 'x'",
        "DELETE FROM items",
        "WITH gone AS (DELETE FROM items RETURNING id) SELECT * FROM gone",
        "EXPLAIN ANALYZE DELETE FROM items",
        "SELECT * INTO copy FROM items",
        "CREATE TABLE other (a int)",
        "TRUNCATE items",
        "SELECT sneak()",
        "CALL leave()",
        "DO $$ BEGIN DELETE FROM items; END $$",
        "SET TRANSACTION READ WRITE",
        "SET default_transaction_read_only = off",
        "COMMIT",
        "/* a /* nested */ comment */ COMMIT",
        "-- a comment\nROLLBACK",
        "; COMMIT",
        "BEGIN",
        "COPY items TO STDOUT",
        "COPY items TO PROGRAM 'id'",
        "LISTEN something",
        "LOCK TABLE items",
    ],
)
def test_reading_is_all_that_a_call_may_do_by_default(
    query: Any, items_stay: None, sql: str
) -> None:
    ran = query(sql)
    assert ran.status == 4, ran.everything
    assert ran.stdout == ""


def test_a_function_cannot_make_the_transaction_writable(query: Any, items_stay: None) -> None:
    sql = (
        "SELECT set_config('transaction_read_only', 'off', true), "
        "set_config('default_transaction_read_only', 'off', false), sneak()"
    )
    ran = query(sql)
    assert ran.status in (1, 4)
    assert "transaction" in ran.stderr or "reading only" in ran.stderr
    assert query("SELECT set_config('application_name', 'x', true)").status == 0


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1; DELETE FROM items",
        "SELECT 1; COMMIT; DELETE FROM items",
        "SELECT 1) ; DELETE FROM items; SELECT (1",
        "SHOW server_version; DELETE FROM items",
    ],
)
@pytest.mark.parametrize("mode", ["read-only", "read-write"])
def test_a_second_statement_is_refused(query: Any, items_stay: None, sql: str, mode: str) -> None:
    assert query(sql, SQL_QUERY_MODE=mode).status in (1, 4)
    assert query("SELECT 1;", SQL_QUERY_MODE=mode).status == 0


def test_the_operator_can_allow_changes(query: Any, items_stay: None) -> None:
    mode = {"SQL_QUERY_MODE": "read-write"}
    answer = query("INSERT INTO items (id, name) VALUES ($1, $2) RETURNING id", 9, "n", **mode)
    assert answer.answer["rows"] == [[9]]
    assert query("SELECT name FROM items WHERE id = 9").answer["rows"] == [["n"]]
    assert query("DELETE FROM items WHERE id = 9", **mode).answer["rows_changed"] == 1
    assert query("CREATE TABLE made (a int)", **mode).status == 0
    assert query("DROP TABLE made", **mode).status == 0
    assert query("COMMIT", **mode).status == 4


def test_a_superuser_cannot_be_read_only(query: Any, server: Server) -> None:
    url = server.url("postgres")
    ran = query("SELECT 1", DATABASE_URL=url)
    assert ran.status == 4
    assert "superuser" in ran.stderr
    assert query("SELECT 1", DATABASE_URL=url, SQL_QUERY_MODE="read-write").status == 0


def test_rows_are_bounded_by_number_without_fetching_the_rest(query: Any) -> None:
    answer = query("SELECT generate_series(1, 2000000000)", max_rows=120).answer
    assert (answer["row_count"], answer["truncated"]) == (120, True)
    assert answer["rows"][-1] == [120]
    answer = query("SELECT generate_series(1, 100)", max_rows=100).answer
    assert (answer["row_count"], answer["truncated"]) == (100, False)


def test_rows_are_bounded_by_bytes(query: Any) -> None:
    ran = query("SELECT repeat('a', 100000) FROM generate_series(1, 40)")
    assert ran.answer["truncated"] is True
    assert 0 < ran.answer["row_count"] < 40
    assert len(ran.stdout) < 1_100_000


def test_show_and_explain_work(query: Any) -> None:
    assert query("SHOW transaction_read_only").answer["rows"] == [["on"]]
    assert query("EXPLAIN SELECT * FROM items").answer["row_count"] > 0
    assert query("TABLE items").answer["row_count"] == 2
    assert query("VALUES (1), (2)").answer["row_count"] == 2
    assert query("(SELECT 1)").answer["rows"] == [[1]]


def test_the_servers_own_words_are_passed_on(query: Any) -> None:
    ran = query("SELECT nothing FROM items")
    assert ran.status == 1
    assert 'column "nothing" does not exist (42703)' in ran.stderr


def test_a_wrong_password_is_told_without_it(query: Any, server: Server) -> None:
    url = server.url().replace(PASSWORD, "wrong-password-7")
    ran = query("SELECT 1", DATABASE_URL=url)
    assert ran.status == 1
    assert "refuses the user or its password" in ran.stderr
    assert "wrong-password-7" not in ran.everything


def test_a_server_that_is_not_there_is_told_without_its_url(query: Any) -> None:
    ran = query("SELECT 1", DATABASE_URL="postgresql://app:hidden-word@127.0.0.1:1/shop")
    assert ran.status == 1
    assert "can't be reached" in ran.stderr
    assert "hidden-word" not in ran.everything


def test_a_password_in_a_row_is_hidden(query: Any) -> None:
    assert query("SELECT $1::text", PASSWORD).answer["rows"] == [["[redacted:DATABASE_URL]"]]


def test_the_unix_socket_is_reached_by_the_host_option(query: Any, server: Server) -> None:
    url = f"postgresql://app:{PASSWORD}@:{server.port}/shop?host={server.folder}"
    assert query("SELECT 1", DATABASE_URL=url).answer["rows"] == [[1]]


def test_tls_is_checked_as_far_as_sslmode_says(
    query: Any, server: Server, certificate: Path
) -> None:
    shown = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    for mode, trusted, status in (
        ("require", False, 0),
        ("verify-ca", False, 1),
        ("verify-full", False, 1),
        ("verify-ca", True, 0),
        ("verify-full", True, 0),
        ("prefer", False, 2),
    ):
        host = "localhost" if trusted else "127.0.0.1"
        environment = {"DATABASE_URL": server.url(host=host, options=f"?sslmode={mode}")}
        if trusted:
            environment["SSL_CERT_FILE"] = str(certificate)
        ran = query(shown, **environment)
        assert ran.status == status, (mode, ran.stderr)
        if status == 0:
            assert ran.answer["rows"] == [[True]]
    plain = {"DATABASE_URL": server.url(options="?sslmode=disable")}
    assert query(shown, **plain).answer["rows"] == [[False]]


def test_an_option_that_is_not_known_is_told(query: Any, server: Server) -> None:
    ran = query("SELECT 1", DATABASE_URL=server.url(options="?options=-cfoo"))
    assert ran.status == 2
    assert "'options'" in ran.stderr
