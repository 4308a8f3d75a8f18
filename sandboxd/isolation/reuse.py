"""The broker's side of templates: which launches may use one, and what it must have in common."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from sandboxd.isolation.root import system_paths
from sandboxd.isolation.wire import FIRST_HIGH_FD, MAX_FDS, LaunchSpec, lasting_part

__all__ = ["spare_key", "template_key", "template_suits"]

#: Below these a template, under the same limits as its calls, had no room for itself.
_LEAST_MEMORY = 48 << 20
_LEAST_PROCESSES = 4
_LEAST_FILES = 64
_NULL = os.makedev(1, 3)  # Documentation/admin-guide/devices.txt


def template_suits(spec: LaunchSpec, streams: Sequence[int] = ()) -> bool:
    """Whether a template can give ``spec`` all that a sandbox made for it alone would.

    Not where it needs a terminal, a copy-on-write workspace, listeners, limits too small for the
    template itself, files outside /run or such as can be executed (which no file can that is held
    open for writing), or mounts where a call's own memory or files go; nor where a program could
    open one of its ``streams`` again (proc(5), /proc/PID/fd) that is a file or a device of the
    host, for a template is restricted before it gets them.
    """
    limits = spec.limits
    files = limits.open_files
    largest = max((len(file.content) for file in spec.files), default=0)
    if (
        spec.tty
        or spec.overlay is not None
        or spec.brings_namespace
        or spec.waits
        or spec.further
        or spec.listeners
        or 0 < limits.memory < _LEAST_MEMORY
        or 0 < limits.processes < _LEAST_PROCESSES
        or 0 < files < (FIRST_HIGH_FD + MAX_FDS if spec.extra_fds else _LEAST_FILES)
        or 0 < limits.file_size < largest
        or not all(file.path.startswith("/run/") for file in spec.files)
        or any(file.mode & 0o111 for file in spec.files)
        or len({file.path for file in spec.files}) < len(spec.files)
        or not all(_needs_no_path(fd) for fd in streams)
    ):
        return False
    private = {"/tmp", "/home", f"/home/{spec.user}"}  # noqa: S108 - the sandbox's own
    taken = {"dev", "run"} if spec.files else {"dev"}
    targets = ["/" + mount.target.strip("/") for mount in spec.mounts]
    return not any(target in private or target.split("/")[1] in taken for target in targets)


def _needs_no_path(fd: int) -> bool:
    """Whether ``fd`` is a pipe, a socket, /dev/null, or a file in no directory (a memfd)."""
    try:
        there = os.fstat(fd)
    except OSError:
        return False  # to be told by who passes it on
    if stat.S_ISCHR(there.st_mode):
        return there.st_rdev == _NULL
    if stat.S_ISREG(there.st_mode):
        return there.st_nlink == 0
    return stat.S_ISFIFO(there.st_mode) or stat.S_ISSOCK(there.st_mode)


def template_key(spec: LaunchSpec, lasting: bytes) -> object:
    """Equal for launches that may share a template, and only for these.

    A directory or program that was replaced since, by another of the same path, makes another.
    ``lasting`` is the encoded part of the same name.
    """
    return lasting, *(_identity(mount.source) for mount in spec.mounts)


def spare_key(spec: LaunchSpec) -> object:
    """Equal for launches that may take place in the same sandbox that waits for its program.

    The contents of ``spec.files`` aren't compared. The system's own files are: a package manager
    replaces some of them.
    """
    system = (_identity(path) for path in system_paths())
    return (template_key(spec, lasting_part(spec)), *system)


def _identity(path: str) -> tuple[int, int]:
    try:
        there = os.stat(path)
    except OSError as failure:
        return -1, failure.errno or 0
    return there.st_dev, there.st_ino
