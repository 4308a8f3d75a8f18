"""sandboxctl as a process of its own, on pipes and on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CTL = [sys.executable, "-m", "sandboxd.cli"]
PROJECT = Path(__file__).parents[2]

#: /bin/sh: everything a test wants an agent to do comes after ``--``.
AGENT = "version: 1\ndescription: runs what a test says\ncommand: [/bin/sh]\nargs_allowed: true\n"


@dataclass
class Ctl:
    """sandboxctl, pointed at one daemon or at none."""

    directory: Path
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SANDBOXD_", "XDG_"))}
        self.environ = {
            **kept,
            "PYTHONPATH": str(PROJECT),
            "SANDBOXD_CONFIG": str(self.directory / "config"),
            "SANDBOXD_STATE": str(self.directory / "state"),
            "SANDBOXD_RUNTIME": str(self.directory / "run"),
            "TERM": "xterm",
            **self.environ,
        }

    def __call__(
        self, *args: str, stdin: bytes = b"", status: int | None = 0, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*CTL, *args],
            input=stdin,
            capture_output=True,
            env={**self.environ, **environ},
            timeout=60,
        )
        result = subprocess.CompletedProcess(
            done.args,
            done.returncode,
            done.stdout.decode("utf-8", "surrogateescape"),
            done.stderr.decode("utf-8", "surrogateescape"),
        )
        if status is not None:
            assert result.returncode == status, (result.stdout, result.stderr)
        return result

    def json(self, *args: str, **options: Any) -> Any:
        return json.loads(self(*args, "--json", **options).stdout)

    def start(self, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        return subprocess.Popen([*CTL, *args], env=self.environ, **options)

    def on_terminal(self, *args: str, rows: int = 24, columns: int = 80) -> Terminal:
        return Terminal([*CTL, *args], self.environ, rows, columns)


class Terminal:
    """A command whose terminal is ours: standard streams, session and foreground group."""

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], rows: int, columns: int
    ) -> None:
        import fcntl
        import struct
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.slave = slave
        self.seen = b""  # since the last expected text
        self.all = b""
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environ,
            preexec_fn=_own_terminal,  # one thread, and the child only calls setsid
        )

    def expect(self, text: str, seconds: float = 30) -> None:
        """Read until ``text`` appears in what came since the last one."""
        wanted = text.encode()
        deadline = time.monotonic() + seconds
        while wanted not in self.seen:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.master], [], [], max(left, 0))
            if not ready:
                raise AssertionError(f"no {text!r} in {self.seen!r}")
            self._read()
        self.seen = self.seen[self.seen.index(wanted) + len(wanted) :]

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def attributes(self) -> list[Any]:
        import termios

        return termios.tcgetattr(self.slave)

    def wait(self, *, keep: bool = False) -> int:
        """Its exit status; the terminal is closed unless it is to be kept."""
        status = self.process.wait(timeout=30)
        while select.select([self.master], [], [], 0)[0]:
            self._read()
        if not keep:
            self.close()
        return status

    def _read(self) -> None:
        got = os.read(self.master, 65536)
        self.seen += got
        self.all += got

    def close(self) -> None:
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
