"""Runs a daemon and writes down what the programs in its sandboxes ask the kernel for.

``python -m sandboxd.authoring.watch FILE COMMAND...`` starts the command, follows its tree, and
writes one JSON object a line to FILE for each path, program and address that a sandboxed process
asks for: what came of it, never an argument vector, an environment or data. Signals that end the
daemon are passed on, and its exit status is ours.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import posixpath
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sandboxd.authoring.ptrace import Entered, Left, Tracee, follow

__all__ = ["main"]

_AT_FDCWD = -100
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class _Shape:
    """Where a system call has its parts: indices of its arguments, -1 where there is none.

    ``writes``: it changes what the path names. ``flags``: open(2)'s flags, which tell.
    """

    name: str
    path: int = -1
    directory: int = -1
    flags: int = -1
    writes: bool = False
    address: int = -1


def _at(name: str, *, writes: bool = False, path: int = 1) -> _Shape:
    return _Shape(name, path=path, directory=path - 1, writes=writes)


#: By name, with the numbers on x86-64 and on aarch64 (asm-generic/unistd.h); -1: not there.
_CALLS: tuple[tuple[_Shape, int, int], ...] = (
    (_Shape("open", path=0, flags=1), 2, -1),
    (_Shape("creat", path=0, writes=True), 85, -1),
    (_Shape("openat", path=1, directory=0, flags=2), 257, 56),
    (_Shape("openat2", path=1, directory=0), 437, 437),
    (_Shape("stat", path=0), 4, -1),
    (_Shape("lstat", path=0), 6, -1),
    (_at("newfstatat"), 262, 79),
    (_at("statx"), 332, 291),
    (_Shape("access", path=0), 21, -1),
    (_at("faccessat"), 269, 48),
    (_at("faccessat2"), 439, 439),
    (_Shape("readlink", path=0), 89, -1),
    (_at("readlinkat"), 267, 78),
    (_Shape("chdir", path=0), 80, 49),
    (_Shape("execve", path=0), 59, 221),
    (_at("execveat"), 322, 281),
    (_Shape("mkdir", path=0, writes=True), 83, -1),
    (_at("mkdirat", writes=True), 258, 34),
    (_Shape("rmdir", path=0, writes=True), 84, -1),
    (_Shape("unlink", path=0, writes=True), 87, -1),
    (_at("unlinkat", writes=True), 263, 35),
    (_Shape("rename", path=0, writes=True), 82, -1),
    (_at("renameat", writes=True), 264, 38),
    (_at("renameat2", writes=True), 316, 276),
    (_Shape("truncate", path=0, writes=True), 76, 45),
    (_Shape("chmod", path=0, writes=True), 90, -1),
    (_at("fchmodat", writes=True), 268, 53),
    (_Shape("symlink", path=1, writes=True), 88, -1),
    (_at("symlinkat", writes=True, path=2), 266, 36),
    (_Shape("connect", address=1), 42, 203),
    (_Shape("sendto", address=4), 44, 206),
    (_Shape("bind", address=1), 49, 200),
    (_Shape("socket"), 41, 198),
    (_Shape("write"), 1, 64),
    (_Shape("pwrite64"), 18, 68),
    (_Shape("clone"), 56, 220),
    (_Shape("clone3"), 435, 435),
    (_Shape("fork"), 57, -1),
    (_Shape("vfork"), 58, -1),
    (_Shape("mmap"), 9, 222),
    (_Shape("mount"), 165, 40),
    (_Shape("unshare"), 272, 97),
    (_Shape("setns"), 308, 268),
    (_Shape("chroot", path=0), 161, 51),
    (_Shape("ptrace"), 101, 117),
    (_Shape("keyctl"), 250, 219),
    (_Shape("add_key"), 248, 217),
    (_Shape("bpf"), 321, 280),
    (_Shape("perf_event_open"), 298, 241),
    (_Shape("userfaultfd"), 323, 282),
    (_Shape("io_uring_setup"), 425, 425),
    (_Shape("memfd_secret"), 447, 447),
    (_Shape("process_vm_readv"), 310, 270),
    (_Shape("setuid"), 105, 146),
    (_Shape("setgid"), 106, 144),
    (_Shape("sethostname"), 170, 161),
)

#: Failures that tell of the sandbox where nothing else of a call is worth telling.
_REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EAFNOSUPPORT)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Different records that are kept; a program that asks for more is not shown whole.
_MOST = 50_000


def main(arguments: list[str]) -> int:
    """Run ``arguments[1:]`` and write what its sandboxes ask for to the file ``arguments[0]``."""
    shapes = _by_number(platform.machine())
    file = os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "w") as out:
        watch = _Watch(shapes, out)
        child = _start(arguments[1:])
        for number in _PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(child, number))
        status = follow(child, begins=watch.begins, see=watch.see)
    return os.waitstatus_to_exitcode(status) & 0xFF


def _by_number(machine: str) -> dict[int, _Shape]:
    """The table for one architecture. Raises KeyError for one that has none."""
    first = {"x86_64": True, "aarch64": False}[machine]
    numbers = {(x86 if first else arm): shape for shape, x86, arm in _CALLS}
    numbers.pop(-1, None)
    return numbers


def _start(command: list[str]) -> int:
    """Fork a child that stops itself and becomes ``command`` when it goes on."""
    child = os.fork()
    if child == 0:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            os.execv(command[0], command)
        finally:
            os._exit(127)
    os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return child


class _Watch:
    """Turns system calls into records, each different one once."""

    def __init__(self, shapes: dict[int, _Shape], out: TextIO) -> None:
        self._shapes, self._out = shapes, out
        self._seen: set[str] = set()
        self._ours = _root("self")

    def begins(self, tracee: Tracee) -> bool:
        """Whether it runs in a sandbox: a root directory of its own tells."""
        return _root(str(tracee.pid)) not in (self._ours, None)

    def see(self, tracee: Tracee, call: Entered | Left) -> None:
        if isinstance(call, Entered):
            shape = self._shapes.get(call.number)
            tracee.told = None if shape is None else (shape, _facts(tracee, shape, call.arguments))
            if shape is not None and shape.name.startswith("execve"):
                self._write(shape.name, tracee.told[1], 0)  # success replaces the process
            return
        if tracee.told is None:
            return
        (shape, facts), tracee.told = tracee.told, None
        number = call.value if call.failed else 0
        if "path" in facts or "address" in facts:
            if number != errno.EINTR and not (shape.name.startswith("execve") and not number):
                self._write(shape.name, facts, number)
        elif number in _REFUSED or (shape.name in _LIMITED and number in _LIMITED[shape.name]):
            self._write(shape.name, facts, number)

    def _write(self, name: str, facts: dict[str, Any], number: int) -> None:
        line = json.dumps({"call": name, **facts, "error": errno.errorcode.get(number, "")})
        if line not in self._seen and len(self._seen) < _MOST:
            self._seen.add(line)
            self._out.write(line + "\n")
            self._out.flush()


_LIMITED: dict[str, tuple[int, ...]] = {
    "write": _FULL,
    "pwrite64": _FULL,
    "clone": (errno.EAGAIN,),
    "clone3": (errno.EAGAIN,),
    "fork": (errno.EAGAIN,),
    "vfork": (errno.EAGAIN,),
    "mmap": (errno.ENOMEM,),
}


def _facts(tracee: Tracee, shape: _Shape, arguments: tuple[int, ...]) -> dict[str, Any]:
    """What a call is about: a path as the sandbox sees it, or an address."""
    if shape.path >= 0:
        path = os.fsdecode(tracee.read(arguments[shape.path]))
        directory = _signed(arguments[shape.directory]) if shape.directory >= 0 else _AT_FDCWD
        if not path.startswith("/"):
            base = tracee.link("cwd" if directory == _AT_FDCWD else f"fd/{directory}")
            if not base.startswith("/"):  # a pipe or a socket has no path
                return {}
            path = posixpath.join(base, path) if path else base
        writes = shape.writes
        if shape.flags >= 0:
            writes = bool(arguments[shape.flags] & _WRITING)
        elif shape.name == "openat2":  # struct open_how begins with the flags
            how = tracee.read_exactly(arguments[2], 8)
            writes = bool(int.from_bytes(how, sys.byteorder) & _WRITING)
        return {"path": posixpath.normpath(path), "writes": writes}
    if shape.address >= 0:
        address = arguments[shape.address]
        size = min(arguments[shape.address + 1], 128)
        said = _address(tracee.read_exactly(address, size)) if address else ""
        return {"address": said} if said else {}
    if shape.name in ("write", "pwrite64"):
        return {"file": tracee.link(f"fd/{arguments[0]}")}
    if shape.name == "socket":
        return {"family": arguments[0]}
    return {}


def _address(data: bytes) -> str:
    """A struct sockaddr as people write it; empty for families without a host."""
    if len(data) < 2:
        return ""
    (family,) = struct.unpack_from("=H", data)
    if family == socket.AF_INET and len(data) >= 8:
        (port,) = struct.unpack_from("!H", data, 2)
        return f"{socket.inet_ntop(family, data[4:8])}:{port}"
    if family == socket.AF_INET6 and len(data) >= 24:
        (port,) = struct.unpack_from("!H", data, 2)
        return f"[{socket.inet_ntop(family, data[8:24])}]:{port}"
    if family == socket.AF_UNIX:
        name = data[2:]
        abstract = name.startswith(b"\0")
        text = os.fsdecode(name.strip(b"\0").partition(b"\0")[0])
        return f"unix:{'@' if abstract else ''}{text}" if text else ""
    return ""


def _signed(value: int) -> int:
    """A descriptor argument: an int in the low half of the register."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _root(pid: str) -> tuple[int, int] | None:
    try:
        found = Path(f"/proc/{pid}/root/").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
