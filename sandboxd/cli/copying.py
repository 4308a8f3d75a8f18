"""``sandboxctl session cp``: files into and out of a live session's workspace."""

from __future__ import annotations

import argparse
import base64
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command
from sandboxd.cli.reading import read_input
from sandboxd.errors import Invalid, NotFound, SandboxdError

__all__ = ["add"]

_REMOTE = re.compile(r"(s-[0-9a-f]*):(.*)", re.DOTALL)

#: What one request takes: files, and bytes of them.
_FILES, _BYTES = 256, 8 << 20
#: Directories within directories that one listing goes into.
_DEPTH = 32


def add(nouns: Commands) -> None:
    parser = command(
        nouns,
        "cp",
        copy,
        help="copy files into or out of a live session's workspace",
        description="Copy a file, or with -r a directory, between here and the workspace of a live "
        "session. SESSION:PATH is a path in the workspace; one of the two is of that form. What is "
        "written there is the agent's to use, and is seen in its copy-on-write view if it has one. "
        "No link is followed and none is copied. Each file is replaced whole, and may have 8 MiB.",
        examples=[
            ("sandboxctl session cp s-0123:report.txt .", "out"),
            ("sandboxctl session cp data.csv s-0123:input/", "in"),
            ("sandboxctl session cp -r s-0123:src ./src", "a directory"),
            ("sandboxctl session cp s-0123:notes.md - | less", "to standard output"),
        ],
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="SESSION:PATH, a path here, or - for stdin"
    )
    parser.add_argument(
        "target", metavar="TARGET", help="a path here, - for stdout, or SESSION:PATH"
    )
    parser.lookups.update(source="places", target="places")
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="a directory, with all of it"
    )


def copy(args: argparse.Namespace) -> int:
    source, target = _REMOTE.fullmatch(args.source), _REMOTE.fullmatch(args.target)
    if (source is None) == (target is None):
        raise Invalid(
            "one of SOURCE and TARGET is in a session, and the other is here",
            hint="as in: sandboxctl session cp SESSION:PATH .",
        )
    with connect(args) as daemon:
        copying = _Copying(daemon, (source or target)[1], args.recursive)  # type: ignore[index]
        if source is not None:
            copying.out(source[2], args.target)
        elif target is not None:
            copying.into(args.source, target[2])
    if args.json:
        told = {"files": copying.files, "bytes": copying.bytes, "left_out": copying.left_out}
        output.print_json(told)
    else:
        for path in copying.left_out:
            output.note(f"left out: {output.clean(path)} (a link, or no file)")
        if args.target != "-":
            files = output.amount(copying.files, "file")
            output.note(f"copied {files}, {output.size(copying.bytes)}")
    return 0


