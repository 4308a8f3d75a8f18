"""Programs beside an agent, by a real daemon: ``session.exec`` and ``sandboxctl session exec``."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from real_daemon import RealDaemon, directories, until

from sandboxd.errors import Conflict, Invalid, KernelError, NotFound

WAITING = "echo waiting; exec sleep 600"
TOOL = "input: {type: object, additionalProperties: false}\nsecrets: [TOKEN]\n"


@pytest.fixture(scope="module")
def served() -> Iterator[RealDaemon]:
    with directories() as daemon:
        daemon.agent("resident", WAITING, environment="{COLOUR: blue}", tools="[show]")
        daemon.tool("show", "#!/bin/sh\nexec env\n", TOOL)
        daemon.start()
        daemon.set("resident", TOKEN="canary-of-exec")
        yield daemon
        assert daemon.stop() == 0


@pytest.fixture
def session(served: RealDaemon) -> Iterator[str]:
    """A live session whose agent only waits."""
    started = served.call("session.start", agent="resident", args=[], tty=False, attach=False)
    id: str = started["id"]
    yield id
    with contextlib.suppress(NotFound):
        served.call("session.stop", id=id, grace=0)


def records(daemon: RealDaemon, session: str) -> list[dict[str, Any]]:
    """What is recorded of programs beside the session's agent."""
    mine = (r for r in daemon.audit() if r.get("session") == session)
    return [record for record in mine if record["event"].startswith("session.exec")]


def execute(daemon: RealDaemon, session: str, *argv: str, **params: Any) -> dict[str, Any]:
    got: dict[str, Any] = daemon.call("session.exec", id=session, argv=list(argv), **params)
    for name in ("stdout", "stderr"):
        got[name] = base64.b64decode(got[name]).decode()
    return got


def test_it_gets_the_agents_environment_and_no_secret(served: RealDaemon, session: str) -> None:
    got = execute(served, session, "env", environment={"NODE_ENV": "test"})
    names = {line.split("=")[0] for line in got["stdout"].splitlines()}
    expected = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR", "COLOUR", "NODE_ENV"}
    assert names == expected | {"SANDBOXD_SESSION", "SANDBOXD_AGENT", "SANDBOXD_SOCKET"}
    assert f"SANDBOXD_SESSION={session}\n" in got["stdout"]
    assert (got["exit_code"], got["signal"], got["timed_out"]) == (0, None, False)
    # Nor is it anywhere that it may read; the control: the search finds what is there.
    search = "cat /proc/*/environ /workspace/* /run/*/* /tmp/* 2>/dev/null | grep -ac "
    assert execute(served, session, "sh", "-c", search + "canary-of-exec")["stdout"] == "0\n"
    assert int(execute(served, session, "sh", "-c", search + "COLOUR=blue")["stdout"]) > 0


def test_a_line_for_the_shell_a_directory_and_input(served: RealDaemon, session: str) -> None:
    line = "mkdir -p sub && cd sub && pwd && cat && echo oops >&2; exit 3"
    got = served.call(
        "session.exec", id=session, command=line, stdin=base64.b64encode(b"given\n").decode()
    )
    assert base64.b64decode(got["stdout"]) == b"/workspace/sub\ngiven\n"
    assert base64.b64decode(got["stderr"]) == b"oops\n"
    assert got["exit_code"] == 3
    assert execute(served, session, "pwd", cwd="sub")["stdout"] == "/workspace/sub\n"
    assert execute(served, session, "pwd", cwd="/usr")["stdout"] == "/usr\n"
    with pytest.raises(KernelError) as refusal:
        execute(served, session, "pwd", cwd="absent")
    assert (refusal.value.syscall, refusal.value.path) == ("chdir", "/workspace/absent")


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"argv": []}, "no program"),
        ({"argv": ["true"], "command": "true"}, "either argv"),
        ({}, "either argv"),
        ({"argv": ["true"], "environment": {"LD_PRELOAD": "/x"}}, "LD_PRELOAD can't be set"),
        ({"argv": ["true"], "environment": {"SANDBOXD_SOCKET": "/x"}}, "SANDBOXD_SOCKET can't"),
        ({"argv": ["true"], "environment": {"not a name": "x"}}, "is not a variable name"),
        ({"argv": ["true"], "environment": {"A": 1}}, "environment must be"),
        ({"argv": ["tr\0ue"]}, "NUL byte|absolute path"),
        ({"argv": ["true", "\0"]}, "NUL byte"),
        ({"argv": ["true"], "timeout": 0}, "timeout must be"),
        ({"argv": ["true"], "timeout": True}, "timeout must be"),
        ({"argv": ["true"], "stdin": "?"}, "stdin must be base64"),
        ({"argv": ["true"], "limit": -1}, "limit must be"),
    ],
)
def test_what_makes_no_sense_is_refused(
    served: RealDaemon, session: str, params: dict[str, Any], named: str
) -> None:
    with pytest.raises(Invalid, match=named):
        served.call("session.exec", id=session, **params)


