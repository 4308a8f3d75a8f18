"""Where a daemon's cgroups may be: found in /proc, made, locked, and cleared of leftovers.

On v2 a cgroup either holds processes or passes controllers on to cgroups below it ("no internal
processes", cgroups(7)), and whoever manages a part of the tree manages it alone. So the places are,
in this order: the cgroup that systemd delegated to us, after its processes have moved to a leaf of
it; for root, the nearest cgroup above that passes the controllers on already. v1 has no such rules:
there it is below our own cgroup, in each hierarchy.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sandboxd.errors import KernelError

__all__ = ["NEEDED", "Place", "find_places"]

#: What the limits of a sandbox take.
NEEDED = ("memory", "pids", "cpu")

_WANTED = (*NEEDED, "io")
_V1_WANTED = (*NEEDED, "cpuacct", "blkio")
_PREFIX = "sandboxd-"
_LEAF = "supervisor"
_DELEGATED = ("user.delegate", "trusted.delegate")  # systemd's marks, for users and for root


@dataclass(frozen=True)
class Place:
    """The daemon's own cgroup in one hierarchy, open as ``lock``, which shows that it is in use."""

    path: str
    unified: bool
    controllers: frozenset[str]
    lock: int
    swap_limit: bool = False

    def write(self, file: str, data: bytes) -> None:
        """Write a file below, from the descriptor on: long paths are slow here. KernelError."""
        _write(file, data, self.lock, shown=f"{self.path}/{file}")

    def field(self, file: str, name: bytes) -> int:
        """One value of a file of lines ``name value``; 0 when it isn't there."""
        for line in self._read(file).splitlines():
            key, _, value = line.partition(b" ")
            if key == name:
                return int(value)
        return 0

    def number(self, file: str) -> int:
        """The value of a file; 0 when it isn't there, or no number."""
        text = self._read(file).strip()
        return int(text) if text.isdigit() else 0

    def _read(self, file: str) -> bytes:
        """What one read(2) gives: a short file."""
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.lock)
            try:
                return os.read(fd, 4096)
            finally:
                os.close(fd)
        except OSError:
            return b""


def find_places() -> tuple[list[Place], list[str]]:
    """A new cgroup of ours in each hierarchy that has a use, and reasons where there is none.

    Never raises for what a host lacks. Removes what a launcher that was killed has left behind.
    """
    places: list[Place] = []
    reasons: list[str] = []
    mounts = _mounts()
    if mounts.unified is not None and mounts.offers():
        _collect(places, reasons, lambda: _unified(mounts))
    held = {name for place in places for name in place.controllers}
    for names, own in mounts.old.items():
        wanted = [name for name in _V1_WANTED if name in names and name not in held]
        if wanted and "cpuset" not in names:  # that one needs values before it takes a process
            _collect(places, reasons, functools.partial(_old, own, wanted))
    if mounts.unified is None and not mounts.old:
        reasons.append("no cgroup file system is mounted")
    return places, reasons


class _Lacking(Exception):
    """Why a hierarchy can't be used."""


@dataclass(frozen=True)
class _Mounts:
    """This process's own cgroup in each hierarchy, as a path; on v2 also the topmost visible."""

    unified: str | None
    top: str
    old: dict[tuple[str, ...], str]

    def offers(self) -> bool:
        """Whether v2 is worth using: it has a controller, or there is nothing else."""
        return not self.old or bool(_words(f"{self.top}/cgroup.controllers") & {*_WANTED})


