"""tools/sql_query on real SQLite files: reading works, more needs the operator's word."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A workspace with ``data/shop.db`` in it."""
    path = tmp_path / "data" / "shop.db"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as made:
        made.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT, price REAL, raw BLOB)")
        rows = [(1, "tea", 2.5, b"\x00\xff"), (2, "café", 3.0, None), (3, "x'; --", 1.0, b"")]
        made.execute("CREATE INDEX by_name ON items (name)")
        made.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", rows)
        made.commit()
    return path


@pytest.fixture
def query(run_tool: Any, tmp_path: Path, database: Path) -> Callable[..., Any]:
    def run(sql: str, *parameters: Any, max_rows: int | None = None, **environment: str) -> Any:
        arguments: dict[str, Any] = {"sql": sql}
        if parameters:
            arguments["parameters"] = list(parameters)
        if max_rows is not None:
            arguments["max_rows"] = max_rows
        base = {"DATABASE_URL": "sqlite:///data/shop.db"}
        return run_tool("sql_query", arguments, base | environment, tmp_path)

    return run


def count(database: Path) -> int:
    with closing(sqlite3.connect(database)) as opened:
        number = opened.execute("SELECT count(*) FROM items").fetchone()[0]
    assert isinstance(number, int)
    return number


def test_rows_come_back_with_their_columns(query: Any) -> None:
    assert query("SELECT id, name, price, raw FROM items ORDER BY id").answer == {
        "columns": ["id", "name", "price", "raw"],
        "rows": [
            [1, "tea", 2.5, {"base64": "AP8="}],
            [2, "café", 3.0, None],
            [3, "x'; --", 1.0, {"base64": ""}],
        ],
        "row_count": 3,
        "truncated": False,
    }


def test_parameters_are_values_and_never_sql(query: Any) -> None:
    answer = query("SELECT id FROM items WHERE name = ?", "x'; --").answer
    assert answer["rows"] == [[3]]
    assert query("SELECT id FROM items WHERE name = ?", "' OR 1=1 --").answer["rows"] == []
    assert query("SELECT ?, ?, ?", None, True, 1.5).answer["rows"] == [[None, 1, 1.5]]


def test_the_absolute_spelling_of_the_url_means_the_workspace(query: Any) -> None:
    url = "sqlite:////workspace/data/shop.db"
    assert query("SELECT 1", DATABASE_URL=url).answer["rows"] == [[1]]


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO items (name) VALUES ('new')",
        "UPDATE items SET name = 'changed'",
        "DELETE FROM items",
        "WITH x AS (SELECT 1) DELETE FROM items",
        "DROP TABLE items",
        "CREATE TABLE other (a)",
        "CREATE TEMP TABLE other (a)",
        "PRAGMA user_version = 5",
        "PRAGMA query_only = OFF",
        "PRAGMA journal_mode = WAL",
        "PRAGMA writable_schema = ON",
        "BEGIN IMMEDIATE",
        "VACUUM",
        "VACUUM INTO 'copy.db'",
        "ATTACH 'other.db' AS other",
        "REINDEX",
    ],
)
def test_reading_is_all_that_a_call_may_do_by_default(query: Any, database: Path, sql: str) -> None:
    before = database.read_bytes()
    ran = query(sql)
    assert ran.status == 4
    assert "read" in ran.stderr
    assert database.read_bytes() == before
    assert sorted(p.name for p in database.parent.iterdir()) == ["shop.db"]


def test_the_operator_can_allow_changes(query: Any, database: Path) -> None:
    insert = "INSERT INTO items (name) VALUES (?) RETURNING name"
    for mode in ("read-write", "rw"):
        answer = query(insert, "new", SQL_QUERY_MODE=mode).answer
        assert answer["rows"] == [["new"]]
    assert count(database) == 5
    answer = query("UPDATE items SET price = 9", SQL_QUERY_MODE="read-write").answer
    assert answer["rows_changed"] == 5
    assert query("CREATE TABLE other (a)", SQL_QUERY_MODE="read-write").status == 0
    assert query("DROP TABLE other", SQL_QUERY_MODE="read-write").status == 0


def test_a_mode_that_nobody_knows_is_refused(query: Any) -> None:
    ran = query("SELECT 1", SQL_QUERY_MODE="readwrite")
    assert ran.status == 2
    assert query("SELECT 1", SQL_QUERY_MODE="read-only").status == 0


@pytest.mark.parametrize("mode", ["read-only", "read-write"])
def test_no_mode_reaches_another_file(
    query: Any, database: Path, tmp_path: Path, mode: str
) -> None:
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as made:
        made.execute("CREATE TABLE t (a)")
    for sql in (f"ATTACH '{other}' AS o", "VACUUM INTO 'copy.db'", "SELECT load_extension('x')"):
        assert query(sql, SQL_QUERY_MODE=mode).status in (1, 4)
    assert not (tmp_path / "copy.db").exists()
    url = "sqlite:///other.db"  # the control: nothing is wrong with the file itself
    assert query("SELECT * FROM t", SQL_QUERY_MODE=mode, DATABASE_URL=url).status == 0


def test_a_second_statement_is_refused(query: Any, database: Path) -> None:
    for mode in ("read-only", "read-write"):
        ran = query("SELECT 1; DELETE FROM items", SQL_QUERY_MODE=mode)
        assert ran.status == 4
        assert "one statement" in ran.stderr
    assert count(database) == 3
    assert query("SELECT 1;").status == 0


