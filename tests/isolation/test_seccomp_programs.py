"""What the committed filter programs say, to every call of every ABI; and that they are current."""

from __future__ import annotations

import errno
import itertools
import socket

import pytest
from filter_machine import (
    AARCH64,
    ALLOW,
    ARM,
    I386,
    IN_SANDBOX,
    KILL,
    ON_LAUNCHER,
    X86_64,
    Machine,
    load,
)

from sandboxd.isolation.filters import calls

EPERM, ENOSYS, EAFNOSUPPORT = errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT

#: One row for each ABI: the machine, its AUDIT_ARCH_*, and the numbers of some calls.
NUMBERS = {
    "x86_64": ("x86_64", X86_64, {
        "ioctl": 16, "clone": 56, "socket": 41, "socketpair": 53, "personality": 135, "mount": 165,
        "umount2": 166, "unshare": 272, "setns": 308, "keyctl": 250, "ptrace": 101, "bpf": 321,
        "flock": 73, "vfork": 58, "prlimit64": 302, "getrandom": 318, "timerfd_create": 283,
    }),
    "i386": ("x86_64", I386, {
        "ioctl": 54, "clone": 120, "socket": 359, "socketpair": 360, "personality": 136,
        "mount": 21, "umount2": 52, "unshare": 310, "setns": 346, "keyctl": 288, "ptrace": 26,
        "bpf": 357,
        "flock": 143, "vfork": 190, "prlimit64": 340, "getrandom": 355, "timerfd_create": 322,
    }),
    "aarch64": ("aarch64", AARCH64, {
        "ioctl": 29, "clone": 220, "socket": 198, "socketpair": 199, "personality": 92, "mount": 40,
        "umount2": 39, "unshare": 97, "setns": 268, "keyctl": 219, "ptrace": 117, "bpf": 280,
        "flock": 32, "prlimit64": 261, "getrandom": 278, "timerfd_create": 85,
    }),
    "arm": ("aarch64", ARM, {
        "ioctl": 54, "clone": 120, "socket": 281, "socketpair": 288, "personality": 136,
        "mount": 21, "umount2": 52, "unshare": 337, "setns": 375, "keyctl": 311, "ptrace": 26,
        "bpf": 386,
        "flock": 143, "vfork": 190, "prlimit64": 369, "getrandom": 384, "timerfd_create": 350,
    }),
}  # fmt: skip
#: Since Linux 5.1 these are the same everywhere.
COMMON = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443,
    "process_mrelease": 448, "set_mempolicy_home_node": 450,
}  # fmt: skip
DIRTY = 0xABCD << 32  # what a caller may leave in the upper half of a register


