"""The daemon as a service on a booted host: start, sessions, reload, stop, crash, hang, reboot."""

from __future__ import annotations

import json
import re
import subprocess
import time

import pytest

pytestmark = pytest.mark.host

UNIT = "sandboxd.service"

WORKER = """
version: 1
description: runs what it is told
command: [/bin/sh]
args_allowed: true
tools: [greet]
policy: work
workspace: {mode: rw}
"""
POLICY = """
version: 1
description: everything that is declared
rules:
  - allow: "*"
"""
TOOL = """
version: 1
name: greet
description: Say hello to somebody
program: greet.sh
argv: ["{name}"]
input:
  type: object
  additionalProperties: false
  required: [name]
  properties:
    name: {type: string, maxLength: 100}
secrets:
  - {variable: GREETING_SIGNATURE, as: SIGNATURE}
timeout: 5s
"""
GREET = """#!/bin/sh
printf 'hello %s, signed with %s letters\\n' "$1" "${#SIGNATURE}"
printf 'the signature is %s\\n' "$SIGNATURE"
env | cut -d= -f1 | sort | tr '\\n' ' '
"""
# What an agent's own client does, as small as it gets: MCP over the session's socket.
CALL = """
import json, os, socket
s = socket.socket(socket.AF_UNIX); s.connect(os.environ["SANDBOXD_SOCKET"]); f = s.makefile("rw")
def ask(number, method, **params):
    f.write(json.dumps(dict(jsonrpc="2.0", id=number, method=method, params=params)) + chr(10))
    f.flush()
    while True:
        answer = json.loads(f.readline())
        if answer.get("id") == number:
            return answer
ask(1, "initialize", protocolVersion="2025-06-18", capabilities={},
    clientInfo=dict(name="t", version="1"))
f.write(json.dumps(dict(jsonrpc="2.0", method="notifications/initialized")) + chr(10))
print(json.dumps(ask(2, "tools/call", name="greet", arguments=dict(name="ada"))))
"""
SECRET = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def ready(host):
    """Installed and configured, not started."""
    host.run("sandboxctl", "install")
    host.run("sandboxctl", "init")
    host.write("/etc/sandboxd/agents/worker.yaml", WORKER)
    host.write("/etc/sandboxd/policies/work.yaml", POLICY)
    host.write("/etc/sandboxd/tools/greet/tool.yaml", TOOL)
    host.write("/etc/sandboxd/tools/greet/greet.sh", GREET, 0o755)
    host.run("useradd", "--groups", "sandboxd", "alice")
    host.run("useradd", "mallory")
    return host


@pytest.fixture
def running(ready):
    ready.run("systemctl", "reset-failed", UNIT, check=False)
    ready.run("systemctl", "start", UNIT)
    return ready


def ctl(host, *words: str) -> dict:
    return json.loads(host.out("sandboxctl", "--json", *words))


def status_of(host, pid: str) -> dict[str, str]:
    lines = host.out("cat", f"/proc/{pid}/status").splitlines()
    return {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}


def start_session(host, script: str) -> str:
    """A detached session of the worker that runs a shell script; its id."""
    return str(ctl(host, "session", "start", "worker", "--", "-c", script)["id"])


def until(true, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)


def states(host) -> dict[str, str]:
    return {s["id"]: s["state"] for s in ctl(host, "session", "list", "--all")["sessions"]}


def test_start_returns_when_the_daemon_serves(running) -> None:
    assert running.property(UNIT, "ActiveState") == "active"
    assert running.property(UNIT, "StatusText") == "0 sessions"
    told = ctl(running, "status")
    assert str(told["pid"]) == running.property(UNIT, "MainPID")
    assert (told["mode"], told["user"]) == ("root", "sandboxd")
    assert told["runtime"] == "/run/sandboxd"


def test_the_broker_has_given_everything_up(running) -> None:
    status = status_of(running, running.property(UNIT, "MainPID"))
    uid = running.out("id", "-u", "sandboxd")
    assert status["Uid"].split() == [uid] * 4
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"


def as_user(host, name: str, *command: str) -> subprocess.CompletedProcess[str]:
    become = ("setpriv", f"--reuid={name}", f"--regid={name}", "--init-groups")
    return host.run(*become, "env", f"HOME=/home/{name}", *command, check=False)


