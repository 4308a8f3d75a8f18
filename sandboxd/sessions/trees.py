"""Directories that an agent could write to, read and changed without being led astray.

Everything is opened below an open directory by openat2(2), beneath it and without following any
link or leaving its file system, so that swapping a directory for a link in mid-work gains
nothing. Standard library only: it runs in a sandbox, see :mod:`sandboxd.sessions.landing`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import stat
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the import would take longer than most work that is done here
    from pathlib import Path

__all__ = [
    "DIRECTORY",
    "FILE",
    "MAX_DEPTH",
    "OPAQUE",
    "ORIGIN",
    "WHITEOUT",
    "Kind",
    "Trees",
    "Trouble",
    "attribute",
    "created",
    "identity",
    "is_empty",
    "is_whiteout",
    "kind_of",
    "lstat",
    "move",
    "names",
    "opened",
    "remove",
    "why",
]

#: Directories within directories; deeper ones are nothing that anybody reviews.
MAX_DEPTH = 100

#: overlayfs's own marks: of a directory that hides the lower one, of an entry that is gone (the
#: form without a device node), and of a file that was copied up from the lower layer.
OPAQUE, WHITEOUT, ORIGIN = "user.overlay.opaque", "user.overlay.whiteout", "user.overlay.origin"

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

_SYS_OPENAT2 = 437
_RESOLVE = 0x01 | 0x02 | 0x04 | 0x08  # NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH
_RENAME_NOREPLACE = 1
_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Kind = Literal["file", "directory", "symlink", "special", ""]


class Trouble(Exception):
    """Why nothing was done, for people."""


class Trees:
    """Two open directories: ``upper`` with the changes, ``lower`` as it is now."""

    def __init__(self, upper: str, lower: str) -> None:
        self.upper = os.open(upper, DIRECTORY | os.O_CLOEXEC)
        self.lower = os.open(lower, DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Trees:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.upper)
        os.close(self.lower)


@contextlib.contextmanager
def opened(at: int, path: str, flags: int, mode: int = 0) -> Iterator[int]:
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, _RESOLVE)
    fd = _libc.syscall(_SYS_OPENAT2, at, os.fsencode(path or "."), how, len(how))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        yield fd
    finally:
        os.close(fd)


def created(at: int, name: str, mode: int) -> contextlib.AbstractContextManager[int]:
    return opened(at, name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)


def names(fd: int) -> list[str]:
    """What an open directory holds, in order."""
    return sorted(os.listdir(fd))


def move(at: int, fresh: str, name: str, *, over: bool, to: int | None = None) -> None:
    """rename(2) from ``at`` to ``to``, or within ``at``; only ``over`` replaces what is there."""
    target = at if to is None else to
    if over:
        os.rename(fresh, name, src_dir_fd=at, dst_dir_fd=target)
        return
    old, new = os.fsencode(fresh), os.fsencode(name)
    if _libc.renameat2(at, old, target, new, _RENAME_NOREPLACE) < 0:
        code = ctypes.get_errno()
        if code != errno.EINVAL:  # a file system that can't: the check was a moment ago
            raise OSError(code, os.strerror(code))
        os.rename(fresh, name, src_dir_fd=at, dst_dir_fd=target)


def lstat(at: int | None, name: str) -> os.stat_result | None:
    if at is None:
        return None
    try:
        return os.lstat(name, dir_fd=at)
    except FileNotFoundError:
        return None


def is_whiteout(at: int, name: str, found: os.stat_result) -> bool:
    if stat.S_ISCHR(found.st_mode):
        return found.st_rdev == 0
    if not stat.S_ISREG(found.st_mode) or found.st_size:
        return False
    with contextlib.suppress(OSError), opened(at, name, FILE) as fd:
        return attribute(fd, WHITEOUT) is not None
    return False


def attribute(fd: int, name: str) -> bytes | None:
    try:
        return os.getxattr(fd, name)
    except OSError:
        return None


def identity(found: os.stat_result | None) -> tuple[int, ...] | None:
    if found is None:
        return None
    return (found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_ctime_ns)


def kind_of(found: os.stat_result | None) -> Kind:
    if found is None:
        return ""
    if stat.S_ISREG(found.st_mode):
        return "file"
    if stat.S_ISDIR(found.st_mode):
        return "directory"
    return "symlink" if stat.S_ISLNK(found.st_mode) else "special"


def why(failure: OSError) -> str:
    """A failed system call, for people. No path: the caller tells it."""
    if failure.errno == errno.EOVERFLOW:  # an id that the id-mapped mount does not map
        return "what is there belongs to another user than the workspace"
    return os.strerror(failure.errno or 0).lower()


def is_empty(path: Path) -> bool:
    """Whether a directory holds nothing."""
    fd = os.open(path, DIRECTORY | os.O_CLOEXEC)
    try:
        return not names(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a directory that no agent can reach any more, however deep and whatever its modes.

    Each directory found is first moved to the top, so that neither the depth of the tree nor the
    length of a path counts. An absent one is fine. Raises OSError.
    """
    try:
        top = os.open(path, DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        waiting: list[str] = []
        prefix = f"{os.urandom(8).hex()}-"
        numbers = itertools.count()

        def clear(fd: int) -> None:
            for name in names(fd):
                if not stat.S_ISDIR(os.lstat(name, dir_fd=fd).st_mode):
                    os.unlink(name, dir_fd=fd)
                    continue
                os.chmod(name, 0o700, dir_fd=fd)
                waiting.append(prefix + str(next(numbers)))
                os.rename(name, waiting[-1], src_dir_fd=fd, dst_dir_fd=top)

        clear(top)
        while waiting:
            name = waiting.pop()
            with opened(top, name, DIRECTORY) as fd:
                clear(fd)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    path.rmdir()
