"""Land what an agent changed in the workspace, or keep it for later. A program by itself.

It runs in a sandbox of its own that shows it nothing but the workspace at /workspace and the
overlay's upper layer at /changes, as their owner, without a network: what an agent planted can
mislead nobody with more power than that. The request is one JSON object on standard input, the
answer one on standard output. Paths in both are relative to the workspace, as os.fsdecode
spells them. A file lands whole, by rename(2) in its own directory.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import secrets
import stat
import sys
from dataclasses import asdict
from typing import Any

from sandboxd.sessions.overlay import Change, chosen, diff, with_text
from sandboxd.sessions.trees import (
    DIRECTORY,
    FILE,
    MAX_DEPTH,
    OPAQUE,
    ORIGIN,
    WHITEOUT,
    Trees,
    Trouble,
    attribute,
    created,
    identity,
    is_whiteout,
    kind_of,
    lstat,
    move,
    names,
    opened,
    why,
)

__all__ = ["CHANGES", "KEPT", "WORKSPACE", "apply", "keep", "main"]

WORKSPACE, CHANGES, KEPT = "/workspace", "/changes", "/kept"

#: Bytes of the answer's list of changes, and entries of each other list.
MAX_ANSWER = 8 << 20
MAX_TOLD = 1_000

_CHUNK = 1 << 20


def main() -> None:
    """Answer the one request. Exits with 0 whatever the answer says."""
    try:
        answer = _answer(json.load(sys.stdin))
    except Trouble as trouble:
        answer = {"trouble": str(trouble)}
    except OSError as failure:
        answer = {"trouble": why(failure)}
    json.dump(answer, sys.stdout)


def apply(trees: Trees, changes: list[Change], *, force: bool) -> dict[str, Any]:
    """Land ``changes`` in the workspace, one after the other; what could not be is told.

    Nothing is touched when one of them is a conflict, unless ``force``.
    """
    conflicts = [c for c in changes if c.conflict]
    if conflicts and not force:
        return {"conflicts": [{"path": c.path, "why": c.conflict} for c in conflicts[:MAX_TOLD]]}
    done: list[Change] = []
    failed: list[dict[str, str]] = []
    modes: list[tuple[str, int]] = []
    for change in changes:
        try:
            if change.problem:
                raise Trouble(change.problem)
            _land(trees, change, modes)
        except Trouble as trouble:
            failed.append({"path": change.path, "why": str(trouble)})
        except OSError as failure:
            failed.append({"path": change.path, "why": why(failure)})
        else:
            done.append(change)
    for path, mode in reversed(modes):  # last, for a directory may forbid to write in it
        with contextlib.suppress(OSError), opened(trees.lower, path, DIRECTORY) as fd:
            os.fchmod(fd, mode)
    for parent in {posixpath.dirname(c.path) for c in done}:
        with contextlib.suppress(OSError), opened(trees.lower, parent, DIRECTORY) as fd:
            os.fsync(fd)
    return {
        "conflicts": [],
        "applied": [c.path for c in done[:MAX_TOLD]],
        "failed": failed[:MAX_TOLD],
        **{kind: sum(c.change == kind for c in done) for kind in ("added", "changed", "deleted")},
    }


def keep(source: int, target: int, depth: int = 0) -> int:
    """Copy the upper layer in ``source`` into the empty directory ``target``, marks included.

    Deletions become what overlayfs knows as whiteouts by attribute, which need no device node.
    Returns how many entries were left out, because they are too deep or nothing that could land.
    """
    left_out = 0
    _copy_attribute(source, target, OPAQUE)
    for name in names(source):
        found = os.lstat(name, dir_fd=source)
        kind, mode = kind_of(found), found.st_mode & 0o777
        if is_whiteout(source, name, found):
            with created(target, name, 0o600) as fd:
                os.setxattr(fd, WHITEOUT, b"y")
        elif kind == "symlink":
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif kind == "special" or (kind == "directory" and depth >= MAX_DEPTH):
            left_out += 1
        else:
            if found.st_mode & 0o700 != 0o700:
                os.chmod(name, mode | 0o700, dir_fd=source)  # no agent runs: nobody swaps it
            if kind == "directory":
                os.mkdir(name, 0o700, dir_fd=target)
                with (
                    opened(source, name, DIRECTORY) as old,
                    opened(target, name, DIRECTORY) as new,
                ):
                    left_out += keep(old, new, depth + 1)
                    os.fchmod(new, mode)
            else:
                with opened(source, name, FILE) as old, created(target, name, 0o600) as new:
                    _copy(old, new)
                    _copy_attribute(old, new, ORIGIN)
                    os.fchmod(new, mode)
    os.fsync(target)
    return left_out


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if request["op"] == "keep":
        with Trees(CHANGES, KEPT) as trees:
            return {"left_out": keep(trees.upper, trees.lower)}
    with Trees(CHANGES, WORKSPACE) as trees:
        every = diff(trees, request["since"])
        changes = chosen(every, request["paths"])
        if request["op"] == "apply":
            done = apply(trees, changes, force=request["force"])
            if not done["conflicts"]:
                done["remaining"] = len(diff(trees, request["since"]))
            return done
        told, size = [], 0
        for change in with_text(trees, changes) if request["text"] else changes:
            row = {k: v for k, v in asdict(change).items() if v not in (None, "") and k != "seen"}
            size += len(json.dumps(row))
            if size > MAX_ANSWER:
                break
            told.append(row)
        return {"changes": told, "total": len(changes)}


def _land(trees: Trees, change: Change, modes: list[tuple[str, int]]) -> None:
    """Do one change. What stands in its place must still be what was compared."""
    parent, name = posixpath.split(change.path)
    with opened(trees.lower, parent, DIRECTORY) as at:
        if change.change == "deleted":
            if change.old_kind == "directory":
                os.rmdir(name, dir_fd=at)
            else:
                _check(at, name, change)
                os.unlink(name, dir_fd=at)
        elif change.kind == "directory":
            if change.change == "added":
                os.mkdir(name, 0o700, dir_fd=at)
            modes.append((change.path, change.mode or 0))
        else:
            _replace(trees, at, parent, name, change)


def _replace(trees: Trees, at: int, parent: str, name: str, change: Change) -> None:
    """Make the new file or link under a name that nobody expects, then move it into place."""
    fresh = f".sandboxd-{secrets.token_hex(8)}"
    try:
        with opened(trees.upper, parent, DIRECTORY) as source:
            if change.kind == "symlink":
                os.symlink(os.readlink(name, dir_fd=source), fresh, dir_fd=at)
            else:
                with opened(source, name, FILE) as old, created(at, fresh, 0o600) as new:
                    if not stat.S_ISREG(os.fstat(old).st_mode):
                        raise Trouble("no longer a file")
                    _copy(old, new)
                    os.fchmod(new, change.mode or 0)
                    os.fsync(new)
        _check(at, name, change)
        move(at, fresh, name, over=change.seen is not None)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh, dir_fd=at)
        raise


def _check(at: int, name: str, change: Change) -> None:
    if identity(lstat(at, name)) != change.seen:
        raise Trouble("changed in the workspace while this was under way")


def _copy(old: int, new: int) -> None:
    """The content, with its holes: a file of one byte may claim to have a terabyte."""
    size = os.fstat(old).st_size
    at = 0
    while at < size:
        try:
            at = os.lseek(old, at, os.SEEK_DATA)
        except OSError as failure:
            if failure.errno == errno.ENXIO:  # nothing but a hole is left
                break
            raise
        end = min(os.lseek(old, at, os.SEEK_HOLE), size)
        while at < end:
            data = os.pread(old, min(_CHUNK, end - at), at)
            if not data:
                break
            view = memoryview(data)
            while view:
                written = os.pwrite(new, view, at)
                view, at = view[written:], at + written
        else:
            continue
        break
    os.ftruncate(new, size)


def _copy_attribute(old: int, new: int, name: str) -> None:
    value = attribute(old, name)
    if value is not None:
        os.setxattr(new, name, value)
