"""One cgroup for each sandbox: memory, processes and CPU of a whole tree (cgroups(7)).

Resource limits hold for one process, and a tree has many; a cgroup counts them together. The
launcher makes one before it forks and removes it once the last process is reaped. Unified
hierarchies (v2) and the older one per controller (v1) are both used as they are found:

- *Where.* Under systemd the unit's own cgroup, which ``Delegate=yes`` made ours: the processes
  that are already there move to a leaf, for on v2 only leaves may hold any. Else, for root, the
  nearest cgroup above that passes the controllers on. Else nowhere, and :attr:`Cgroups.state` says
  so: the limits of single processes are then all there is.
- *In.* On v2 the child is born inside (clone3(2), CLONE_INTO_CGROUP). Elsewhere it writes itself
  into ``tasks``: for its own, only thread the kernel need not stop every fork meanwhile, which
  makes ``cgroup.procs`` slow.
- *Out of memory.* The kernel kills the whole group (memory.oom.group). v1 has no such thing and
  tells an eventfd instead, on which the launcher does the same.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

from sandboxd.errors import KernelError
from sandboxd.isolation.cgroup_places import NEEDED, Place, find_places
from sandboxd.isolation.wire import CgroupState

__all__ = ["Cgroup", "Cgroups", "Share", "Usage", "set_up"]

#: What a sandbox takes for itself, before its program takes anything: the copied pages of its
#: init, mounts, kernel memory. On top of the limit, so that a single process meets its own limit
#: first, as an allocation that fails, and not the end of the whole group.
OVERHEAD = 16 << 20

#: In memory, or passing everything on to a disk below.
_NO_DISKS = ("loop", "ram", "zram", "dm-", "md", "nbd", "sr", "fd")
_PERIOD = 100_000  # of CPU bandwidth, in microseconds: the kernel's default


@dataclass(frozen=True)
class Share:
    """Limits of one sandbox; 0 is none. ``millicpus``: thousandths of one CPU; ``io``: bytes a
    second of reading, and of writing, for each disk."""

    memory: int = 0
    processes: int = 0
    millicpus: int = 0
    io: int = 0


@dataclass(frozen=True)
class Usage:
    """What a whole tree used. ``oom``: the kernel killed in it for want of memory."""

    cpu_us: int | None = None
    peak_kib: int = 0
    oom: bool = False


def set_up() -> Cgroups:
    """Find or make this daemon's place in the host's cgroups. Never raises: a host may have none.

    For a single-threaded child of the daemon, before it leaves any namespace. Where v2 demands it,
    this process and the daemon move to a leaf of their cgroup.
    """
    places, reasons = find_places()
    return Cgroups(places, "; ".join(reasons))


class Cgroups:
    """The daemon's own cgroup in every hierarchy that it uses; below it one for each sandbox."""

    def __init__(self, places: list[Place], lacking: str) -> None:
        self._places = places
        self._spare: Cgroup | None = None
        self._count = 0
        held = {name for place in places for name in place.controllers}
        versions = sorted({"v2" if place.unified else "v1" for place in places})
        missing = [name for name in NEEDED if name not in held]
        if missing and not lacking:
            lacking = f"this host withholds {', '.join(missing)}"
        #: What the broker is told.
        self.state = CgroupState("+".join(versions), frozenset(held), lacking if missing else "")

    def prepare(self) -> None:
        """Make the next sandbox's cgroup ahead of time, while its limits aren't known yet."""
        if self._spare is None and self._places:
            with contextlib.suppress(KernelError):  # told when it is needed
                self._spare = self._new()

    def create(self, share: Share) -> Cgroup | None:
        """A new cgroup with these limits; None where there are no cgroups at all.

        Raises KernelError, and leaves nothing behind.
        """
        if not self._places:
            return None
        group, self._spare = self._spare or self._new(), None
        try:
            group.limit(share)
        except BaseException:
            group.remove()
            raise
        return group

    def close(self) -> None:
        """Remove the daemon's own cgroups. No process may be left in them."""
        if self._spare is not None:
            self._spare.remove()
        for place in self._places:
            with contextlib.suppress(OSError):
                os.rmdir(place.path)
            os.close(place.lock)
        self._places = []

    def _new(self) -> Cgroup:
        self._count += 1
        group = Cgroup(self._places, str(self._count))
        try:
            group.make()
        except BaseException:
            group.remove()
            raise
        return group


