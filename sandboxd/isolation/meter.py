"""What one call after another uses of a cgroup that they share in turn. Standard library only."""

from __future__ import annotations

import os

from sandboxd.isolation.cgroup import Cgroup, Usage

__all__ = ["Meter"]


class Meter:
    """Counts from :meth:`mark` on. Its files are opened where the host's are in sight, and kept."""

    def __init__(self, group: Cgroup | None) -> None:
        self._cpu = self._peak = self._oom = -1
        self._nanoseconds = False
        if group is not None:
            self._cpu = group.open("cpu.stat", unified=True, controller="cpu")
            if self._cpu < 0:
                self._cpu = group.open("cpuacct.usage", unified=False, controller="cpuacct")
                self._nanoseconds = True
            self._oom, self._peak = _memory_files(group)
        self.mark()

    @property
    def fds(self) -> list[int]:
        return [fd for fd in (self._cpu, self._peak, self._oom) if fd >= 0]

    def mark(self) -> None:
        """A call begins."""
        #: Microseconds of CPU until then; None where no cgroup tells.
        self.before, self._oom_before = self.cpu(), self._oom_kills()
        self._highest_before = 0
        if self._peak >= 0:
            try:
                os.pwrite(self._peak, b"0", 0)
            except OSError:  # before Linux 6.12 v2 keeps the highest for good
                self._highest_before = _number(_pread(self._peak))

    def read(self) -> Usage:
        """What the call has used.

        Where the highest use can't be set back, only a call that used more than each before it is
        told its own; others get 0.
        """
        cpu = self.cpu()
        highest = _number(_pread(self._peak)) if self._peak >= 0 else 0
        peak = highest if highest > self._highest_before else 0
        used = None if cpu is None or self.before is None else cpu - self.before
        return Usage(used, peak >> 10, self._oom_kills() > self._oom_before)

    def cpu(self) -> int | None:
        """Microseconds of CPU since the group was made; None where it isn't told."""
        if self._cpu < 0:
            return None
        text = _pread(self._cpu)
        return _number(text) // 1000 if self._nanoseconds else _field(text, b"usage_usec")

    def _oom_kills(self) -> int:
        return _field(_pread(self._oom), b"oom_kill") if self._oom >= 0 else 0


def _memory_files(group: Cgroup) -> tuple[int, int]:
    """What counts the kernel's kills, and what holds the highest use."""
    for unified, kills, highest in (
        (True, "memory.events", "memory.peak"),
        (False, "memory.oom_control", "memory.max_usage_in_bytes"),
    ):
        fd = group.open(kills, unified=unified, controller="memory")
        if fd >= 0:
            for mode in (os.O_RDWR, os.O_RDONLY):  # read-only by itself before Linux 6.12
                peak = group.open(highest, unified=unified, controller="memory", mode=mode)
                if peak >= 0:
                    return fd, peak
            return fd, -1
    return -1, -1


def _pread(fd: int) -> bytes:
    try:
        return os.pread(fd, 4096, 0)
    except OSError:
        return b""


def _number(text: bytes) -> int:
    text = text.strip()
    return int(text) if text.isdigit() else 0


def _field(text: bytes, name: bytes) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(b" ")
        if key == name:
            return int(value)
    return 0
