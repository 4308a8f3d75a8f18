"""Sessions of a real daemon, asked for over the admin socket and by sandboxctl."""

from __future__ import annotations

import base64
import os
import signal

import psutil
import pytest
from real_daemon import RealDaemon, until

from sandboxd.errors import Conflict, Denied, KernelError, NotFound
from sandboxd.isolation import landlock


def output(daemon: RealDaemon, session: str) -> bytes:
    with daemon.client() as client:
        items = client.stream("session.logs", id=session, follow=False)
        return b"".join(base64.b64decode(item["data"]) for item in items)


def test_an_agent_starts_from_an_empty_environment_plus_its_list(configured: RealDaemon) -> None:
    configured.agent("plain", "env -0", environment="{COLOUR: blue}")
    configured.start()
    done = configured.run("plain", env={**os.environ, "LEAKED": "from-the-operator"})
    names = {line.split("=")[0] for line in done.stdout.split("\0") if line}
    expected = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR", "COLOUR", "PWD"}
    assert names == expected | {"SANDBOXD_SESSION", "SANDBOXD_AGENT", "SANDBOXD_SOCKET"}
    assert "COLOUR=blue\0" in done.stdout
    assert "from-the-operator" not in done.stdout


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_run_exits_with_the_agents_status(configured: RealDaemon, status: int) -> None:
    configured.agent("leaver", f"exit {status}")
    configured.start()
    assert configured.run("leaver").returncode == status


def test_run_tells_a_signal_as_a_shell_does(configured: RealDaemon) -> None:
    configured.agent("victim", "kill -KILL $$")
    configured.start()
    assert configured.run("victim").returncode == 128 + signal.SIGKILL


def test_run_copies_input_output_and_errors(configured: RealDaemon) -> None:
    configured.agent("copier", "tr a-z A-Z; echo oops >&2")
    configured.start()
    done = configured.run("copier", input="hello\n")
    assert (done.stdout, done.stderr, done.returncode) == ("HELLO\n", "oops\n", 0)


def test_an_agent_can_open_its_streams_by_name(configured: RealDaemon) -> None:
    configured.agent("shell", "cat /dev/stdin > /dev/stdout; echo oops > /dev/stderr")
    configured.start()
    done = configured.run("shell", input="hello\n")
    assert (done.stdout, done.stderr, done.returncode) == ("hello\n", "oops\n", 0)


def test_arguments_reach_only_an_agent_that_allows_them(configured: RealDaemon) -> None:
    configured.write(
        "agents/open.yaml",
        """
        version: 1
        description: takes arguments
        command: [/bin/echo]
        args_allowed: true
        """,
    )
    configured.agent("closed", "echo never")
    configured.start()
    assert configured.run("open", "a b", "--c").stdout == "a b --c\n"
    refused = configured.run("closed", "x")
    assert refused.returncode == 125
    assert "takes no arguments" in refused.stderr
    assert "args_allowed: true" in refused.stderr


def test_an_unknown_agent_is_told_with_those_that_exist(configured: RealDaemon) -> None:
    configured.agent("known", "true")
    configured.start()
    with pytest.raises(NotFound) as caught:
        configured.call("session.start", agent="unknown")
    assert caught.value.hint == "known agents: known"


def test_a_missing_program_names_the_path_and_leaves_nothing(configured: RealDaemon) -> None:
    configured.write(
        "agents/broken.yaml",
        "version: 1\ndescription: no program\ncommand: [/usr/bin/no-such-program]\n",
    )
    configured.start()
    with pytest.raises(KernelError) as caught:
        configured.call("session.start", agent="broken")
    assert caught.value.syscall == "execve"
    assert caught.value.path == "/usr/bin/no-such-program"
    assert "mount what it needs" in caught.value.hint
    assert configured.call("session.list", all=False)["sessions"] == []
    assert list(configured.paths.sessions.iterdir()) == []
    ended = configured.audit()[-1]
    assert ended["event"] == "session.ended"
    assert "no-such-program" in ended["reason"]


