"""sandboxctl approvals on a terminal and in a pipe, with an agent that asks."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

import pytest

from sandboxd.cli import desk

if TYPE_CHECKING:
    from cli_support import Ctl, Terminal

HIDDEN = "echo safe\u202e; rm -rf /\x1b[2J"

POLICY = """\
version: 1
description: asks about every shell command
rules:
  - ask: shell
    reason: a test
"""


class Asker:
    """Starts agents that call ``shell`` once, each in a session of its own."""

    def __init__(self, ctl: Ctl) -> None:
        self.ctl = ctl
        self.started: list[subprocess.Popen[bytes]] = []

    def ask(self, command: str) -> subprocess.Popen[bytes]:
        info = {"name": "t", "version": "1"}
        start = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": info}
        messages = [
            {"id": 0, "method": "initialize", "params": start},
            {"method": "notifications/initialized"},
            {
                "id": 1,
                "method": "tools/call",
                "params": {"name": "shell", "arguments": {"command": command}},
            },
        ]
        lines = [json.dumps({"jsonrpc": "2.0", **message}) for message in messages]
        script = 'for line; do printf "%s\\n" "$line"; done | sandboxd-mcp'
        running = self.ctl.start("run", "asker", "--", "-c", script, "sh", *lines)
        self.started.append(running)
        return running

    def watch(self, *options: str) -> subprocess.Popen[bytes]:
        self.started.append(self.ctl.start("approvals", "watch", *options))
        return self.started[-1]

    def answered(self, running: subprocess.Popen[bytes]) -> str:
        """The text of the call's result."""
        said, errors = running.communicate(timeout=60)
        assert running.returncode == 0, errors
        (result,) = [m["result"] for m in map(json.loads, said.splitlines()) if m.get("id") == 1]
        return "\n".join(block["text"] for block in result["content"])

    def waiting(self) -> list[str]:
        return [row["id"] for row in self.ctl.json("approvals", "list")["approvals"]]

    def wait_for(self, count: int) -> list[str]:
        end = time.monotonic() + 30
        while len(found := self.waiting()) != count:
            assert time.monotonic() < end, found
        return found


@pytest.fixture
def asker(daemon: Ctl) -> Iterator[Asker]:
    config = daemon.directory / "config"
    agent, policy = config / "agents/asker.yaml", config / "policies/asking.yaml"
    agent.write_text((config / "agents/sh.yaml").read_text() + "policy: asking\n")
    policy.write_text(POLICY)
    for path in (agent, policy):
        path.chmod(0o644)
    daemon("reload")
    made = Asker(daemon)
    try:
        yield made
    finally:
        for running in made.started:
            running.kill()
            running.communicate()
        agent.unlink()
        policy.unlink()
        daemon("reload")


def answer(terminal: Terminal, typed: str, expected: str) -> None:
    """Type until it counts: what comes in a prompt's first half second does not."""
    for _ in range(60):
        terminal.send(typed + "\n")
        try:
            terminal.expect(expected, 0.7)
            return
        except AssertionError:
            continue
    raise AssertionError(f"no {expected!r} in {terminal.all!r}")


def test_a_prompt_approves_what_it_shows(asker: Asker) -> None:
    terminal = asker.ctl.on_terminal("approvals", "watch", columns=60)
    terminal.expect("waiting for calls")
    terminal.send("y\n")  # typed ahead: it must not count for what comes
    running = asker.ask("echo hello")
    terminal.expect("approve? [y]es")
    assert len(asker.waiting()) == 1
    shown = terminal.all.decode()
    assert '|   "command": "echo hello"\r\n' in shown
    answer(terminal, "y", " approved")
    assert asker.answered(running) == "hello\n"
    terminal.expect("waiting for calls")
    terminal.send("q\n")
    assert terminal.wait() == 0


def test_a_prompt_denies_with_a_reason_and_shows_nothing_raw(asker: Asker) -> None:
    running = asker.ask(HIDDEN)
    asker.wait_for(1)
    terminal = asker.ctl.on_terminal("approvals", "watch", columns=100)
    terminal.expect("approve? [y]es")
    shown = terminal.all.decode()
    assert r'"command": "echo safe\u202e; rm -rf /\u001b[2J"' in shown
    assert "\u202e" not in shown
    assert "\x1b[2J" not in shown
    answer(terminal, "n looks wrong", " denied")
    assert "an operator denied it: looks wrong" in asker.answered(running)
    terminal.send("\x03")
    assert terminal.wait() == 130


def test_a_prompt_says_when_another_operator_was_faster(asker: Asker) -> None:
    running = asker.ask("echo hello")
    terminal = asker.ctl.on_terminal("approvals", "watch")
    terminal.expect("approve? [y]es")
    (id,) = asker.waiting()
    asker.ctl("approvals", "deny", id, "--reason", "no need")
    terminal.expect(f"{id} denied by ")
    terminal.expect("no need")
    assert "no need" in asker.answered(running)
    terminal.send("\x04")
    assert terminal.wait() == 0