def test_its_time_ends_it_with_all_that_it_started(served: RealDaemon, session: str) -> None:
    init = served.call("session.show", id=session)["pid"]
    before = psutil.Process(init).children(recursive=True)
    script = "trap '' TERM; setsid sleep 601 & setsid setsid sleep 602 & echo begun; sleep 603"
    got = execute(served, session, "sh", "-c", script, timeout=1.5)
    assert (got["stdout"], got["signal"], got["timed_out"]) == ("begun\n", signal.SIGKILL, True)
    until(lambda: psutil.Process(init).children(recursive=True) == before)
    assert execute(served, session, "true")["exit_code"] == 0
    ended = [r for r in records(served, session) if r["event"] == "session.exec_ended"]
    assert [record["timed_out"] for record in ended] == [True, False]


def test_who_leaves_ends_it(served: RealDaemon, session: str) -> None:
    init = psutil.Process(served.call("session.show", id=session)["pid"])
    before = init.children(recursive=True)
    with served.client() as client:
        client.submit("session.exec", id=session, argv=["sleep", "600"])
        until(lambda: any(p.name() == "sleep" for p in set(init.children(True)) - set(before)))
    until(lambda: init.children(recursive=True) == before)


def test_output_is_bounded(served: RealDaemon, session: str) -> None:
    got = execute(served, session, "sh", "-c", "head -c 300000 /dev/zero", limit=1000)
    assert (len(got["stdout"]), got["truncated"], got["exit_code"]) == (1000, True, 0)
    got = execute(served, session, "sh", "-c", "yes; echo unreachable")
    assert (len(got["stdout"]), got["truncated"], got["signal"]) == (1 << 20, True, 9)
    got = execute(served, session, "sh", "-c", "head -c 1000 /dev/zero", limit=1000)
    assert (len(got["stdout"]), got["truncated"]) == (1000, False)


def test_what_goes_on_in_the_background_holds_nobody_up(served: RealDaemon, session: str) -> None:
    script = "sleep 604 & echo begun"
    got = execute(served, session, "sh", "-c", script, timeout=60)
    assert "begun\n" in got["stdout"]
    assert (got["exit_code"], got["timed_out"]) == (0, False)
    assert execute(served, session, "pkill", "-f", "sleep 604")["exit_code"] == 0


def test_sessions_that_ended_or_never_were_take_none(served: RealDaemon, session: str) -> None:
    with served.client() as client:
        running = client.submit("session.exec", id=session, argv=["sleep", "600"])
        until(lambda: bool(records(served, session)))
        served.call("session.stop", id=session, grace=0)
        try:
            got = client.result(running)
        except Conflict:
            pass  # it had not begun
        else:
            assert got["signal"] == signal.SIGKILL
    with pytest.raises(NotFound):
        execute(served, session, "true")
    assert len(records(served, session)) == 2


def test_it_is_recorded_without_its_arguments(served: RealDaemon, session: str) -> None:
    execute(served, session, "sh", "-c", "true # canary-in-arguments")
    begun, ended = records(served, session)
    assert (begun["event"], ended["event"]) == ("session.exec", "session.exec_ended")
    assert (begun["session"], begun["agent"], begun["program"]) == (session, "resident", "sh")
    assert (ended["exit_code"], ended["timed_out"]) == (0, False)
    assert begun["by"] == ended["by"] != ""
    assert "canary-in-arguments" not in json.dumps(served.audit())


def test_sandboxctl_exits_as_the_program_does(served: RealDaemon, session: str) -> None:
    def ctl(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return served.ctl("session", "exec", *words, **options)

    done = ctl(session, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    done = ctl("-i", "--env", "A=b=c", session, "--", "sh", "-c", 'echo "$A"; cat', input="in\n")
    assert (done.returncode, done.stdout) == (0, "b=c\nin\n")
    assert ctl(session, "--", "sh", "-c", "kill -9 $$").returncode == 128 + 9
    for given in ("0.3", "300ms"):
        assert ctl("--timeout", given, session, "--", "sleep", "60").returncode == 124
    assert ctl("--timeout", "1m", session, "--", "true").returncode == 0
    done = ctl("--timeout", "soon", session, "--", "true")
    assert done.returncode == 125
    assert "--timeout: 'soon' is not a duration" in done.stderr
    done = ctl(session, "--", "absent-program")
    assert done.returncode == 127
    assert "absent-program" in done.stderr
    assert ctl(session, "--", "/etc/passwd").returncode == 126
    assert ctl(session, "--").returncode == 125
    assert ctl("--env", "X", session, "--", "true").returncode == 125
    assert ctl("--cwd", "/absent", session, "--", "true").returncode == 125
    done = ctl("--json", session, "--", "true")
    assert json.loads(done.stdout)["exit_code"] == 0


def test_interrupting_sandboxctl_ends_the_program(served: RealDaemon, session: str) -> None:
    init = psutil.Process(served.call("session.show", id=session)["pid"])
    before = init.children(recursive=True)
    paths = served.paths
    command = [sys.executable, "-m", "sandboxd.cli", "--config", str(paths.config)]
    command += ["--state", str(paths.state), "--runtime", str(paths.runtime)]
    command += ["session", "exec", session, "--", "sleep", "600"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=dict(os.environ)) as ctl:
        until(lambda: any(p.name() == "sleep" for p in set(init.children(True)) - set(before)))
        ctl.send_signal(signal.SIGINT)
        assert ctl.wait(timeout=30) == 130
    until(lambda: init.children(recursive=True) == before)
