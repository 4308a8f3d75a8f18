"""System calls of a process tree, as they happen, by ptrace(2).

The tree is traced from its first instruction: a program that stopped itself is seized, and goes
on. Its children are attached by the kernel as they are made, so nothing has to be allowed to look
into another process, and what a sandbox forbids its processes doesn't matter: the tracer is
outside.

A tracer is a process of its own: wait(2) in another thread of it would take tracees' stops away.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandboxd.errors import KernelError

__all__ = ["Entered", "Left", "Tracee", "follow"]

_SEIZE, _CONT, _SYSCALL, _LISTEN = 0x4206, 7, 24, 0x4208
_GETEVENTMSG, _GET_SYSCALL_INFO = 0x4201, 0x420E
_FORK, _VFORK, _CLONE, _EXEC, _STOP = 1, 2, 3, 4, 128
#: PTRACE_O_TRACESYSGOOD, and an event for each way to make a process and for execve.
_OPTIONS = 1 | 1 << _FORK | 1 << _VFORK | 1 << _CLONE | 1 << _EXEC
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_ENTRY, _EXIT = 1, 2
_WALL = 0x40000000  # whatever kind of child it is (waitpid(2), "Linux notes")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info, include/uapi/linux/ptrace.h (Linux 5.3): any architecture."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        ("number", ctypes.c_uint64),  # at an exit: what it returned
        ("arguments", ctypes.c_uint64 * 6),  # at an exit: the first byte tells an error
    )


@dataclass(frozen=True)
class Entered:
    """A system call by its number on this machine; ``arguments`` are the six registers."""

    number: int
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class Left:
    """Its end: what it returned, or the errno (positive) where ``failed``."""

    value: int
    failed: bool


@dataclass
class Tracee:
    """One thread of the tree; ``told`` is where its watcher keeps what it knows of it."""

    pid: int
    watched: bool = False
    told: Any = None

    def read(self, address: int, most: int = 4096) -> bytes:
        """Its memory from ``address`` up to a NUL byte; what can't be read is cut off."""
        found = b""
        try:
            with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
                while len(found) < most:
                    piece = os.pread(memory.fileno(), 256 - address % 256, address)
                    before, end, _ = piece.partition(b"\0")
                    found += before
                    if end or not piece:
                        break
                    address += len(piece)
        except OSError:
            pass
        return found[:most]

    def read_exactly(self, address: int, size: int) -> bytes:
        """``size`` bytes of its memory, or none."""
        try:
            with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
                return os.pread(memory.fileno(), size, address)
        except OSError:
            return b""

    def link(self, name: str) -> str:
        """What a link below its /proc directory points to, as itself would see it; or empty."""
        try:
            return str(Path(f"/proc/{self.pid}/{name}").readlink())
        except OSError:
            return ""


def follow(
    root: int,
    *,
    begins: Callable[[Tracee], bool],
    see: Callable[[Tracee, Entered | Left], None],
) -> int:
    """Follow the tree of the stopped child ``root`` until it is gone; its wait status.

    ``begins`` is asked at each execve whether the calls of that process are to be seen; its
    children inherit the answer. ``see`` gets them.

    Raises KernelError where ptrace is refused.
    """
    _ptrace(_SEIZE, root, 0, _OPTIONS)
    os.kill(root, signal.SIGCONT)
    tracees = {root: Tracee(root)}
    ended = 0
    while tracees:
        try:
            pid, status = os.waitpid(-1, _WALL)
        except ChildProcessError:
            break
        if os.WIFSTOPPED(status):
            _stopped(tracees, pid, status, begins, see)
        else:
            tracees.pop(pid, None)
            ended = status if pid == root else ended
    return ended


def _stopped(
    tracees: dict[int, Tracee],
    pid: int,
    status: int,
    begins: Callable[[Tracee], bool],
    see: Callable[[Tracee, Entered | Left], None],
) -> None:
    """Take one stop of one thread, and let it go on."""
    # A child's first stop may come before its parent tells of it.
    tracee = tracees.setdefault(pid, Tracee(pid))
    number, event = os.WSTOPSIG(status), status >> 16
    deliver, how = 0, _CONT
    if number == _SYSCALL_STOP:
        _tell(tracee, see)
    elif event in (_FORK, _VFORK, _CLONE):
        if child := _message(pid):
            made = tracees.setdefault(child, Tracee(child))
            made.watched = made.watched or tracee.watched
    elif event == _EXEC:
        former = _message(pid)  # execve by another thread takes the leader's number
        if former != pid and (gone := tracees.pop(former, None)) is not None:
            tracee.told = gone.told
        tracee.watched = tracee.watched or begins(tracee)
    elif event == _STOP:
        if number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            how = _LISTEN  # stopped as a group: it stays so until SIGCONT
    elif number != signal.SIGTRAP:
        deliver = number
    if how == _CONT and tracee.watched:
        how = _SYSCALL
    _resume(how, pid, deliver)


def _tell(tracee: Tracee, see: Callable[[Tracee, Entered | Left], None]) -> None:
    info = _Info()
    try:
        _ptrace(_GET_SYSCALL_INFO, tracee.pid, ctypes.sizeof(info), ctypes.addressof(info))
    except KernelError:
        return  # killed meanwhile
    if info.op == _ENTRY:
        see(tracee, Entered(info.number, tuple(info.arguments)))
    elif info.op == _EXIT:
        value = ctypes.c_int64(info.number).value
        failed = bool(info.arguments[0] & 0xFF)
        see(tracee, Left(-value if failed else value, failed))


def _message(pid: int) -> int:
    """The number that comes with an event; 0 when the tracee was killed meanwhile."""
    message = ctypes.c_ulong()
    try:
        _ptrace(_GETEVENTMSG, pid, 0, ctypes.addressof(message))
    except KernelError:
        return 0
    return message.value


def _resume(how: int, pid: int, deliver: int) -> None:
    try:
        _ptrace(how, pid, 0, deliver)
    except KernelError as error:
        if error.errno != errno.ESRCH:  # SIGKILL takes a tracee out of any stop (ptrace(2))
            raise


def _ptrace(request: int, pid: int, address: int, data: int) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        raise KernelError("ptrace", ctypes.get_errno())
