"""PostgreSQL, Redis and SMTP through relays, by their own clients, on hosts of our own."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from real_daemon import RealDaemon
from world import DATABASE, World, wait_for

pytestmark = pytest.mark.services

PASSWORD = "pw-5d41402abc4b2a76"
SMTP = """
import socketserver, sys
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"220 mail\\r\\n")
        while line := self.rfile.readline():
            word = line.split()[0].upper() if line.split() else b""
            if word == b"DATA":
                self.wfile.write(b"354 go\\r\\n")
                while self.rfile.readline().strip() != b".":
                    pass
            if word == b"QUIT":
                self.wfile.write(b"221 bye\\r\\n")
                return
            self.wfile.write(b"250 ok\\r\\n")
server = socketserver.ThreadingTCPServer((sys.argv[1], 25), Handler)
print("ready", flush=True)
server.serve_forever()
"""


@pytest.fixture
def database(internet: World, tmp_path: Path) -> World:
    """PostgreSQL, Redis and a mail server at DATABASE."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    nobody = pwd.getpwnam("nobody")
    data = tmp_path / "pg"
    data.mkdir()
    os.chown(data, nobody.pw_uid, nobody.pw_gid)
    for one in (tmp_path, *tmp_path.parents[:2]):
        one.chmod(0o755)
    secret = tmp_path / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    unprivileged = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    initdb = [programs / "initdb", "-D", data, "-U", "app", "-A", "scram-sha-256",
              "--pwfile", secret, "--locale=C", "--no-sync"]  # fmt: skip
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, env=environment, **unprivileged)
    with (data / "pg_hba.conf").open("a") as file:
        file.write("host all all 0.0.0.0/0 scram-sha-256\n")
    as_nobody = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups")
    internet.inside(
        internet.internet, *as_nobody, programs / "postgres", "-D", data, "-h", DATABASE,
        "-k", data, "-F", env=environment, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    internet.inside(
        internet.internet, "redis-server", "--bind", DATABASE, "--requirepass", PASSWORD,
        "--save", "", "--dir", tmp_path, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    mail = internet.inside(
        internet.internet, sys.executable, "-I", "-c", SMTP, DATABASE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert mail.stdout is not None
    assert mail.stdout.readline() == "ready\n"
    there = ("nsenter", "--target", str(internet.internet), "--net", "--")
    wait_for([*there, "psql", "-h", DATABASE, "-U", "app", "postgres", "-c", "select 1"],
             {**environment, "PGPASSWORD": PASSWORD})  # fmt: skip
    wait_for([*there, "redis-cli", "-h", DATABASE, "-a", PASSWORD, "ping"])
    return internet


def test_clients_of_three_protocols_find_their_servers_by_name_and_port(
    daemon: RealDaemon, database: World
) -> None:
    script = f"""
    export PGPASSWORD={PASSWORD} REDISCLI_AUTH={PASSWORD}
    psql -h db.internal -U app -At postgres -c 'select 6 * 7'
    redis-cli -h db.internal set answer 42
    redis-cli -h db.internal get answer
    /usr/bin/python3 -I -c "import smtplib
with smtplib.SMTP('db.internal', timeout=30) as mail:
    print(mail.sendmail('a@example.com', ['b@example.com'], 'Subject: hello'))"
    redis-cli -h db.internal -p 6380 ping 2>&1
    psql -h other.internal -U app postgres -c 'select 1' 2>&1 | grep -o 'could not translate'
    """
    relays = [
        {"to": "db.internal:5432", "addresses": ["10.1.0.0/16"]},
        {"to": "db.internal:6379", "addresses": ["10.1.0.0/16"]},
        {"to": "db.internal:25", "address": DATABASE},
    ]
    daemon.agent("clients", script, policy="agent", egress=json.dumps({"relays": relays}))
    daemon.start()
    done = daemon.ctl("run", "clients")
    *lines, refused, unknown = done.stdout.splitlines()
    assert lines == ["42", "OK", "42", "{}"], done.stderr
    assert refused.startswith("Could not connect to Redis at db.internal:6380")
    assert unknown == "could not translate"
    closed = [row for row in daemon.audit() if row["event"] == "egress.closed"]
    assert sorted({(row["kind"], row["host"], row["port"]) for row in closed}) == [
        ("relay", "db.internal", 25),
        ("relay", "db.internal", 5432),
        ("relay", "db.internal", 6379),
    ]
    assert PASSWORD not in json.dumps(daemon.audit())
    assert set(database.asked()) == {"db.internal"}


def test_a_private_address_that_the_relay_does_not_name_is_not_reached(
    daemon: RealDaemon, database: World
) -> None:
    relays = [{"to": "db.internal:6379"}]
    script = f"REDISCLI_AUTH={PASSWORD} redis-cli -h db.internal ping 2>&1 || true"
    daemon.agent("clients", script, policy="agent", egress=json.dumps({"relays": relays}))
    daemon.start()
    assert "PONG" not in daemon.ctl("run", "clients").stdout
    reasons = {row["reason"] for row in daemon.audit() if row["event"] == "egress.refused"}
    assert reasons == {f"db.internal: {DATABASE} is an address of a private network"}
