"""System calls that a sandbox has no business with. Arguments are such that success is harmless."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import pty
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

from sandboxd.selftest.prober.kernel import NUMBERS, call, ioctl
from sandboxd.selftest.prober.namespaces import getpid
from sandboxd.selftest.prober.probe import HOST, SCRATCH, Attack, Plan, add

_CALLS = "Escape: syscalls"
_FAMILIES = "Escape: socket families"
_TERMINAL = "Escape: terminals"
_AS_ROOT = "the same as root of scratch namespaces"
_SAME = "the same outside"


def _raw(name: str, *arguments: Any) -> Attack:
    return lambda plan: call(name, *arguments) and None


def _timex() -> Any:
    """ADJ_TICK with an impossible tick: past the check of privileges it is EINVAL."""
    return ctypes.create_string_buffer(struct.pack("I", 0x4000), 256)


# Denied for want of a capability of the host's own, with or without a filter; the control is that
# root comes past that check and fails for the arguments.
for _name, _arguments, _allowed in (
    ("kexec_load", (0, 99, 0, 0), ("EINVAL",)),
    ("kexec_file_load", (-1, -1, 0, 0, -1), ("EINVAL", "EBADF")),
    ("init_module", (0, 0, 0), ("ENOEXEC", "EFAULT")),
    ("finit_module", (-1, 0, 0), ("EBADF",)),
    ("delete_module", (b"sandboxd_selftest", 0x800), ("ENOENT",)),
    ("reboot", (0, 0, 0, 0), ("EINVAL",)),
    ("swapon", (b"/sandboxd-selftest", 0), ("ENOENT",)),
    ("swapoff", (b"/sandboxd-selftest",), ("ENOENT",)),
    ("adjtimex", (_timex(),), ("EINVAL",)),
    ("clock_adjtime", (0, _timex()), ("EINVAL",)),
    ("acct", (b"/sandboxd-selftest",), ("ENOENT",)),
    ("syslog", (8, 0, 99), ("EINVAL",)),
    ("sethostname", (b"sandboxd-selftest", 17), ("ok",)),
    ("setdomainname", (b"sandboxd-selftest", 17), ("ok",)),
    ("vhangup", (), ("ok",)),
    ("iopl", (3,), ("ok",)),
    ("ioperm", (0x80, 1, 1), ("ok",)),
    ("bpf", (0, struct.pack("4I", 2, 4, 4, 1).ljust(120, b"\0"), 120), ("ok",)),
    ("fanotify_init", (4, 0), ("ok",)),
    ("userfaultfd", (0,), ("ok",)),
):
    if NUMBERS[_name] >= 0:
        add(_name, _CALLS, _raw(_name, *_arguments), "EPERM", "ENOSYS", filtered="EPERM",
            outside=SCRATCH, allowed=_allowed, fallback=getpid, says=_AS_ROOT)  # fmt: skip


def _counters(flags: int) -> Any:
    """PERF_COUNT_SW_CPU_CLOCK of this process; ``flags`` leave out the kernel's part or not."""
    return struct.pack("IIQQQQQ", 1, 112, 0, 0, 0, 0, flags).ljust(112, b"\0")


add("perf_event_open of the kernel", _CALLS, _raw("perf_event_open", _counters(0), 0, -1, -1, 0),
    "EACCES", "EPERM", filtered="EPERM", outside=SCRATCH, fallback=getpid,
    says=_AS_ROOT)  # fmt: skip


def _traceme(plan: Plan) -> None:
    call("ptrace", 0, 0, 0, 0)


def _own_memory(plan: Plan) -> None:
    buffer = ctypes.create_string_buffer(8)
    vector = struct.pack("PN", ctypes.addressof(buffer), 8)
    call("process_vm_readv", os.getpid(), vector, 1, vector, 1, 0)


def _ring(plan: Plan) -> None:
    os.close(call("io_uring_setup", 1, ctypes.create_string_buffer(120)))


