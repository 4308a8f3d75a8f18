"""System calls that Python 3.11 has no wrapper for, each failing as a :class:`KernelError`.

ctypes only: this module is part of the privileged process, which imports no third-party code.
Numbers above 424 are the same on every architecture (include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Iterable
from typing import Any

from sandboxd.errors import KernelError, Unavailable

__all__ = [
    "CLONE_NEWCGROUP",
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "CLONE_NEWTIME",
    "CLONE_NEWUSER",
    "CLONE_NEWUTS",
    "adopt_orphans",
    "argument_area",
    "clone_tree",
    "close_all_but",
    "drop_bounding_set",
    "drop_capabilities",
    "fork_into",
    "join_new_keyring",
    "mount",
    "mount_filesystem",
    "move_mount",
    "no_new_privileges",
    "open_beneath",
    "pivot_root",
    "set_dumpable",
    "set_keep_capabilities",
    "set_mount_attributes",
    "set_title",
    "sethostname",
    "setns",
    "umount_detached",
    "unshare",
    "wipe",
]

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MOUNT_ATTR_IDMAP = 0x00100000

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1

_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_SET_NAME = 15
_PR_CAPBSET_DROP = 24
_PR_SET_SECUREBITS = 28
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_KEYCTL_JOIN_SESSION_KEYRING = 1

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_CLONE3 = 435
_SYS_CLOSE_RANGE = 436
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442
# The old numbers differ by architecture: (pivot_root, keyctl).
_OLD_NUMBERS = {"x86_64": (155, 250), "aarch64": (41, 219), "riscv64": (41, 219)}

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_UINT_MAX = 0xFFFFFFFF
#: The C library again, called without letting go of the interpreter's lock.
_held_libc: Any = ctypes.PyDLL(None, use_errno=True)
_held_libc.syscall.restype = ctypes.c_long
_CLONE_INTO_CGROUP = 0x200000000


def unshare(flags: int) -> None:
    """unshare(2): leave the shared namespaces named by ``flags``."""
    if _libc.unshare(ctypes.c_int(flags)) < 0:
        raise _failed("unshare", _flag_names(flags))


def setns(fd: int, flags: int) -> None:
    """setns(2): enter the namespace behind ``fd``."""
    if _libc.setns(ctypes.c_int(fd), ctypes.c_int(flags)) < 0:
        raise _failed("setns", _flag_names(flags))


def fork_into(cgroup: int) -> int:
    """clone3(2) with CLONE_INTO_CGROUP, as fork(2) but for the cgroup that the child is born in.

    What os.fork() does around fork(2) is done here with the same public calls (Python/C API,
    PyOS_BeforeFork). For a process with one thread.
    """
    # Of struct clone_args all is 0 but flags, exit_signal and, as its last member, cgroup.
    args = struct.pack("=11Q", _CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, *(0,) * 5, cgroup)
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _held_libc.syscall(_SYS_CLONE3, args, len(args))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise _failed("clone3", "into a cgroup")
    return int(pid)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2), the classic interface: propagation changes and simple filesystems."""
    done = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    if done < 0:
        raise _failed("mount", target)


def umount_detached(target: str) -> None:
    """umount2(2) with MNT_DETACH: the mount leaves the tree now, and ends when unused."""
    if _libc.umount2(os.fsencode(target), MNT_DETACH) < 0:
        raise _failed("umount2", target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    number, _ = _old_numbers()
    if _libc.syscall(number, os.fsencode(new_root), os.fsencode(put_old)) < 0:
        raise _failed("pivot_root", new_root)


def open_beneath(directory: int, path: str | bytes, flags: int, *, resolve: int) -> int:
    """openat2(2) with ``resolve`` rules; O_CLOEXEC is added. Returns a descriptor."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    fd = _libc.syscall(_SYS_OPENAT2, directory, os.fsencode(path), how, len(how))
    if fd < 0:
        raise _failed("openat2", os.fsdecode(path))
    return int(fd)


def clone_tree(directory: int, path: str = "", *, recursive: bool, shown: str = "") -> int:
    """open_tree(2): a detached copy of the mount at ``path``, to be configured and then placed.

    An empty ``path`` means ``directory`` itself. ``shown`` is what an error calls it.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    flags |= (0 if path else AT_EMPTY_PATH) | (AT_RECURSIVE if recursive else 0)
    tree = _libc.syscall(_SYS_OPEN_TREE, directory, os.fsencode(path), ctypes.c_uint(flags))
    if tree < 0:
        raise _failed("open_tree", shown or path)
    return int(tree)


def set_mount_attributes(
    fd: int, attributes: int, *, recursive: bool, userns: int = 0, path: str = ""
) -> None:
    """mount_setattr(2): add ``attributes`` (MOUNT_ATTR_*) to a mount, or to its whole tree."""
    attr = struct.pack("=QQQQ", attributes, 0, 0, userns)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    if _libc.syscall(_SYS_MOUNT_SETATTR, fd, b"", flags, attr, len(attr)) < 0:
        raise _failed("mount_setattr", path)


def move_mount(tree: int, directory: int, path: str = "") -> None:
    """move_mount(2): place a detached mount on ``path`` below ``directory`` (or on itself)."""
    to_empty = 0x40 if not path else 0  # MOVE_MOUNT_T_EMPTY_PATH
    done = _libc.syscall(
        _SYS_MOVE_MOUNT,
        tree,
        b"",
        directory,
        os.fsencode(path),
        ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH | to_empty),
    )
    if done < 0:
        raise _failed("move_mount", path)


