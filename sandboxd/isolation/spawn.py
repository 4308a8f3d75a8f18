"""posix_spawn(3) and its neighbours, for a process that must keep no copy of what it passes on.

Python's own ``os.posix_spawn`` copies arguments and environment into memory that it frees but
does not wipe. Here they are pointed to where they lie, in a mapping of the launch spec that goes
away with the launch. The child is made by vfork and exec: no page table is copied.

Standard library only.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import resource
import signal
from collections.abc import Iterable, Sequence
from typing import Any

from sandboxd.errors import KernelError

__all__ = [
    "Inbox",
    "Mapping",
    "clear_keyrings",
    "has_keyrings",
    "inherited_attributes",
    "spawn",
]

_KEYCTL_GET_KEYRING_ID, _KEYCTL_CLEAR, _KEYCTL_GET_PERSISTENT = 0, 7, 22
_SESSION_KEYRING, _USER_KEYRING, _USER_SESSION_KEYRING = -3, -4, -5

_SETSIGDEF, _SETSIGMASK, _SETSID = 0x04, 0x08, 0x80
#: Larger than posix_spawnattr_t, posix_spawn_file_actions_t and sigset_t of any C library.
_ROOM = 1024
#: sched_getattr, keyctl, ioprio_get
_NUMBERS = {"x86_64": (315, 250, 252), "aarch64": (275, 219, 31), "riscv64": (275, 219, 31)}
_IOPRIO_WHO_PROCESS = 1

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Mapping:
    """A launch spec in memory: its address, and a view of it."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")

    @classmethod
    def of(cls, memfd: int, limit: int) -> Mapping:
        """A sealed memfd, mapped to read where the kernel keeps it. Ends with :meth:`unmap`."""
        size = os.fstat(memfd).st_size
        if not 0 < size <= limit:
            raise ValueError("a launch spec of no possible size")
        flags = mmap.MAP_PRIVATE | mmap.MAP_POPULATE
        address = _libc.mmap(None, size, mmap.PROT_READ, flags, memfd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise KernelError("mmap", ctypes.get_errno(), "launch spec")
        return cls(address, size)

    def unmap(self) -> None:
        size = len(self.view)
        self.view.release()
        _libc.munmap(self.address, size)


class Inbox:
    """Where packets arrive: at an address that is known, and can be wiped."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def part(self, start: int, end: int) -> Mapping:
        """The bytes from ``start`` to ``end``, until the next packet."""
        return Mapping(self._address + start, end - start)

    def wipe(self, size: int) -> None:
        ctypes.memset(self._address, 0, size)


class _Attributes:
    """Made once: a new session, no signal blocked, the given ones at their defaults."""

    def __init__(self, defaults: Iterable[int]) -> None:
        self.data = ctypes.create_string_buffer(_ROOM)
        signals = ctypes.create_string_buffer(_ROOM)
        _libc.posix_spawnattr_init(self.data)
        flags = _SETSIGDEF | _SETSIGMASK | _SETSID
        _libc.posix_spawnattr_setflags(self.data, ctypes.c_short(flags))
        _libc.sigemptyset(signals)
        _libc.posix_spawnattr_setsigmask(self.data, signals)
        for number in defaults:
            _libc.sigaddset(signals, number)
        _libc.posix_spawnattr_setsigdefault(self.data, signals)


_attributes = _Attributes(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


def spawn(
    program: int, argv: Sequence[int], env: Sequence[int], fds: Iterable[tuple[int, int]]
) -> tuple[int, int]:
    """Start the program whose path, arguments and environment are C strings at these addresses.

    ``fds`` are (source, target), no target being a later source; everything else must be
    close-on-exec. Returns the pid and 0, or 0 and the errno of what failed.
    """
    actions = _file_actions(tuple(fds))
    pid = ctypes.c_int(0)
    code = _libc.posix_spawn(
        ctypes.byref(pid),
        ctypes.c_void_p(program),
        actions,
        _attributes.data,
        (ctypes.c_void_p * (len(argv) + 1))(*argv, None),
        (ctypes.c_void_p * (len(env) + 1))(*env, None),
    )
    return (0, code) if code else (pid.value, 0)


@functools.lru_cache(maxsize=64)  # a template's descriptors have the same few numbers every time
def _file_actions(fds: tuple[tuple[int, int], ...]) -> ctypes.Array[ctypes.c_char]:
    actions = ctypes.create_string_buffer(_ROOM)
    _libc.posix_spawn_file_actions_init(actions)
    for source, target in fds:
        _libc.posix_spawn_file_actions_adddup2(actions, source, target)
    return actions


def has_keyrings() -> bool:
    """Whether this thread, and so the program that it starts, can use the kernel's keyrings."""
    _, keyctl, _ = _NUMBERS[os.uname().machine]
    found: int = _libc.syscall(keyctl, _KEYCTL_GET_KEYRING_ID, _SESSION_KEYRING, 0)
    return found >= 0


def clear_keyrings() -> bool:
    """Empty the keyrings that processes of this session and user leave; whether that succeeded.

    A new session keyring for each call would soon use up the user's quota, for the kernel frees
    keys later (keyrings(7)).
    """
    _, keyctl, _ = _NUMBERS[os.uname().machine]
    rings = [_SESSION_KEYRING, _USER_KEYRING, _USER_SESSION_KEYRING]
    persistent = _libc.syscall(keyctl, _KEYCTL_GET_PERSISTENT, -1, _SESSION_KEYRING)
    if persistent > 0:
        rings.insert(0, persistent)
    return all(_libc.syscall(keyctl, _KEYCTL_CLEAR, ring) == 0 for ring in rings)


def inherited_attributes() -> tuple[object, ...]:
    """What a process of the same user may change of this one, and its children would inherit.

    Limits (prlimit(2)), policy, priority, clamps (sched_setattr(2)), CPUs (sched_setaffinity(2)),
    priority of input and output (ioprio_set(2)).
    """
    sched_getattr, _, ioprio_get = _NUMBERS[os.uname().machine]
    scheduling = ctypes.create_string_buffer(128)
    _libc.syscall(sched_getattr, 0, scheduling, len(scheduling), 0)
    return (
        scheduling.raw,
        _libc.syscall(ioprio_get, _IOPRIO_WHO_PROCESS, 0),
        os.sched_getaffinity(0),
        *(resource.getrlimit(kind) for kind in _LIMITS),
    )


_LIMITS = tuple(
    sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})
)
