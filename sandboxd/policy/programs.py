"""Which file a tool runs: looked at when it is loaded, opened and hashed when it is launched.

A digest says what a file *was*. So the file is opened once for each launch and hashed through that
descriptor, which stays open until the program runs: meanwhile no other file can have its device and
inode number, and no write leaves its time of change as it was. These are what the sandbox compares
with the descriptor that it executes.

A script is started as the kernel would (``#!``, execve(2)), but by us: its interpreter is pinned
like a program, and the script is what the sandbox shows at its path.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from sandboxd.errors import Denied
from sandboxd.isolation.wire import Pin

if TYPE_CHECKING:
    from sandboxd.policy.model import Tool

__all__ = [
    "TOOL_PATH",
    "Held",
    "Interpreter",
    "Refused",
    "bytes_to_hash",
    "hold_program",
    "interpreters_of",
    "is_native",
]

#: Where a tool finds programs by name, unless its manifest says otherwise.
TOOL_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"

#: Bytes that the kernel reads of a script's first line (BINPRM_BUF_SIZE), and scripts that may
#: interpret each other (fs/exec.c, exec_binprm).
_LINE, _DEEPEST = 256, 4
#: Files over this size are hashed again only when they changed since.
_SMALL = 1 << 20
#: A change within the same tick of the clock need not show in ctime, so a file that is younger
#: is not remembered (as git's index does it, Documentation/technical/racy-git).
_SETTLED_NS = 2_000_000_000
_REMEMBERED = 256
#: Entries beside a program that are shown one by one.
_MOST_SIBLINGS = 64

_ENV = re.compile(r"[^\s=-][^\s=]*")


class Refused(Exception):
    """A script that can't be started."""


@attrs.frozen
class Interpreter:
    """One ``#!``: the name that the interpreter is started by, its argument, and its file."""

    name: str
    argument: str
    path: Path
    digest: str = ""


@dataclass
class Held:
    """A program that was found to be the one that was loaded. Close it once it runs.

    ``start`` are the first words of the argument vector, ``execute`` the file that becomes the
    process; None: what stands at the first word's path. ``beside``: what its folder shows next to
    the program; None: the folder is shown as it is.
    """

    program: Pin
    start: tuple[str, ...]
    execute: tuple[Path, Pin] | None
    beside: tuple[Path, ...] | None = None
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def hold_program(tool: Tool) -> Held:
    """Open and hash the program and its interpreters. Denied unless all are what was loaded."""
    fds: list[int] = []
    try:
        program = _open(tool, tool.program, tool.digest, fds)
        start: tuple[str, ...] = (tool.invoked or str(tool.program),)
        execute = (Path(tool.program), program) if tool.native else None
        for interpreter in tool.interpreters:
            there = _open(tool, interpreter.path, interpreter.digest, fds)
            if interpreter is tool.interpreters[0]:
                start = (str(tool.program),)
            words = (interpreter.name, interpreter.argument)
            start = (*filter(None, words), *start)
            execute = (interpreter.path, there)
        return Held(program, start, execute, _beside(tool), fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def bytes_to_hash(tool: Tool) -> int:
    """How much :func:`hold_program` would read now."""
    total = 0
    for path in (tool.program, *(interpreter.path for interpreter in tool.interpreters)):
        try:
            there = os.stat(path)  # noqa: PTH116 - in the way of every call
        except OSError:
            continue  # it will tell
        if there.st_size <= _SMALL or _key(there) not in _known:
            total += there.st_size
    return total


def interpreters_of(program: Path, environment: Mapping[str, str]) -> tuple[Interpreter, ...]:
    """What the kernel would start to run the script ``program``, the innermost first; () of others.

    Raises Refused, and OSError where something can't be read.
    """
    found: list[Interpreter] = []
    path = program
    while (line := _first_line(path)) is not None:
        if len(found) == _DEEPEST:
            raise Refused(f"{program} has interpreters that are scripts, too many in a row")
        name, argument = _words(path, line)
        if Path(name).name == "env" and _ENV.fullmatch(argument):  # env(1): no option, no NAME=
            name, argument = _in_path(argument, environment.get("PATH", TOOL_PATH)), ""
        real = Path(os.path.realpath(name))
        if not real.is_file():
            raise Refused(f"{path} wants the interpreter {name}, which is not there")
        found.append(Interpreter(name, argument, real))
        path = real
    return tuple(found)


def is_native(path: Path) -> bool:
    """Whether the kernel executes the file itself (elf(5))."""
    with path.open("rb") as stream:
        return stream.read(4) == b"\x7fELF"


def _open(tool: Tool, path: Path, digest: str, fds: list[int]) -> Pin:
    from sandboxd.policy.model import place

    rule = place(tool, "program")
    what = "the program" if path == tool.program else f"the interpreter {path}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        fds.append(fd)
        there = os.fstat(fd)
        same = stat.S_ISREG(there.st_mode) and _digest(fd, there) == digest
    except OSError as error:
        raise Denied(
            f"{what} of {tool.name} can't be read: {os.strerror(error.errno or 0)}", rule=rule
        ) from None
    if not same:
        raise Denied(
            f"{what} of {tool.name} changed after the configuration was loaded",
            rule=rule,
            hint="look at what changed it, then: sandboxctl reload",
        )
    return there.st_dev, there.st_ino, there.st_ctime_ns


_known: dict[tuple[int, ...], str] = {}


def _digest(fd: int, there: os.stat_result) -> str:
    key = _key(there)
    if there.st_size > _SMALL and key in _known:
        return _known[key]
    with open(fd, "rb", closefd=False, buffering=0) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    settled = time.time_ns() - max(there.st_mtime_ns, there.st_ctime_ns) > _SETTLED_NS
    if there.st_size > _SMALL and settled and _same(there, os.fstat(fd)):
        while len(_known) >= _REMEMBERED:
            _known.pop(next(iter(_known)), None)
        _known[key] = digest
    return digest


def _key(there: os.stat_result) -> tuple[int, ...]:
    return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_size, one.st_mtime_ns, one.st_ctime_ns) == (
        other.st_size,
        other.st_mtime_ns,
        other.st_ctime_ns,
    )


