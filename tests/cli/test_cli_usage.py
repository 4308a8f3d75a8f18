"""Help, mistakes, the shape of output, and how little a command imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd.broker.mcppeer import RemoteError
from sandboxd.cli import manual, output
from sandboxd.cli.completion import Node, nodes
from sandboxd.cli.parser import EXIT_STATUS, build
from sandboxd.errors import SandboxdError

if TYPE_CHECKING:
    from cli_support import Ctl

PROJECT = Path(__file__).parents[2]
TREE = list(nodes(build()))
LEAVES = [node for node in TREE if node.words and not node.commands]


def words(node: Node) -> str:
    return " ".join(node.words)


@pytest.mark.parametrize("node", LEAVES, ids=words)
def test_every_command_explains_itself_with_examples(node: Node) -> None:
    parser = build()
    for word in node.words:
        (sub,) = [a for a in parser._actions if hasattr(a, "choices") and word in (a.choices or ())]
        parser = sub.choices[word]
    text = parser.format_help()
    assert f"usage: sandboxctl {words(node)}" in text
    assert "examples:\n  " in text
    assert "--json" in text
    assert all(f"sandboxctl {words(node)}" in line for line, _ in parser.examples), parser.examples
    assert max(map(len, text.splitlines())) <= 120


def test_the_contract_of_commands_is_there() -> None:
    assert {words(node) for node in LEAVES} >= {
        *(
            "status",
            "reload",
            "run",
            "agents list",
            "agents show",
            "tools list",
            "doctor",
            "demo",
            "init",
            "install",
        ),
        *("session start", "session list", "session show", "session stop", "session logs"),
        *("env list", "env set", "env remove", "env import", "audit tail", "audit verify"),
        *("policy explain", "config check", "completion"),
    }


def test_the_manual_is_what_the_commands_say() -> None:
    document = (PROJECT / "docs" / "sandboxctl.md").read_text()
    assert document == manual.renewed(document), (
        "run: python -m sandboxd.cli.manual docs/sandboxctl.md"
    )


def test_the_documented_exit_statuses_are_those_of_the_errors() -> None:
    documented = (PROJECT / "docs" / "errors.md").read_text()
    # A server's refusal becomes a tool's result; no command ends with it.
    for kind in set(SandboxdError.__subclasses__()) - {RemoteError}:
        assert f"| `{kind.code}` | {kind.exit_code} |" in documented
        assert f"  {kind.exit_code}    " in EXIT_STATUS


def test_the_overview_is_the_manual(alone: Ctl) -> None:
    text = alone("--help").stdout
    for part in ("first steps:", "exit status:", "SANDBOXD_RUNTIME", "NO_COLOR", "--json"):
        assert part in text
    assert "__complete" not in text
    assert alone("--version").stdout.startswith("sandboxctl 0.")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "missing: COMMAND"),
        (["bogus"], "there is no command 'bogus'"),
        (["session"], "missing: COMMAND"),
        (["session", "bogus"], "there is no command 'bogus'"),
        (["session", "stop"], "missing: SESSION"),
        (["session", "stop", "--grac", "1", "s-1"], "unexpected '--grac'"),
        (["session", "start", "a", "b"], "unexpected 'b'"),
        (["status", "\x1b[31mred"], "unexpected '\\x1b[31mred'"),
        (["audit", "tail", "-n", "many"], "invalid int value: 'many'"),
        (["selftest", "--patience", "0.5"], "--patience: from 1 to 20"),
        (["selftest", "--patience", "nan"], "--patience: from 1 to 20"),
        (["selftest", "--patience", "long"], "invalid factor value: 'long'"),
    ],
)
def test_a_mistake_has_a_message_a_hint_and_status_2(
    alone: Ctl, args: list[str], text: str
) -> None:
    done = alone(*args, status=2)
    first, second = done.stderr.splitlines()
    assert first.startswith("sandboxctl: ")
    assert text in first
    assert second.startswith("  hint: see sandboxctl")
    assert "[options]" not in second
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["status", "agents", "session list", "env list a", "reload"])
def test_without_a_daemon_every_command_says_so_with_status_6(alone: Ctl, command: str) -> None:
    done = alone(*command.split(), status=6)
    assert done.stderr.startswith("sandboxctl: no sandboxd is running: there is no ")
    assert "\n  hint: start one" in done.stderr
    error = json.loads(alone("--json", *command.split(), status=6).stderr)["error"]
    assert error["code"] == "unavailable"
    assert error["hint"]


def test_shared_options_work_before_and_after_the_command(daemon: Ctl, alone: Ctl) -> None:
    run = str(daemon.directory / "run")
    for args in (["--runtime", run, "status"], ["status", "--runtime", run]):
        assert str(daemon.directory) in alone(*args).stdout
    assert alone("--json", "status", "--runtime", run).stdout.startswith("{")


def test_the_status_names_the_daemons_places(daemon: Ctl) -> None:
    got = daemon.json("status")
    assert got["runtime"] == str(daemon.directory / "run")
    lines = daemon("status").stdout
    for name in ("version", "pid", "launcher", "generation", "master key", "sessions"):
        assert f"\n{name}" in f"\n{lines}"


def test_a_command_that_asks_the_daemon_imports_no_heavy_library(daemon: Ctl) -> None:
    code = (
        "import sys\nfrom sandboxd.cli import main\nassert main(['agents']) == 0\n"
        "heavy = {'trio', 'mcp', 'pydantic', 'attr', 'cattrs', 'yaml', 'cryptography', 'psutil',"
        " 'jsonschema', 'asyncio', 'logging', 'subprocess'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=daemon.environ, capture_output=True, text=True
    )
    assert done.stderr.strip() == "[]", done.stderr


def test_a_reader_that_leaves_gets_no_traceback(daemon: Ctl) -> None:
    read, write = os.pipe()
    os.close(read)
    process = daemon.start("status", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")


def test_a_full_disk_is_a_failure_and_no_traceback(daemon: Ctl) -> None:
    with open("/dev/full", "wb") as full:
        process = daemon.start("status", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(b"sandboxctl: input or output failed: No space left")


def test_it_works_with_every_standard_stream_closed(daemon: Ctl) -> None:
    def close_all() -> None:
        for fd in range(3):
            os.close(fd)

    process = daemon.start("status", stdin=None, stdout=None, stderr=None, preexec_fn=close_all)
    assert process.wait(timeout=60) == 0


def test_a_terminal_gets_columns_headings_and_colour_unless_told_otherwise(daemon: Ctl) -> None:
    screen = daemon.on_terminal("agents", columns=60)
    assert screen.wait() == 0
    assert b"\x1b[1mAGENT" in screen.all
    assert all(
        len(line) <= 61 + len("\x1b[1m\x1b[0m") for line in screen.all.decode().split("\r\n")
    )
    daemon.environ["NO_COLOR"] = "1"
    try:
        plain = daemon.on_terminal("agents")
        assert plain.wait() == 0
    finally:
        del daemon.environ["NO_COLOR"]
    assert b"\x1b" not in plain.all
    assert "\x1b" not in daemon("agents").stdout


def test_nothing_that_a_terminal_obeys_gets_through() -> None:
    assert output.clean("plain ünï 日本") == "plain ünï 日本"
    assert output.clean("a\x1b]0;t\x07b\n\u202ec\u200bd\udcff") == (
        r"a\x1b]0;t\x07b\n\u202ec\u200bd\udcff"
    )


def test_agents_and_tools_are_listed_with_what_they_may_have(daemon: Ctl) -> None:
    (agent,) = [a for a in daemon.json("agents")["agents"] if a["slug"] == "sh"]
    assert agent["tools"] == ["shell", "http_request"]
    assert "runs what a test says" in daemon("agents").stdout
    everything = {tool["name"] for tool in daemon.json("tools", "list")["tools"]}
    assert everything >= {"shell", "http_request", "git", "sql_query"}
    assert {t["name"] for t in daemon.json("tools", "list", "sh")["tools"]} == {
        "shell",
        "http_request",
    }
    listed = daemon("tools", "list", "sh").stdout
    assert "HTTP_REQUEST_TOKEN,(HTTP_REQUEST_HOSTS),HTTP_REQUEST_HEADER" in listed
    assert daemon("tools", "list", "other").stderr == "other has no tools\n"
    assert "no agent 'nobody'" in daemon("tools", "list", "nobody", status=3).stderr
