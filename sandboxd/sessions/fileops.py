"""Read and change files of a workspace that its agent may be turning over meanwhile.

A program by itself: it runs in a sandbox of its own that shows it nothing but the workspace, as
the workspace's owner (see :mod:`sandboxd.sessions.helper`). On top of that every path is resolved
by openat2(2) beneath the workspace's root, through no link at all and into no other file system.
A file is replaced whole, by rename(2) in its own directory. Paths are relative to the workspace.

Standard library only.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import itertools
import json
import os
import posixpath
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any

from sandboxd.sessions.trees import (
    FILE,
    MAX_DEPTH,
    created,
    kind_of,
    lstat,
    move,
    opened,
    why,
)

__all__ = ["MAX_ENTRIES", "MAX_REMOVED", "WORKSPACE", "main", "perform"]

WORKSPACE = "/workspace"

#: Without O_NOFOLLOW: openat2(2) refuses a link, and says so (ELOOP rather than ENOTDIR).
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY

#: Entries of one listing, and bytes of their paths.
MAX_ENTRIES = 10_000
_MAX_NAMES = 2 << 20
#: Entries that one recursive removal takes away.
MAX_REMOVED = 100_000

#: errno to the code of an error; what isn't here is a conflict with what the workspace holds.
_CODES = {
    errno.ENOENT: "not_found",
    errno.ELOOP: "denied",
    errno.EXDEV: "denied",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.EROFS: "denied",
    errno.EOVERFLOW: "denied",
    errno.ENAMETOOLONG: "invalid",
    errno.EINVAL: "invalid",
}
_WORDS = {
    errno.ELOOP: "is a symbolic link, or its path leads through one",
    errno.EXDEV: "is on another file system",
    errno.ENOENT: "does not exist",
    errno.ENOTDIR: "is no directory, or a part of its path is none",
    errno.EISDIR: "is a directory",
    errno.EEXIST: "exists already",
    errno.ENOTEMPTY: "is a directory that is not empty",
    errno.ENOSPC: "does not fit: no space is left",
    errno.EDQUOT: "does not fit: no space is left",
    errno.EACCES: "can't be reached or changed: its mode forbids it",
    errno.EPERM: "can't be changed: its file system forbids it",
    errno.EROFS: "can't be changed: the workspace is read-only",
}


class _Refused(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def main() -> None:
    """Answer the one request. Exits with 0 whatever the answer says."""
    signal.signal(signal.SIGTERM, _leave)
    request = json.load(sys.stdin)
    root = os.open(WORKSPACE, DIRECTORY | os.O_CLOEXEC)
    json.dump(perform(root, request), sys.stdout)


def _leave(*_: object) -> None:
    sys.exit(1)


def perform(root: int, request: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked below the open directory ``root``; a refusal has ``code`` and ``why``."""
    operation = _OPERATIONS[request["op"]]
    try:
        return operation(root, request)
    except _Refused as refused:
        return _refusal(request, refused.code, str(refused))
    except OSError as failure:
        number = failure.errno or 0
        words = _WORDS.get(number) or f"can't be used: {why(failure)}"
        return _refusal(request, _CODES.get(number, "conflict"), words)


def _refusal(request: dict[str, Any], code: str, words: str) -> dict[str, Any]:
    return {"code": code, "why": words, "path": request["path"], "done": request.get("done", 0)}


def _read(root: int, request: dict[str, Any]) -> dict[str, Any]:
    limit = request["limit"]
    with opened(root, request["path"], FILE) as fd:
        found = os.fstat(fd)
        _want_file(found)
        data = b""
        while len(data) <= limit and (chunk := os.pread(fd, limit + 1 - len(data), len(data))):
            data += chunk
    if len(data) > limit:
        raise _Refused("invalid", f"is larger than {limit:,} bytes")
    content = binascii.b2a_base64(data, newline=False).decode("ascii")
    return {"content": content, **_entry(request["path"], found, None)}


def _write(root: int, request: dict[str, Any]) -> dict[str, Any]:
    for done, file in enumerate(request["files"]):
        request |= {"path": file["path"], "done": done}
        _write_one(root, file["path"], binascii.a2b_base64(file["content"]), file["mode"])
    return {"written": len(request["files"])}


def _write_one(root: int, path: str, data: bytes, mode: int | None) -> None:
    with _parent(root, path, make=True) as (at, name):
        old = lstat(at, name)
        if old is not None:
            _want_file(old)
            mode = old.st_mode & 0o777 if mode is None else mode
        fresh = f".sandboxd-{os.urandom(8).hex()}"
        try:
            with created(at, fresh, 0o600) as fd:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fchmod(fd, 0o644 if mode is None else mode)
                os.fsync(fd)
            # A link that took the name meanwhile is replaced, not followed.
            move(at, fresh, name, over=True)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(fresh, dir_fd=at)
            raise


def _remove(root: int, request: dict[str, Any]) -> dict[str, Any]:
    with _parent(root, request["path"]) as (at, name):
        if not stat.S_ISDIR(os.lstat(name, dir_fd=at).st_mode):
            os.unlink(name, dir_fd=at)
            return {"removed": 1}
        budget = [MAX_REMOVED]
        if request["recursive"]:
            with opened(at, name, DIRECTORY) as fd:
                _empty(fd, budget, 0)
        os.rmdir(name, dir_fd=at)
        return {"removed": MAX_REMOVED - budget[0] + 1}