def test_a_detached_session_is_listed_shown_logged_and_stopped(configured: RealDaemon) -> None:
    configured.agent("worker", "echo started; trap 'echo bye; exit 3' TERM; sleep 300 & wait")
    configured.start()
    session = configured.call("session.start", agent="worker")["id"]
    until(lambda: output(configured, session) == b"started\n")
    (row,) = configured.call("session.list", all=False)["sessions"]
    assert (row["id"], row["agent"], row["state"]) == (session, "worker", "running")
    shown = configured.call("session.show", id=session)
    assert shown["usage"]["processes"] == 2
    assert shown["usage"]["memory"] > 0
    off = {layer["layer"] for layer in shown["isolation"] if layer["state"] != "on"}
    # An ordinary user may have none.
    assert off <= ({"cgroup", "cgroup io"} if os.geteuid() else set())
    ended = configured.call("session.stop", id=session)
    assert (ended["state"], ended["exit_code"]) == ("ended", 3)
    assert output(configured, session) == b"started\nbye\n"
    (row,) = configured.call("session.list", all=True)["sessions"]
    assert row["reason"].startswith("stopped by ")


def test_stop_kills_a_tree_that_ignores_sigterm(configured: RealDaemon) -> None:
    configured.agent(
        "stubborn", "trap '' TERM; (setsid sh -c 'trap \"\" TERM; sleep 300' &); sleep 300"
    )
    configured.start()
    started = configured.call("session.start", agent="stubborn")
    tree = [psutil.Process(started["pid"])]
    until(lambda: len(tree[0].children(recursive=True)) >= 4)
    tree += tree[0].children(recursive=True)
    ended = configured.call("session.stop", id=started["id"], grace=0.2)
    assert ended["exit_signal"] == signal.SIGKILL
    assert not [process for process in tree if process.is_running()]


def test_a_signal_reaches_the_program(configured: RealDaemon) -> None:
    configured.agent("listener", "trap 'exit 9' USR1; echo ready; while :; do sleep 0.05; done")
    configured.start()
    session = configured.call("session.start", agent="listener")["id"]
    until(lambda: output(configured, session) == b"ready\n")
    configured.call("session.signal", id=session, signal=int(signal.SIGUSR1))
    assert configured.call("session.wait", id=session)["exit_code"] == 9


def test_an_attached_session_ends_with_its_operator(configured: RealDaemon) -> None:
    configured.agent("orphan", "sleep 300")
    configured.start()
    with configured.client() as client:
        started, fds = client.call_with_fds("session.start", agent="orphan", attach=True)
        assert len(fds) == 3
        for fd in fds:
            os.close(fd)
    ended = configured.call("session.wait", id=started["id"])
    assert ended["reason"] == "its operator left"


def test_the_limit_on_sessions_is_told(configured: RealDaemon) -> None:
    configured.write("sandboxd.yaml", "version: 1\nmax_sessions: 1\n")
    configured.agent("worker", "sleep 300")
    configured.start()
    configured.call("session.start", agent="worker")
    with pytest.raises(Conflict, match="which is the limit"):
        configured.call("session.start", agent="worker")


def test_a_workspace_keeps_its_owner_on_disk(configured: RealDaemon) -> None:
    configured.agent("writer", "id -u; echo data > /workspace/new; stat -c %u /workspace/new")
    configured.start()
    done = configured.run("writer")
    assert done.stdout.split() == ["1000", "1000"], done.stderr
    workspace = configured.paths.workspaces / "writer"
    assert (workspace / "new").stat().st_uid == workspace.stat().st_uid
    if os.geteuid() == 0:
        assert workspace.stat().st_uid not in (0, 1000)


