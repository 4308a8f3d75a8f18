"""docs/first-steps.md, command by command, on a real daemon."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_daemon import BROKER_UID

PAGE = Path(__file__).resolve().parent.parent / "docs" / "first-steps.md"
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


def steps(text: str) -> Iterator[tuple[str, str]]:
    """Each command of the page (with its continuation lines) and what it is said to print."""
    command, printed = "", ""
    for block in BLOCK.findall(text):
        for line in block.splitlines():
            if line.startswith("$ "):
                if command:
                    yield command, printed
                command, printed = line[2:], ""
            elif line.startswith("> "):
                command += "\n" + line[2:]
            else:
                printed += line + "\n"
    yield command, printed


def matches(expected: str, got: str) -> bool:
    """Whether ``got`` is as documented, where ``...`` stands for anything and spaces fold."""
    parts = [re.escape(" ".join(part.split())) for part in expected.split("...")]
    # A wildcard may stand for nothing, and swallows the spaces around it.
    pattern = r"\s?.*\s?".join(parts)
    return re.fullmatch(pattern, " ".join(got.split()), re.DOTALL) is not None


@pytest.fixture
def shell() -> Iterator[subprocess.Popen[str]]:
    """A bash whose sandboxctl and sandboxd are this checkout's, in directories of its own."""
    with tempfile.TemporaryDirectory(prefix="sbx", dir="/tmp") as base:
        home = Path(base)
        home.chmod(0o755)
        bin_ = home / "bin"
        bin_.mkdir()
        user = f"--user {BROKER_UID}" if os.geteuid() == 0 else ""
        for name, module in (("sandboxctl", "sandboxd.cli"), ("sandboxd", "sandboxd.main")):
            script = bin_ / name
            extra = user if name == "sandboxd" else ""
            script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} {extra} "$@"\n')
            script.chmod(0o755)
        root = Path(__file__).resolve().parent.parent
        process = subprocess.Popen(
            ["/bin/bash", "--norc", "-s"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=home,
            start_new_session=True,
            umask=0o022,
            env={
                "HOME": base,
                "PATH": f"{bin_}:/usr/bin:/bin",
                "PYTHONPATH": str(root),
                "SANDBOXD_CONFIG": f"{base}/config",
                "SANDBOXD_STATE": f"{base}/state",
                "SANDBOXD_RUNTIME": f"{base}/run",
            },
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=60)


def run(shell: subprocess.Popen[str], command: str) -> tuple[str, int]:
    """What a command prints and its exit status; an AssertionError when it takes a minute."""
    alarm = threading.Timer(60, os.killpg, (shell.pid, signal.SIGKILL))
    alarm.start()
    try:
        return _read(shell, command)
    finally:
        alarm.cancel()


def _read(shell: subprocess.Popen[str], command: str) -> tuple[str, int]:
    assert shell.stdin is not None
    assert shell.stdout is not None
    # Its input is the commands to come, which no command may read.
    shell.stdin.write("{ " + command + "\n} < /dev/null\nprintf '\\n<<%d>>\\n' $?\n")
    shell.stdin.flush()
    lines: list[str] = []
    for line in shell.stdout:
        if done := re.fullmatch(r"<<(\d+)>>\n", line):
            return "".join(lines).rstrip("\n") + "\n", int(done[1])
        lines.append(line)
    raise AssertionError(f"the shell ended: {''.join(lines)}")


def test_every_command_does_what_the_page_says(shell: subprocess.Popen[str]) -> None:
    for command, printed in steps(PAGE.read_text()):
        got, status = run(shell, command)
        said = f"$ {command}\n{got}(exit {status})"
        assert status == 0, said
        if printed or "sandboxctl" in command:
            assert matches(printed, got), f"{said}\nthe page says:\n{printed}"


def test_a_wrong_line_on_the_page_would_be_noticed() -> None:
    assert matches("set A ...\nnext", "set A (version 1)\nnext\n")
    assert not matches("set A ...\nnext", "set B (version 1)\nnext\n")
    assert not matches("set A", "set A (version 1)\n")
    assert list(steps("```console\n$ a b\n> c\nd\n$ e\n```\n")) == [("a b\nc", "d\n"), ("e", "")]