def test_the_schema_can_be_read(query: Any) -> None:
    names = [row[1] for row in query("PRAGMA table_info(items)").answer["rows"]]
    assert names == ["id", "name", "price", "raw"]
    assert query("SELECT name FROM sqlite_schema WHERE type = 'table'").answer["rows"] == [
        ["items"]
    ]
    assert query("EXPLAIN QUERY PLAN SELECT * FROM items").status == 0


def test_rows_are_bounded_by_number(query: Any) -> None:
    numbers = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"
    answer = query(numbers, max_rows=3).answer  # endless, but only three are asked for
    assert (answer["rows"], answer["truncated"]) == ([[1], [2], [3]], True)
    answer = query("SELECT id FROM items", max_rows=3).answer
    assert (answer["row_count"], answer["truncated"]) == (3, False)


def test_rows_are_bounded_by_bytes(query: Any) -> None:
    sql = (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 20) "
        "SELECT x, printf('%.100000c', 'a') FROM n"
    )
    ran = query(sql)
    assert ran.answer["truncated"] is True
    assert 0 < ran.answer["row_count"] < 20
    assert len(ran.stdout) < 1_100_000


def test_one_value_cannot_fill_the_memory(query: Any) -> None:
    ran = query("SELECT length(zeroblob(2000000000))")
    assert ran.status == 1
    assert "too big" in ran.stderr
    assert query("SELECT length(zeroblob(1000))").answer["rows"] == [[1000]]


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///../outside.db",
        "sqlite:////etc/outside.db",
        "sqlite:////workspace/../outside.db",
        "sqlite:////workspace2/outside.db",
        "sqlite:///data/%2e%2e/%2e%2e/outside.db",
        "sqlite:///data/shop.db?mode=rwc",
        "sqlite://host/data/shop.db",
        "sqlite:///",
        "sqlite:///:memory:/x/../y",
    ],
)
def test_a_file_outside_the_workspace_is_refused(
    query: Any, tmp_path: Path, url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert query("SELECT 1", DATABASE_URL=url).status in (2, 4)
    assert query("SELECT 1").status == 0


def test_symbolic_links_on_the_way_are_refused(
    query: Any, tmp_path: Path, database: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    os.link(database, outside / "shop.db")
    (tmp_path / "link.db").symlink_to(outside / "shop.db")
    (tmp_path / "folder").symlink_to(outside)
    for url in ("sqlite:///link.db", "sqlite:///folder/shop.db"):
        ran = query("SELECT 1", DATABASE_URL=url)
        assert ran.status == 4
        assert "symbolic link" in ran.stderr
    os.link(database, tmp_path / "plain.db")
    assert query("SELECT 1", DATABASE_URL="sqlite:///plain.db").status == 0


def test_a_missing_file_is_told_and_not_made(query: Any, tmp_path: Path) -> None:
    ran = query("SELECT 1", DATABASE_URL="sqlite:///none.db", SQL_QUERY_MODE="read-write")
    assert ran.status == 1
    assert "No such file" in ran.stderr
    assert not (tmp_path / "none.db").exists()


def test_a_file_that_is_no_database_is_told(query: Any, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("hello " * 1000)
    ran = query("SELECT * FROM sqlite_schema", DATABASE_URL="sqlite:///text.db")
    assert ran.status == 1
    assert "not a database" in ran.stderr


def test_a_database_in_wal_mode_is_read(query: Any, database: Path) -> None:
    with closing(sqlite3.connect(database)) as opened:
        opened.execute("PRAGMA journal_mode = WAL")
        opened.execute("INSERT INTO items (name) VALUES ('in the wal')")
        opened.commit()
        assert query("SELECT count(*) FROM items").answer["rows"] == [[4]]


def test_mistakes_in_sql_are_told_in_the_databases_words(query: Any) -> None:
    ran = query("SELECT absent FROM items")
    assert ran.status == 1
    assert "no such column: absent" in ran.stderr
    assert query("SELECT ?", 1, 2).status == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"sql": ""},
        {"sql": 1},
        {"sql": "SELECT 1", "max_rows": 0},
        {"sql": "SELECT 1", "max_rows": 10_001},
        {"sql": "SELECT 1", "parameters": {"a": 1}},
        {"sql": "SELECT ?", "parameters": [[1]]},
        {"sql": "SELECT 1", "mode": "read-write"},
        {"sql": "SELECT ?", "parameters": [10**30]},
        [],
    ],
)
def test_wrong_arguments_are_told(
    run_tool: Any, tmp_path: Path, database: Path, arguments: Any
) -> None:
    ran = run_tool("sql_query", arguments, {"DATABASE_URL": "sqlite:///data/shop.db"}, tmp_path)
    assert ran.status == 2
    assert ran.stderr.startswith("sql_query: ")


@pytest.mark.parametrize("url", ["", "mysql://user:hunter2-secret@host/db", "data/shop.db"])
def test_a_url_that_cannot_be_used_is_told_without_it(query: Any, url: str) -> None:
    ran = query("SELECT 1", DATABASE_URL=url)
    assert ran.status == 2
    assert "DATABASE_URL" in ran.stderr
    assert "hunter2" not in ran.everything


def test_deep_json_ends_with_a_message(run_tool: Any, tmp_path: Path) -> None:
    deep = "[" * 100_000
    ran = run_tool("sql_query", None, {"DATABASE_URL": "sqlite:///a"}, tmp_path, stdin=deep)
    assert (ran.status, json.dumps(ran.stdout)) == (2, '""')
    assert "one JSON object" in ran.stderr
