"""The 32-bit system calls of x86_64, by their own gate: another table of numbers to filter."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct

from sandboxd.selftest.prober.namespaces import getpid
from sandboxd.selftest.prober.probe import HOST, Attack, add

_THREAT = "Escape: 32-bit syscalls"
#: A function of the number and five arguments: registers as asm/unistd_32.h's calls take them,
#: then ``int $0x80``.
_GATE = bytes.fromhex("53 89f8 89f3 87ca 4489c6 4489cf cd80 4863c0 5b c3")
_MAP_32BIT = 0x40
_PAGE = 4096


def _gate(number: int, *arguments: int | bytes) -> int:
    """Call it; bytes are passed by an address below 4 GiB. Raises OSError."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_32BIT
    area = mmap.mmap(-1, 2 * _PAGE, flags, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    area.write(_GATE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    words, at = [], _PAGE
    for argument in arguments:
        if isinstance(argument, bytes):
            area[at : at + len(argument)] = argument
            words.append(start + at)
            at += 1024
        else:
            words.append(argument)
    function = ctypes.CFUNCTYPE(ctypes.c_long, *(ctypes.c_ulong,) * 6)(start)
    result = int(function(number, *words, *(0,) * (5 - len(words))))
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _raw(number: int, *arguments: int | bytes) -> Attack:
    return lambda plan: _gate(number, *arguments) and None


_SOCKET = struct.pack("3I", 40, 1, 0)  # AF_VSOCK, SOCK_STREAM
_LOCAL = struct.pack("3I", 1, 1, 0)
if platform.machine() == "x86_64":
    # A kernel without these calls kills who knocks at that gate.
    for _words, _number, _arguments, _denial, _allowed in (
        ("ptrace", 26, (0, 0, 0, 0), "EPERM", ("ok",)),
        ("personality", 136, (0x40000,), "EPERM", ("ok",)),
        ("keyctl", 288, (0, 0xFFFFFFFD, 0), "EPERM", ("ok",)),
        ("unshare", 310, (0x400,), "EPERM", ("ok",)),
        ("io_uring_setup", 425, (1, bytes(120)), "EPERM", ("ok",)),
        ("memfd_secret", 447, (0,), "EPERM", ("ok", "ENOSYS")),
        ("modify_ldt", 123, (0, bytes(64), 64), "EPERM", ("ok",)),
        ("socketcall: a local socket", 102, (1, _LOCAL), "EAFNOSUPPORT", ("ok",)),
        ("socketcall: AF_VSOCK", 102, (1, _SOCKET), "EAFNOSUPPORT", ("ok",)),
        ("socket: AF_VSOCK", 359, (40, 1, 0), "EAFNOSUPPORT", ("ok",)),
    ):
        add(f"int 0x80: {_words}", _THREAT, _raw(_number, *_arguments), _denial, "SIGSEGV",
            needs="seccomp", outside=HOST, allowed=_allowed, fallback=getpid,
            says="the same outside")  # fmt: skip
    add("int 0x80: a number no kernel has", _THREAT, _raw(9999), "ENOSYS", "SIGSEGV",
        needs="seccomp", outside=HOST, allowed=("ENOSYS",), fallback=getpid,
        says="outside the same denial")  # fmt: skip