class _Copying:
    """One run of the command, and what it did."""

    def __init__(self, daemon: Any, session: str, recursive: bool) -> None:
        self._daemon, self._session, self._recursive = daemon, session, recursive
        self.files = self.bytes = 0
        self.left_out: list[str] = []

    def out(self, path: str, target: str) -> None:
        entry = self._call("info", path=path)
        if entry["type"] == "directory":
            self._need_recursive(path)
            self._tree_out(entry["path"], Path(target))
        elif target == "-":
            sys.stdout.flush()
            sys.stdout.buffer.write(self._read(path))
            sys.stdout.flush()
        else:
            into = target.endswith("/") or Path(target).is_dir()
            _write(Path(target, entry["name"]) if into else Path(target), self._read(path), entry)

    def into(self, source: str, path: str) -> None:
        if source == "-":
            self._send([(path, read_input("-", "standard input", most=_BYTES), 0o644)])
            return
        found = _lstat(Path(source))
        if stat.S_ISDIR(found.st_mode):
            self._need_recursive(source)
            self._tree_in(Path(source), path)
            return
        if path.endswith("/") or path == "" or self._is_directory(path):
            path = f"{path.rstrip('/')}/{Path(source).name}".lstrip("/")
        self._send([(path, _read(Path(source)), found.st_mode & 0o777)])

    def _tree_out(self, path: str, target: Path) -> None:
        listed = self._call("list", path=path, depth=_DEPTH)
        if listed["truncated"]:
            raise Invalid("there are more than 10,000 entries", hint="copy its parts one by one")
        target.mkdir(parents=True, exist_ok=True)
        for entry in listed["entries"]:
            below = entry["path"].removeprefix(path).lstrip("/")
            if "problem" in entry or entry["type"] not in ("file", "directory"):
                self.left_out.append(entry["path"])
            elif entry["type"] == "directory":
                target.joinpath(below).mkdir(exist_ok=True)
            else:
                _write(target / below, self._read(entry["path"]), entry)

    def _tree_in(self, source: Path, path: str) -> None:
        batch: list[tuple[str, bytes, int]] = []
        size = 0
        for below, found in self._walk(source):
            there = f"{path.rstrip('/')}/{below}".lstrip("/")
            if stat.S_ISDIR(found.st_mode):
                self._call("mkdir", path=there)
                continue
            data = _read(source / below)
            if batch and (len(batch) >= _FILES or size + len(data) > _BYTES):
                self._send(batch)
                batch, size = [], 0
            batch.append((there, data, found.st_mode & 0o777))
            size += len(data)
        if batch:
            self._send(batch)

    def _walk(self, source: Path) -> Iterator[tuple[str, os.stat_result]]:
        """Files below ``source``, and directories that hold nothing; no link is followed."""
        for directory, inner, names in os.walk(source, followlinks=False):
            for name in sorted((*names, *inner)):
                whole = Path(directory, name)
                found = _lstat(whole)
                if stat.S_ISREG(found.st_mode) or (
                    stat.S_ISDIR(found.st_mode) and not any(whole.iterdir())
                ):
                    yield str(whole.relative_to(source)), found
                elif not stat.S_ISDIR(found.st_mode):
                    self.left_out.append(str(whole))

    def _send(self, batch: list[tuple[str, bytes, int]]) -> None:
        rows = [
            {
                "path": path,
                "content": base64.b64encode(data).decode("ascii"),
                "encoding": "base64",
                "mode": mode,
            }
            for path, data, mode in batch
        ]
        self._call("write", files=rows)
        self.files += len(batch)
        self.bytes += sum(len(data) for _, data, _ in batch)

    def _read(self, path: str) -> bytes:
        data = base64.b64decode(self._call("read", path=path, encoding="base64")["content"])
        self.files += 1
        self.bytes += len(data)
        return data

    def _is_directory(self, path: str) -> bool:
        try:
            return bool(self._call("info", path=path)["type"] == "directory")
        except NotFound:
            return False

    def _need_recursive(self, path: str) -> None:
        if not self._recursive:
            raise Invalid(f"{output.clean(path)} is a directory", hint="copy all of it with -r")

    def _call(self, op: str, **params: Any) -> Any:
        return self._daemon.call(f"session.files.{op}", id=self._session, **params)


def _lstat(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except OSError as failure:
        raise _failed(failure, path) from None


def _read(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Invalid(f"{output.clean(str(path))} is no plain file")
            data = file.read(_BYTES + 1)
    except OSError as failure:
        raise _failed(failure, path) from None
    if len(data) > _BYTES:
        raise Invalid(f"{output.clean(str(path))} has more than {_BYTES:,} bytes")
    return data


def _write(path: Path, data: bytes, entry: dict[str, Any]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(path, flags, entry["mode"] & 0o777), "wb") as file:
            file.write(data)
    except OSError as failure:
        raise _failed(failure, path) from None


def _failed(failure: OSError, path: Path) -> SandboxdError:
    return Invalid(f"{output.clean(str(path))}: {(failure.strerror or '').lower()}")