def _mounts() -> _Mounts:
    points: dict[tuple[str, ...], tuple[str, str]] = {}
    for line in _read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        if kind in ("cgroup", "cgroup2"):
            root, point = (_unescaped(word) for word in before.split()[3:5])
            # v2 has the empty key, v1 its controllers; other words are options of the mount.
            key = () if kind == "cgroup2" else tuple(sorted(options.split()[-1].split(",")))
            points.setdefault(key, (root, point))
    unified, top, old = None, "", {}
    for line in _read("/proc/self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        if number == "0":
            if () in points:
                root, top = points[()]
                unified = _below(root, top, path)
            continue
        controllers = tuple(sorted(names.split(",")))
        for key, (root, point) in points.items():
            if key and {*controllers} <= {*key}:
                old[controllers] = _below(root, point, path)
    return _Mounts(unified, top, old)


def _unified(mounts: _Mounts) -> Place:
    own, top = mounts.unified or "", mounts.top
    home, ours = _home(own, top)
    _enable(home, _WANTED if ours else NEEDED)
    place = _own_group(home, unified=True)
    held = _enable(place.path, _words(f"{place.path}/cgroup.controllers") & {*_WANTED})
    if os.path.exists(f"{place.path}/cgroup.kill"):
        held |= {"kill"}
    swap = "memory" in held and os.path.exists(f"{place.path}/memory.swap.max")
    return Place(place.path, True, frozenset(held), place.lock, swap)


def _home(own: str, top: str) -> tuple[str, bool]:
    """Where on v2 a cgroup of ours may be made, and whether all of that is ours."""
    real_root = not os.path.exists(f"{top}/cgroup.type")
    alone = {*_processes(own)} <= {*_family()}
    mine = os.geteuid() != 0 and os.stat(own).st_uid == os.geteuid()
    if _is_delegated(own) or (alone and (mine or (own == top and not real_root))):
        _vacate(own)
        return own, True
    parent = os.path.dirname(own)
    if own != top and _is_delegated(parent) and not _processes(parent):
        return parent, True  # a process put into a leaf by systemd (DelegateSubgroup=)
    if os.geteuid() == 0:
        at = own
        while at != top:
            at = os.path.dirname(at)
            if {*NEEDED} <= _words(f"{at}/cgroup.subtree_control"):
                return at, False
        if real_root:  # the only inner node that may hold processes
            return top, False
    raise _Lacking("no cgroup is delegated to this process")


def _vacate(own: str) -> None:
    """Move every process of ``own`` to a leaf below it: inner nodes of v2 may hold none."""
    leaf = f"{own}/{_LEAF}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(leaf, 0o755)
    for _ in range(100):  # as long as they fork
        pids = _processes(own)
        if not pids:
            # Among busy sandboxes the daemon gets its turn, with processors and with disks, which
            # sandboxes share evenly (io.weight takes effect with BFQ or blk-iocost).
            _enable(own, ("cpu", "io"))
            for file in ("cpu.weight", "io.weight"):
                with contextlib.suppress(KernelError):
                    _write(f"{leaf}/{file}", b"1000")
            return
        for pid in pids:
            try:
                _write(f"{leaf}/cgroup.procs", b"%d" % pid)
            except KernelError as failure:
                if failure.errno != errno.ESRCH:  # it has just ended
                    raise
    raise _Lacking(f"the processes of {own} would not move to {_LEAF}")


def _old(own: str, wanted: list[str]) -> Place:
    place = _own_group(own, unified=False)
    swap = False
    if "memory" in wanted:
        with contextlib.suppress(KernelError):
            _write(f"{place.path}/memory.swappiness", b"0")
        swap = os.path.exists(f"{place.path}/memory.memsw.limit_in_bytes")
    if "cpu" in wanted:
        # Beside the single processes of the cgroup above, each of which counts as much as a group.
        shares = 1024 * (os.cpu_count() or 1)
        with contextlib.suppress(KernelError):
            _write(f"{place.path}/cpu.shares", b"%d" % shares)
    return Place(place.path, False, frozenset(wanted), place.lock, swap)


def _own_group(home: str, *, unified: bool) -> Place:
    """A new cgroup for this daemon below ``home``, locked; leftovers beside it are removed.

    The lock (flock(2)) ends with the last process that holds it, however that ended: what isn't
    locked is nobody's. It is taken after mkdir(2), so another launcher may remove the directory
    in between; then it is made again.
    """
    for entry in os.listdir(home):
        if entry.startswith(_PREFIX):
            _remove_leftover(f"{home}/{entry}")
    for _ in range(100):
        path = f"{home}/{_PREFIX}{os.urandom(6).hex()}"
        os.mkdir(path, 0o700)  # nobody else may take the lock
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.stat(path)
            except OSError:
                os.close(lock)
                raise
            return Place(path, unified, frozenset(), lock)
    raise _Lacking(f"no cgroup can be kept below {home}")


def _remove_leftover(path: str) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for entry in os.scandir(path):
                if entry.is_dir(follow_symlinks=False):
                    os.rmdir(entry.path)
            os.rmdir(path)
        finally:
            os.close(lock)


def _collect(places: list[Place], reasons: list[str], make: Callable[[], Place]) -> None:
    try:
        places.append(make())
    except _Lacking as why:
        reasons.append(str(why))
    except OSError as failure:
        reasons.append(f"{failure.filename or 'cgroup'}: {failure.strerror}")
    except KernelError as failure:
        reasons.append(f"{failure.path}: {os.strerror(failure.errno)}")


def _enable(at: str, wanted: Iterable[str]) -> set[str]:
    """Pass controllers on to the children of ``at``; those that are."""
    for name in wanted:
        if name not in _words(f"{at}/cgroup.subtree_control"):
            with contextlib.suppress(KernelError):
                _write(f"{at}/cgroup.subtree_control", f"+{name}".encode())
    return _words(f"{at}/cgroup.subtree_control") & {*_WANTED}


def _is_delegated(path: str) -> bool:
    for name in _DELEGATED:
        with contextlib.suppress(OSError):
            return os.getxattr(path, name) == b"1" and os.access(path, os.W_OK)
    return False


def _family() -> Iterator[int]:
    """This process and those it descends from, as far as /proc shows them."""
    pid = int(os.readlink("/proc/self"))
    while pid > 0:
        yield pid
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        pid = int(fields[1]) if len(fields) > 1 else 0


def _processes(path: str) -> list[int]:
    return [int(word) for word in _read(f"{path}/cgroup.procs").split()]


def _below(root: str, point: str, path: str) -> str:
    """Where a mount of the part ``root`` of a hierarchy shows ``path``; its top if it doesn't."""
    at = point + "/" + os.path.relpath(path, root)
    return os.path.normpath(at) if ".." not in at.split("/") and os.path.isdir(at) else point


def _unescaped(text: str) -> str:
    """Spaces and the like are octal in mountinfo (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _words(path: str) -> set[str]:
    return {*_read(path).split()}


def _read(path: str) -> str:
    """A file's text; "" when it isn't there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return os.fsdecode(b"".join(parts))
    except OSError:
        return ""
    finally:
        os.close(fd)


def _write(path: str, data: bytes, directory: int | None = None, *, shown: str = "") -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    except OSError as failure:
        raise KernelError("write", failure.errno or 0, shown or path) from None
