"""bubblewrap as near to one of our sandboxes as it allows, from the same launch spec.

It gets what ours has: every namespace, the same read-only system, private memory, the same mounts
and files, no capabilities, no_new_privs, and our own system call filter. It has no Landlock, no
limits, no cgroup, no session keyring and no host uid of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from sandboxd.isolation import seccomp
from sandboxd.isolation.root import system_layout
from sandboxd.isolation.wire import LaunchSpec, sealed_memfd

__all__ = ["FILTERS", "arguments", "filters"]

FILTERS = ("calls", "arguments", "built")
_ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "ssl")
_UID = "1000"


def arguments(
    bwrap: str, spec: LaunchSpec, filters: Sequence[int], given: ExitStack
) -> tuple[list[str], list[int]]:
    """The command line for ``spec``, and the descriptors that it must inherit.

    ``filters`` are open files of filter programs. What ``given`` holds is closed by the caller.
    """
    words = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    words += ["--uid", _UID, "--gid", _UID, "--hostname", spec.hostname]
    directories, links = system_layout()
    for path in directories:
        words += ["--ro-bind", path, path]
    for path, target in links:
        words += ["--symlink", target, path]
    for name in _ETC:
        words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    words += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108
    words += ["--tmpfs", f"/home/{spec.user}"]
    inherited = list(filters)
    for mount in spec.mounts:
        words += ["--ro-bind" if mount.readonly else "--bind", mount.source, mount.target]
    for file in spec.files:
        fd = sealed_memfd(file.content)
        given.callback(os.close, fd)
        os.lseek(fd, 0, os.SEEK_SET)
        inherited.append(fd)
        words += ["--perms", f"{file.mode:04o}", "--ro-bind-data", str(fd), file.path]
    for fd in filters:
        words += ["--add-seccomp-fd", str(fd)]
    words += ["--chdir", spec.cwd, "--", *map(os.fsdecode, spec.argv)]
    return words, inherited


def filters(given: ExitStack) -> list[int]:
    """Our filter programs as open files, from their start; empty where there are none."""
    machine = os.uname().machine
    if machine not in seccomp.MACHINES:
        return []
    directory = Path(seccomp.__file__).parent / "filters"
    opened = []
    for name in FILTERS:
        fd = sealed_memfd((directory / f"{machine}-{name}.bpf").read_bytes())
        os.lseek(fd, 0, os.SEEK_SET)
        given.callback(os.close, fd)
        opened.append(fd)
    return opened
