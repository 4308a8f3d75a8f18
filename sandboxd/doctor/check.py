"""One finding, and the small looks at /proc that findings are made of."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Check", "State", "existing", "filesystem", "lines", "output", "read", "sysctl"]

State = Literal["ok", "degraded", "missing"]


@dataclass(frozen=True)
class Check:
    """``costs`` and ``fix`` are empty when ``state`` is ok.

    ``required``: without it sandboxd can't isolate anything on this host.
    """

    name: str
    state: State
    detail: str
    costs: str = ""
    fix: str = ""
    required: bool = False


def existing(path: Path) -> Path:
    """``path``, or the nearest directory above that exists."""
    while not path.is_dir():
        path = path.parent
    return path


def filesystem(path: Path) -> tuple[str, bool]:
    """The type of the filesystem that holds ``path``, and whether it is mounted read-only."""
    path = path.resolve()
    best: tuple[int, str] = (-1, "")
    for line in lines("/proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        # Spaces and the like are octal in there (proc(5)).
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
        if path.is_relative_to(point) and len(point) >= best[0]:
            best = len(point), after.split()[0]
    return best[1], bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def sysctl(name: str) -> str:
    """A kernel setting by its path below /proc/sys; "" where there is none."""
    return read(f"/proc/sys/{name}").strip()


def lines(path: str) -> list[str]:
    return read(path).splitlines()


def read(path: str) -> str:
    """A file's text; "" when it isn't there or not ours to read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def output(*command: str) -> str:
    """What a command prints; "" when it isn't there or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
