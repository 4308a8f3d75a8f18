"""What the launcher and its templates report, as the broker understands it."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
from dataclasses import dataclass

from sandboxd.errors import KernelError, SandboxdError, Unavailable
from sandboxd.isolation.wire import Frame

__all__ = ["Exit", "descriptors_in", "exit_of", "failure_of", "gone", "pid_of"]


@dataclass(frozen=True)
class Exit:
    """How a program ended: ``code`` or ``signal`` (the other is None), and what was used.

    ``cpu_ms`` is that of the whole tree, ``max_rss_kib`` the largest process's. ``peak_kib`` is
    the most that the tree held at once, caches of files included; 0 where no cgroup tells, or
    where an earlier call of the same tool needed as much and the kernel (before Linux 6.12) can't
    set that back.
    ``oom``: the kernel ended it, or a process of it, for want of memory.
    """

    code: int | None
    signal: int | None
    cpu_ms: int
    max_rss_kib: int
    peak_kib: int = 0
    oom: bool = False


def exit_of(frame: Frame) -> Exit:
    code = os.waitstatus_to_exitcode(frame.a)
    return Exit(
        code if code >= 0 else None,
        -code if code < 0 else None,
        frame.b // 1000,
        frame.c,
        frame.d,
        frame.text == "oom",
    )


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds)


def pid_of(pidfd: int) -> int:
    """The pid behind a pidfd as this process's /proc names it (pidfd_open(2)); 0 if ended."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{pidfd}") as info:
        for line in info:
            if line.startswith("Pid:"):
                return max(0, int(line.split()[1]))
    return 0


def gone() -> Unavailable:
    return Unavailable("the launcher is gone", hint="restart the daemon: it can launch nothing now")


def failure_of(frame: Frame) -> SandboxdError:
    call, _, path = frame.text.partition("\t")
    return KernelError(call, frame.a, path, hint=_hint(call, frame.a, path))


def _hint(call: str, code: int, path: str) -> str:
    if call == "execve" and code == errno.ENOENT:
        return f"{path} is not in the sandbox, or its interpreter isn't; mount what it needs"
    if call == "execve" and code == errno.EACCES:
        return f"{path} is not executable in the sandbox"
    if code == errno.ESTALE:
        return f"{path} was replaced while the call was starting; look at what does that"
    if call == "execve" and code == errno.E2BIG:
        return "arguments and environment are larger than the kernel takes (execve(2), E2BIG)"
    if call == "mount_setattr" and code == errno.EINVAL:
        return f"the file system of {path} has no id-mapped mounts; use a local one (ext4, xfs...)"
    if call == "idmap":
        return "give the workspace to an ordinary user: chown USER DIR"
    if call == "setxattr" or path.startswith("overlay"):
        return "a copy-on-write workspace can't be had here; see docs/configuration.md, workspace"
    if call == "keyctl" and code == errno.EDQUOT:
        return (
            "the daemon's user has no room for another session keyring, of which each sandbox has "
            "one: sysctl -w kernel.keys.maxkeys=5000, or stop sessions; see: sandboxctl doctor"
        )
    if call in ("unshare", "write", "setns", "fsmount"):
        return "this host withholds what a sandbox needs; see: sandboxctl doctor"
    return ""
