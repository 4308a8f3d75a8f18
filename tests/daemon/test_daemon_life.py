"""The daemon's own life: one per state directory, reloads, crashes, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path

import psutil
import pytest
from real_daemon import RealDaemon, until

from sandboxd.errors import SandboxdError
from sandboxd.vault.custody import create_key_file


def test_two_daemons_on_one_state_directory_are_refused(configured: RealDaemon) -> None:
    configured.start()
    second = configured.fail_to_start()
    assert second.returncode == 5
    assert f"another sandboxd (pid {configured.call('status')['pid']})" in second.stderr
    assert configured.call("status")["sessions"] == 0


def test_sigterm_ends_every_session_and_exits_cleanly(configured: RealDaemon) -> None:
    configured.agent("worker", "sleep 300")
    configured.start()
    pids = [configured.call("session.start", agent="worker")["pid"] for _ in range(3)]
    tree = [p for pid in pids for p in (psutil.Process(pid), *psutil.Process(pid).children())]
    assert configured.stop() == 0
    assert not [process for process in tree if process.is_running()]
    assert not configured.paths.admin_socket.exists()
    assert list(configured.paths.sessions.iterdir()) == []


def test_a_killed_daemon_leaves_no_process_and_tells_at_the_next_start(
    configured: RealDaemon,
) -> None:
    configured.agent("worker", "setsid sleep 300 & sleep 300")
    configured.start()
    started = configured.call("session.start", agent="worker")
    init = psutil.Process(started["pid"])
    until(lambda: len(init.children(recursive=True)) >= 3)
    tree = [init, *init.children(recursive=True)]
    configured.stop(signal.SIGKILL)
    until(lambda: not [process for process in tree if process.is_running()])
    configured.start()
    (row,) = configured.call("session.list", all=True)["sessions"]
    assert (row["id"], row["state"], row["reason"]) == (started["id"], "ended", "the daemon died")
    assert configured.call("audit.verify")["ok"]
    assert list(configured.paths.sessions.iterdir()) == []


def test_a_daemon_whose_launcher_dies_ends_with_the_reason(configured: RealDaemon) -> None:
    configured.agent("worker", "sleep 300")
    configured.start()
    started = configured.call("session.start", agent="worker")
    init = psutil.Process(started["pid"])
    launcher = init.parent()
    assert launcher is not None
    launcher.kill()
    assert configured.process is not None
    assert configured.process.wait(timeout=30) == 6
    assert "the launcher died" in configured.log.read_text()
    until(lambda: not init.is_running())


@pytest.mark.parametrize("how", ["reload", "SIGHUP"])
def test_a_valid_new_configuration_is_applied(configured: RealDaemon, how: str) -> None:
    configured.agent("old", "true")
    configured.start()
    configured.agent("new", "true")
    if how == "reload":
        assert configured.call("reload")["changed"] is True
    else:
        assert configured.process is not None
        configured.process.send_signal(signal.SIGHUP)
    until(lambda: len(configured.call("agents.list")["agents"]) == 2)
    assert configured.run("new").returncode == 0


def test_a_broken_configuration_is_refused_whole_and_the_old_one_stays(
    configured: RealDaemon,
) -> None:
    configured.agent("old", "true")
    configured.start()
    before = configured.call("status")["generation"]
    configured.agent("new", "true")
    broken = configured.write("agents/broken.yaml", "version: 1\ncomand: [/bin/true]\n")
    refused = configured.ctl("reload")
    assert refused.returncode == 2
    assert f"{broken}:2:1" in refused.stderr
    assert "command" in refused.stderr
    assert configured.call("status")["generation"] == before
    assert [a["slug"] for a in configured.call("agents.list")["agents"]] == ["old"]
    assert configured.audit()[-1]["event"] == "daemon.reload_refused"


def test_a_wrong_key_is_told_from_a_damaged_store(configured: RealDaemon) -> None:
    configured.agent("a", "true")
    configured.start()
    configured.set("a", TOKEN="a value to keep")
    assert configured.stop() == 0
    key = configured.paths.config / "master.key"
    right = key.with_name("right.key")
    key.rename(right)
    create_key_file(key)
    refused = configured.fail_to_start()
    assert refused.returncode == 7
    assert "key" in refused.stderr
    assert "a value to keep" not in refused.stderr
    key.unlink()
    right.rename(key)
    configured.start()
    assert configured.call("env.list", agent="a")["variables"][0]["name"] == "TOKEN"


def test_a_corrupted_row_stops_the_start_and_is_named(configured: RealDaemon) -> None:
    configured.agent("a", "true")
    configured.start()
    configured.set("a", TOKEN="a value to keep")
    assert configured.stop() == 0
    with sqlite3.connect(configured.paths.store) as store:
        (table,) = [
            name
            for (name,) in store.execute("select name from sqlite_master where type = 'table'")
            if "variable" in name
        ]
        flipped = store.execute(f"select ciphertext from {table}").fetchone()[0]
        flipped = bytes([flipped[0] ^ 1]) + flipped[1:]
        store.execute(f"update {table} set ciphertext = ?", (flipped,))
    store.close()
    refused = configured.fail_to_start()
    assert refused.returncode == 7
    assert "TOKEN" in refused.stderr
    assert "a value to keep" not in refused.stderr


def test_a_runtime_directory_too_long_for_sockets_is_refused(configured: RealDaemon) -> None:
    command = configured.command
    at = command.index("--runtime") + 1
    command[at] = f"/tmp/{'x' * 100}"
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "bytes too long" in refused.stderr
    assert "--runtime" in refused.stderr
    assert not Path(command[at]).exists()


def test_a_state_directory_of_somebody_else_is_refused(configured: RealDaemon) -> None:
    command = configured.command
    if os.geteuid() == 0:
        configured.paths.state.mkdir(mode=0o700)
        os.chown(configured.paths.state, 12345, 12345)
        owner = 12345
    else:
        command[command.index("--state") + 1] = "/usr"
        owner = 0
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 5
    assert f"belongs to uid {owner}" in refused.stderr
    assert "chown" in refused.stderr


def test_a_state_directory_open_to_others_is_refused(configured: RealDaemon) -> None:
    configured.start()
    assert configured.stop() == 0
    configured.paths.state.chmod(0o755)
    refused = configured.fail_to_start()
    assert refused.returncode == 5
    assert "chmod 700" in refused.stderr


def test_a_missing_configuration_names_the_command_that_makes_it(configured: RealDaemon) -> None:
    shutil.rmtree(configured.paths.config)
    refused = configured.fail_to_start()
    assert refused.returncode == 6
    assert "sandboxctl init" in refused.stderr


def test_a_key_open_to_others_is_refused(configured: RealDaemon) -> None:
    (configured.paths.config / "master.key").chmod(0o644)
    refused = configured.fail_to_start()
    assert refused.returncode == 4
    assert "master.key" in refused.stderr


def test_the_broker_runs_without_privileges(configured: RealDaemon) -> None:
    configured.start()
    status = configured.call("status")
    fields = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{status['pid']}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert "0" not in fields["Uid"].split()
    assert {fields[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
    if os.geteuid() == 0:
        assert fields["CapBnd"] == "0" * 16
        assert fields["NoNewPrivs"] == "1"
        assert fields["Groups"].split() == []
    # Not dumpable: its /proc entry belongs to root, so the same uid can't read it (proc(5)).
    assert Path(f"/proc/{status['pid']}/environ").stat().st_uid == 0


def test_when_the_audit_log_cannot_be_written_nothing_runs(configured: RealDaemon) -> None:
    configured.agent("worker", "touch /workspace/ran")
    configured.wrapper = ("/bin/sh", "-c", 'ulimit -f 2048; exec "$@"', "sh")  # 1 MiB a file
    configured.start()
    assert configured.run("worker").returncode == 0
    ran = configured.paths.workspaces / "worker" / "ran"
    assert ran.exists()
    ran.unlink()
    # A refused reload is recorded with its problem: many of them fill the log and nothing else.
    configured.write("agents/broken.yaml", "".join(f"unknown_{i}: 1\n" for i in range(500)))
    for _ in range(200):
        with pytest.raises(SandboxdError) as caught:
            configured.call("reload")
        if caught.value.code == "store":
            break
    assert caught.value.code == "store"
    with pytest.raises(SandboxdError) as caught:
        configured.call("session.start", agent="worker")
    assert caught.value.code == "store"
    assert not ran.exists()


def test_following_the_audit_log_misses_no_record(configured: RealDaemon) -> None:
    configured.agent("quick", "true")
    configured.start()
    with configured.client() as client:
        records = client.stream("audit.tail", n=1, follow=True)
        first = next(records)["seq"]
        for _ in range(5):
            configured.run("quick")
        followed = [next(records)["seq"] for _ in range(10)]
    assert followed == list(range(first + 1, first + 11))
    with configured.client() as client:
        assert list(client.stream("audit.tail", n=0, follow=False)) == []


def test_a_state_directory_that_is_not_writable_is_refused(configured: RealDaemon) -> None:
    configured.start()
    assert configured.stop() == 0
    configured.paths.state.chmod(0o500)
    refused = configured.fail_to_start()
    assert refused.returncode == 5
    assert "not writable" in refused.stderr
    assert "chmod u+w" in refused.stderr


def test_a_lock_that_is_another_file_too_is_refused(configured: RealDaemon) -> None:
    configured.start()
    assert configured.stop() == 0
    os.link(configured.paths.lock, configured.base / "second-name")
    refused = configured.fail_to_start()
    assert refused.returncode == 5
    assert "is not this daemon's own file" in refused.stderr


def test_sigterm_while_sessions_start_ends_them_all(configured: RealDaemon) -> None:
    configured.agent("worker", "sleep 300")
    configured.start()
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            client = stack.enter_context(configured.client())
            client.submit("session.start", agent="worker")
        assert configured.stop() == 0
    configured.start()
    rows = configured.call("session.list", all=True)["sessions"]
    assert {row["state"] for row in rows} <= {"ended"}
    assert "the daemon died" not in {row["reason"] for row in rows}


def test_further_signals_while_stopping_change_nothing(configured: RealDaemon) -> None:
    configured.agent("stubborn", "trap '' TERM; while :; do sleep 0.1; done")
    configured.start()
    configured.call("session.start", agent="stubborn")
    assert configured.process is not None
    configured.process.send_signal(signal.SIGTERM)
    until(lambda: "stopping" in configured.log.read_text())
    for further in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        configured.process.send_signal(further)
    assert configured.process.wait(timeout=60) == 0
    configured.start()
    (row,) = configured.call("session.list", all=True)["sessions"]
    assert row["reason"] == "the daemon stopped"


@pytest.mark.parametrize("name", ["agents/x.yaml", "tools/x/tool.yaml", "sandboxd.yaml"])
def test_a_directory_where_a_file_belongs_is_refused_by_a_reload(
    configured: RealDaemon, name: str
) -> None:
    configured.agent("old", "true")
    configured.start()
    (configured.paths.config / name).mkdir(parents=True)
    assert configured.process is not None
    configured.process.send_signal(signal.SIGHUP)
    until(lambda: configured.audit()[-1]["event"] == "daemon.reload_refused")
    assert "expected a regular file" in configured.audit()[-1]["problem"]
    assert configured.run("old").returncode == 0


def test_settings_that_wait_for_the_next_start_are_told(configured: RealDaemon) -> None:
    configured.start()
    configured.write("sandboxd.yaml", "version: 1\nmax_concurrent_calls: 3\nmax_sessions: 5\n")
    warnings = configured.call("reload")["warnings"]
    assert [w for w in warnings if "max_concurrent_calls takes effect at the next start" in w]
    assert not [w for w in warnings if "max_sessions" in w]


def test_a_stranger_is_refused_and_recorded(configured: RealDaemon) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can speak as somebody else")
    configured.start()
    # The socket's mode keeps strangers out; opened wide, the peer's credentials still do.
    configured.paths.admin_socket.chmod(0o666)
    done = subprocess.run(
        ["/usr/bin/python3", "-c", STRANGER, str(configured.paths.admin_socket)],
        user=64126,
        group=64126,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "may not administer this sandboxd" in done.stdout
    refused = configured.audit()[-1]
    assert (refused["event"], refused["uid"]) == ("admin.refused", 64126)


STRANGER = """
import socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
peer.sendall(b'{"jsonrpc":"2.0","id":1,"method":"status","params":{}}\\n')
print(peer.recv(65536).decode())
"""


def test_a_changed_audit_record_is_named(configured: RealDaemon) -> None:
    configured.agent("a", "true")
    configured.start()
    configured.set("a", TOKEN="a value to keep")
    assert configured.ctl("audit", "verify").returncode == 0
    (log,) = (path for path in configured.paths.audit.iterdir() if path.suffix == ".jsonl")
    log.write_text(log.read_text().replace('"env.set"', '"env.sat"'))
    done = configured.ctl("audit", "verify")
    assert done.returncode == 7
    assert "line 2, record 2" in done.stdout + done.stderr
    assert "Bad(" not in done.stdout + done.stderr
