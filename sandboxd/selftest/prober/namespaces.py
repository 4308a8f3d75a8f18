"""Namespaces and mounts: none made, none entered, nothing mounted, no second root."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH115, PTH116, PTH123, S108

from __future__ import annotations

import ctypes
import os
import signal
import stat
import struct
from collections.abc import Callable
from typing import Any

from sandboxd.selftest.prober.kernel import call, ioctl
from sandboxd.selftest.prober.probe import HOST, SCRATCH, Attack, Plan, add

_THREAT = "Escape: namespaces"
_MOUNTS = "Escape: mounts"
_NEW = {
    "mount": 0x20000,
    "cgroup": 0x2000000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "time": 0x80,
}
_NEW_USER = 0x10000000
_IN_SCRATCH = "the same as root of scratch namespaces"
_FILES = {"mount": "mnt", "network": "net"}
_AT_FDCWD = -100


def getpid(plan: Plan) -> None:
    """The raw call itself works: what is refused was understood."""
    if call("getpid") != os.getpid():
        raise OSError(38, "the wrapper is wrong")


def _unshare(flag: int) -> Attack:
    return lambda plan: call("unshare", flag) and None


def _clone(flags: int) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        pid = call("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    return attack


def _clone3(flags: int) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        arguments = struct.pack("11Q", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0)
        pid = call("clone3", ctypes.create_string_buffer(arguments, 88), 88)
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    return attack


def _join(path: str) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        fd = os.open(path, os.O_RDONLY)
        call("setns", fd, 0)

    return attack


def _join_init(plan: Plan) -> None:
    pid = 1 if plan.inside else os.getpid()
    call("setns", os.pidfd_open(pid), _NEW["uts"])


def _relative(kind: str, request: int) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        os.close(ioctl(os.open(f"/proc/self/ns/{kind}", os.O_RDONLY), request))

    return attack


# Making a user namespace gives every capability over new kernel surface.
add("unshare: user namespace", _THREAT, _unshare(_NEW_USER), "ENOSPC", filtered="EPERM",
    outside=HOST, fallback=getpid, says="the same outside")  # fmt: skip
add("clone: user namespace", _THREAT, _clone(_NEW_USER), "ENOSPC", filtered="EPERM",
    outside=HOST, fallback=getpid, says="the same outside")  # fmt: skip
add("clone3: user namespace", _THREAT, _clone3(_NEW_USER), "ENOSPC", filtered="ENOSYS",
    outside=HOST, fallback=getpid, says="the same outside")  # fmt: skip
add("unshare: user and mount namespace", _THREAT, _unshare(_NEW_USER | _NEW["mount"]), "ENOSPC",
    filtered="EPERM", outside=HOST, fallback=getpid, says="the same outside")  # fmt: skip
for _name, _flag in _NEW.items():
    add(f"unshare: {_name} namespace", _THREAT, _unshare(_flag), "EPERM", outside=SCRATCH,
        fallback=getpid, says=_IN_SCRATCH)  # fmt: skip
for _name in ("mount", "pid", "network"):
    add(f"clone: {_name} namespace", _THREAT, _clone(_NEW[_name]), "EPERM", outside=SCRATCH,
        fallback=getpid, says=_IN_SCRATCH)  # fmt: skip
for _name in ("mount", "uts", "ipc", "pid", "network", "cgroup"):
    add(f"setns: own {_name} namespace", _THREAT,
        _join(f"/proc/self/ns/{_FILES.get(_name, _name)}"), "EPERM", outside=SCRATCH,
        fallback=getpid, says=_IN_SCRATCH)  # fmt: skip
add("setns: own user namespace", _THREAT, _join("/proc/self/ns/user"), "EINVAL", filtered="EPERM",
    inside=lambda plan: os.readlink("/proc/self/ns/user") and None,
    says="the same file is read as a link")  # fmt: skip
add("setns: init's namespaces by pidfd", _THREAT, _join_init, "EPERM", outside=SCRATCH,
    fallback=getpid, says=_IN_SCRATCH)  # fmt: skip
for _kind, _words, _request in (
    ("user", "parent of the user namespace", 0xB702),
    ("pid", "parent of the pid namespace", 0xB702),
    ("net", "owner of the network namespace", 0xB701),
    ("mnt", "owner of the mount namespace", 0xB701),
):
    add(f"open the {_words}", _THREAT, _relative(_kind, _request), "EPERM",
        inside=lambda plan, kind=_kind: ioctl(os.open(f"/proc/self/ns/{kind}", 0), 0xB703) and None,
        says="its type may be asked")  # fmt: skip


def _mount(source: bytes | None, target: bytes, kind: bytes | None, flags: int) -> Any:
    return lambda plan: call("mount", source, target, kind, flags, None) and None


_BIND, _REMOUNT, _REC, _SHARED = 0x1000, 0x20, 0x4000, 0x100000
for _words, _arguments, _lacking in (
    ("tmpfs", (b"tmpfs", b"/tmp", b"tmpfs", 0), False),
    ("proc", (b"proc", b"/tmp", b"proc", 0xE), False),
    ("sysfs", (b"sysfs", b"/tmp", b"sysfs", 0), True),
    ("devpts", (b"devpts", b"/tmp", b"devpts", 0), True),
    ("mqueue", (b"mqueue", b"/tmp", b"mqueue", 0), True),
    ("cgroup2", (b"cgroup2", b"/tmp", b"cgroup2", 0), True),
    ("a bind of /usr", (b"/usr", b"/tmp", None, _BIND), False),
    ("/usr, made writable", (None, b"/", None, _REMOUNT | _BIND), False),
    ("/, made shared", (None, b"/", None, _SHARED | _REC), False),
):
    add(f"mount {_words}", _MOUNTS, _mount(*_arguments), "EPERM", outside=SCRATCH,
        says=_IN_SCRATCH, **({"fallback": getpid} if _lacking else {}))  # fmt: skip


def _unmount(path: str) -> Attack:
    """What covers something of the host is not lifted; outside, /mnt is a mount of ours."""
    return lambda plan: call("umount2", (path if plan.inside else "/mnt").encode(), 2) and None


for _at in ("/tmp", "/proc/sys", "/proc/interrupts"):
    add(f"unmount {_at}", _MOUNTS, _unmount(_at), "EPERM", outside=SCRATCH,
        says=_IN_SCRATCH)  # fmt: skip


def _pivot(plan: Plan) -> None:
    os.chdir("/tmp" if plan.inside else "/mnt")
    call("pivot_root", b".", b".")


def _chroot(plan: Plan) -> None:
    os.chroot("/usr")


def _open_tree(plan: Plan) -> None:
    os.close(call("open_tree", _AT_FDCWD, b"/usr", 1))


def _fspick(plan: Plan) -> None:
    os.close(call("fspick", _AT_FDCWD, b"/tmp" if plan.inside else b"/mnt", 1))


def _move_mount(plan: Plan) -> None:
    at = b"/tmp" if plan.inside else b"/mnt"
    call("move_mount", _AT_FDCWD, at, _AT_FDCWD, b"/usr", 0)


def _set_attributes(plan: Plan) -> None:
    at = b"/tmp" if plan.inside else b"/mnt"
    call("mount_setattr", _AT_FDCWD, at, 0, struct.pack("4Q", 1, 0, 0, 0), 32)


def _fsopen(plan: Plan) -> None:
    os.close(call("fsopen", b"tmpfs", 1))


for _words, _attack in (
    ("pivot_root", _pivot),
    ("chroot", _chroot),
    ("open_tree, cloning", _open_tree),
    ("fsopen", _fsopen),
    ("fspick", _fspick),
    ("move_mount", _move_mount),
    ("mount_setattr", _set_attributes),
):
    add(_words, _MOUNTS, _attack, "EPERM", outside=SCRATCH, fallback=getpid,
        says=_IN_SCRATCH)  # fmt: skip


def _by_handle(plan: Plan) -> None:
    """A forged handle of inode 2, the root of most file systems (CVE-2014-3519 and "shocker")."""
    handle = struct.pack("IiQ", 8, 1, 2)
    os.close(call("open_by_handle_at", _AT_FDCWD, handle, os.O_RDONLY))


def _handle(plan: Plan) -> None:
    handle = ctypes.create_string_buffer(struct.pack("Ii", 120, 0), 128)
    call("name_to_handle_at", _AT_FDCWD, b"/tmp", handle, ctypes.byref(ctypes.c_int()), 0)


add("open_by_handle_at", _MOUNTS, _by_handle, "EPERM", outside=SCRATCH,
    allowed=("ok", "ESTALE", "EINVAL", "EOPNOTSUPP"), fallback=getpid,
    says=_IN_SCRATCH)  # fmt: skip
add("name_to_handle_at", _MOUNTS, _handle, filtered="EPERM", outside=HOST,
    allowed=("ok", "EOPNOTSUPP"), fallback=getpid, says="the same outside")  # fmt: skip


def _shares(kind: str) -> Callable[[Plan], str]:
    """Whether a namespace is the host's, or another session's."""
    return lambda plan: (
        "ok" if os.readlink(f"/proc/self/ns/{kind}") in plan.namespaces[kind] else "own"
    )


for _kind in ("user", "mnt", "pid", "ipc", "uts", "cgroup", "net", "time"):
    _needs = "time namespace" if _kind == "time" else ""
    add(f"share a {_kind} namespace", _THREAT, _shares(_kind), "own", needs=_needs, outside=HOST,
        says="outside it is the host's")  # fmt: skip


def _options(wanted: str) -> Callable[[Plan], tuple[str, str]]:
    """Mounts that lack an option. Single devices are counted elsewhere."""

    def attack(plan: Plan) -> tuple[str, str]:
        lacking = []
        with open("/proc/self/mountinfo") as mounts:
            for line in mounts:
                fields = line.split()
                if wanted not in fields[5].split(",") and not _is_device(fields[4]):
                    lacking.append(fields[4])
        return ("none" if not lacking else "ok"), ", ".join(lacking)[:200]

    return attack


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode) or path == "/dev/pts"
    except OSError:
        return False


for _option in ("nosuid", "nodev"):
    add(f"mounts without {_option}", _MOUNTS, _options(_option), "none", outside=HOST,
        says="outside there are some")  # fmt: skip
