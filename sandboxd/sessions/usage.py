"""What a session's processes use now, as operators see it."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

__all__ = ["Usage", "usage"]


@dataclass(frozen=True)
class Usage:
    """Living processes, their resident memory in bytes, and CPU seconds spent by them."""

    processes: int
    memory: int
    cpu: float


def usage(init: int) -> Usage:
    """The tree below the sandbox's init (host pid ``init``), which itself is not counted."""
    processes = memory = 0
    cpu = 0.0
    try:
        tree = psutil.Process(init).children(recursive=True)
    except psutil.Error:
        return Usage(0, 0, 0.0)
    for process in tree:
        try:
            times = process.cpu_times()
            memory += process.memory_info().rss
        except psutil.Error:
            continue  # ended since it was listed
        processes += 1
        cpu += times.user + times.system
    return Usage(processes, memory, round(cpu, 2))
