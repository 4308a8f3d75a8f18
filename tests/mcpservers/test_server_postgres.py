"""The npm server for PostgreSQL, which takes its credential on the command line, on a real one."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_daemon import RealDaemon, directories, until
from real_servers import accept, call, client_agent, import_file, install_npm, text

pytestmark = pytest.mark.services

PASSWORD = "pw-8f14e45fceea167a"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A PostgreSQL server on loopback, whose superuser has the password."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    which = shutil.which("pg_ctl")
    programs = found[-1].parent if found else Path(which).resolve().parent if which else None
    assert programs, "these tests need PostgreSQL (Debian: apt-get install postgresql)"
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:  # initdb refuses root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]

    def run(*command: str | Path) -> None:
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": str(folder)}
        quiet = subprocess.DEVNULL
        subprocess.run(
            command, check=True, cwd=folder, env=environment, stdout=quiet, timeout=120, **as_user
        )

    data = folder / "data"
    try:
        run(
            *(programs / "initdb", "-D", data, "-U", "app", "-A", "scram-sha-256", "--no-sync"),
            *("--pwfile", folder / "password", "-E", "UTF8", "--locale=C"),
        )
        options = f"-p {number} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run(programs / "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start")
        try:
            yield number
        finally:
            run(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def daemon() -> Iterator[RealDaemon]:
    with directories() as daemon:
        client_agent(daemon)
        daemon.start()
        yield daemon


def test_a_credential_on_a_command_line_is_moved_where_no_process_list_shows_it(
    daemon: RealDaemon, port: int
) -> None:
    packages = daemon.base / "packages"
    packages.mkdir()
    url = f"postgresql://app:{PASSWORD}@127.0.0.1:{port}/postgres"
    args = ["-y", "@modelcontextprotocol/server-postgres", url]
    got = import_file(daemon, {"db": {"command": "npx", "args": args}}, install_npm(packages))
    assert got["servers"][0]["variables"] == ["DB_URL"]
    assert got["cleaned"]["mcpServers"]["db"]["args"] == [*args[:2], "${DB_URL}"]
    accept(daemon, "db")
    saw = call(
        daemon,
        ("db__query", {"sql": "SELECT 6 * 7 AS answer"}),
        ("db__query", {"sql": f"SELECT '{PASSWORD}' || '' AS echoed"}),
        ("db__query", {"sql": "CREATE TABLE t (a int)"}),
    )
    answered, echoed, refused = saw["calls"]
    assert '"answer": 42' in text(answered)
    assert refused["error"] is True
    assert PASSWORD not in text(echoed)
    record = str(daemon.audit()) + daemon.log.read_text()
    assert PASSWORD not in record + str(got)


def test_the_process_list_of_the_host_shows_the_name_alone(daemon: RealDaemon, port: int) -> None:
    packages = daemon.base / "packages"
    packages.mkdir()
    url = f"postgresql://app:{PASSWORD}@127.0.0.1:{port}/postgres"
    args = ["-y", "@modelcontextprotocol/server-postgres", url]
    import_file(daemon, {"db": {"command": "npx", "args": args}}, install_npm(packages))
    accept(daemon, "db")
    sleep = '[["db__query", {"sql": "SELECT pg_sleep(3)"}]]'
    session = daemon.call("session.start", agent="client", args=[sleep])["id"]
    until(lambda: bool(daemon.call("session.show", id=session)["servers"]))
    lines: list[str] = []

    def seen() -> bool:
        lines[:] = [
            " ".join(process.info["cmdline"] or ())
            for process in psutil.process_iter(["cmdline"])
            if "server-postgres" in " ".join(process.info["cmdline"] or ())
        ]
        return bool(lines)

    until(seen)
    assert any("DB_URL" in line for line in lines)
    assert not any(PASSWORD in line for line in lines)
