"""What /proc tells of a tree of processes: who is in it, CPU time, memory (proc(5))."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["below", "cpu_seconds", "family", "parent", "pss", "rss", "status"]

_TICK = os.sysconf("SC_CLK_TCK")


def below(pid: int, *, without: Iterable[int] = ()) -> list[int]:
    """All living descendants; not the ``without`` and what is below those."""
    left_out = set(without)
    found: list[int] = []
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return found
    for thread in threads:
        try:
            words = (thread / "children").read_text().split()
        except OSError:
            continue
        for child in map(int, words):
            if child not in left_out:
                found += [child, *below(child, without=left_out)]
    return found


def family(roots: Iterable[int], *, without: Iterable[int] = ()) -> list[int]:
    """``roots`` and all their living descendants, each once."""
    left_out = set(without)
    found: dict[int, None] = {}
    for root in roots:
        found.update(dict.fromkeys((root, *below(root, without=left_out))))
    return list(found)


def cpu_seconds(roots: Iterable[int], *, without: Iterable[int] = ()) -> float:
    """User and system time of whole trees, with that of descendants that were waited for."""
    return sum(_cpu(pid) for pid in family(roots, without=without))


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status, empty when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def parent(pid: int) -> int:
    return int(status(pid).get("PPid", "0"))


def rss(pid: int) -> int:
    """Resident bytes, shared ones included."""
    return int(status(pid).get("VmRSS", "0 kB").split()[0]) << 10


def pss(pid: int) -> int | None:
    """Resident bytes, shared ones in equal parts; None where the kernel does not let us look."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _cpu(pid: int) -> float:
    """Of a process and of those it reaped (proc(5), stat, fields 14 to 17)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(word) for word in words[11:15]) / _TICK