@pytest.fixture(params=NUMBERS)
def abi(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def error(abi: str, call: str, *arguments: int, programs: tuple[str, ...] = IN_SANDBOX) -> int:
    machine, arch, numbers = NUMBERS[abi]
    return Machine(machine, programs).error(arch, {**COMMON, **numbers}[call], *arguments)


def test_what_reaches_into_kernel_or_processes_is_refused(abi: str) -> None:
    refused = ("mount", "umount2", "unshare", "setns", "keyctl", "ptrace", "bpf", *COMMON)
    assert {call: error(abi, call) for call in refused} == dict.fromkeys(refused, EPERM)


def test_what_programs_need_is_allowed(abi: str) -> None:
    needed = {"flock", "vfork", "prlimit64", "getrandom", "timerfd_create"} & set(NUMBERS[abi][2])
    assert {call: error(abi, call) for call in needed} == dict.fromkeys(needed, 0)


def test_clone_makes_threads_and_processes_but_no_namespace(abi: str) -> None:
    thread = 0x3D0F00  # as pthread_create(3) does
    fork = 0x01200000 | 17
    assert [error(abi, "clone", flags) for flags in (thread, fork, DIRTY | fork)] == [0, 0, 0]
    for bit in (17, 25, 26, 27, 28, 29, 30):  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
        for other in (0, fork, DIRTY):
            assert error(abi, "clone", 1 << bit | other) == EPERM


def test_clone3_is_not_there_for_programs_and_only_the_native_one_for_the_launcher(
    abi: str,
) -> None:
    machine, arch, _ = NUMBERS[abi]
    assert Machine(machine).error(arch, 435) == ENOSYS
    launcher = Machine(machine, ON_LAUNCHER).error(arch, 435)
    assert launcher == (0 if abi == machine else ENOSYS)


def test_the_launcher_may_build_but_not_by_way_of_another_abi(abi: str) -> None:
    native = abi == NUMBERS[abi][0]
    for call in ("mount", "umount2", "unshare", "setns", "keyctl", "fsopen", "open_tree"):
        assert error(abi, call, programs=ON_LAUNCHER) == (0 if native else EPERM)
        assert error(abi, call) == EPERM
    assert error(abi, "bpf", programs=ON_LAUNCHER) == EPERM


def test_the_terminals_dangerous_ioctls_are_refused_whatever_the_upper_half_holds(
    abi: str,
) -> None:
    for request in (0x5412, 0x541C, 0x5423):  # TIOCSTI, TIOCLINUX, TIOCSETD
        assert error(abi, "ioctl", 0, request) == EPERM
        assert error(abi, "ioctl", 0, request | DIRTY) == EPERM
    for request in (0x5401, 0x5411, 0x5413, 0x541B, 0x541D, 0x5422, 0x5424, 0x12000000 | 0x5412):
        assert error(abi, "ioctl", 0, request) == 0  # TCGETS and neighbours


def test_sockets_are_local_or_tcp_udp_and_what_getifaddrs_asks(abi: str) -> None:
    stream, datagram, flags = socket.SOCK_STREAM, socket.SOCK_DGRAM, 0x80800
    allowed = {
        *((socket.AF_UNIX, kind, 0) for kind in range(1, 6)),
        *itertools.product(
            (socket.AF_INET, socket.AF_INET6), (stream, datagram), (0, 1, 6, 17, 58)
        ),
        *((socket.AF_NETLINK, kind, 0) for kind in range(1, 6)),
    }
    kinds = (1, 2, 3, 5, 6, 10)  # and raw, sequenced packets, DCCP, packet
    protocols = (0, 1, 6, 12, 17, 58, 63, 64, 132, 262)  # with SCTP and MPTCP
    for family, kind, protocol in itertools.product(range(47), kinds, protocols):
        expected = 0 if (family, kind, protocol) in allowed else EPERM
        if family in (socket.AF_INET, socket.AF_INET6) and kind in (1, 2) and protocol < 64:
            expected = 0
        if family == socket.AF_UNIX or (family == socket.AF_NETLINK and protocol == 0):
            expected = 0
        if family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
            expected = EAFNOSUPPORT
        arguments = (family | DIRTY, kind | flags | DIRTY, protocol | DIRTY)
        assert error(abi, "socket", *arguments) == expected, (family, kind, protocol)
        if expected == 0:
            assert error(abi, "socket", family, kind, protocol) == 0
    for family in (64, 1 << 16 | 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000001):
        assert error(abi, "socket", family, 1, 0) == EPERM


def test_socket_pairs_are_local(abi: str) -> None:
    assert error(abi, "socketpair", socket.AF_UNIX, 1) == 0
    assert error(abi, "socketpair", DIRTY | socket.AF_UNIX, 1) == 0
    others = {error(abi, "socketpair", f, 1) for f in range(64) if f != socket.AF_UNIX}
    assert others <= {EPERM, EAFNOSUPPORT}
    assert 0 not in others


def test_32_bit_x86_makes_no_socket_by_the_call_that_hides_its_arguments() -> None:
    machine = Machine("x86_64")
    seen = {call: machine.error(I386, 102, call) for call in range(1, 21)}
    assert {call for call, code in seen.items() if code} == {1, 8}
    assert seen[1] == seen[8] == machine.error(I386, 102, DIRTY | 1) == EAFNOSUPPORT


def test_personality_only_answers(abi: str) -> None:
    for persona in (0, 8, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, DIRTY):
        assert error(abi, "personality", persona) == 0
    for persona in (1, 0x40000, 0x400000, DIRTY | 0x40000, 0x20000, 0xFFFFFFFE):
        assert error(abi, "personality", persona) == EPERM


def test_numbers_that_the_list_does_not_know_are_not_there(abi: str) -> None:
    machine, arch, _ = NUMBERS[abi]
    for number in (calls.LAST + 1, 511, 1023, 0xEFFFF, 0xF0007, 0x7FFFFFFF, 0xFFFFFFFF):
        assert Machine(machine).error(arch, number) == ENOSYS
    private = [Machine(machine).error(arch, number) for number in range(0xF0000, 0xF0007)]
    # of 32-bit ARM: breakpoint, cacheflush, usr26, usr32, set_tls, get_tls
    assert private[1:] == [0 if abi == "arm" else EPERM] * 6


def test_x32_is_not_there() -> None:
    for number in range(560):
        assert Machine("x86_64").error(X86_64, 0x40000000 | number) == ENOSYS


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_an_architecture_that_is_none_of_this_kernels_is_killed(machine: str) -> None:
    for arch in (0, 0xC0000015, 0x8 | 0xC0000000, X86_64 if machine == "aarch64" else AARCH64):
        assert Machine(machine).verdict(arch, 0) == KILL
    assert Machine(machine).verdict(X86_64 if machine == "x86_64" else AARCH64, 63) == ALLOW


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_program_that_every_launch_installs_is_short(machine: str) -> None:
    assert len(load(machine, "built")) // 8 <= 32


@pytest.mark.services
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_committed_programs_are_what_libseccomp_makes_of_the_list(machine: str) -> None:
    from sandboxd.isolation.filters import build

    assert build.build(machine) == {name: load(machine, name) for name in build.PROGRAMS}


@pytest.mark.services
def test_every_call_of_every_abi_is_allowed_exactly_if_it_is_listed(abi: str) -> None:
    from sandboxd.isolation.filters import build

    machine, arch, _ = NUMBERS[abi]
    (named,) = (a for a in build.ARCHITECTURES[machine] if a.token == arch)
    names = build.names(named)
    assert len(names) > 280
    listed = calls.ALLOWED | set(calls.ALLOWED_IF)
    tested = {*calls.ALLOWED_IF, *calls.REFUSED_IF}
    for number in range(calls.LAST + 1):
        name = names.get(number, "")
        if name in tested:
            continue  # above, by their arguments
        expected = 0 if name in listed else calls.BUILDING.get(name, EPERM)
        assert Machine(machine).error(arch, number) == expected, (number, name)
