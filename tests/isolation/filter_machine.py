"""Runs committed filter programs as the kernel does, for any architecture and any call."""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sandboxd.isolation import filters

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028
DIRECTORY = Path(filters.__file__).parent
ON_LAUNCHER = ("calls", "arguments")
IN_SANDBOX = (*ON_LAUNCHER, "built")


@dataclass(frozen=True)
class Machine:
    """The filters of one architecture, installed in the order of ``programs``."""

    name: str
    programs: tuple[str, ...] = IN_SANDBOX

    def verdict(self, arch: int, number: int, *arguments: int) -> int:
        """The strictest of all programs; of equally strict ones, the newest's (seccomp(2))."""
        data = struct.pack("<IIQ6Q", number, arch, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
        verdicts = [_run(_code(self.name, program), data) for program in reversed(self.programs)]
        return min(verdicts, key=lambda v: _signed(v & 0xFFFF0000))

    def error(self, arch: int, number: int, *arguments: int) -> int:
        """The errno that a call ends with, 0 for one that is let through."""
        verdict = self.verdict(arch, number, *arguments)
        assert verdict == ALLOW or verdict & 0xFFFF0000 == ERRNO, hex(verdict)
        return 0 if verdict == ALLOW else verdict & 0xFFFF


def load(machine: str, program: str) -> bytes:
    return (DIRECTORY / f"{machine}-{program}.bpf").read_bytes()


def _signed(action: int) -> int:
    return action - (1 << 32) if action & KILL else action


@cache
def _code(machine: str, program: str) -> list[tuple[int, ...]]:
    return list(struct.iter_unpack("<HBBI", load(machine, program)))


def _run(code: list[tuple[int, ...]], data: bytes) -> int:
    words = struct.unpack("<16I", data)
    accumulator = at = 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        if operation == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            accumulator = words[value // 4]
        elif operation == 0x54:  # BPF_ALU | BPF_AND
            accumulator &= value
        elif operation == 0x05:  # BPF_JMP | BPF_JA
            at += value
        elif operation == 0x06:  # BPF_RET
            return value
        else:
            at += yes if _HOLDS[operation](accumulator, value) else no


_HOLDS: dict[int, Callable[[int, int], bool]] = {
    0x15: operator.eq,  # BPF_JMP | BPF_JEQ, BPF_JGT, BPF_JGE, BPF_JSET
    0x25: operator.gt,
    0x35: operator.ge,
    0x45: lambda a, k: bool(a & k),
}
