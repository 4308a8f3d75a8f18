"""The system calls that reach for other processes' memory, for keys and for shared segments."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH123

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable
from typing import Any

from sandboxd.trial.hunt import PATTERN, Hunt

__all__ = ["ATTACKS", "add_key", "remove_key", "search_keyrings", "search_memory"]

_libc: Any = ctypes.CDLL(None, use_errno=True)
for _name in ("syscall", "ptrace", "process_vm_readv"):
    getattr(_libc, _name).restype = ctypes.c_long
_libc.shmat.restype = ctypes.c_void_p

_NUMBERS = {
    "x86_64": {"add_key": 248, "keyctl": 250},
    "aarch64": {"add_key": 217, "keyctl": 219},
    "riscv64": {"add_key": 217, "keyctl": 219},
}.get(platform.machine(), {"add_key": -1, "keyctl": -1})
# Numbers above 424 are the same everywhere (include/uapi/asm-generic/unistd.h).
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438

_CHUNK = 1 << 20
_OVERLAP = 64
_KEYCTL_JOIN_SESSION, _KEYCTL_UNLINK, _KEYCTL_READ = 1, 9, 11
_KEYCTL_DESCRIBE = 6
_SESSION_KEYRING = -3
_PTRACE_SEIZE = 0x4206
_IPC_PRIVATE, _IPC_CREAT, _IPC_RMID, _SHM_RDONLY = 0, 0o1000, 0, 0o10000


def search_memory(hunt: Hunt, pid: int) -> None:
    """Search every readable mapping of a process by /proc/PID/mem (proc(5))."""
    try:
        regions = _regions(pid)
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as failure:
        hunt.refuse(failure)
        return
    hunt.looked += 1
    for start, end, name in regions:
        at = start
        while at < end:
            try:
                data = os.pread(memory, min(_CHUNK + _OVERLAP, end - at), at)
            except (OSError, OverflowError):
                break  # device memory and guard pages can't be read
            if not data:
                break
            hunt.bytes += len(data)
            for match in PATTERN.finditer(data):
                hunt.seen.setdefault(match[0], f"memory of process {pid} {name}".rstrip())
            at += _CHUNK
    os.close(memory)


def _regions(pid: int) -> list[tuple[int, int, str]]:
    regions = []
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            fields = line.split(None, 5)
            name = fields[5].strip() if len(fields) > 5 else ""
            if fields[1].startswith("r") and name not in ("[vvar]", "[vsyscall]"):
                start, _, end = fields[0].partition("-")
                regions.append((int(start, 16), int(end, 16), name))
    return regions


def _ptrace(hunt: Hunt, pid: int, fd: int) -> None:
    """Attach. The tracee of a success stays attached: it is killed, or it is a breach."""
    _checked(_libc.ptrace(_PTRACE_SEIZE, pid, None, None))


def _vm_read(hunt: Hunt, pid: int, fd: int) -> None:
    """process_vm_readv(2) of the stack, or of some address where maps can't be read."""
    try:
        start, end = next((s, e) for s, e, name in _regions(pid) if name == "[stack]")
    except (OSError, StopIteration):
        start, end = 0x400000, 0x401000
    buffer = ctypes.create_string_buffer(end - start)
    local = struct.pack("PN", ctypes.addressof(buffer), end - start)
    remote = struct.pack("PN", start, end - start)
    _checked(_libc.process_vm_readv(pid, local, 1, remote, 1, 0))
    hunt.look(f"stack of process {pid}", buffer.raw)


def _get_descriptor(hunt: Hunt, pid: int, fd: int) -> None:
    pidfd = _checked(_libc.syscall(_PIDFD_OPEN, pid, 0))
    try:
        copy = _checked(_libc.syscall(_PIDFD_GETFD, pidfd, fd, 0))
    finally:
        os.close(pidfd)
    try:
        hunt.look(f"descriptor {fd} of process {pid}", os.pread(copy, 4096, 0))
    finally:
        os.close(copy)


ATTACKS: dict[str, Callable[[Hunt, int, int], None]] = {
    "ptrace": _ptrace,
    "process_vm_readv": _vm_read,
    "pidfd_getfd": _get_descriptor,
}


def add_key(description: bytes, payload: bytes) -> int:
    """A key in the session keyring (add_key(2))."""
    return _checked(
        _libc.syscall(
            _NUMBERS["add_key"], b"user", description, payload, len(payload), _SESSION_KEYRING
        )
    )


def remove_key(key: int) -> None:
    _libc.syscall(_NUMBERS["keyctl"], _KEYCTL_UNLINK, key, _SESSION_KEYRING, 0, 0)


def new_session_keyring() -> None:
    """An anonymous session keyring for this thread and its children (keyctl(2))."""
    _checked(_libc.syscall(_NUMBERS["keyctl"], _KEYCTL_JOIN_SESSION, None, 0, 0, 0))


def search_keyrings(hunt: Hunt) -> int:
    """Read every key below the five keyrings that a process has, and all of /proc/keys."""
    todo = [-1, -2, -3, -4, -5, *_listed_keys()]
    seen: set[int] = set()
    rings = 0
    while todo:
        key = todo.pop()
        if key in seen:
            continue
        seen.add(key)
        try:
            data = _read_key(key)
            is_ring = key < 0 or _describe(key).startswith(b"keyring;")
        except OSError as failure:
            hunt.refuse(failure)
            continue
        if is_ring:
            rings += 1
            todo += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
        else:
            hunt.look(f"key {key}", data)
    return rings


def _read_key(key: int) -> bytes:
    size = 1 << 16
    buffer = ctypes.create_string_buffer(size)
    got = _checked(_libc.syscall(_NUMBERS["keyctl"], _KEYCTL_READ, key, buffer, size, 0))
    return buffer.raw[: min(got, size)]


def _describe(key: int) -> bytes:
    buffer = ctypes.create_string_buffer(512)
    _checked(_libc.syscall(_NUMBERS["keyctl"], _KEYCTL_DESCRIBE, key, buffer, 512, 0))
    return buffer.value


def _listed_keys() -> list[int]:
    try:
        with open("/proc/keys") as keys:
            return [int(line.split()[0], 16) for line in keys]
    except (OSError, ValueError):
        return []


def share(payload: bytes) -> int:
    """A System V segment that holds ``payload``."""
    segment = _checked(_libc.shmget(_IPC_PRIVATE, 4096, _IPC_CREAT | 0o600))
    address = attach(segment)
    ctypes.memmove(address, payload, len(payload))
    detach(address)
    return segment


def attach(segment: int, flags: int = 0) -> int:
    """shmat(2): where the segment lies now."""
    address = _libc.shmat(segment, None, flags)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(address)


def detach(address: int) -> None:
    _libc.shmdt(ctypes.c_void_p(address))


def unshare(segment: int) -> None:
    _libc.shmctl(segment, _IPC_RMID, None)


def search_shared(hunt: Hunt) -> int:
    """Attach every segment that /proc/sysvipc/shm lists; how many there are."""
    with open("/proc/sysvipc/shm") as table:
        rows = [line.split() for line in table][1:]
    for row in rows:
        segment, size = int(row[1]), int(row[3])
        try:
            address = attach(segment, _SHM_RDONLY)
        except OSError as failure:
            hunt.refuse(failure)
            continue
        hunt.look(f"shared segment {segment}", ctypes.string_at(address, size))
        detach(address)
    return len(rows)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
