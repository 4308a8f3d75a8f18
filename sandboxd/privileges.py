"""How the broker gives up root, and what it gives up besides.

Called before trio starts; the master key, which root alone may be able to read, has been read by
then and nothing else. Raises rather than going on with more
privileges than promised.
"""

from __future__ import annotations

import grp
import os
import pwd
import resource
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sandboxd.errors import KernelError, SandboxdError, Unavailable
from sandboxd.isolation import kernel

__all__ = [
    "Identity",
    "become",
    "harden",
    "identity",
    "make_reachable",
    "raise_file_limit",
    "refuse_unreachable",
]


@dataclass(frozen=True)
class Identity:
    """Whom the broker becomes: numeric ids, supplementary groups and a name to show."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str


def harden() -> None:
    """No core dumps, no ptrace by the same uid: plaintext stays in this process's memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel.set_dumpable(False)


def identity(user: str) -> Identity:
    """The account ``user``, a name or a number. Unavailable, with the command that makes it."""
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        if user.isdecimal():
            uid = int(user)
            return Identity(uid, uid, (), user)
        raise Unavailable(
            f"there is no user {user!r} for the broker to run as",
            hint="create it with: sandboxctl install (or systemd-sysusers), "
            "or name another with --user",
        ) from None
    groups = tuple(g.gr_gid for g in grp.getgrall() if entry.pw_name in g.gr_mem)
    return Identity(entry.pw_uid, entry.pw_gid, groups, entry.pw_name)


def become(who: Identity) -> None:
    """Take on ``who``'s ids and nobody else's, and lose every capability, for good."""
    if who.uid == 0:
        raise Unavailable(
            "the broker must not run as root", hint="name an ordinary user with --user"
        )
    try:
        os.setgroups(who.groups)
        os.setresgid(who.gid, who.gid, who.gid)
        kernel.no_new_privileges()
        kernel.drop_bounding_set()  # while CAP_SETPCAP is there; the other sets follow the uid
        os.setresuid(who.uid, who.uid, who.uid)
    except OSError as failure:
        raise Unavailable(
            f"root can't become {who.name} (uid {who.uid}) here: {failure.strerror}",
            hint="a container needs that uid in its user namespace, and CAP_SETUID and CAP_SETGID",
        ) from None
    kernel.drop_capabilities()
    harden()  # a change of uid makes the process dumpable as the host's suid_dumpable says
    if os.getresuid() != (who.uid,) * 3 or os.getresgid() != (who.gid,) * 3:
        raise SandboxdError("the broker could not give up root")


def make_reachable(paths: Iterable[str | Path], who: Identity) -> list[str]:
    """Let ``who`` reach ``paths`` that lie below directories closed to them, like /root.

    A Python environment in root's home is common, and the broker still loads modules after it
    gave up root. In a mount namespace of the broker's own, the closed directory is covered by an
    empty one in which only the needed paths appear, read-only; the host's tree is untouched.
    Returns the directories that were covered. Unavailable when a needed path itself is closed.
    """
    closed: dict[str, list[str]] = {}
    for path in dict.fromkeys(str(Path(p)) for p in paths):
        if (barrier := _barrier(path, who)) is not None:
            if barrier == path:
                raise Unavailable(
                    f"{path} is closed to {who.name}, which the broker runs as",
                    hint=f"open it for reading: chmod -R o+rX {path}",
                )
            closed.setdefault(barrier, []).append(path)
    if not closed:
        return []
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    for barrier, needed in closed.items():
        trees = [(path, _read_only_copy(path)) for path in needed]
        cover = kernel.mount_filesystem(
            "tmpfs", kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV, mode="0755", size="1m"
        )
        kernel.move_mount(cover, kernel.AT_FDCWD, barrier)
        for path, tree in trees:
            Path(path).mkdir(mode=0o755, parents=True, exist_ok=True)
            kernel.move_mount(tree, kernel.AT_FDCWD, path)
            os.close(tree)
        kernel.set_mount_attributes(cover, kernel.MOUNT_ATTR_RDONLY, recursive=False)
        os.close(cover)
    return list(closed)


def refuse_unreachable(directory: Path, who: Identity) -> None:
    """Raise Unavailable when ``who`` could not reach a directory that it has to write."""
    barrier = _barrier(str(directory), who)
    if barrier is not None and barrier != str(directory):
        raise Unavailable(
            f"{directory} lies below {barrier}, which is closed to {who.name}",
            hint="choose another place with --state and --runtime",
        )


def raise_file_limit(wanted: int) -> int:
    """Raise RLIMIT_NOFILE to ``wanted`` or as far as the hard limit lets; returns the result."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        return target
    return soft


def _read_only_copy(path: str) -> int:
    source = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        tree = kernel.clone_tree(source, recursive=True, path=path)
    finally:
        os.close(source)
    try:
        kernel.set_mount_attributes(
            tree,
            kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV,
            recursive=True,
            path=path,
        )
    except KernelError:
        os.close(tree)
        raise
    return tree


def _barrier(path: str, who: Identity) -> str | None:
    """The topmost directory on the way to ``path`` that ``who`` may not search, if any."""
    for parent in [*reversed(Path(path).parents), Path(path)]:
        status = parent.stat()
        if not stat.S_ISDIR(status.st_mode):
            continue
        if who.uid == status.st_uid:
            bit = stat.S_IXUSR
        elif status.st_gid in (who.gid, *who.groups):
            bit = stat.S_IXGRP
        else:
            bit = stat.S_IXOTH
        if not status.st_mode & bit:
            return str(parent)
    return None
