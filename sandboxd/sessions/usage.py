"""What a session's processes use now, as operators see it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil  # a megabyte: loaded when an operator first asks

__all__ = ["Usage", "usage", "usages"]


@dataclass(frozen=True)
class Usage:
    """Living processes, their resident memory in bytes, and CPU seconds spent by them."""

    processes: int
    memory: int
    cpu: float


def usage(init: int) -> Usage:
    """The tree below the sandbox's init (host pid ``init``), which itself is not counted."""
    import psutil

    try:
        return _sum(psutil.Process(init).children(recursive=True))
    except psutil.Error:
        return Usage(0, 0, 0.0)


def usages(inits: Sequence[int]) -> list[Usage]:
    """The same for several, with one look at the host's processes for all of them."""
    if not inits:
        return []
    import psutil

    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter(["ppid"]):
        children.setdefault(process.info["ppid"] or 0, []).append(process)
    found = []
    for init in inits:
        below = list(children.get(init, ()))
        for process in below:
            below.extend(children.get(process.pid, ()))
        found.append(_sum(below))
    return found


def _sum(tree: Iterable[psutil.Process]) -> Usage:
    import psutil

    processes = memory = 0
    cpu = 0.0
    for process in tree:
        try:
            times = process.cpu_times()
            memory += process.memory_info().rss
        except psutil.Error:
            continue  # ended since it was listed
        processes += 1
        cpu += times.user + times.system
    return Usage(processes, memory, round(cpu, 2))