def _empty(fd: int, budget: list[int], depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise _Refused("conflict", f"holds more than {MAX_DEPTH} directories in one another")
    while names := _some_names(fd, 1000):
        for name in names:
            budget[0] -= 1
            if budget[0] < 0:
                raise _Refused(
                    "conflict", f"holds more than {MAX_REMOVED:,} entries; some are gone"
                )
            if stat.S_ISDIR(os.lstat(name, dir_fd=fd).st_mode):
                with opened(fd, name, DIRECTORY) as inner:
                    _empty(inner, budget, depth + 1)
                os.rmdir(name, dir_fd=fd)
            else:
                os.unlink(name, dir_fd=fd)


def _list(root: int, request: dict[str, Any]) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    with opened(root, request["path"], DIRECTORY) as fd:
        whole = _walk(fd, request["path"], request["depth"], entries, [_MAX_NAMES])
    return {"entries": entries, "truncated": not whole}


def _walk(fd: int, path: str, depth: int, entries: list[dict[str, Any]], left: list[int]) -> bool:
    """Whether there was room for all that is below."""
    names = _some_names(fd, MAX_ENTRIES + 1)
    for name in sorted(names):
        found = lstat(fd, name)
        if found is None:
            continue  # gone meanwhile
        below = posixpath.join(path, name)
        left[0] -= len(below) + 1
        if len(entries) >= MAX_ENTRIES or left[0] < 0:
            return False
        entries.append(_entry(below, found, fd))
        if depth > 1 and stat.S_ISDIR(found.st_mode):
            try:
                with opened(fd, name, DIRECTORY) as inner:
                    if not _walk(inner, below, depth - 1, entries, left):
                        return False
            except OSError as failure:  # another one now, or closed to its owner
                entries[-1]["problem"] = why(failure)
    return len(names) <= MAX_ENTRIES


def _info(root: int, request: dict[str, Any]) -> dict[str, Any]:
    if not request["path"]:
        return _entry("", os.fstat(root), None)
    with _parent(root, request["path"]) as (at, name):
        return _entry(request["path"], os.lstat(name, dir_fd=at), at)


def _exists(root: int, request: dict[str, Any]) -> dict[str, Any]:
    try:
        _info(root, request)
    except (FileNotFoundError, NotADirectoryError):
        return {"exists": False}
    return {"exists": True}


def _mkdir(root: int, request: dict[str, Any]) -> dict[str, Any]:
    with _parent(root, request["path"], make=True) as (at, name):
        try:
            os.mkdir(name, 0o755, dir_fd=at)
        except FileExistsError:
            with opened(at, name, DIRECTORY):
                return {"created": False}
    return {"created": True}


def _rename(root: int, request: dict[str, Any]) -> dict[str, Any]:
    with _parent(root, request["path"]) as (at, name):
        os.lstat(name, dir_fd=at)  # what is missing is told by its own name
        request["path"] = request["new"]
        with _parent(root, request["new"]) as (to, new):
            try:
                move(at, name, new, over=request["overwrite"], to=to)
            except OSError as failure:
                if failure.errno == errno.EXDEV:  # overlayfs.rst, "Renaming directories"
                    raise _Refused(
                        "conflict", "can't be taken by a directory that the workspace below holds"
                    ) from None
                raise
    return {}


_OPERATIONS: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
    "read": _read,
    "write": _write,
    "remove": _remove,
    "list": _list,
    "info": _info,
    "exists": _exists,
    "mkdir": _mkdir,
    "rename": _rename,
}


@contextlib.contextmanager
def _parent(root: int, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
    """The open directory that holds ``path``, and the name in it."""
    parent, name = posixpath.split(path)
    if make:
        _make_directories(root, parent)
    with opened(root, parent, DIRECTORY) as at:
        yield at, name


def _make_directories(root: int, path: str) -> None:
    with contextlib.ExitStack() as held:
        at = root
        for name in filter(None, path.split("/")):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=at)
            at = held.enter_context(opened(at, name, DIRECTORY))


def _some_names(fd: int, most: int) -> list[str]:
    """Up to ``most`` names of an open directory, which may hold any number."""
    os.lseek(fd, 0, os.SEEK_SET)
    with os.scandir(fd) as found:
        return [entry.name for entry in itertools.islice(found, most)]


def _want_file(found: os.stat_result) -> None:
    kind = kind_of(found)
    if kind == "symlink":
        raise OSError(errno.ELOOP, "")
    if kind != "file":
        what = "a directory" if kind == "directory" else "neither a file nor a directory"
        raise _Refused("conflict", f"is {what}")


def _entry(path: str, found: os.stat_result, at: int | None) -> dict[str, Any]:
    kind = kind_of(found)
    shown, exact = _text(path)
    entry = {
        "path": shown,
        "name": posixpath.basename(shown),
        "type": kind,
        "size": found.st_size if kind == "file" else 0,
        "mode": found.st_mode & 0o7777,
        "modified": found.st_mtime,
    }
    if kind == "symlink" and at is not None:
        with contextlib.suppress(OSError):
            entry["target"] = _text(os.readlink(posixpath.basename(path), dir_fd=at))[0]
    return entry if exact else {**entry, "problem": "its name is not UTF-8"}


def _text(path: str) -> tuple[str, bool]:
    """A path as text that any client can take, and whether it still says which one it is."""
    try:
        return os.fsencode(path).decode(), True
    except UnicodeDecodeError:
        return os.fsencode(path).decode(errors="replace"), False
