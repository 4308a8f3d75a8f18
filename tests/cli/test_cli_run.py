"""``sandboxctl run``: an agent that looks like an ordinary program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING

import pytest

CTL = [sys.executable, "-m", "sandboxd.cli"]
YES = ["run", "sh", "--", "-c", "yes"]

if TYPE_CHECKING:
    from cli_support import Ctl


def test_output_errors_and_status_come_through_apart(daemon: Ctl) -> None:
    done = daemon("run", "sh", "--", "-c", "echo out; echo err >&2; exit 7", status=7)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_standard_input_reaches_the_agent_and_ends(daemon: Ctl) -> None:
    done = daemon("run", "sh", "--", "-c", "cat; echo end", stdin=b"\x00\xffline\n")
    assert done.stdout == "\x00\udcffline\nend\n"


def test_arguments_after_the_dashes_are_the_agents(daemon: Ctl) -> None:
    done = daemon("run", "sh", "--", "-c", 'printf "<%s>" "$@"', "sh", "--json", "--", "-t", "")
    assert done.stdout == "<--json><--><-t><>"


def test_much_data_goes_both_ways_at_once(daemon: Ctl) -> None:
    data = os.urandom(1 << 20) * 8
    process = daemon.start("run", "sh", "--", "-c", "cat", stdin=subprocess.PIPE)
    out, err = process.communicate(data, timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out == data


def test_an_agent_that_never_reads_does_not_hold_up_its_output(daemon: Ctl) -> None:
    process = daemon.start(
        "run", "sh", "--", "-c", "head -c 1000000 /dev/zero; exit 3", stdin=subprocess.PIPE
    )
    out, _ = process.communicate(b"x" * 1_000_000, timeout=60)
    assert (process.returncode, len(out)) == (3, 1_000_000)


def test_a_reader_that_leaves_ends_the_writer_as_a_pipe_would(daemon: Ctl) -> None:
    done = subprocess.run(
        [*("bash", "-c", '"$@" | head -n 1; echo "${PIPESTATUS[0]}"', "bash"), *CTL, *YES],
        env=daemon.environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [b"y", b"141"]


def test_a_closed_standard_input_is_an_empty_one(daemon: Ctl) -> None:
    process = daemon.start(
        "run", "sh", "--", "-c", "cat; echo done", stdin=None, preexec_fn=lambda: os.close(0)
    )
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"done\n")


def test_a_signal_that_ends_the_agent_becomes_the_status(daemon: Ctl) -> None:
    daemon("run", "sh", "--", "-c", "kill -KILL $$", status=128 + signal.SIGKILL)


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2"])
def test_a_signal_is_passed_on(daemon: Ctl, name: str) -> None:
    script = f"trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.05; done"
    process = daemon.start("run", "sh", "--", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(getattr(signal, f"SIG{name}"))
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == (f"got {name}\n".encode(), 9)


def test_a_signal_that_was_ignored_from_the_start_stays_so(daemon: Ctl) -> None:
    script = "trap 'echo got HUP' HUP; trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    process = daemon.start(
        *("run", "sh", "--", "-c", script),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == (b"", 9)


def test_a_killed_run_takes_its_session_along(daemon: Ctl) -> None:
    process = daemon.start("run", "sh", "--", "-c", "echo ready; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    (row,) = daemon.json("session", "list")["sessions"]
    process.kill()
    process.communicate()
    for _ in range(200):
        if not daemon.json("session", "list")["sessions"]:
            break
        time.sleep(0.05)
    ended = daemon.json("session", "show", row["id"])
    assert ended["state"] == "ended"
    assert "left" in ended["reason"]


def test_a_session_stopped_by_somebody_else_says_so(daemon: Ctl) -> None:
    process = daemon.start("run", "sh", "--", "-c", "echo ready; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    (row,) = daemon.json("session", "list")["sessions"]
    daemon("session", "stop", "--grace", "0", row["id"])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert b"sandboxctl: the session ended: stopped by" in err


def test_a_failure_of_ours_is_not_taken_for_the_agents(daemon: Ctl, alone: Ctl) -> None:
    assert "no agent 'nobody'" in daemon("run", "nobody", status=125).stderr
    assert "no sandboxd is running" in alone("run", "sh", status=125).stderr
    done = daemon("run", "sh", "extra", status=125)
    assert "the agent's own arguments come after --" in done.stderr
    assert "unexpected '--bogus'" in daemon("run", "sh", "--bogus", status=125).stderr


def test_a_program_that_is_not_there_or_no_program_ends_as_in_a_shell(daemon: Ctl) -> None:
    daemon("run", "missing", status=127)
    daemon("run", "unexecutable", status=126)


def test_a_terminal_is_asked_for_only_on_one(daemon: Ctl) -> None:
    assert "needs standard input to be a terminal" in daemon("run", "-t", "sh", status=125).stderr


def test_with_t_the_agent_has_a_terminal_of_the_same_size(daemon: Ctl) -> None:
    screen = daemon.on_terminal(
        "run",
        "-t",
        "sh",
        "--",
        "-c",
        "[ -t 0 ] && [ -t 2 ] && stty size; echo $TERM; exit 5",
        rows=33,
        columns=101,
    )
    screen.expect("33 101")
    screen.expect("xterm")
    assert screen.wait() == 5


def test_keys_go_to_the_agent_and_the_terminal_is_put_back(daemon: Ctl) -> None:
    script = (
        "trap 'echo interrupted' INT; x=; echo ready;"
        'while [ -z "$x" ]; do read x; done; cat; echo "<$x>"; exit 6'
    )
    screen = daemon.on_terminal("run", "-t", "sh", "--", "-c", script)
    before = screen.attributes()
    assert before[3] & termios.ICANON
    screen.expect("ready")
    assert not screen.attributes()[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    screen.send("\x03")
    screen.expect("interrupted")
    screen.send("one\n")
    screen.expect("one")
    screen.send("\x04")
    screen.expect("<one>")
    assert screen.wait(keep=True) == 6
    assert screen.attributes() == before
    screen.close()


def test_a_stopped_run_leaves_the_terminal_in_order_meanwhile(daemon: Ctl) -> None:
    screen = daemon.on_terminal("run", "-t", "sh", "--", "-c", "echo ready; read x; exit 8")
    before = screen.attributes()
    screen.expect("ready")
    raw = screen.attributes()
    screen.process.send_signal(signal.SIGTSTP)
    _, status = os.waitpid(screen.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert screen.attributes() == before
    screen.process.send_signal(signal.SIGCONT)
    screen.send("\n")
    assert screen.wait() == 8
    assert raw != before


def test_a_new_window_size_reaches_the_agent(daemon: Ctl) -> None:
    script = "trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.05; done"
    screen = daemon.on_terminal("run", "-t", "sh", "--", "-c", script)
    screen.expect("ready")
    screen.resize(50, 132)
    screen.process.send_signal(signal.SIGWINCH)
    screen.expect("50 132")
    assert screen.wait() == 4
