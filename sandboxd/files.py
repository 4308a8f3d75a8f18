"""Files that must be private and survive a power cut: one way to open and replace them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from sandboxd.errors import Denied

__all__ = ["fsync_directory", "open_private", "read_all", "replace_file", "write_all"]


def open_private(path: Path, flags: int, what: str) -> int:
    """A descriptor of a regular file that only its owner can touch: mode 0400 or 0600.

    The checks look at the opened file, so nothing can be swapped in between. Raises
    :class:`Denied` when it is a symbolic link, not a regular file, open to others or owned by
    neither root nor this process's user, and OSError when open(2) fails. ``what`` names the file
    in the message. A file that O_CREAT makes gets mode 0600.
    """
    # O_NONBLOCK: a FIFO in its place must not hang the daemon. It means nothing to regular files.
    always = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags | always, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            reason, hint = "is a symbolic link", "name the file itself"
        elif error.errno in (errno.ENXIO, errno.EISDIR):  # a socket or FIFO; a directory
            reason, hint = "is not a regular file", "put a regular file there"
        else:
            raise
    else:
        reason, hint = _unsafe(os.fstat(fd), path)
        if not reason:
            return fd
        os.close(fd)
    raise Denied(f"{what} {path} {reason}", hint=hint)


def read_all(fd: int, limit: int) -> bytes:
    """Everything from the start, or the first ``limit`` bytes."""
    parts = []
    offset = 0
    while offset < limit and (part := os.pread(fd, min(limit - offset, 1 << 20), offset)):
        parts.append(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """All of ``data``, however many write(2) it takes. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put ``data`` at ``path`` whole or not at all, durable when it returns. Raises OSError."""
    new = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()  # left by a crash
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(fd, mode)  # whatever the umask is
        write_all(fd, data)
        os.fsync(fd)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make names created, renamed or removed in it durable (fsync(2), NOTES)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unsafe(info: os.stat_result, path: Path) -> tuple[str, str]:
    """Why the file can't be trusted and what to do about it; two empty texts if it can."""
    mode = stat.S_IMODE(info.st_mode)
    if stat.S_ISLNK(info.st_mode):  # as O_PATH opens it
        return "is a symbolic link", "name the file itself"
    if not stat.S_ISREG(info.st_mode):
        return "is not a regular file", "put a regular file there"
    if info.st_uid not in (0, os.geteuid()):
        return (
            f"belongs to user {info.st_uid}, neither root nor the reader",
            f"chown it: chown {os.geteuid()} {path}",
        )
    if mode not in (0o400, 0o600):
        return f"has mode {mode:04o}, not 0400 or 0600", f"chmod it: chmod 0600 {path}"
    return "", ""
