"""Completion in the real shells, each asked the same questions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli_support import Terminal

if TYPE_CHECKING:
    from cli_support import Ctl

#: A file that an agent might leave in its workspace for whoever completes names there.
HOSTILE = "local.$(touch${IFS}executed)"

#: A command line up to the cursor, some of what must be offered, some of what must not.
CASES = [
    ("sandboxctl ", {"status", "session", "env", "completion"}, {"__complete", "--json"}),
    ("sandboxctl se", {"session"}, {"status"}),
    ("sandboxctl --json ses", {"session"}, set()),
    ("sandboxctl session ", {"start", "list", "show", "stop", "logs"}, {"status"}),
    ("sandboxctl session stop --g", {"--grace"}, {"--json"}),
    ("sandboxctl run ", {"sh", "other", "example"}, {"status"}),
    ("sandboxctl run o", {"other"}, {"sh"}),
    ("sandboxctl env list s", {"sh"}, {"other"}),
    ("sandboxctl env remove sh COMPLETED_", {"COMPLETED_A", "COMPLETED_B"}, set()),
    ("sandboxctl env remove sh COMPLETED_A COMPLETED_", {"COMPLETED_B"}, set()),
    ("sandboxctl policy explain sh ht", {"http_request"}, {"shell"}),
    ("sandboxctl policy ", {"check", "explain", "diff"}, {"lint"}),
    ("sandboxctl tools show ht", {"http_request"}, {"shell"}),
    ("sandboxctl tools lint --str", {"--strict"}, {"--files"}),
    ("sandboxctl approvals ", {"list", "show", "approve", "deny", "watch"}, {"status"}),
    ("sandboxctl keys ", {"create", "list", "show", "rotate", "deactivate"}, {"jwks"}),
    ("sandboxctl tokens create --a", {"--agent"}, {"--now"}),
    ("sandboxctl completion ", {"bash", "zsh", "fish"}, set()),
    ("sandboxctl run sh -- o", set(), {"other"}),
    # Values of options.
    ("sandboxctl keys create --role ", {"owner", "operator", "viewer"}, {"local.key", "sh"}),
    ("sandboxctl keys create --role op", {"operator"}, {"owner"}),
    ("sandboxctl dashboard --role ", {"owner", "viewer"}, {"developer"}),
    ("sandboxctl keys create --agent o", {"other"}, {"sh"}),
    ("sandboxctl keys create --label lo", set(), {"local.key", "local.d"}),
    ("sandboxctl run --lifetime lo", set(), {"local.key", "local.d"}),
    ("sandboxctl tools run shell --agent o", {"other"}, {"sh"}),
    ("sandboxctl --key-file lo", {"local.key", "local.d", HOSTILE}, set()),
    ("sandboxctl status --ca lo", {"local.key"}, set()),
    ("sandboxctl tools test shell --env-file lo", {"local.key"}, set()),
    ("sandboxctl status --config lo", {"local.d"}, {"local.key"}),
    ("sandboxctl config check lo", {"local.d"}, {"local.key"}),
    ("sandboxctl config schema ", {"sandboxd", "agent", "tool", "policy"}, set()),
    ("sandboxctl session exec --cwd lo", set(), {"local.d", "local.key"}),
    ("sandboxctl run --server unix:/lo", set(), {"local.d", "other"}),
    # SESSION:PATH or a file.
    ("sandboxctl session cp lo", {"local.key", "local.d", HOSTILE}, {"SESSION:"}),
    ("sandboxctl session cp notes s-", {"SESSION:"}, {"local.key"}),
    ("sandboxctl session cp -r ", {"SESSION:", "local.d", "local.key"}, set()),
    ("sandboxctl session cp SESSION:lo", set(), {"local.key", "local.d"}),
    ("sandboxctl session cp SESSION:notes lo", {"local.key"}, set()),
]
#: The same for values glued to their option: shells differ in whether they repeat the option.
GLUED = [
    ("sandboxctl keys create --role=op", "operator", "owner"),
    ("sandboxctl --key-file=local.k", "local.key", "local.d"),
    ("sandboxctl keys create --agent=o", "other", "sh"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``sandboxctl``."""
    directory = tmp_path_factory.mktemp("bin")
    script = directory / "sandboxctl"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m sandboxd.cli "$@"\n')
    script.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def with_variables(daemon: Ctl) -> Ctl:
    daemon("env", "set", "sh", "COMPLETED_A=some-value", "COMPLETED_B=some-value")
    return daemon


