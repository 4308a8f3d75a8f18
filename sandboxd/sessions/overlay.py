"""What differs between a session's upper layer and the workspace below it, and line by line.

Standard library only: it runs in a sandbox, see :mod:`sandboxd.sessions.landing`.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import posixpath
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from sandboxd.sessions.trees import (
    DIRECTORY,
    FILE,
    MAX_DEPTH,
    OPAQUE,
    ORIGIN,
    Kind,
    Trees,
    Trouble,
    attribute,
    identity,
    is_whiteout,
    kind_of,
    lstat,
    names,
    opened,
    why,
)

__all__ = ["Change", "chosen", "diff", "with_text"]

#: More changes than this are nothing that anybody reviews.
MAX_CHANGES = 100_000
#: Files up to this size, and so many lines of both sides, are compared line by line.
MAX_TEXT = 256 << 10
MAX_LINES = 4_000
#: Seconds that comparing lines may take altogether.
TEXT_SECONDS = 10.0

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Change:
    """One path that differs. ``old_*`` is the workspace's side; empty where it has nothing.

    ``conflict``: the workspace changed there after the session began. ``problem``: why it can't
    be applied. ``text``: a unified diff; ``binary`` or ``omitted`` say why there is none.
    """

    path: str
    change: Literal["added", "changed", "deleted"]
    kind: Kind = ""
    old_kind: Kind = ""
    mode: int | None = None
    old_mode: int | None = None
    size: int | None = None
    old_size: int | None = None
    target: str | None = None
    old_target: str | None = None
    conflict: str = ""
    problem: str = ""
    note: str = ""
    binary: bool = False
    omitted: str = ""
    text: str | None = None
    #: What the workspace's entry was when it was looked at: it must still be that to be replaced.
    seen: tuple[int, ...] | None = None


def diff(trees: Trees, since: int) -> list[Change]:
    """Every difference, parents before children, but what is deleted children first.

    ``since`` is the time of the session's start in nanoseconds: a workspace entry whose inode
    changed later is a conflict. Raises Trouble when there are more than can be listed.
    """
    return _bounded(_walk(trees.upper, trees.lower, "", since, 0))


def chosen(changes: list[Change], paths: Iterable[str]) -> list[Change]:
    """Those at or below ``paths``, and the directories they need. All of them for no path.

    Raises Trouble for a path where nothing changed.
    """
    wanted = [path.strip("/") for path in paths]
    if not wanted:
        return changes
    added = {c.path for c in changes if c.change == "added"}
    hit: set[str] = set()
    for path in wanted:
        below = {c.path for c in changes if c.path == path or c.path.startswith(path + "/")}
        if not below:
            raise Trouble(f"nothing changed at {path}")
        hit |= below
    needed = {parent for path in hit for parent in _parents(path)}
    # Where a directory took a file's place, that includes the file's removal.
    return [c for c in changes if c.path in hit or (c.path in needed and c.path in added)]


def with_text(trees: Trees, changes: list[Change]) -> Iterator[Change]:
    """The same changes with line by line differences, as far as bounds of size and time allow."""
    signal.signal(signal.SIGALRM, _out_of_time)
    left = TEXT_SECONDS
    for change in changes:
        if "file" not in (change.kind, change.old_kind) or change.problem:
            yield change
            continue
        given, left = left, 0.0
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, max(given, 0.001))
                done = _with_text(trees, change)
            finally:
                left = signal.setitimer(signal.ITIMER_REAL, 0)[0]
        except _OutOfTime:
            done = replace(change, omitted="comparing the lines would take too long")
        except OSError as failure:
            done = replace(change, omitted=why(failure))
        yield done


def _walk(upper: int, lower: int | None, prefix: str, since: int, depth: int) -> Iterator[Change]:
    here = names(upper)
    for name in here:
        found = os.lstat(name, dir_fd=upper)
        old = lstat(lower, name)
        yield from _entry(upper, lower, name, prefix + name, found, old, since, depth)
    if lower is not None and attribute(upper, OPAQUE) == b"y":
        for name in sorted(set(names(lower)).difference(here)):
            yield from _deleted(lower, name, prefix + name, since, depth)


def _entry(
    upper: int,
    lower: int | None,
    name: str,
    path: str,
    found: os.stat_result,
    old: os.stat_result | None,
    since: int,
    depth: int,
) -> Iterator[Change]:
    if is_whiteout(upper, name, found):
        if old is not None and lower is not None:
            yield from _deleted(lower, name, path, since, depth)
        return
    kind, old_kind = kind_of(found), kind_of(old)
    if old is not None and lower is not None and (kind == "directory") != (old_kind == "directory"):
        yield from _deleted(lower, name, path, since, depth)  # first, to make place
        old, old_kind = None, ""
    change = Change(
        path,
        "added" if old is None else "changed",
        kind,
        old_kind,
        mode=found.st_mode & 0o777,
        old_mode=None if old is None else old.st_mode & 0o777,
        size=found.st_size if kind == "file" else None,
        old_size=old.st_size if old is not None and old_kind == "file" else None,
        conflict=_conflict(lower, old, since, upper, name, kind),
        note="setuid, setgid and sticky bits don't land" if found.st_mode & 0o7000 else "",
        seen=identity(old),
    )
    if kind == "directory":
        yield from _directory(upper, lower, name, path, change, since, depth)
    elif kind == "special":
        yield replace(change, problem="neither a file, a directory nor a link")
    elif kind == "symlink":
        target = os.readlink(name, dir_fd=upper)
        old_target = os.readlink(name, dir_fd=lower) if old_kind == "symlink" else None
        if target != old_target:
            note = "leads out of the workspace" if _leads_out(path, target) else ""
            yield replace(change, target=target, old_target=old_target, note=note)
    else:
        try:
            same_mode = old_kind == "file" and change.mode == change.old_mode
            if same_mode and lower is not None and _same_content(upper, lower, name):
                return
        except OSError as failure:
            change = replace(change, problem=why(failure))
        yield change


def _directory(
    upper: int, lower: int | None, name: str, path: str, change: Change, since: int, depth: int
) -> Iterator[Change]:
    if depth >= MAX_DEPTH:
        yield replace(change, problem=f"more than {MAX_DEPTH} directories deep")
        return
    if change.change == "added":
        yield change
    elif change.mode != change.old_mode:  # what is in it may well have changed: no conflict
        yield replace(change, conflict="")
    try:
        with contextlib.ExitStack() as held:
            inner = held.enter_context(opened(upper, name, DIRECTORY))
            below = None
            if change.old_kind == "directory" and lower is not None:
                below = held.enter_context(opened(lower, name, DIRECTORY))
            yield from _walk(inner, below, path + "/", since, depth + 1)
    except OSError as failure:
        yield replace(change, problem=why(failure))


def _deleted(lower: int, name: str, path: str, since: int, depth: int) -> Iterator[Change]:
    """An entry of the workspace that is no more, after everything below it."""
    old = lstat(lower, name)
    if old is None:
        return
    kind = kind_of(old)
    change = Change(
        path,
        "deleted",
        old_kind=kind,
        old_mode=old.st_mode & 0o777,
        old_size=old.st_size if kind == "file" else None,
        old_target=os.readlink(name, dir_fd=lower) if kind == "symlink" else None,
        # A directory's own time says nothing more than its entries do: rmdir(2) wants it empty.
        conflict=_late(old, since) if kind != "directory" else "",
        seen=identity(old) if kind != "directory" else None,
    )
    if kind == "directory":
        try:
            if depth >= MAX_DEPTH:
                raise OSError(errno.ELOOP, "more directories deep than can be reviewed")
            with opened(lower, name, DIRECTORY) as inner:
                for entry in names(inner):
                    yield from _deleted(inner, entry, f"{path}/{entry}", since, depth + 1)
        except OSError as failure:
            change = replace(change, problem=why(failure))
    yield change


def _conflict(
    lower: int | None, old: os.stat_result | None, since: int, upper: int, name: str, kind: Kind
) -> str:
    if old is not None:
        return _late(old, since)
    if lower is None or kind != "file" or os.fstat(lower).st_ctime_ns <= since:
        return ""
    # overlayfs marks what it copied from the workspace, and the directory has lost or got names.
    with contextlib.suppress(OSError), opened(upper, name, FILE) as fd:
        if attribute(fd, ORIGIN) is not None:
            return "may have been removed from the workspace since the session began"
    return ""


def _late(old: os.stat_result, since: int) -> str:
    if old.st_ctime_ns > since:  # which nobody can set, unlike the time of modification
        return "changed in the workspace since the session began"
    return ""


def _same_content(upper: int, lower: int, name: str) -> bool:
    with opened(upper, name, FILE) as new, opened(lower, name, FILE) as old:
        if os.fstat(new).st_size != os.fstat(old).st_size:
            return False
        while True:
            one, other = os.read(new, _CHUNK), os.read(old, _CHUNK)
            if one != other:
                return False
            if not one:
                return True


def _with_text(trees: Trees, change: Change) -> Change:
    if max(change.size or 0, change.old_size or 0) > MAX_TEXT:
        return replace(change, omitted="too large to show")
    new = _read(trees.upper, change.path) if change.kind == "file" else b""
    old = _read(trees.lower, change.path) if change.old_kind == "file" else b""
    try:
        sides = [side.decode() for side in (old, new)]
    except UnicodeDecodeError:
        return replace(change, binary=True)
    if "\0" in sides[0] or "\0" in sides[1]:
        return replace(change, binary=True)
    before, after = map(_lines, sides)
    if len(before) + len(after) > MAX_LINES and before and after:
        return replace(change, omitted="too many lines to compare")
    a = f"a/{change.path}" if change.old_kind else "/dev/null"
    b = f"b/{change.path}" if change.kind else "/dev/null"
    text = []
    for line in difflib.unified_diff(before, after, a, b):
        text.append(line if line.endswith("\n") else line + "\n\\ no newline at the end\n")
    return replace(change, text="".join(text))


def _lines(text: str) -> list[str]:
    """At newlines only: splitlines() knows ten more ends of a line, which no reviewer sees."""
    *lines, last = text.split("\n")
    return [f"{line}\n" for line in lines] + ([last] if last else [])


def _read(root: int, path: str) -> bytes:
    with opened(root, path, FILE) as fd:
        data = b""
        while len(data) <= MAX_TEXT and (chunk := os.read(fd, MAX_TEXT)):
            data += chunk
        return data


def _leads_out(path: str, target: str) -> bool:
    if target.startswith("/"):
        return True
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target)).split("/")[0] == ".."


def _parents(path: str) -> Iterator[str]:
    while path := posixpath.dirname(path):
        yield path


def _bounded(changes: Iterator[Change]) -> list[Change]:
    out: list[Change] = []
    for change in changes:
        out.append(change)
        if len(out) > MAX_CHANGES:
            raise Trouble(f"more than {MAX_CHANGES:,} changes, which nobody can review")
    return out


class _OutOfTime(BaseException):
    pass


def _out_of_time(*_: object) -> None:
    raise _OutOfTime
