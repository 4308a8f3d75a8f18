"""What a run's figures depend on: the machine, who runs it, and how busy it was."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from sandboxd import __version__

__all__ = ["busy", "describe", "in_words", "user"]


def describe() -> dict[str, Any]:
    """Processors, memory, kernel, Python, the file system of the audit log, and the load."""
    return {
        "at": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "sandboxd": __version__,
        "commit": _commit(),
        "processors": len(os.sched_getaffinity(0)),
        "model": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "memory_gib": round(int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]) / 2**20),
        "kernel": f"Linux {platform.release()} {platform.machine()}",
        "system": _system(),
        "python": platform.python_version(),
        "user": user(),
        "file_system": _file_system(tempfile.gettempdir()),
        "load": list(os.getloadavg()),
    }


def in_words(about: dict[str, Any]) -> str:
    """One sentence for a table's foot."""
    commit = f" at {about['commit']}" if about["commit"] else ""
    return (
        f"{about['at']}, as {about['user']}: sandboxd {about['sandboxd']}{commit}; "
        f"{about['processors']} x {about['model']}, {about['memory_gib']} GiB; {about['kernel']}, "
        f"{about['system']}, Python {about['python']}; records on {about['file_system']}; "
        f"load average {about['load'][0]:.1f} when it began"
        + (f", {about['load_after'][0]:.1f} at its end" if "load_after" in about else "")
    )


def busy(about: dict[str, Any]) -> bool:
    """Whether so much else ran when it began that times say little."""
    return bool(about["load"][0] > 0.75 * about["processors"])


def user() -> str:
    return "root" if os.geteuid() == 0 else "an ordinary user"


def _commit() -> str:
    """Of the tree that runs, with a + when it has changes; empty without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def _file_system(path: str) -> str:
    """The kind of file system that holds ``path`` (proc(5), mountinfo)."""
    best, kind = "", "an unknown file system"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4]
        if Path(path).is_relative_to(point) and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind
