"""Background sessions, audit log, decisions and configuration, as operators see them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cli_support import Ctl


def start(ctl: Ctl, script: str) -> str:
    return ctl("session", "start", "sh", "--", "-c", script).stdout.strip()


def ended(ctl: Ctl, id: str) -> None:
    ctl("session", "logs", "-f", id)


def test_a_session_is_listed_shown_stopped_and_remembered(daemon: Ctl) -> None:
    id = start(daemon, "sleep 1000")
    (row,) = [r for r in daemon.json("session", "list")["sessions"] if r["id"] == id]
    assert (row["agent"], row["state"]) == ("sh", "running")
    assert id in daemon("session", "list").stdout
    shown = daemon("session", "show", id[:12]).stdout
    assert "isolation" in shown
    assert "pid namespace: on" in shown
    assert "shell" in shown
    stopped = daemon("session", "stop", "--grace", "0", id)
    assert stopped.stdout.startswith(f"{id} ended by SIGKILL: stopped by ")
    assert id not in daemon("session", "list").stdout
    assert "ended by SIGKILL: stopped by" in daemon("session", "show", id).stdout
    assert id in daemon("session", "list", "--all").stdout


def test_logs_are_byte_for_byte_in_a_pipe_and_harmless_on_a_terminal(daemon: Ctl) -> None:
    id = start(daemon, r"printf '\033[31mred\377\t\303\274\r\nnext'")
    ended(daemon, id)
    assert daemon("session", "logs", id).stdout == "\x1b[31mred\udcff\tü\r\nnext"
    screen = daemon.on_terminal("session", "logs", id)
    assert screen.wait() == 0
    assert "\\x1b[31mred\\xff\tü\r\nnext".encode() in screen.all
    raw = daemon.on_terminal("session", "logs", "--raw", id)
    assert raw.wait() == 0
    assert b"\x1b[31mred\xff" in raw.all


def test_logs_follow_until_the_session_ends(daemon: Ctl) -> None:
    id = start(daemon, "trap 'echo second; exit' TERM; echo first; while :; do sleep 0.05; done")
    process = daemon.start("session", "logs", "-f", id)
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    assert daemon("session", "stop", id).stdout.startswith(f"{id} ended with 0: stopped by ")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b"second\n", b"")


def test_following_can_be_interrupted(daemon: Ctl) -> None:
    id = start(daemon, "echo first; sleep 1000")
    process = daemon.start("session", "logs", "-f", id)
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    daemon("session", "stop", "--grace", "0", id)


@pytest.mark.parametrize("command", ["show", "stop", "logs"])
def test_an_unknown_session_is_not_found(daemon: Ctl, command: str) -> None:
    done = daemon("session", command, "s-ffffffffffffffff", status=3)
    assert "s-ffffffffffffffff" in done.stderr
    assert "hint: see: sandboxctl session list" in done.stderr


def test_a_grace_that_is_no_time_is_refused(daemon: Ctl) -> None:
    for grace in ("-1", "nan", "inf", "soon"):
        done = daemon("session", "stop", f"--grace={grace}", "s-1", status=2)
        assert f"--grace: '{grace}' is not a duration" in done.stderr
    for grace in ("3601", "61m", "2h"):
        done = daemon("session", "stop", f"--grace={grace}", "s-1", status=2)
        assert "--grace takes an hour at most" in done.stderr
    id = start(daemon, "exec sleep 1000")
    stopped = daemon("session", "stop", "--grace", "30m", id)
    assert stopped.stdout.startswith(f"{id} ended")


def test_the_audit_log_shows_what_happened_and_verifies(daemon: Ctl) -> None:
    daemon("env", "set", "sh", "AUDITED=some-value")
    records = [json.loads(line) for line in daemon("audit", "tail", "--json").stdout.splitlines()]
    (record,) = [r for r in records if r["event"] == "env.set" and r["names"] == ["AUDITED"]]
    line = daemon("audit", "tail", "-n", "1").stdout
    assert "env.set" in line
    assert 'names=["AUDITED"]' in line
    assert record["mac"] not in daemon("audit", "tail").stdout
    assert "every one as it was written" in daemon("audit", "verify").stdout
    assert daemon.json("audit", "verify")["ok"] is True


def test_the_audit_log_can_be_followed(daemon: Ctl) -> None:
    process = daemon.start("audit", "tail", "-f", "-n", "1", "--json")
    assert process.stdout is not None
    before = json.loads(process.stdout.readline())
    daemon("env", "set", "sh", "FOLLOWED=some-value")
    after = json.loads(process.stdout.readline())
    assert after["seq"] == before["seq"] + 1
    assert after["names"] == ["FOLLOWED"]
    process.terminate()
    process.communicate(timeout=60)


def test_a_decision_is_explained_without_running_anything(daemon: Ctl) -> None:
    allowed = daemon("policy", "explain", "sh", "shell", '{"command": "id"}').stdout
    assert allowed.startswith("verdict    allow\n")
    assert "\narguments " in allowed
    assert '"-c", "--", "id"]' in allowed
    denied = daemon("policy", "explain", "other", "shell", '{"command": "id"}', status=4)
    assert denied.stdout.split()[:2] == ["verdict", "deny"]
    wrong = daemon.json("policy", "explain", "sh", "shell", "-", stdin=b"{}", status=4)
    assert wrong["verdict"] == "deny"
    assert "command" in wrong["reason"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "are not valid JSON"),
        ('{"a": 1, "a": 2}', "the same key twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_arguments_that_are_no_json_are_refused(daemon: Ctl, text: str, why: str) -> None:
    done = daemon("policy", "explain", "sh", "shell", "-", stdin=text.encode(), status=2)
    assert why in done.stderr


def test_a_wrong_configuration_is_told_with_its_place_and_not_applied(daemon: Ctl) -> None:
    generation = daemon.json("status")["generation"]
    bad = daemon.directory / "config" / "agents" / "bad.yaml"
    bad.write_text("version: 1\ndescription: x\ncommand: [/bin/sh]\ntoools: []\nnetwork: maybe\n")
    bad.chmod(0o644)
    try:
        for args in (["config", "check"], ["reload"], ["config", "check", str(bad.parent.parent)]):
            done = daemon(*args, status=2)
            assert f"{bad}:4:1: unknown key 'toools'" in done.stderr
            assert f"{bad}:5:10: network: " in done.stderr
        errors = json.loads(daemon("config", "check", "--json", status=2).stderr)["error"]
        assert errors["code"] == "config"
        assert len(errors["errors"]) == 2
    finally:
        bad.unlink()
    assert daemon.json("status")["generation"] == generation
    assert "is valid" in daemon("config", "check").stdout


def test_a_new_agent_is_there_after_a_reload(daemon: Ctl) -> None:
    fresh = daemon.directory / "config" / "agents" / "fresh.yaml"
    fresh.write_text("version: 1\ndescription: fresh\ncommand: [/bin/true]\n")
    fresh.chmod(0o644)
    try:
        daemon("run", "fresh", status=125)
        assert "is in force" in daemon("reload").stdout
        daemon("run", "fresh")
        assert "nothing changed" in daemon("reload").stdout
    finally:
        fresh.unlink()
        daemon("reload")


def test_stopping_several_reports_each(daemon: Ctl) -> None:
    ids = [start(daemon, "sleep 1000") for _ in range(2)]
    done = daemon("session", "stop", "--json", "--grace", "0", *ids)
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ids
