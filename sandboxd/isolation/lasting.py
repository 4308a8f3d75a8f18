"""What a sandbox needs that serves one launch after another: files to fill, traces to clear.

A launch can leave something in few places, for it runs as an ordinary user without a capability in
a root that is read-only: its private memory, the IPC namespace, the keyrings, and what a process
may change of another one of its user. The first two are emptied here and looked at again: memory
by what the file system counts, queues and segments by what the kernel lists.
:mod:`sandboxd.isolation.spawn` sees to the rest.

Runs with no privilege, as the sandbox's user, when no process of the launch is left. Standard
library only.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import functools
import os
import stat
from collections.abc import Callable
from typing import Any, NamedTuple

from sandboxd.isolation import kernel
from sandboxd.isolation.root import READONLY, Root, mount_point, private_places

__all__ = ["LastingRoot", "Traces"]

#: More entries than this are not worth clearing away: a new sandbox is.
_MOST = 4096
_DEEPEST = 32

_DELIVERED = "run"
_GETFLAGS = 0x80086601  # FS_IOC_GETFLAGS (ioctl_iflags(2)), on 64 bits
_IPC_RMID = 0

_libc: Any = ctypes.CDLL(None, use_errno=True)


class LastingRoot(Root):
    """A root whose files are filled anew for each launch, by :attr:`files`, open for writing.

    :attr:`queues` is a directory of the POSIX message queues, or -1 on a kernel without.
    """

    files: tuple[int, ...] = ()
    queues = -1

    def deliver(self) -> None:
        if _has_queues():
            attributes = READONLY & ~kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOEXEC
            tree = kernel.mount_filesystem("mqueue", attributes)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self.queues = os.open(".", flags, dir_fd=tree)
            os.close(tree)
        if not self.spec.files:
            return
        tree = kernel.mount_filesystem(
            "tmpfs",
            READONLY & ~kernel.MOUNT_ATTR_RDONLY,
            mode="0755",
            size=str(32 << 20),
            nr_inodes="4096",
        )
        self.files = tuple(self._empty(tree, file.path, file.mode) for file in self.spec.files)
        # Shown by another mount of the same: one that is written by can't become read-only.
        self.place_own(_DELIVERED, tree, close=False)
        shown = kernel.clone_tree(self.fd, _DELIVERED, recursive=False)
        kernel.set_mount_attributes(shown, READONLY, recursive=False)
        kernel.umount_detached(f"{mount_point()}/{_DELIVERED}")
        self.place_own(_DELIVERED, shown)
        os.close(tree)

    def _empty(self, tree: int, path: str, mode: int) -> int:
        _, *parents, name = path.strip("/").split("/")
        at = os.dup(tree)
        for parent in parents:
            with contextlib.suppress(FileExistsError):
                os.mkdir(parent, 0o755, dir_fd=at)
            below = os.open(parent, os.O_PATH | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(name, flags, mode, dir_fd=at)
        os.close(at)
        os.fchmod(fd, mode)
        os.fchown(fd, self.uid, self.gid)
        return fd


class Traces:
    """Made before the first launch; :meth:`clear` after each brings back what was there then."""

    def __init__(self, root: LastingRoot) -> None:
        self._queues = root.queues
        self._files = root.files
        self._memory = [_Memory(path) for path, _ in private_places(root.spec)]
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self._terminals = os.open("/dev/pts", flags)
        self._names = os.listdir(self._terminals)

    @property
    def fds(self) -> list[int]:
        held = [self._terminals, *self._files, *(memory.fd for memory in self._memory)]
        return held + ([self._queues] if self._queues >= 0 else [])

    def clear(self) -> bool:
        """Whether nothing is left; else this sandbox must not be used again."""
        try:
            for fd in self._files:
                os.ftruncate(fd, 0)
            return (
                all(memory.clear() for memory in self._memory)
                and os.listdir(self._terminals) == self._names
                and _clear_system_v()
                and (self._queues < 0 or _clear_queues(self._queues))
            )
        except OSError:
            return False


class _Memory:
    """One place of private memory, as it was at first: empty, but for what is mounted below."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._device = os.fstat(self.fd).st_dev
        self._kept = self._look(self.fd)
        os.utime(self.fd, ns=(0, 0))
        self._facts = self._of(self.fd)
        self._free = _free(self.fd)

    def clear(self) -> bool:
        # What was moved within it takes no room: where something was there first, that is compared.
        if _free(self.fd) != self._free or (self._kept and self._look(self.fd) != self._kept):
            budget = [_MOST]
            self._clear(self.fd, self._kept, budget, _DEEPEST)
            if _free(self.fd) != self._free or self._look(self.fd) != self._kept:
                return False
        os.utime(self.fd, ns=(0, 0))
        return self._of(self.fd) == self._facts

    def _of(self, fd: int) -> tuple[object, ...]:
        """What an owner may change of a directory."""
        now = os.fstat(fd)
        flags = array.array("l", [0])
        with contextlib.suppress(OSError):  # tmpfs has none before Linux 6.6
            fcntl.ioctl(fd, _GETFLAGS, flags)
        return now.st_mode, now.st_uid, now.st_gid, now.st_size, os.listxattr(fd), flags[0]

    def _look(self, directory: int) -> dict[str, Any]:
        """The tree below, down to where other file systems are mounted."""
        found: dict[str, Any] = {}
        for name in os.listdir(directory):
            there = os.stat(name, dir_fd=directory, follow_symlinks=False)
            facts = there.st_dev, there.st_ino, there.st_mode
            below = None
            if there.st_dev == self._device and stat.S_ISDIR(there.st_mode):
                fd = _open(name, directory)
                below = self._look(fd), self._of(fd)
                os.close(fd)
            found[name] = facts, below
        return found

    def _clear(self, directory: int, kept: dict[str, Any], budget: list[int], depth: int) -> None:
        """Remove all but ``kept``. OSError for what resists, or is too much."""
        for name in os.listdir(directory):
            budget[0] -= 1
            if budget[0] < 0 or depth < 0:
                raise OSError
            _, below = kept.get(name, (None, None))
            if below is not None:
                fd = _open(name, directory)
                try:
                    self._clear(fd, below[0], budget, depth - 1)
                finally:
                    os.close(fd)
            elif name not in kept:
                self._remove(name, directory, budget, depth)

    def _remove(self, name: str, directory: int, budget: list[int], depth: int) -> None:
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            try:
                os.rmdir(name, dir_fd=directory)
            except OSError:  # not empty
                # A directory still, and no link: nobody is left who could turn it.
                os.chmod(name, 0o700, dir_fd=directory)
                fd = _open(name, directory)
                try:
                    self._clear(fd, {}, budget, depth - 1)
                finally:
                    os.close(fd)
                os.rmdir(name, dir_fd=directory)