def mount_filesystem(kind: str, attributes: int, **options: str | None) -> int:
    """fsopen(2), fsconfig(2), fsmount(2): a new detached filesystem. ``None`` makes a flag."""
    context = _libc.syscall(_SYS_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
    if context < 0:
        raise _failed("fsopen", kind)
    try:
        for key, value in options.items():
            command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
            text = None if value is None else value.encode()
            if _libc.syscall(_SYS_FSCONFIG, context, command, key.encode(), text, 0) < 0:
                raise _failed("fsconfig", f"{kind} {key}")
        if _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) < 0:
            raise _failed("fsconfig", kind)
        fd = _libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
        if fd < 0:
            raise _failed("fsmount", kind)
        return int(fd)
    finally:
        os.close(context)


def sethostname(name: str) -> None:
    """sethostname(2) in the current UTS namespace."""
    text = name.encode()
    if _libc.sethostname(text, len(text)) < 0:
        raise _failed("sethostname", name)


def set_dumpable(dumpable: bool) -> None:
    """PR_SET_DUMPABLE: off means no core dumps, no ptrace, and a /proc/PID owned by root."""
    _prctl(_PR_SET_DUMPABLE, int(dumpable))


def adopt_orphans() -> None:
    """PR_SET_CHILD_SUBREAPER: descendants whose parents end become this process's children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_keep_capabilities(keep: bool) -> None:
    """PR_SET_KEEPCAPS: keep the permitted set across the coming change of user id."""
    _prctl(_PR_SET_KEEPCAPS, int(keep))


def no_new_privileges() -> None:
    """PR_SET_NO_NEW_PRIVS: setuid and file capabilities give nothing from here on."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def set_effective_capabilities() -> None:
    """Raise the effective set to the permitted set (after PR_SET_KEEPCAPS it starts empty)."""
    header, data = _capability_header(), (ctypes.c_uint32 * 6)()
    if _libc.capget(header, data) < 0:
        raise _failed("capget")
    data[0], data[3] = data[1], data[4]
    if _libc.capset(header, data) < 0:
        raise _failed("capset")


def drop_bounding_set() -> None:
    """Empty the capability bounding set.

    That needs CAP_SETPCAP; without it (a process that never had any capability) the set is left,
    and with no_new_privs and an empty permitted set it gives nothing.
    """
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) == 0:
        capability += 1


def drop_capabilities() -> None:
    """Empty the bounding, ambient, permitted, effective and inheritable sets (capabilities(7))."""
    drop_bounding_set()
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    # SECBIT_NOROOT, SECBIT_NO_SETUID_FIXUP, SECBIT_NO_CAP_AMBIENT_RAISE, each with its lock.
    _libc.prctl(_PR_SET_SECUREBITS, ctypes.c_ulong(0xCF), 0, 0, 0)
    if _libc.capset(_capability_header(), (ctypes.c_uint32 * 6)()) < 0:
        raise _failed("capset")


def join_new_keyring() -> None:
    """keyctl(KEYCTL_JOIN_SESSION_KEYRING): an anonymous session keyring, holding nothing."""
    _, number = _old_numbers()
    if _libc.syscall(number, _KEYCTL_JOIN_SESSION_KEYRING, None) < 0:
        error = ctypes.get_errno()
        if error != 38:  # ENOSYS: a kernel without keyrings has none to inherit
            raise KernelError("keyctl", error)


def close_all_but(wanted: Iterable[int]) -> None:
    """close_range(2): close every descriptor that is not in ``wanted``."""
    start = 0
    for fd in (*sorted(set(wanted)), _UINT_MAX):
        if start < fd:
            last = ctypes.c_uint(fd - 1)
            if _libc.syscall(_SYS_CLOSE_RANGE, ctypes.c_uint(start), last, 0) < 0:
                raise _failed("close_range")
        start = fd + 1


def argument_area() -> tuple[int, int]:
    """Where this process's command line lies in memory: address and size (proc(5), stat)."""
    with open("/proc/self/stat", "rb") as stat:
        fields = stat.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, fields 48 and 49
    return (start, end - start) if 0 < start < end else (0, 0)


def set_title(area: tuple[int, int], title: str) -> None:
    """Show ``title`` instead of the command line, with its host paths, in /proc/PID/cmdline."""
    address, size = area
    text = title.encode()[: max(0, size - 1)]
    if size:
        ctypes.memset(address, 0, size)
        ctypes.memmove(address, text, len(text))
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(title.encode()), 0, 0, 0)


def wipe(value: bytes) -> None:
    """Overwrite a bytes object in memory. Only for the one who made it and needs it no more."""
    if len(value) > 1:  # shorter ones are shared by all of Python
        ctypes.memset(id(value) + bytes.__basicsize__ - 1, 0, len(value))


def _capability_header() -> Any:
    # _LINUX_CAPABILITY_VERSION_3 and pid 0, this thread (capset(2)).
    return (ctypes.c_uint32 * 2)(0x20080522, 0)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) < 0:
        raise _failed("prctl", str(option))


def _old_numbers() -> tuple[int, int]:
    machine = os.uname().machine
    try:
        return _OLD_NUMBERS[machine]
    except KeyError:
        raise Unavailable(
            f"the launcher does not know the system call numbers of {machine}",
            hint="supported: " + ", ".join(sorted(_OLD_NUMBERS)),
        ) from None


def _flag_names(flags: int) -> str:
    names = [
        name.removeprefix("CLONE_NEW").lower()
        for name, bit in sorted(globals().items())
        if name.startswith("CLONE_NEW") and flags & bit
    ]
    return "+".join(names)


def _failed(call: str, path: str = "") -> KernelError:
    return KernelError(call, ctypes.get_errno(), path)
