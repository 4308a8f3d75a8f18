"""A time namespace: a sandbox's clocks don't tell how long this host has been running.

The monotonic and the boot-time clock, and with them the uptime and the moment of boot in /proc,
count from the sandbox's own start (time_namespaces(7)). The wall clock is everybody's. The
namespace belongs to the sandbox's innermost user namespace, where nobody is left with a
capability, and its offsets are fixed for good by the first process in it.

Standard library only.
"""

from __future__ import annotations

import os
import time

from sandboxd.errors import KernelError
from sandboxd.isolation import kernel

__all__ = ["START", "available", "enter"]

#: What the clocks of every sandbox begin with, in seconds: a machine that was started yesterday.
#: Less would be met on freshly started machines only, where programs that take 0 for "never" err.
START = 86_400

_OFFSETS = (("monotonic", time.CLOCK_MONOTONIC), ("boottime", time.CLOCK_BOOTTIME))


class _Tried:
    """What the launcher found out once, for every sandbox that it forks."""

    works: bool | None = None


def available() -> bool:
    """Whether this process's children can have a time namespace; tried once, in one of them.

    It takes Linux 5.6 with CONFIG_TIME_NS, and a limit (user.max_time_namespaces) above 0.
    """
    if _Tried.works is None:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                kernel.unshare(kernel.CLONE_NEWUSER)
                kernel.set_dumpable(True)  # else /proc/self belongs to root (proc(5))
                _move()
                code = 0
            finally:
                os._exit(code)
        _Tried.works = os.waitpid(pid, 0)[1] == 0
    return _Tried.works


def enter() -> None:
    """Move this process, which must have one thread, into a new time namespace.

    For a process with every capability in its user namespace and a /proc that is its own to write.
    Does nothing where there are none (``available``); a policy that must have one says so. Raises
    KernelError.
    """
    if available():
        _move()


def _move() -> None:
    kernel.unshare(kernel.CLONE_NEWTIME)
    # "CLOCK SECONDS NANOSECONDS"; only before anybody is in there (time_namespaces(7)).
    text = ""
    for name, clock in _OFFSETS:
        seconds, nanoseconds = divmod(START * 10**9 - time.clock_gettime_ns(clock), 10**9)
        text += f"{name} {seconds} {nanoseconds}\n"
    fd = _open("/proc/self/timens_offsets", os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    except OSError as failure:
        raise KernelError("write", failure.errno or 0, "/proc/self/timens_offsets") from None
    finally:
        os.close(fd)
    # unshare(2) moves only children to come, and before Linux 6.3 a process whose children go
    # elsewhere can have neither threads nor vfork(2).
    fd = _open("/proc/self/ns/time_for_children", os.O_RDONLY)
    try:
        kernel.setns(fd, kernel.CLONE_NEWTIME)
    finally:
        os.close(fd)


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as failure:
        raise KernelError("open", failure.errno or 0, path) from None