def test_operators_may_and_strangers_may_not(running) -> None:
    done = as_user(running, "alice", "sandboxctl", "--json", "status")
    assert json.loads(done.stdout)["user"] == "sandboxd"
    done = as_user(running, "mallory", "sandboxctl", "--json", "status")
    assert (done.returncode, done.stdout) == (4, "")
    assert "Traceback" not in done.stderr


def test_a_stranger_reaches_no_session(running) -> None:
    id = start_session(running, "sleep 600")
    socket = running.out("find", "/run/sandboxd/sessions", "-type", "s")
    assert id in socket
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect({socket!r})"
    done = as_user(running, "mallory", "python3", "-c", connect)
    assert "PermissionError" in done.stderr
    running.run("sandboxctl", "session", "stop", id)


def test_a_session_runs_and_its_status_comes_back(running) -> None:
    script = "echo out; echo err >&2; id -u; touch /workspace/f; exit 7"
    done = running.run("sandboxctl", "run", "worker", "--", "-c", script, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n1000\n", "err\n")
    owner = running.out("stat", "-c", "%U", "/var/lib/sandboxd/workspaces/worker/f")
    assert owner == "sandboxd"


def test_a_tool_gets_the_secret_and_the_agent_does_not(running) -> None:
    running.run("sandboxctl", "env", "set", "--stdin", "worker", "GREETING_SIGNATURE", stdin=SECRET)
    script = f"env; python3 -c '{CALL}'; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'"
    done = running.run("sandboxctl", "run", "worker", "--", "-c", script)
    assert SECRET not in done.stdout + done.stderr
    (answer,) = (json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"jsonrpc"'))
    text = answer["result"]["content"][0]["text"]
    assert f"hello ada, signed with {len(SECRET)} letters" in text
    assert "the signature is [redacted:GREETING_SIGNATURE]" in text


def test_nothing_of_the_service_manager_reaches_agent_or_tool(running) -> None:
    running.run("sandboxctl", "env", "set", "--stdin", "worker", "GREETING_SIGNATURE", stdin=SECRET)
    done = running.run("sandboxctl", "run", "worker", "--", "-c", f"env; python3 -c '{CALL}'")
    for name in ("NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "CREDENTIALS_DIRECTORY",
                 "STATE_DIRECTORY", "INVOCATION_ID", "JOURNAL_STREAM"):  # fmt: skip
        assert name not in done.stdout, name
    assert "SIGNATURE" in done.stdout  # the tool did print the names of its environment


def test_reload_applies_a_new_configuration_and_keeps_sessions(running) -> None:
    id = start_session(running, "sleep 600")
    pid = running.property(UNIT, "MainPID")
    running.write("/etc/sandboxd/agents/extra.yaml", WORKER.replace("runs what", "also runs what"))
    running.run("systemctl", "reload", UNIT)
    agents = [a["slug"] for a in ctl(running, "agents")["agents"]]
    assert "extra" in agents
    assert running.property(UNIT, "MainPID") == pid
    assert states(running)[id] == "running"
    running.run("sandboxctl", "session", "stop", id)


def test_a_refused_reload_fails_says_why_and_changes_nothing(running) -> None:
    running.write("/etc/sandboxd/agents/extra.yaml", "version: 1\ncomand: [/bin/sh]\n")
    try:
        done = running.run("systemctl", "reload", UNIT, check=False)
        assert done.returncode != 0
        assert running.property(UNIT, "ActiveState") == "active"
        assert re.search(r"extra\.yaml:2:\d+: .*comand", running.journal())
        assert "worker" in [a["slug"] for a in ctl(running, "agents")["agents"]]
    finally:
        running.run("rm", "/etc/sandboxd/agents/extra.yaml")
        running.run("systemctl", "reload", UNIT)


def test_stop_ends_every_session_and_leaves_no_process(running) -> None:
    stubborn = "trap '' TERM HUP INT; (setsid sh -c 'trap \"\" TERM; sleep 600' &); sleep 600"
    ids = [start_session(running, stubborn), start_session(running, "sleep 600")]
    assert len(running.processes_of(UNIT)) >= 5
    begun = time.monotonic()
    running.run("systemctl", "stop", UNIT)
    assert time.monotonic() - begun < 30
    assert running.property(UNIT, "Result") == "success"
    assert running.processes_of(UNIT) == []
    assert "sleep 600" not in running.out("ps", "-eo", "args")
    running.run("systemctl", "start", UNIT)
    assert {states(running)[id] for id in ids} == {"ended"}


def test_a_first_call_starts_a_stopped_daemon(running) -> None:
    running.run("systemctl", "stop", UNIT)
    assert running.property("sandboxd.socket", "ActiveState") == "active"
    assert ctl(running, "status")["user"] == "sandboxd"
    assert running.property(UNIT, "ActiveState") == "active"


def test_the_socket_stays_the_same_over_restarts(running) -> None:
    socket = running.out("stat", "-c", "%i %a %U:%G", "/run/sandboxd/admin.sock")
    running.run("systemctl", "restart", UNIT)
    assert running.out("stat", "-c", "%i %a %U:%G", "/run/sandboxd/admin.sock") == socket
    assert socket.endswith(" 660 root:sandboxd")


def test_a_killed_daemon_comes_back_without_leftovers(running) -> None:
    id = start_session(running, "sleep 600")
    old = running.property(UNIT, "MainPID")
    running.run("kill", "-KILL", old)
    until(
        lambda: (
            running.property(UNIT, "ActiveState") == "active"
            and running.property(UNIT, "MainPID") != old
        ),
        "the daemon is back",
    )
    assert "sleep 600" not in running.out("ps", "-eo", "args")
    assert states(running)[id] == "ended"
    assert running.run("sandboxctl", "audit", "verify", check=False).returncode == 0


def test_a_hanging_daemon_is_killed_by_the_watchdog(running) -> None:
    drop_in(running, "WatchdogSec=2s", "TimeoutAbortSec=1s")
    try:
        running.run("systemctl", "restart", UNIT)
        old = running.property(UNIT, "MainPID")
        running.run("kill", "-STOP", old)
        until(
            lambda: (
                running.property(UNIT, "ActiveState") == "active"
                and running.property(UNIT, "MainPID") not in (old, "0")
            ),
            "the watchdog restarted the daemon",
        )
        assert "Watchdog timeout" in running.journal(200)
    finally:
        drop_in(running)


def test_a_daemon_that_serves_is_left_alone_by_the_watchdog(running) -> None:
    drop_in(running, "WatchdogSec=1s")
    try:
        running.run("systemctl", "restart", UNIT)
        pid = running.property(UNIT, "MainPID")
        beats = {running.property(UNIT, "WatchdogTimestampMonotonic")}
        until(
            lambda: (
                beats.add(running.property(UNIT, "WatchdogTimestampMonotonic")) or len(beats) > 4
            ),
            "four heartbeats",
        )
        assert running.property(UNIT, "MainPID") == pid
    finally:
        drop_in(running)


def test_a_wrong_configuration_ends_the_start_at_once_and_for_good(ready) -> None:
    ready.run("systemctl", "stop", UNIT, "sandboxd.socket")
    ready.write("/etc/sandboxd/agents/extra.yaml", "version: 1\ncomand: [/bin/sh]\n")
    try:
        done = ready.run("systemctl", "start", UNIT, check=False)
        assert done.returncode != 0
        assert ready.property(UNIT, "ActiveState") == "failed"
        assert ready.property(UNIT, "ExecMainStatus") == "2"
        assert ready.property(UNIT, "NRestarts") == "0"
        assert re.search(r"extra\.yaml:2:\d+: .*comand", ready.journal())
    finally:
        ready.run("rm", "/etc/sandboxd/agents/extra.yaml")
        ready.run("systemctl", "reset-failed", UNIT)


def test_the_key_can_be_an_encrypted_credential(ready) -> None:
    ready.run("systemctl", "stop", UNIT)
    ready.run("install", "-d", "-m", "700", "/etc/credstore.encrypted")
    ready.run("systemd-creds", "encrypt", "--with-key=host", "--name=sandboxd.key",
              "/etc/sandboxd/master.key", "/etc/credstore.encrypted/sandboxd.key")  # fmt: skip
    ready.run("mv", "/etc/sandboxd/master.key", "/root/master.key")
    settings = ready.out("cat", "/etc/sandboxd/sandboxd.yaml")
    ready.write("/etc/sandboxd/sandboxd.yaml", "version: 1\nkey: {credential: sandboxd.key}\n")
    sealed = "/etc/credstore.encrypted/sandboxd.key"
    drop_in(ready, f"LoadCredentialEncrypted=sandboxd.key:{sealed}")
    try:
        ready.run("systemctl", "start", UNIT)
        assert ctl(ready, "status")["key_custody"] == "credential"
        pid = ready.property(UNIT, "MainPID")
        done = ready.run("sandboxctl", "run", "worker", "--", "-c",
                         "env; ls /run/credentials 2>&1; true")  # fmt: skip
        assert "CREDENTIALS_DIRECTORY" not in done.stdout
        assert "No such file" in done.stdout
        assert pid == ready.property(UNIT, "MainPID")
    finally:
        ready.run("systemctl", "stop", UNIT)
        ready.run("mv", "/root/master.key", "/etc/sandboxd/master.key")
        ready.write("/etc/sandboxd/sandboxd.yaml", settings + "\n")
        drop_in(ready)


@pytest.mark.parametrize(
    ("listen", "settings"),
    [
        ("127.0.0.1:7621", ()),
        ("127.0.0.1:443", ("CapabilityBoundingSet=CAP_NET_BIND_SERVICE",)),
        ("unix:/run/sandboxd/http.sock", ()),
    ],
)
def test_http_is_served_from_the_unit(ready, listen: str, settings: tuple[str, ...]) -> None:
    ready.run("systemctl", "stop", UNIT)
    before = ready.out("cat", "/etc/sandboxd/sandboxd.yaml")
    ready.write("/etc/sandboxd/sandboxd.yaml", f"{before}\nhttp: {{listen: '{listen}'}}\n")
    if settings:
        drop_in(ready, *settings)
    asking = (
        "import socket, sys; where = sys.argv[1]; "
        "path = where.removeprefix('unix:'); host, _, port = where.rpartition(':'); "
        "s = socket.socket(socket.AF_UNIX) if path != where else socket.socket(); "
        "s.connect(path if path != where else (host, int(port))); "
        "head = 'GET /healthz HTTP/1.1', 'Host: localhost', 'Connection: close', '', ''; "
        "s.sendall('\\r\\n'.join(head).encode()); "
        "print(s.makefile().read())"
    )
    try:
        ready.run("systemctl", "start", UNIT)
        assert listen in ctl(ready, "status")["http"]
        # As somebody with no right to the admin socket: the key decides, and this route needs none.
        got = ready.out("runuser", "-u", "nobody", "--", "python3", "-c", asking, listen)
        assert got.startswith("HTTP/1.1 200")
        assert got.endswith('{"status":"ok"}')
        broker = ready.property(UNIT, "MainPID")
        assert "CapEff:\t0000000000000000" in ready.out("cat", f"/proc/{broker}/status")
    finally:
        ready.run("systemctl", "stop", UNIT)
        ready.write("/etc/sandboxd/sandboxd.yaml", before + "\n")
        drop_in(ready)


def test_the_doctor_finds_the_host_ready(running) -> None:
    done = running.run("sandboxctl", "doctor", "--json", check=False)
    assert done.returncode == 0, done.stdout
    found = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert found["systemd"]["state"] == "ok"
    assert found["idmapped mounts"]["state"] == "ok"


def test_uninstalling_stops_the_daemon(running) -> None:
    id = start_session(running, "sleep 600")
    assert id
    try:
        running.run("sandboxctl", "uninstall")
        assert running.processes_of(UNIT) == []
        assert running.property(UNIT, "LoadState") == "not-found"
        assert not exists(running, "/run/sandboxd/admin.sock")
        assert exists(running, "/var/lib/sandboxd/store.sqlite")
    finally:
        running.run("sandboxctl", "install")


def drop_in(host, *settings: str) -> None:
    """Put exactly these settings into a drop-in of the service."""
    path = "/etc/systemd/system/sandboxd.service.d/test.conf"
    host.write(path, "\n".join(("[Service]", *settings, "")))
    host.run("systemctl", "daemon-reload")


def exists(host, path: str) -> bool:
    done: subprocess.CompletedProcess[str] = host.run("test", "-e", path, check=False)
    return done.returncode == 0
