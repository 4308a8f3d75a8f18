"""Raw system calls by name, with the numbers of the two common architectures."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from typing import Any

__all__ = ["NUMBERS", "call", "ioctl", "libc", "number", "raise_limit"]

libc: Any = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

#: name: (x86_64, aarch64); asm/unistd_64.h and asm-generic/unistd.h.
_BOTH: dict[str, tuple[int, int]] = {
    "getpid": (39, 172),
    "clone": (56, 220),
    "ptrace": (101, 117),
    "syslog": (103, 116),
    "capset": (126, 91),
    "uselib": (134, -1),
    "personality": (135, 92),
    "ustat": (136, -1),
    "sysfs": (139, -1),
    "vhangup": (153, 58),
    "modify_ldt": (154, -1),
    "pivot_root": (155, 41),
    "adjtimex": (159, 171),
    "acct": (163, 89),
    "mount": (165, 40),
    "umount2": (166, 39),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "remap_file_pages": (216, 234),
    "timer_create": (222, 107),
    "set_mempolicy": (238, 237),
    "get_mempolicy": (239, 236),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "unshare": (272, 97),
    "get_robust_list": (274, 100),
    "move_pages": (279, 239),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "clock_adjtime": (305, 266),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "finit_module": (313, 273),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
}
#: The same number everywhere since Linux 5.1.
_NEW = {
    "io_uring_setup": 425,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fspick": 433,
    "pidfd_open": 434,
    "clone3": 435,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
    "memfd_secret": 447,
    "statmount": 457,
    "listmount": 458,
}
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine(), 1)
NUMBERS: dict[str, int] = {name: pair[_COLUMN] for name, pair in _BOTH.items()} | _NEW


def number(name: str) -> int:
    """The number of a system call; -1 where this architecture has none."""
    return NUMBERS[name]


def call(name: str | int, *arguments: Any) -> int:
    """syscall(2). Raises OSError; ENOSYS where this architecture has no such call."""
    nr = name if isinstance(name, int) else NUMBERS[name]
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return checked(libc.syscall(ctypes.c_long(nr), *given))


def ioctl(fd: int, request: int, argument: Any = 0) -> int:
    """ioctl(2) with all 64 bits of ``request``, which Python's own wrapper would cut."""
    return checked(libc.ioctl(fd, ctypes.c_ulong(request), argument))


def checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def raise_limit(kind: int, value: int) -> None:
    """setrlimit(2) of both limits, with an OSError like any other call."""
    try:
        resource.setrlimit(kind, (value, value))
    except ValueError:  # what Python makes of EPERM here
        raise PermissionError(1, "not allowed to raise maximum limit") from None