def _first_line(path: Path) -> bytes | None:
    with path.open("rb") as stream:
        head = stream.read(_LINE)
    return head[2:] if head.startswith(b"#!") else None


def _words(path: Path, head: bytes) -> tuple[str, str]:
    """The interpreter and its one argument, as the kernel reads them (fs/binfmt_script.c)."""
    line, end, _ = head.partition(b"\n")
    name, blank, argument = line.strip(b" \t").replace(b"\t", b" ").partition(b" ")
    if not name or (not end and not blank and len(head) == _LINE - 2):
        raise Refused(f"{path} begins with #! and names no interpreter")
    if not name.startswith(b"/"):
        raise Refused(f"{path} names its interpreter by a path that is not absolute")
    return os.fsdecode(name), os.fsdecode(argument.strip(b" "))


def _in_path(name: str, path: str) -> str:
    if "/" in name:
        return name
    for directory in path.split(":"):
        candidate = f"{directory}/{name}"
        if directory and os.access(candidate, os.X_OK) and Path(candidate).is_file():
            return candidate
    raise Refused(f"no '{name}' in {path}, where env would look for it")


def _beside(tool: Tool) -> tuple[Path, ...] | None:
    """What stands beside the program on the way down from its folder.

    With it the sandbox makes the folder's own directories anew and shows the entries in them, so
    that nobody outside can put another file in the program's place: a mount on an entry of the
    host's directory would go with that entry (rename(2) detaches it in every namespace). None
    where that can't be: the program is elsewhere, or links would have to be shown as what they are.
    """
    program = Path(tool.program)
    if not program.is_relative_to(tool.directory):
        return None
    try:
        found = tuple(_siblings(tool.directory, program))
    except OSError:
        return None
    return found if len(found) <= _MOST_SIBLINGS and not any(map(os.path.islink, found)) else None


def _siblings(directory: Path, program: Path) -> Iterator[Path]:
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        path = directory / name
        if path == program:
            continue
        if path in program.parents:
            yield from _siblings(path, program)
        else:
            yield path