def test_two_sessions_do_not_see_each_other(configured: RealDaemon) -> None:
    configured.agent("one", "echo mine > ~/mark; ls ~; sleep 300")
    configured.agent("two", "ls ~; ls /proc | grep -c '^[0-9]*$'")
    configured.start()
    first = configured.call("session.start", agent="one")["id"]
    until(lambda: output(configured, first) == b"mark\n")
    # Its init, its shell, ls and grep at the most: nobody of the first session's tree.
    lines = configured.run("two").stdout.split()
    assert lines[:-1] == []
    assert int(lines[-1]) <= 4


def test_a_session_with_the_hosts_network_is_listed_as_lowered(configured: RealDaemon) -> None:
    configured.agent("online", "sleep 300", network="host", policy="agent")
    configured.start()
    session = configured.call("session.start", agent="online")["id"]
    (row,) = configured.call("session.list", all=False)["sessions"]
    assert row["lowered"] == ["network"]
    shown = configured.call("session.show", id=session)
    assert [x["layer"] for x in shown["isolation"] if x["state"] == "lowered"] == [
        "network namespace"
    ]


def test_a_policy_that_requires_what_is_not_there_starts_nothing(configured: RealDaemon) -> None:
    configured.write(
        "policies/demanding.yaml",
        """
        version: 1
        description: lets agents share a network that it requires to be their own
        network: host
        agent_network: host
        require: [network_namespace, mount_namespace]
        rules: []
        """,
    )
    configured.agent("careful", "true", policy="demanding")
    configured.agent("careless", "true", policy="demanding", network="host")
    configured.start()
    with pytest.raises(Denied, match=r"would not have: network_namespace$"):
        configured.call("session.start", agent="careless")
    configured.call("session.start", agent="careful")


def test_a_session_tells_of_landlock_and_seccomp_and_a_policy_can_require_them(
    configured: RealDaemon,
) -> None:
    configured.write(
        "policies/walled.yaml",
        """
        version: 1
        description: wants both walls behind the namespaces
        require: [landlock, seccomp]
        rules: []
        """,
    )
    configured.agent("plain", "sleep 300")
    configured.agent("walled", "grep Seccomp: /proc/self/status", policy="walled")
    configured.start()
    session = configured.call("session.start", agent="plain")["id"]
    shown = configured.call("session.show", id=session)["isolation"]
    state = {layer["layer"]: layer["state"] for layer in shown}
    abi = landlock.best_abi()
    assert (state["landlock"], state["seccomp"]) == ("on" if abi else "missing", "on")
    if abi:
        assert configured.run("walled").stdout == "Seccomp:\t2\n"
        (remark,) = (layer["remark"] for layer in shown if layer["layer"] == "landlock")
        assert remark.startswith(f"ABI {abi}: reading, writing and running files")
    else:
        with pytest.raises(Denied, match=r"would not have: landlock$"):
            configured.call("session.start", agent="walled")


def test_the_limit_on_sessions_holds_for_requests_at_once(configured: RealDaemon) -> None:
    configured.write("sandboxd.yaml", "version: 1\nmax_sessions: 2\n")
    configured.agent("worker", "sleep 300")
    configured.start()
    with configured.client() as client:
        requests = [client.submit("session.start", agent="worker") for _ in range(8)]
        results = []
        for request in requests:
            try:
                results.append(client.result(request)["id"])
            except Conflict:
                results.append(None)
    assert len([r for r in results if r]) == 2
    assert len(configured.call("session.list", all=False)["sessions"]) == 2


def test_a_stop_whose_operator_leaves_still_happens(configured: RealDaemon) -> None:
    configured.agent("stubborn", "trap '' TERM; while :; do sleep 0.1; done")
    configured.start()
    started = configured.call("session.start", agent="stubborn")
    with configured.client() as client:
        client.submit("session.stop", id=started["id"], grace=1)
        until(lambda: configured.call("session.list", all=False)["sessions"][0]["reason"] != "")
    assert configured.call("session.wait", id=started["id"])["signal"] == signal.SIGKILL