def test_a_call_can_be_left_for_later(asker: Asker) -> None:
    running = asker.ask("echo later")
    terminal = asker.ctl.on_terminal("approvals", "watch")
    terminal.expect("approve? [y]es")
    answer(terminal, "l", "goes on waiting")
    terminal.expect("waiting for calls")
    (id,) = asker.waiting()
    asker.ctl("approvals", "approve", id)
    assert asker.answered(running) == "later\n"
    terminal.send("q\n")
    assert terminal.wait() == 0


def test_a_pipe_is_told_without_a_prompt(asker: Asker) -> None:
    text, lines = asker.watch(), asker.watch("--json")
    assert lines.stdout is not None
    assert text.stdout is not None
    running = asker.ask(HIDDEN)
    asked = json.loads(lines.stdout.readline())
    seen = until_line(text.stdout, b"command line")
    (id,) = asker.waiting()
    asker.ctl("approvals", "deny", id)
    asker.answered(running)
    ended = json.loads(lines.stdout.readline())
    assert (asked["event"], asked["id"], asked["arguments"]) == ("asked", id, {"command": HIDDEN})
    assert (ended["event"], ended["id"], ended["outcome"]) == ("ended", id, "denied")
    seen += until_line(text.stdout, f"{id} denied".encode())
    assert seen.isascii()
    assert b"approve?" not in seen


def until_line(stream: IO[bytes], beginning: bytes) -> bytes:
    """What is read up to the line with this beginning, that included."""
    seen = b""
    for line in stream:
        seen += line
        if line.startswith(beginning):
            return seen
    raise AssertionError(f"no {beginning!r} in {seen!r}")


def test_an_operators_own_call_says_that_it_waits(asker: Asker) -> None:
    call = ("tools", "run", "shell", "--agent", "asker", "--args", '{"command": "echo mine"}')
    running = asker.ctl.start(*call)
    asker.started.append(running)
    assert running.stderr is not None
    assert running.stderr.readline() == b"waits for an operator's approval, 300 s at most\n"
    assert b"sandboxctl approvals watch" in running.stderr.readline()
    (id,) = asker.wait_for(1)
    asker.ctl("approvals", "approve", id)
    said, _ = running.communicate(timeout=30)
    assert (running.returncode, said) == (0, b"mine\n")


def test_ids_are_completed(asker: Asker) -> None:
    asker.ask("echo x")
    (id,) = asker.wait_for(1)
    assert asker.ctl("__complete", "approvals").stdout == f"{id}\n"


def test_nothing_waits(daemon: Ctl) -> None:
    done = daemon("approvals", "list")
    assert (done.stdout, done.stderr) == ("", "no call waits for approval\n")
    assert daemon.json("approvals", "list") == {"approvals": []}
    assert "no call 'c-1' waits" in daemon("approvals", "show", "c-1", status=3).stderr
    daemon("approvals", "approve", "--once", "--session", "c-1", status=2)


def shown_call(**changed: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(("id", "agent", "session", "tool", "description", "program"), "x"),
        **dict.fromkeys(("program_digest", "rule", "reason", "network", "workspace"), "x"),
        **dict.fromkeys(("asked_at", "expires_at", "digest"), "x"),
        "secrets": [],
        "lowered": [],
        "timeout": 60.0,
        "arguments": {},
        "argv": [],
        "argv_length": 0,
        "stdin": None,
        **changed,
    }


def test_an_answer_in_the_first_half_second_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(desk.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(desk.termios, "tcflush", lambda fd, queue: None)
    asked: list[tuple[str, dict[str, Any]]] = []

    class Daemon:
        def call(self, method: str, **params: Any) -> dict[str, Any]:
            asked.append((method, params))
            return {"outcome": "approved"}

    prompt = desk.Desk(Daemon())  # type: ignore[arg-type]
    prompt._take({"event": "asked", **shown_call(id="c-1", digest="d1")})
    prompt._present()
    now[0] += 0.4
    assert prompt._typed(b"y\n") is False
    assert asked == []
    assert "too fast" in capsys.readouterr().out
    now[0] += 0.2
    prompt._typed(b"y\n")
    assert asked == [("approvals.approve", {"id": "c-1", "digest": "d1", "scope": "once"})]


def lines_of(show: Callable[..., Iterator[str]], **changed: Any) -> list[str]:
    return list(show(shown_call(**changed)))


def test_many_values_are_cut_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from sandboxd.cli.approvals import MAX_LINES, details

    many = {f"k{n}": n for n in range(1000)}
    lines = lines_of(details, arguments=many)
    assert lines[-1] == "802 more lines not shown; see all of it with: show --full"
    assert len([line for line in lines if line.startswith("| ")]) == MAX_LINES
    assert len(list(details(shown_call(arguments=many), full=True))) > 1000


def test_a_description_is_one_line_and_a_huge_command_line_only_counted() -> None:
    from sandboxd.cli.approvals import details

    lines = lines_of(details, description="x" * 200 + "\nagent  trusted", argv=None, argv_length=9)
    assert f"tool       x: {'x' * 60} ..." in lines
    assert not any("trusted" in line for line in lines)
    assert lines[-1] == "command line  9 characters, too many to show"