def _remap(plan: Plan) -> None:
    area = mmap.mmap(-1, 8192, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    call("remap_file_pages", address, 4096, 0, 1, 0)


# Nothing but the filter stands in the way of these: each has been a way into the kernel.
for _name, _attack, _allowed in (
    ("io_uring_setup", _ring, ("ok",)),
    ("perf_event_open of itself", _raw("perf_event_open", _counters(0x60), 0, -1, -1, 0), ("ok",)),
    ("userfaultfd, user mode only", _raw("userfaultfd", 1), ("ok",)),
    ("fanotify_init, unprivileged", _raw("fanotify_init", 0x200, 0), ("ok",)),
    ("ptrace: ask to be traced", _traceme, ("ok",)),
    ("process_vm_readv of itself", _own_memory, ("ok",)),
    ("kcmp of itself", lambda plan: call("kcmp", os.getpid(), os.getpid(), 1, 0, 0) and None,
     ("ok",)),
    ("pidfd_getfd of itself",
     lambda plan: os.close(call("pidfd_getfd", os.pidfd_open(os.getpid()), 0, 0)), ("ok",)),
    ("memfd_secret", lambda plan: os.close(call("memfd_secret", 0)), ("ok",)),
    ("personality without randomisation", _raw("personality", 0x40000), ("ok",)),
    ("personality of another system", _raw("personality", 0x6), ("ok",)),
    ("remap_file_pages", _remap, ("ok",)),
    ("set_mempolicy", _raw("set_mempolicy", 0, 0, 0), ("ok",)),
    ("get_mempolicy", _raw("get_mempolicy", 0, 0, 0, 0, 0), ("ok",)),
    ("migrate_pages", _raw("migrate_pages", 0, 0, 0, 0), ("ok",)),
    ("ustat", _raw("ustat", 0, ctypes.create_string_buffer(64)), ("ok", "EINVAL")),
    ("sysfs", _raw("sysfs", 3), ("ok",)),
    ("modify_ldt", _raw("modify_ldt", 0, ctypes.create_string_buffer(64), 64), ("ok",)),
    ("uselib", _raw("uselib", b"/sandboxd-selftest"), ("ENOENT",)),
):  # fmt: skip
    if NUMBERS.get(_name, 0) >= 0:
        add(_name, _CALLS, _attack, filtered="EPERM",
            outside=HOST, allowed=_allowed, fallback=getpid, says=_SAME)  # fmt: skip

# Numbers that this program's ABI does not have: the x32 ABI's, and those of later kernels.
if platform.machine() == "x86_64":
    for _words, _base in (("x32: getpid", 39), ("x32: ioctl", 514), ("x32: ptrace", 521)):
        add(_words, _CALLS, lambda plan, nr=_base: call(0x40000000 | nr, 0, 0, 0, 0) and None,
            "ENOSYS", inside=getpid, says="the same number without the x32 bit")  # fmt: skip
add("statmount", _CALLS, _raw("statmount", 0, 0, 0, 0), filtered="ENOSYS", outside=HOST,
    allowed=("EFAULT", "EINVAL"), fallback=getpid, says=_SAME)  # fmt: skip
add("listmount", _CALLS, _raw("listmount", 0, 0, 0, 0), filtered="ENOSYS", outside=HOST,
    allowed=("EFAULT", "EINVAL", "ok"), fallback=getpid, says=_SAME)  # fmt: skip
add("a number no kernel has", _CALLS, lambda plan: call(100_000) and None, "ENOSYS",
    inside=getpid, says="a number that it has")  # fmt: skip


def _family(family: int, kind: int, protocol: int = 0) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        socket.socket(family, kind, protocol).close()

    return attack


_RAW, _DGRAM, _STREAM, _SEQ = (
    socket.SOCK_RAW, socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET,
)  # fmt: skip
_unix = _family(socket.AF_UNIX, _STREAM)
for _words, _arguments, _denials, _filtered in (
    ("packet, raw", (17, _RAW, 0x300), ("EPERM",), "EAFNOSUPPORT"),
    ("packet, datagram", (17, _DGRAM, 0x300), ("EPERM",), "EAFNOSUPPORT"),
    ("IPv4, raw", (2, _RAW, 255), ("EPERM",), "EPERM"),
    ("IPv4, raw ICMP", (2, _RAW, 1), ("EPERM",), "EPERM"),
    ("IPv6, raw", (10, _RAW, 58), ("EPERM",), "EPERM"),
    ("IPv4, ping", (2, _DGRAM, 1), ("EACCES",), ""),
    ("IPv4, SCTP", (2, _STREAM, 132), (), "EPERM"),
    ("IPv4, MPTCP", (2, _STREAM, 262), (), "EPERM"),
    ("vsock", (40, _STREAM), (), "EAFNOSUPPORT"),
    ("alg", (38, _SEQ), (), "EAFNOSUPPORT"),
    ("xdp", (44, _RAW), (), "EAFNOSUPPORT"),
    ("key", (15, _RAW, 2), (), "EAFNOSUPPORT"),
    ("bluetooth", (31, _RAW, 1), (), "EAFNOSUPPORT"),
    ("can", (29, _RAW, 1), (), "EAFNOSUPPORT"),
    ("tipc", (30, _SEQ), (), "EAFNOSUPPORT"),
    ("rds", (21, _SEQ), (), "EAFNOSUPPORT"),
    ("x25", (9, _SEQ), (), "EAFNOSUPPORT"),
    ("appletalk", (5, _DGRAM), (), "EAFNOSUPPORT"),
    ("llc", (26, _STREAM), (), "EAFNOSUPPORT"),
    ("kcm", (41, _DGRAM), (), "EAFNOSUPPORT"),
    ("qipcrtr", (42, _DGRAM), (), "EAFNOSUPPORT"),
    ("smc", (43, _STREAM), (), "EAFNOSUPPORT"),
    ("rxrpc", (33, _DGRAM, 2), (), "EAFNOSUPPORT"),
    ("pppox", (24, _STREAM), (), "EAFNOSUPPORT"),
    ("ieee802154", (36, _DGRAM), (), "EAFNOSUPPORT"),
    ("nfc", (39, _SEQ), (), "EAFNOSUPPORT"),
    ("netlink, netfilter", (16, _RAW, 12), (), "EPERM"),
    ("netlink, audit", (16, _RAW, 9), (), "EPERM"),
    ("netlink, kernel events", (16, _RAW, 15), (), "EPERM"),
    ("netlink, generic", (16, _RAW, 16), (), "EPERM"),
    ("netlink, socket diagnosis", (16, _RAW, 4), (), "EPERM"),
    ("netlink, xfrm", (16, _RAW, 6), (), "EPERM"),
):
    add(_words, _FAMILIES, _family(*_arguments), *_denials, filtered=_filtered, outside=SCRATCH,
        fallback=_unix, says=_AS_ROOT)  # fmt: skip


def _on_terminal(request: int, argument: bytes) -> Callable[[Plan], str | None]:
    """ioctl(2) on a terminal that is the caller's own controlling one."""

    def attack(plan: Plan) -> str | None:
        read, write = os.pipe()
        pid, master = pty.fork()
        if pid == 0:
            try:
                ioctl(0, request, ctypes.create_string_buffer(argument, 64))
                word = "ok"
            except OSError as failure:
                word = str(failure.errno)
            os.write(write, word.encode())
            os._exit(0)
        os.close(write)
        word = os.read(read, 16).decode()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(master)
        if word != "ok":
            raise OSError(int(word), "")
        return None

    return attack


_size = _on_terminal(0x5413, b"")  # TIOCGWINSZ
_ignored = ("ENOTTY", "EINVAL", "ok")
for _words, _request, _argument, _past in (
    ("type into it (TIOCSTI)", 0x5412, b"x", ("ok",)),
    ("type into it, with high bits", 0x5412 | 1 << 32, b"x", ("ok",)),
    ("paste into it (TIOCLINUX)", 0x541C, b"\x03", _ignored),
    ("paste into it, with high bits", 0x541C | 7 << 40, b"\x03", _ignored),
    ("change its discipline (TIOCSETD)", 0x5423, b"\0\0\0\0", ("ok",)),
):
    add(_words, _TERMINAL, _on_terminal(_request, _argument), filtered="EPERM", outside=HOST,
        allowed=_past, fallback=_size, says=_SAME)  # fmt: skip
add("take the console's output (TIOCCONS)", _TERMINAL, _on_terminal(0x541D, b""), "EPERM",
    inside=_size, says="asking its size")  # fmt: skip
