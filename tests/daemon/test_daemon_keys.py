"""A deactivated key on a real daemon: what rested on it is gone when the command returns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import psutil
import pytest
from asking_agent import SOURCE
from real_daemon import RealDaemon, directories, until

#: How long the tool sleeps: what its processes are known by, on the whole host.
_NAP = f"47{os.getpid()}.25"

#: A tool that leaves a child behind in another session, as one that wants to survive does.
_SLOW = f"#!/bin/sh\nsetsid sleep {_NAP} &\nsleep {_NAP}\n"
_MANIFEST = "input: {type: object, additionalProperties: false, properties: {}}\ntimeout: 5m\n"


class Holder:
    """Somebody with a key or a token, over HTTP."""

    def __init__(self, daemon: RealDaemon, bearer: str) -> None:
        self.daemon, self.bearer = daemon, bearer

    def post(self, method: str, **params: Any) -> httpx2.Response:
        return httpx2.post(
            f"{self.daemon.url}/api/v1/operator/{method}",
            json=params,
            headers={"authorization": f"Bearer {self.bearer}"},
            timeout=30,
        )

    def call(self, method: str, **params: Any) -> Any:
        got = self.post(method, **params)
        assert got.status_code == 200, got.text
        return got.json()

    def session(self, *steps: tuple[str, str, Any]) -> str:
        """A session whose agent takes these steps."""
        started = self.call("session.start", agent="worker", args=[json.dumps(steps)])
        return str(started["id"])


@pytest.fixture(scope="module")
def shared() -> Iterator[RealDaemon]:
    with directories() as daemon:
        daemon.http("listen: 127.0.0.1:0\nlimits: {failures: 10000}")
        daemon.python_agent("worker", SOURCE, tools="[slow]")
        daemon.tool("slow", _SLOW, _MANIFEST)
        daemon.start()
        yield daemon


@pytest.fixture
def working(shared: RealDaemon) -> Iterator[RealDaemon]:
    """A running daemon without sessions; tests may kill it and start it again."""
    assert (live(shared), naps()) == (set(), set())
    yield shared
    for session in live(shared):
        shared.call("session.stop", id=session, grace=0)


def new_key(daemon: RealDaemon, *options: str) -> tuple[str, Holder]:
    """The id of a new key, and who has it."""
    role = () if "--role" in options else ("--role", "operator")
    done = daemon.ctl("keys", "create", *role, "--label", "a test", *options, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    return made["key"]["id"], Holder(daemon, made["secret"])


def new_token(daemon: RealDaemon, key: str, *options: str) -> tuple[str, Holder]:
    done = daemon.ctl("tokens", "create", "--key", key, *options, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    return made["id"], Holder(daemon, made["token"])


def naps() -> set[int]:
    """The tool's processes, of all calls."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == ["sleep", _NAP]:
            found.add(process.pid)
    return found


def pid_of(daemon: RealDaemon, session: str) -> int:
    return int(daemon.call("session.show", id=session)["pid"])


def live(daemon: RealDaemon) -> set[str]:
    return {row["id"] for row in daemon.call("session.list", all=False)["sessions"]}


