"""Compile the filter programs: ``python -m sandboxd.isolation.filters.build [DIRECTORY]``.

Development only; needs libseccomp (Debian: libseccomp2), which compiles the lists in ``calls``.
Three programs for each architecture; the kernel runs all that a process has and takes the
strictest verdict:

- ``calls``: the list of what is allowed, for every ABI of the architecture. The launcher installs
  it on itself, once, and everything that it starts inherits it.
- ``arguments``: what is refused by its arguments. Likewise.
- ``built``: refuses what only the launcher needs. The one that is installed at every launch,
  so it is short: it looks at the native ABI alone, for ``calls`` allows nothing of it elsewhere.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sandboxd.isolation.filters import calls

__all__ = ["ALLOW", "ARCHITECTURES", "KILL", "PROGRAMS", "Abi", "build", "names", "refusal"]

ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW
KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS
PROGRAMS = ("calls", "arguments", "built")


def refusal(code: int) -> int:
    """SECCOMP_RET_ERRNO with ``code``."""
    return 0x00050000 | code


@dataclass(frozen=True)
class Abi:
    """One way into the kernel: libseccomp's token, and the kernel's AUDIT_ARCH_*."""

    name: str
    token: int


#: What ``uname -m`` says, and the ABIs of such a kernel, the native one first. x32 isn't one:
#: its numbers start at 0x40000000, above ``calls.LAST``, and are refused like those.
ARCHITECTURES: dict[str, tuple[Abi, ...]] = {
    "x86_64": (Abi("x86_64", 0xC000003E), Abi("x86", 0x40000003)),
    "aarch64": (Abi("aarch64", 0xC00000B7), Abi("arm", 0x40000028)),
}


def build(machine: str) -> dict[str, bytes]:
    """The programs of one architecture, by name. Raises OSError without libseccomp."""
    abis = ARCHITECTURES[machine]
    return {
        "calls": _newer_than_the_list() + _allowed_calls(abis),
        "arguments": _refused_arguments(abis),
        "built": _refused_once_built(abis[0]),
    }


@cache
def names(abi: Abi) -> dict[int, str]:
    """Every system call that ``abi`` has, as far as this libseccomp knows."""
    resolve = _library().seccomp_syscall_resolve_num_arch
    numbers = (*range(calls.LAST + 1), *_ARM_PRIVATE)
    found = ((nr, resolve(abi.token, nr)) for nr in numbers)
    return {nr: ctypes.string_at(name).decode() for nr, name in found if name}


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for machine in ARCHITECTURES:
        for name, program in build(machine).items():
            (directory / f"{machine}-{name}.bpf").write_bytes(program)
            print(f"{machine}-{name}: {len(program) // 8} instructions")


def _allowed_calls(abis: Sequence[Abi]) -> bytes:
    native, *compatible = (
        _Compiler((abi,), default=refusal(errno.EPERM), elsewhere=KILL) for abi in abis
    )
    for compiler in (native, *compatible):
        for name in sorted(calls.ALLOWED):
            compiler.add(ALLOW, name)
        for name, alternatives in calls.ALLOWED_IF.items():
            for tests in alternatives:
                compiler.add(ALLOW, name, *tests)
        for name, code in calls.BUILDING.items():  # by way of the native ABI only
            if compiler is native:
                compiler.add(ALLOW, name)
            elif code != errno.EPERM:
                compiler.add(refusal(code), name)
    for compiler in compatible:
        native.merge(compiler)
    return native.export()


def _refused_arguments(abis: Sequence[Abi]) -> bytes:
    compiler = _Compiler(abis, default=ALLOW, elsewhere=ALLOW)
    for name, (code, tests) in calls.REFUSED_IF.items():
        for test in tests:
            compiler.add(refusal(code), name, test)
    return compiler.export()


def _refused_once_built(native: Abi) -> bytes:
    compiler = _Compiler((native,), default=ALLOW, elsewhere=ALLOW, tree=True)
    for name, code in sorted(calls.BUILDING.items()):
        compiler.add(refusal(code), name)
    return compiler.export()


#: 32-bit ARM's private calls lie here (asm/unistd.h, __ARM_NR_BASE).
_ARM_PRIVATE = range(0xF0000, 0xF0007)


def _newer_than_the_list() -> bytes:
    """What libseccomp can't say: ENOSYS above the last number. Falls through to what follows."""
    return b"".join(
        struct.pack("<HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # load the number
            (0x25, 0, 3, calls.LAST),  # not greater: to what follows
            (0x35, 0, 1, _ARM_PRIVATE.start),
            (0x35, 0, 1, _ARM_PRIVATE.stop),  # one of ARM's: to what follows, which knows the ABI
            (0x06, 0, 0, refusal(errno.ENOSYS)),
        )
    )


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


_ACT_BADARCH, _CTL_OPTIMIZE = 2, 8  # enum scmp_filter_attr
_MASKED_EQ = 7  # enum scmp_compare


class _Compiler:
    """A libseccomp filter context for some ABIs; ``elsewhere`` is the verdict on all others."""

    def __init__(
        self, abis: Sequence[Abi], *, default: int, elsewhere: int, tree: bool = False
    ) -> None:
        self.library = _library()
        self.context = ctypes.c_void_p(self.library.seccomp_init(default))
        native = self.library.seccomp_arch_native()
        tokens = [abi.token for abi in abis]
        for token in tokens:
            if token != native:
                self._do("arch_add", ctypes.c_uint32(token))
        if native not in tokens:
            self._do("arch_remove", ctypes.c_uint32(native))
        self._do("attr_set", _ACT_BADARCH, ctypes.c_uint32(elsewhere))
        self._do("attr_set", _CTL_OPTIMIZE, ctypes.c_uint32(2 if tree else 1))
        if not tree:
            for place, name in enumerate(calls.FREQUENT):
                self._do("syscall_priority", self._number(name), ctypes.c_uint8(255 - place))

    def add(self, action: int, name: str, *tests: calls.Test) -> None:
        """Add a rule for each ABI that has the call; all of ``tests`` have to hold."""
        comparisons = (_Comparison * len(tests))(
            *(_Comparison(t.argument, _MASKED_EQ, t.mask, t.value) for t in tests)
        )
        number = self._number(name)
        self._do("rule_add_array", ctypes.c_uint32(action), number, len(tests), comparisons)

    def merge(self, other: _Compiler) -> None:
        """Take over the rules of ``other``, which is for other ABIs, and end it."""
        self._do("merge", other.context)

    def export(self) -> bytes:
        with tempfile.TemporaryFile() as file:
            self._do("export_bpf", file.fileno())
            file.seek(0)
            return file.read()

    def _number(self, name: str) -> int:
        """libseccomp's own number: this host's, or a negative one for a call it doesn't have."""
        number: int = self.library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # __NR_SCMP_ERROR
            raise ValueError(f"libseccomp knows no system call {name}")
        return number

    def _do(self, what: str, *arguments: Any) -> None:
        done = getattr(self.library, f"seccomp_{what}")(self.context, *arguments)
        if done < 0:
            raise OSError(-done, f"seccomp_{what}")


@cache
def _library() -> Any:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_arch_native.restype = ctypes.c_uint32
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p
    library.seccomp_syscall_resolve_num_arch.argtypes = (ctypes.c_uint32, ctypes.c_int)
    return library


if __name__ == "__main__":
    main()