class Cgroup:
    """One sandbox's cgroup: a directory of the same name in every hierarchy."""

    def __init__(self, places: list[Place], name: str) -> None:
        self._places, self._name = places, name
        #: Directory that a child can be born in (clone3(2)); -1 without v2.
        self.birth = -1
        #: Readable once the kernel ran out of memory here and killed one process; -1 on v2.
        self.oom = -1

    def make(self) -> None:
        """Make the directories, and set what is the same for all. KernelError."""
        name = self._name
        for place in self._places:
            try:
                os.mkdir(name, 0o755, dir_fd=place.lock)
                if place.unified:
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                    self.birth = os.open(name, flags, dir_fd=place.lock)
            except OSError as failure:
                raise KernelError("mkdir", failure.errno or 0, f"{place.path}/{name}") from None
            if "memory" not in place.controllers:
                continue
            if not place.unified:
                self.oom = _oom_event(place, name)
                continue
            if place.swap_limit:
                place.write(f"{name}/memory.swap.max", b"0")
            place.write(f"{name}/memory.oom.group", b"1")

    def limit(self, share: Share) -> None:
        """Set the limits. KernelError."""
        for place in self._places:
            for file, value in _settings(place, share):
                place.write(f"{self._name}/{file}", value)

    def join(self, *, born: bool = False) -> None:
        """Move the calling process, which must have one thread, inside. KernelError if refused.

        ``born``: it was made in :attr:`birth`.
        """
        for place in self._places:
            if not (place.unified and born):
                place.write(f"{self._name}/{'cgroup.procs' if place.unified else 'tasks'}", b"0")

    def open(self, file: str, *, unified: bool, controller: str, mode: int = os.O_RDONLY) -> int:
        """One of its files, to keep; -1 where there is none such, or not of this version."""
        for place in self._places:
            if place.unified == unified and (unified or controller in place.controllers):
                with contextlib.suppress(OSError):
                    return os.open(f"{self._name}/{file}", mode | os.O_CLOEXEC, dir_fd=place.lock)
        return -1

    def kill(self) -> None:
        """SIGKILL for every process inside, where the kernel can do that (v2, Linux 5.14)."""
        for place in self._places:
            if place.unified:
                with contextlib.suppress(KernelError):
                    place.write(f"{self._name}/cgroup.kill", b"1")

    def exists(self) -> bool:
        """Whether nobody has removed any of it meanwhile."""
        return all(os.access(self._name, os.F_OK, dir_fd=place.lock) for place in self._places)

    def usage(self) -> Usage:
        """What it used so far. What can't be read is left out."""
        cpu: int | None = None
        peak, oom = 0, False
        for place in self._places:
            at = self._name
            if place.unified:
                cpu = place.field(f"{at}/cpu.stat", b"usage_usec")
            elif "cpuacct" in place.controllers and cpu is None:
                cpu = place.number(f"{at}/cpuacct.usage") // 1000
            if "memory" not in place.controllers:
                continue
            if place.unified:
                peak = place.number(f"{at}/memory.peak")
                oom = bool(place.field(f"{at}/memory.events", b"oom_kill"))
            else:
                peak = place.number(f"{at}/memory.max_usage_in_bytes")
                oom = bool(place.field(f"{at}/memory.oom_control", b"oom_kill"))
        return Usage(cpu, peak >> 10, oom)

    def close(self) -> None:
        """Let go of its descriptors. Idempotent."""
        for fd in (self.birth, self.oom):
            if fd >= 0:
                os.close(fd)
        self.birth = self.oom = -1

    def remove(self) -> bool:
        """Remove it; False while the kernel still holds on to a process of it: try again."""
        self.close()
        left = []
        for place in self._places:
            try:
                os.rmdir(self._name, dir_fd=place.lock)
            except OSError as failure:
                if failure.errno == errno.EBUSY:
                    left.append(place)
        self._places = left
        return not left


def _settings(place: Place, share: Share) -> Iterator[tuple[str, bytes]]:
    """The files to write for one sandbox, in order."""
    memory = b"%d" % (share.memory + OVERHEAD) if share.memory else b""
    quota = max(1000, share.millicpus * _PERIOD // 1000)
    if place.unified:
        if "memory" in place.controllers and memory:
            yield "memory.max", memory
        if "cpu" in place.controllers and share.millicpus:
            yield "cpu.max", b"%d %d" % (quota, _PERIOD)
    else:
        if "memory" in place.controllers and memory:
            yield "memory.limit_in_bytes", memory
            if place.swap_limit:  # memory and swap together; swappiness is the place's, 0
                yield "memory.memsw.limit_in_bytes", memory
        if "cpu" in place.controllers and share.millicpus:
            yield "cpu.cfs_quota_us", b"%d" % quota
    if "pids" in place.controllers and share.processes:
        yield "pids.max", b"%d" % share.processes
    if share.io and "io" in place.controllers:
        for disk in _disks():
            yield "io.max", b"%s rbps=%d wbps=%d" % (disk, share.io, share.io)
    if share.io and "blkio" in place.controllers:
        for disk in _disks():
            yield "blkio.throttle.read_bps_device", b"%s %d" % (disk, share.io)
            yield "blkio.throttle.write_bps_device", b"%s %d" % (disk, share.io)


@functools.cache
def _disks() -> tuple[bytes, ...]:
    """The host's disks as MAJOR:MINOR, as they are at the first launch that asks for it.

    Whole ones, for limits don't go to partitions; loops and the like pass on to these.
    """
    found = []
    for name in sorted(os.listdir("/sys/block")) if os.path.isdir("/sys/block") else ():
        if not name.startswith(_NO_DISKS):
            with contextlib.suppress(OSError), open(f"/sys/block/{name}/dev", "rb") as numbers:
                found.append(numbers.read().strip())
    return tuple(found)


def _oom_event(place: Place, name: str) -> int:
    """An eventfd that the kernel writes to when this v1 cgroup is out of memory; -1 if it can't.

    Told once a victim is chosen (Documentation/admin-guide/cgroup-v1/memory.rst, section 10).
    """
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC
        control = os.open(f"{name}/memory.oom_control", flags, dir_fd=place.lock)
        try:
            place.write(f"{name}/cgroup.event_control", b"%d %d" % (event, control))
        finally:
            os.close(control)
    except (OSError, KernelError):
        os.close(event)  # a kernel that has dropped these still kills the largest process
        return -1
    return event