def test_all_that_rests_on_it_is_gone_when_the_command_returns(working: RealDaemon) -> None:
    id, holder = new_key(working)
    _, token = new_token(working, id, "--agent", "worker")
    _, other = new_key(working)
    kept = other.session(("call", "slow", {}))
    until(lambda: len(naps()) == 2)
    spared = naps()
    sessions = [holder.session(("call", "slow", {})), token.session(("call", "slow", {}))]
    until(lambda: len(naps()) == 6)
    pids = [pid_of(working, session) for session in sessions]
    sockets = [working.paths.sessions / session / "broker.sock" for session in sessions]
    assert all(map(psutil.pid_exists, pids))
    assert all(path.exists() for path in sockets)
    following = Following(token, sessions[1])

    done = working.ctl("keys", "deactivate", id)

    assert not any(map(psutil.pid_exists, pids))
    assert naps() == spared  # the calls' processes, with all that they started
    assert not any(path.exists() for path in sockets)
    assert live(working) == {kept}
    assert done.returncode == 0, done.stderr
    assert "ended 2 sessions" in done.stdout
    assert all(session in done.stdout for session in sessions)
    following.join()
    for held in (holder, token):
        assert held.post("session.list").status_code == 401
    assert other.call("session.show", id=kept)["state"] == "running"

    events = [(record["event"], record.get("session")) for record in working.audit()]
    deactivated = events.index(("key.deactivated", None))
    for session in sessions:
        assert deactivated < events.index(("call.ended", session))
        assert events.index(("call.ended", session)) < events.index(("session.ended", session))
    assert {
        record["reason"] for record in working.audit() if record["event"] == "session.ended"
    } == {f"its API key was deactivated by {me()}"}

    working.stop(signal.SIGKILL)
    working.start()
    for held in (holder, token):
        assert held.post("session.list").status_code == 401
    assert other.post("session.list").status_code == 200
    assert naps() == set()


class Following:
    """A request that follows a session's output, until the server ends it."""

    def __init__(self, holder: Holder, session: str) -> None:
        self._begun, self.status = threading.Event(), 0
        self._thread = threading.Thread(target=self._follow, args=(holder, session))
        self._thread.start()
        assert self._begun.wait(30)
        assert self.status == 200

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _follow(self, holder: Holder, session: str) -> None:
        try:
            with httpx2.stream(
                "POST",
                f"{holder.daemon.url}/api/v1/operator/session.logs",
                json={"id": session, "follow": True},
                headers={"authorization": f"Bearer {holder.bearer}"},
                timeout=60,
            ) as got:
                self.status = got.status_code
                for _ in got.iter_raw():
                    self._begun.set()
        except httpx2.HTTPError:
            pass  # cut off, which is how it ends
        finally:
            self._begun.set()


def test_a_revoked_token_takes_its_session_along_and_no_other(working: RealDaemon) -> None:
    id, holder = new_key(working)
    jti, ann = new_token(working, id, "--agent", "worker", "--user", "ann")
    _, ben = new_token(working, id, "--agent", "worker", "--user", "ben")
    gone, kept = ann.session(("call", "slow", {})), ben.session(("call", "slow", {}))
    until(lambda: len(naps()) == 4)
    pid = pid_of(working, gone)
    done = working.ctl("tokens", "revoke", jti)
    assert not psutil.pid_exists(pid)
    assert len(naps()) == 2
    assert (done.returncode, f"ended 1 session: {gone}" in done.stdout) == (0, True)
    assert live(working) == {kept}
    assert (ann.post("session.list").status_code, ben.post("session.list").status_code) == (
        401,
        200,
    )
    done = working.ctl("tokens", "revoke", "-", input=ben.bearer + "\n")
    assert (done.returncode, live(working), naps()) == (0, set(), set())
    assert holder.post("session.list").status_code == 200


def test_who_deactivates_their_own_key_is_told_so(working: RealDaemon) -> None:
    id, owner = new_key(working, "--role", "owner")
    session = owner.session(("call", "slow", {}))
    answer = owner.call("keys.deactivate", key=id)
    assert (answer["key"]["state"], answer["ended_sessions"]) == ("deactivated", [session])
    assert owner.post("session.list").status_code == 401
    assert (live(working), naps()) == (set(), set())


def test_a_key_whose_overlap_is_over_takes_its_sessions_along(working: RealDaemon) -> None:
    id, holder = new_key(working)
    session = holder.session(("call", "slow", {}))
    until(lambda: len(naps()) == 2)
    rotated = working.ctl("keys", "rotate", id, "--overlap", "1s")
    new = Holder(working, rotated.stdout.strip())
    until(lambda: live(working) == set())
    assert naps() == set()
    assert [one.post("session.list").status_code for one in (holder, new)] == [401, 200]
    shown = working.call("session.show", id=session)
    assert shown["reason"] == "its API key expired"
    assert [r["key"] for r in working.audit() if r["event"] == "key.expired"] == [id]


