"""Each shipped tool called through the broker, in a real sandbox, in both launcher modes."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "broker"))

from broker_parts import ORDINARY_UID, Broker
from git_hub import needs_git

from sandboxd.isolation.client import Launcher
from sandboxd.isolation.runtime import python_prefixes

TOKEN = "tok-in-the-sandbox-0123456789"


@pytest.fixture
async def broker(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Broker]:
    (tmp_path / "broker").mkdir()
    made = Broker(tmp_path / "broker", launcher, None)
    made.tools += ["git", "http_request", "shell", "sql_query"]
    made.make_workspace()
    yield made
    made.close()


@pytest.fixture
def python_reachable(launcher_mode: str) -> None:
    """Skip where root's tests play an ordinary user who can't reach root's own interpreter."""
    if os.geteuid() == 0 and launcher_mode == "user":
        for prefix in python_prefixes():
            for folder in (Path(prefix), *Path(prefix).parents):
                if not folder.stat().st_mode & 0o001:
                    pytest.skip(f"{folder}, with this interpreter in it, is closed to other users")


def own(path: Path) -> None:
    """Give what the test made to the user whose workspace it is."""
    if os.geteuid() == 0:
        for folder, _, files in os.walk(path):
            for name in [folder, *(os.path.join(folder, file) for file in files)]:
                os.chown(name, ORDINARY_UID, ORDINARY_UID)


@pytest.mark.usefixtures("python_reachable")
async def test_http_request_sends_the_credential_and_shows_none(broker: Broker, site: Any) -> None:
    site.answer = lambda seen: (200, {}, json.dumps(seen.headers).encode())
    broker.set(HTTP_REQUEST_TOKEN=TOKEN, HTTP_REQUEST_HOSTS=site.origin)
    result = await broker.call("http_request", {"url": site.origin + "/x"})
    assert (result.outcome, result.exit_code) == ("ok", 0), result
    assert site.seen[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert TOKEN.encode() not in result.stdout + result.stderr
    refused = await broker.call("http_request", {"url": "http://127.0.0.1:1/"})
    assert refused.exit_code == 4


@pytest.mark.usefixtures("python_reachable")
async def test_sql_query_reads_a_file_of_the_workspace(broker: Broker) -> None:
    assert broker.workspace is not None
    with closing(sqlite3.connect(broker.workspace / "shop.db")) as made:
        made.execute("CREATE TABLE items (name TEXT)")
        made.execute("INSERT INTO items VALUES ('tea')")
        made.commit()
    own(broker.workspace)
    broker.set(DATABASE_URL="sqlite:////workspace/shop.db")
    result = await broker.call("sql_query", {"sql": "SELECT name FROM items"})
    assert (result.outcome, result.exit_code) == ("ok", 0), result
    assert json.loads(result.stdout)["rows"] == [["tea"]]
    refused = await broker.call("sql_query", {"sql": "DELETE FROM items"})
    assert refused.exit_code == 4
    broker.set(SQL_QUERY_MODE="read-write")
    result = await broker.call("sql_query", {"sql": "DELETE FROM items"})
    assert json.loads(result.stdout)["rows_changed"] == 1


@needs_git
@pytest.mark.usefixtures("python_reachable")
async def test_git_clones_fetches_and_pushes(
    broker: Broker, hub: Any, git: Callable[..., str]
) -> None:
    assert broker.workspace is not None
    broker.set(REPOSITORY_TOKEN=hub.password, REPOSITORY_HOSTS=hub.origin)
    clone = {"operation": "clone", "url": hub.url, "directory": "shop"}
    for arguments in (clone, {"operation": "fetch", "directory": "shop"}):
        result = await broker.call("git", arguments)
        assert (result.outcome, result.exit_code) == ("ok", 0), result
    assert (broker.workspace / "shop" / "README").read_text() == "hello\n"
    pushed = {"operation": "push", "directory": "shop", "to": "from-the-sandbox"}
    result = await broker.call("git", pushed)
    assert (result.outcome, result.exit_code) == ("ok", 0), result
    assert git("rev-parse", "from-the-sandbox", cwd=hub.bare)


async def test_the_shell_has_the_workspace_and_nothing_to_hide(broker: Broker) -> None:
    assert broker.workspace is not None
    broker.set(HTTP_REQUEST_TOKEN=TOKEN)
    result = await broker.call("shell", {"command": "env; pwd; echo data > made; exit 5"})
    assert result.exit_code == 5
    lines = result.stdout.decode().splitlines()
    assert "/workspace" in lines
    assert {line.partition("=")[0] for line in lines if "=" in line} <= {
        *("HOME", "LANG", "OLDPWD", "PATH", "PWD", "TMPDIR"),
    }
    assert (broker.workspace / "made").read_text() == "data\n"
