"""The system calls that a sandboxed program has: the kernel's filters (seccomp(2)).

What is allowed is written in ``filters/calls.py``, compiled by ``filters/build.py`` when that
changes, and installed here as the bytes that came out. Most of it goes on the launcher itself,
once; every sandbox inherits it. Each sandbox then refuses, in a second and short program, what
building it needed. A filter can't be taken off, and the kernel takes the strictest verdict.

Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from typing import Any

from sandboxd.errors import KernelError

__all__ = ["MACHINES", "restrict_launcher", "restrict_sandbox"]

#: What ``uname -m`` says where there are programs.
MACHINES = ("x86_64", "aarch64")

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_DIRECTORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "filters")

_libc: Any = ctypes.CDLL(None, use_errno=True)


def restrict_launcher() -> bool:
    """Filter this process and all it will start; False where this kernel or machine can't.

    Needs CAP_SYS_ADMIN in its user namespace, which a launcher has. Raises KernelError when the
    programs are not where they were installed, or a kernel that has filters refuses these.
    """
    machine = os.uname().machine
    if machine not in MACHINES or not _kernel_has_filters():
        return False
    for name in ("calls", "arguments"):
        _install(_load(machine, name))
    _Installed.built = _load(machine, "built")
    return True


def restrict_sandbox() -> None:
    """Refuse what only the launcher needs, for good. Does nothing where it isn't filtered itself.

    Needs no_new_privs. Raises KernelError.
    """
    if _Installed.built is not None:
        _install(_Installed.built)


@dataclass(frozen=True)
class _Program:
    """struct sock_fprog, and the instructions that it points to."""

    header: ctypes.Array[ctypes.c_char]
    instructions: ctypes.Array[ctypes.c_char]


class _Installed:
    """What the launcher read when it was still alone, for every sandbox that it forks."""

    built: _Program | None = None


def _load(machine: str, name: str) -> _Program:
    path = os.path.join(_DIRECTORY, f"{machine}-{name}.bpf")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as failure:
        raise KernelError("open", failure.errno or 0, path) from None
    instructions = ctypes.create_string_buffer(data, len(data))
    header = ctypes.create_string_buffer(16)
    ctypes.c_ushort.from_buffer(header).value = len(data) // 8
    ctypes.c_void_p.from_buffer(header, 8).value = ctypes.addressof(instructions)
    return _Program(header, instructions)


def _kernel_has_filters() -> bool:
    """prctl(2): a bad address is complained of only where filters are compiled in."""
    _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    return ctypes.get_errno() == errno.EFAULT


def _install(program: _Program) -> None:
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program.header, 0, 0) < 0:
        raise KernelError("prctl", ctypes.get_errno(), "PR_SET_SECCOMP")