def _open(name: str, directory: int) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=directory)


def _free(fd: int) -> tuple[int, int]:
    """Free blocks and inodes: the kernel's own count of what a file system holds."""
    now = os.fstatvfs(fd)
    return now.f_bfree, now.f_ffree


class _Kind(NamedTuple):
    """How one kind of System V object is listed: by a control call, told what it shall do."""

    control: Callable[[int, int], int]
    stat_any: int
    info: int
    #: Where, in the answer to ``info``, the kernel tells how many there are (int number).
    used: int


_answer = ctypes.create_string_buffer(512)
_numbers = ctypes.cast(_answer, ctypes.POINTER(ctypes.c_int))
#: struct shm_info, used_ids; struct seminfo, semusz; struct msginfo, msgpool.
_SYSTEM_V = (
    _Kind(lambda at, what: int(_libc.shmctl(at, what, _answer)), 15, 14, 0),
    _Kind(lambda at, what: int(_libc.semctl(at, 0, what, _answer)), 20, 19, 7),
    _Kind(lambda at, what: int(_libc.msgctl(at, what, _answer)), 13, 12, 0),
)


def _clear_system_v() -> bool:
    """Remove what shmget(2), semget(2) and msgget(2) made; whether none is left."""
    for kind in _SYSTEM_V:
        highest = kind.control(0, kind.info)
        if highest < 0 or not _numbers[kind.used]:
            continue  # a kernel without them, or none
        for index in range(highest + 1):
            found = kind.control(index, kind.stat_any)
            if found >= 0:
                kind.control(found, _IPC_RMID)
        if kind.control(0, kind.info) >= 0 and _numbers[kind.used]:
            return False
    return True


def _clear_queues(directory: int) -> bool:
    """Remove the POSIX message queues; whether none is left."""
    for name in os.listdir(directory):
        _libc.mq_unlink(b"/" + os.fsencode(name))
    return not os.listdir(directory)


@functools.cache
def _has_queues() -> bool:
    with open("/proc/filesystems") as known:
        return any(line.split()[-1] == "mqueue" for line in known)