def test_no_session_slips_in_while_its_key_ends(working: RealDaemon) -> None:
    id, holder = new_key(working)
    started: list[str] = []
    refused = threading.Event()

    def start() -> None:
        while not refused.is_set():
            try:
                got = holder.post("session.start", agent="worker", args=["[]"])
            except httpx2.RemoteProtocolError:  # cut off in the middle of its answer
                continue
            if got.status_code == 401:
                refused.set()
            elif got.status_code == 200:
                started.append(got.json()["id"])

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(started) >= 3)
    assert working.ctl("keys", "deactivate", id).returncode == 0
    assert live(working) == set()
    for thread in threads:
        thread.join(60)
    assert refused.is_set()
    assert live(working) == set()


def test_a_crash_between_record_and_end_leaves_nothing_running(working: RealDaemon) -> None:
    """The launcher, stopped, can't end anything: the daemon is killed while it waits for that."""
    id, holder = new_key(working)
    session = holder.session(("call", "slow", {}))
    until(lambda: len(naps()) == 2)
    pid = pid_of(working, session)
    launcher = psutil.Process(pid).parent()  # by which every sandbox lives
    assert launcher is not None
    launcher.suspend()
    try:
        command = subprocess.Popen(
            [
                *(sys.executable, "-m", "sandboxd.cli", "--config", str(working.paths.config)),
                *("--state", str(working.paths.state), "--runtime", str(working.paths.runtime)),
                *("keys", "deactivate", id),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: working.call("keys.show", key=id)["deactivated_at"] is not None)
        assert holder.post("session.list").status_code == 401
        assert command.poll() is None  # it did not claim that all was done
        assert psutil.pid_exists(pid)
        working.stop(signal.SIGKILL)
    finally:
        launcher.resume()
    assert command.wait(60) != 0
    command.communicate()
    until(lambda: not psutil.pid_exists(pid) and not naps())
    working.start()
    assert holder.post("session.list").status_code == 401
    assert live(working) == set()
    assert working.call("keys.show", key=id)["state"] == "deactivated"


def me() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def test_nothing_but_the_beginning_of_a_key_is_anywhere(working: RealDaemon) -> None:
    id, holder = new_key(working)
    _, token = new_token(working, id, "--agent", "worker")
    session = token.session(("call", "slow", {}))
    until(lambda: len(naps()) == 2)
    holder.post("keys.deactivate", key=holder.bearer)  # denied, and recorded so
    holder.post("no.such", key=holder.bearer)
    working.ctl("keys", "show", holder.bearer + "0")
    working.ctl("tokens", "revoke", token.bearer + "A", "extra")
    wrong = Holder(working, holder.bearer[:-1] + "x")
    assert wrong.post("session.list").status_code == 401
    secrets = (holder.bearer[:14].encode(), token.bearer.split(".")[2].encode())
    told = [working.log.read_bytes(), json.dumps(working.audit()).encode()]
    for process in psutil.process_iter(["cmdline", "environ"]):
        told.append(repr(process.info).encode())
    files = [path for path in working.base.rglob("*") if path.is_file()]
    told += [path.read_bytes() for path in files]
    assert any(session.encode() in text for text in told)
    assert any(holder.bearer[:12].encode() in text for text in told)
    for secret in secrets:
        assert not [text for text in told if secret in text]


def test_a_key_on_the_command_line_is_not_repeated(working: RealDaemon) -> None:
    text = "an_sk_" + "5" * 64
    for command in ("show", "deactivate", "rotate"):
        done = working.ctl("keys", command, text)
        assert (done.returncode, "5" * 8 in done.stdout + done.stderr) == (3, False)
    assert "5" * 8 not in working.log.read_text()
