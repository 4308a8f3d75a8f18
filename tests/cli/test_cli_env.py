"""``sandboxctl env``: values go in, in every way, and never come out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cli_support import Ctl

SECRET = "hunter2-" + "f3a9c1"


def fingerprint(ctl: Ctl, name: str, agent: str = "sh") -> tuple[str, int]:
    rows = ctl.json("env", "list", agent)["variables"]
    (row,) = [row for row in rows if row["name"] == name]
    return row["fingerprint"], row["size"]


def test_every_way_to_give_a_value_stores_the_same(daemon: Ctl, tmp_path: Path) -> None:
    file = tmp_path / "value"
    file.write_text(SECRET + "\n")
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"W5={SECRET}\nexport W6='{SECRET}'\n")
    data = SECRET.encode()
    daemon("env", "set", "sh", "W1", SECRET)
    daemon("env", "set", "sh", f"W2={SECRET}", f"W7={SECRET}")
    daemon("env", "set", "sh", "W3", "--stdin", stdin=data + b"\n")
    daemon("env", "set", "sh", "W4", "--file", str(file))
    daemon("env", "import", "sh", str(dotenv))
    daemon("env", "import", "sh", "-", stdin=b"W8=" + data)
    same = {fingerprint(daemon, f"W{n}") for n in range(1, 9)}
    assert len(same) == 1
    assert same.pop()[1] == len(SECRET)


def test_the_answer_names_versions_and_when_they_take_effect(daemon: Ctl) -> None:
    first = daemon("env", "set", "sh", "VERSIONED=first-value")
    assert first.stdout == ("set VERSIONED (version 1)\ntakes effect on the agent's next session\n")
    assert daemon.json("env", "set", "sh", "VERSIONED=second-value")["versions"] == {"VERSIONED": 2}
    removed = daemon("env", "remove", "sh", "VERSIONED")
    assert removed.stdout.startswith("removed VERSIONED (it was version 2)\n")
    assert "VERSIONED" not in daemon("env", "list", "sh").stdout


def test_a_live_session_that_keeps_the_old_value_is_named(daemon: Ctl) -> None:
    daemon("env", "set", "sh", "LIVE=the-old-value")
    id = daemon("session", "start", "sh", "--", "-c", "sleep 1000").stdout.strip()
    kept = daemon("env", "set", "sh", "LIVE=the-new-value")
    assert f"live sessions that keep the old value: {id}" in kept.stdout
    assert "--now" in kept.stderr
    revoked = daemon("env", "revoke", "sh", "LIVE")
    assert revoked.stdout == (
        "older values are revoked: 1 live session had one; 0 tool calls ended\n"
    )
    assert daemon.json("env", "revoke", "sh", "LIVE")["sessions"] == []
    assert "no variable 'NOT_THERE'" in daemon("env", "revoke", "sh", "NOT_THERE", status=3).stderr
    taken = daemon("env", "set", "--now", "sh", "LIVE=the-newer-value")
    assert "in force now" in taken.stdout
    assert id not in taken.stdout
    daemon("session", "stop", "--grace", "0", id)


def test_a_single_line_loses_its_newline_and_several_keep_theirs(daemon: Ctl) -> None:
    sizes = {}
    for name, data, more in (
        ("N1", b"line\n", ()),
        ("N2", b"line\r\n", ()),
        ("N3", b"line\n", ("--keep-newline",)),
        ("N4", b"line\ntwo\n", ()),
        ("N5", b"\n", ()),
        ("N6", b"\xff\x01\xfe\x02", ()),
    ):
        daemon("env", "set", "sh", name, "--stdin", *more, stdin=data)
        sizes[name] = fingerprint(daemon, name)[1]
    assert sizes == {"N1": 4, "N2": 4, "N3": 5, "N4": 9, "N5": 0, "N6": 4}


def test_values_that_output_cannot_be_kept_clear_of_are_told_and_the_shortest_refused(
    daemon: Ctl,
) -> None:
    refused = daemon("env", "set", "sh", "FINE=a-longer-value", "PIN=123", "NO=", "X=a", status=2)
    assert "under 4 characters: PIN, X; nothing was set" in refused.stderr
    assert "redact: false" in refused.stderr
    assert "--force" in refused.stderr
    listed = daemon("env", "list", "sh").stdout
    assert not any(f"\n{name} " in listed for name in ("FINE", "PIN", "NO", "X"))

    forced = daemon("env", "set", "--force", "sh", "PIN=123", "NO=")
    assert "set PIN (version 1)" in forced.stdout
    assert "warning: the value of PIN has fewer than 8 characters" in forced.stderr
    assert "value of NO" not in forced.stderr  # an empty value hides nothing
    record = daemon.json("audit", "tail", "-n", "1")
    assert (record["event"], record["forced"]) == ("env.set", ["PIN"])

    warned = daemon.json("env", "set", "sh", "HOST=localhost", "KEY=9vZ4-Qm7x_T2kLw8")["warnings"]
    assert [text for text in warned if "value of" in text] == [
        "the value of HOST is a word of every output: it is masked wherever output has it"
    ]


def test_a_plain_setting_may_be_as_short_as_it_likes(daemon: Ctl) -> None:
    # Declared with redact: false by the only tool that takes it.
    got = daemon.json("env", "set", "sh", "HTTP_REQUEST_HOSTS=x")
    assert not [text for text in got["warnings"] if "value of" in text]


def test_several_are_set_together_or_not_at_all(daemon: Ctl) -> None:
    before = daemon("env", "list", "other", status=0)
    refused = daemon("env", "set", "other", "FINE=1", "LD_PRELOAD=/x.so", status=2)
    assert "LD_PRELOAD is refused: the dynamic loader obeys it" in refused.stderr
    daemon("env", "set", "sh", f"TOGETHER={SECRET}")
    missing = daemon("env", "remove", "sh", "TOGETHER", "NOT_THERE", status=3)
    assert "NOT_THERE" in missing.stderr
    assert daemon("env", "list", "other").stderr == before.stderr == "other has no variables\n"
    assert "TOGETHER" in daemon("env", "list", "sh").stdout


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["A=1", f"{SECRET} x"], "argument 2 after the agent is not NAME=VALUE"),
        ([f"{SECRET}=x"], "argument 1 after the agent is not a variable name"),
        ([SECRET, "x"], "the name is not a variable name"),
        (["A=1", f"A={SECRET}"], "A is given twice"),
        (["A", "-" + SECRET], "wrong arguments"),
        (["A", f"--stdin={SECRET}"], "wrong arguments"),
        (["A", SECRET, "--stdin"], "--stdin takes exactly one NAME"),
        ([f"A={SECRET}", "--stdin"], "--stdin takes exactly one NAME"),
        (["A", "--stdin", "--file", SECRET], "wrong arguments"),
        (["PYTHONPATH=" + SECRET], "PYTHONPATH is refused: the Python interpreter"),
        (["https_proxy=" + SECRET], "https_proxy is refused: it sends the tool's traffic"),
        (["A"], "there is no terminal to ask for the value of A"),
        (["A", "--stdin"], "--stdin gave an empty value"),
        (["A=" + SECRET + "x" * 131_072], None),
    ],
)
def test_a_refusal_says_why_and_repeats_no_value(
    alone: Ctl, args: list[str], text: str | None
) -> None:
    if text is None:
        # The kernel itself refuses such an argument (E2BIG), so it comes by a pipe.
        done = alone("env", "set", "sh", "A", "--stdin", stdin=args[0].encode(), status=2)
        assert "too long for the kernel" in done.stderr
    else:
        done = alone("env", "set", "sh", *args, status=2)
        assert text in done.stderr
    assert "hint:" in done.stderr or "twice" in done.stderr or "exactly one" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


def test_a_forgotten_agent_does_not_put_the_value_in_a_message(alone: Ctl) -> None:
    for args in ([f"A={SECRET}", "B=2"], [SECRET.upper(), "A", SECRET], [f"A={SECRET}"]):
        done = alone("env", "set", *args, status=2)
        assert "hint: " in done.stderr
        assert "hunter2" not in (done.stdout + done.stderr).lower()


def test_an_import_with_mistakes_lists_them_all_and_sets_nothing(
    daemon: Ctl, tmp_path: Path
) -> None:
    file = tmp_path / "bad.env"
    file.write_text(f"FINE={SECRET}\n{SECRET}\nBASH_ENV={SECRET}\n")
    done = daemon("env", "import", "other", str(file), status=2)
    assert done.stderr.splitlines()[0] == "sandboxctl: nothing was set: 2 mistakes"
    assert f"  {file}:2: not an assignment" in done.stderr
    assert f"  {file}:3: BASH_ENV is refused: a shell runs" in done.stderr
    assert "hunter2" not in done.stderr
    as_json = json.loads(daemon("env", "import", "other", str(file), "--json", status=2).stderr)
    assert len(as_json["error"]["errors"]) == 2
    assert daemon("env", "list", "other").stdout == ""


def test_a_dry_run_says_what_is_new_and_sets_nothing(
    daemon: Ctl, alone: Ctl, tmp_path: Path
) -> None:
    daemon("env", "set", "sh", "DRY_OLD=old-value")
    file = tmp_path / ".env"
    file.write_text(f"DRY_OLD={SECRET}\nDRY_NEW={SECRET}\n")
    done = daemon("env", "import", "sh", str(file), "--dry-run")
    assert "replace version 1" in done.stdout
    assert "be new" in done.stdout
    assert "DRY_NEW" not in daemon("env", "list", "sh").stdout
    rows = daemon.json("env", "import", "sh", str(file), "--dry-run")["variables"]
    assert [row["replaces_version"] for row in rows] == [1, None]
    without = alone("env", "import", "sh", str(file), "--dry-run")
    assert "not compared" in without.stderr
    assert "DRY_NEW" in without.stdout
    assert "hunter2" not in done.stdout + done.stderr + without.stdout + without.stderr


def test_what_is_missing_is_not_found(daemon: Ctl, tmp_path: Path) -> None:
    assert "no agent 'nobody'" in daemon("env", "list", "nobody", status=3).stderr
    assert "no agent 'nobody'" in daemon("env", "set", "nobody", "A=1", status=3).stderr
    gone = tmp_path / "gone"
    assert f"{gone} does not exist" in daemon("env", "import", "sh", str(gone), status=3).stderr
    assert "can't read" in daemon("env", "set", "sh", "A", "--file", "/", status=2).stderr
    endless = daemon("env", "set", "sh", "A", "--file", "/dev/zero", status=2)
    assert "is longer than 8,388,608 bytes" in endless.stderr


def test_nothing_ever_prints_a_value(daemon: Ctl) -> None:
    daemon("env", "set", "sh", f"QUIET={SECRET}")
    for args in (["env", "list", "sh"], ["audit", "tail", "-n", "500"], ["agents"], ["status"]):
        for more in ([], ["--json"]):
            done = daemon(*args, *more)
            assert SECRET not in done.stdout + done.stderr
    kept = [p for p in (daemon.directory / "state").rglob("*") if p.is_file()]
    assert kept
    assert not any(SECRET.encode() in p.read_bytes() for p in kept)
    assert SECRET.encode() not in (daemon.directory / "log").read_bytes()


def test_on_a_terminal_the_value_is_asked_for_twice_and_hidden(daemon: Ctl) -> None:
    screen = daemon.on_terminal("env", "set", "sh", "ASKED")
    screen.expect("value of ASKED (hidden): ")
    screen.send(SECRET + "\n")
    screen.expect("once more: ")
    assert SECRET.encode() not in screen.seen
    screen.send(SECRET + "\n")
    screen.expect("set ASKED (version 1)")
    assert screen.wait() == 0
    assert SECRET.encode() not in screen.all
    assert fingerprint(daemon, "ASKED")[1] == len(SECRET)


def test_two_different_answers_set_nothing(daemon: Ctl) -> None:
    screen = daemon.on_terminal("env", "set", "sh", "DIFFERS")
    screen.expect("(hidden): ")
    screen.send("one\n")
    screen.expect("once more: ")
    screen.send("other\n")
    screen.expect("the two values differ; nothing was set")
    assert screen.wait() == 2
    assert "DIFFERS" not in daemon("env", "list", "sh").stdout


def test_ctrl_c_at_the_prompt_ends_quietly(daemon: Ctl) -> None:
    screen = daemon.on_terminal("env", "set", "sh", "INTERRUPTED")
    screen.expect("(hidden): ")
    screen.send("\x03")
    assert screen.wait() == 130
    assert b"Traceback" not in screen.all


def test_a_value_that_a_terminal_line_would_cut_is_refused(daemon: Ctl) -> None:
    screen = daemon.on_terminal("env", "set", "sh", "LONG")
    screen.expect("(hidden): ")
    for _ in range(10):
        screen.send("x" * 500)
    screen.send("\n")
    screen.expect("a terminal line ends at 4,095 characters")
    assert screen.wait() == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="another user needs root")
def test_a_stranger_may_not_set_anything(daemon: Ctl) -> None:
    # Both from one process: the interpreter may live in root's home directory, closed to others.
    code = (
        "import os, sys; from sandboxd.cli import main\n"
        "command = ['env', 'set', 'sh', 'A=some-value']\n"
        "assert main(command) == 0, 'the positive control'\n"
        "os.setgroups([]); os.setgid(64999); os.setuid(64999)\n"
        "sys.exit(main(command))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=daemon.environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 4, done.stderr
    assert "use the daemon's own user, root, or a member of its admin_group" in done.stderr