def said_by(environ: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        command, env=environ, cwd=environ["HOME"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def bash(environ: dict[str, str], script: Path, lines: list[str]) -> list[set[str]]:
    code = f"source {script}\n"
    for line in lines:
        # As bash cuts it: at spaces, and around characters of COMP_WORDBREAKS.
        words = [part for word in line.split(" ") for part in re.findall(r"[:=]+|[^:=]+|^$", word)]
        code += (
            f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}\n"
            '__sandboxctl; echo "${COMPREPLY[*]}"\n'
        )
    said = said_by(environ, "bash", "--norc", "--noprofile", "-c", code)
    return [set(row.split()) for row in said.splitlines()]


def fish(environ: dict[str, str], script: Path, lines: list[str]) -> list[set[str]]:
    code = f"source {script}\n" + "".join(f"complete -C '{line}'; echo ==\n" for line in lines)
    said = said_by(environ, "fish", "--no-config", "-c", code)
    return [
        {row.partition("\t")[0] for row in part.splitlines()} for part in said.split("==\n")[:-1]
    ]


def zsh(environ: dict[str, str], script: Path, lines: list[str]) -> list[set[str]]:
    # Its completion works in the line editor only: type a line and a tab, and read the screen.
    screen = Terminal(["zsh", "-f", "-i"], {**environ, "TERM": "dumb"}, 60, 200)
    for n, command in enumerate(
        (
            "PS1= RPS1=; unsetopt prompt_cr prompt_sp list_ambiguous; setopt interactivecomments",
            "cd; autoload -Uz compinit && compinit -D -u",
            f"source {script}",
        )
    ):
        screen.send(f"{command}; echo ready$(({n} + 10))\n")
        screen.expect(f"ready{n + 10}\r\n")
    found = []
    for n, line in enumerate(lines):
        before = len(screen.all)
        screen.send(f"{line}\t")
        # The line becomes an argument of ":", so that it is not run.
        screen.send(f" #\x01: \x05\necho done$(({n} + 1000))\n")
        screen.expect(f"done{n + 1000}\r\n")
        text = screen.all[before:].decode().replace("\\", "")  # names are listed as inserted
        found.append(set(re.sub(r"\x1b\[[?0-9]*[a-z]|\x07", " ", text).split()))
    screen.send("exit\n")
    screen.wait()
    return found


@pytest.mark.parametrize("shell", [bash, fish, zsh], ids=lambda shell: shell.__name__)
def test_a_shell_completes(
    with_variables: Ctl,
    programs: Path,
    tmp_path: Path,
    shell: Callable[[dict[str, str], Path, list[str]], list[set[str]]],
) -> None:
    name = shell.__name__
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    script = tmp_path / f"completion.{name}"
    script.write_text(with_variables("completion", name).stdout)
    environ = {
        **with_variables.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    (tmp_path / HOSTILE).touch()
    (tmp_path / "local.key").touch()
    (tmp_path / "local.d").mkdir()
    session = with_variables("session", "start", "sh", "--", "-c", "sleep 1000").stdout.strip()
    lines = [line.replace("SESSION", session) for line, *_ in [*CASES, *GLUED]]
    answers = shell(environ, script, lines)
    with_variables("session", "stop", "--grace", "0", session)
    for (line, offered, not_offered), words in zip(CASES, answers, strict=False):
        got = {word.replace(session, "SESSION").removesuffix("/") for word in words}
        assert offered <= got, (line, got)
        assert not got & not_offered, (line, got)
    for (line, value, other), words in zip(GLUED, answers[len(CASES) :], strict=True):
        got = {word.rpartition("=")[2] for word in words}
        assert value in got, (line, words)
        assert other not in got, (line, words)
    assert not (tmp_path / "executed").exists()


def test_bash_inserts_a_session_with_its_colon_and_a_file_quoted(
    with_variables: Ctl, programs: Path, tmp_path: Path
) -> None:
    """On a terminal, where readline cuts words at colons and quotes what is inserted."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    script = tmp_path / "completion.bash"
    script.write_text(with_variables("completion", "bash").stdout)
    (tmp_path / HOSTILE).touch()
    session = with_variables("session", "start", "sh", "--", "-c", "sleep 1000").stdout.strip()
    environ = {
        **with_variables.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "TERM": "dumb",
        "INPUTRC": "/dev/null",
    }
    screen = Terminal(["bash", "--norc", "--noprofile", "-i"], environ, 60, 200)
    screen.send(f"PS1=; cd; source {script}; echo ready$((10))\n")
    screen.expect("ready10\r\n")
    screen.send(f"sandboxctl session cp {session[:-1]}\t")
    screen.expect(f"cp {session}:")
    screen.send("\t\x15")
    screen.send("\x15sandboxctl session cp local.\t")
    screen.expect("cp local.\\$\\(touch\\$\\{IFS\\}executed\\)")
    screen.send("\x15exit\n")
    screen.wait()
    with_variables("session", "stop", "--grace", "0", session)
    assert not (tmp_path / "executed").exists()


def test_without_a_daemon_names_are_empty_and_quiet(alone: Ctl) -> None:
    for kind in ("agents", "tools", "sessions", "variables"):
        done = alone("__complete", kind)
        assert (done.stdout, done.stderr) == ("", "")


def test_names_of_everything_are_printed_one_a_line(with_variables: Ctl) -> None:
    assert "sh" in with_variables("__complete", "agents").stdout.splitlines()
    assert "shell" in with_variables("__complete", "tools").stdout.splitlines()
    names = with_variables("__complete", "variables", "sh").stdout.splitlines()
    assert {"COMPLETED_A", "COMPLETED_B"} <= set(names)
    id = with_variables("session", "start", "sh", "--", "-c", "sleep 1000").stdout.strip()
    assert id in with_variables("__complete", "sessions").stdout.splitlines()
    with_variables("session", "stop", "--grace", "0", id)
    make = ("keys", "create", "--role", "viewer", "--label", "completed")
    kept, gone = (with_variables.json(*make)["key"]["id"] for _ in range(2))
    with_variables("keys", "deactivate", gone)
    names = with_variables("__complete", "keys").stdout.splitlines()
    assert (kept in names, gone in names) == (True, False)
