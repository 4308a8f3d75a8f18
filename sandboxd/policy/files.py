"""Reading what the daemon trusts: configuration files, tool programs and their folders.

Trusted is what only root or the daemon's own user can change: owned by one of the two, and not
writable by a group or by others, all the way up to ``/``. Two exceptions are as safe: a
directory with the sticky bit (others can't replace entries in it, unlink(2)), and a group that
has no member but the owner (the user-private groups of Debian and Fedora, umask 002).
"""

from __future__ import annotations

import errno
import grp
import hashlib
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from sandboxd.policy.problems import Position, Problems

__all__ = ["MAX_FILE", "Source", "Trust", "list_directory", "read_source", "sha256_of"]

#: A configuration file's largest size.
MAX_FILE = 256 * 1024
#: Files below one tool's folder that are looked at.
MAX_TOOL_FILES = 2_000


@dataclass(frozen=True)
class Source:
    """One file as it was read: ``label`` is its short name, such as ``policies/strict.yaml``."""

    path: Path
    label: str
    data: bytes
    shipped: bool = False

    @property
    def file(self) -> str:
        return os.fspath(self.path)


class Trust:
    """Who may own what the daemon trusts: root and the effective user."""

    def __init__(self) -> None:
        self.owners = frozenset({0, os.geteuid()})
        self._directories: dict[str, str] = {}
        self._private: dict[tuple[int, int], bool] = {}

    def refusal(self, path: str | os.PathLike[str]) -> str:
        """Why ``path`` (a real path) or something above it can't be trusted; "" when it can."""
        path = os.fspath(path)
        try:
            status = os.lstat(path)
        except OSError as error:
            return f"{path}: {os.strerror(error.errno or errno.EIO)}"
        return self.judge(path, status) or self._above(os.fspath(Path(path).parent))

    def judge(self, path: str, status: os.stat_result) -> str:
        """Why this one file or directory can't be trusted; "" when it can."""
        if status.st_uid not in self.owners:
            return f"{path} belongs to uid {status.st_uid}, neither root nor this daemon's user"
        if stat.S_ISLNK(status.st_mode) or _sticky(status):
            return ""
        if status.st_mode & stat.S_IWOTH:
            return f"{path} is writable by everybody"
        if status.st_mode & stat.S_IWGRP:
            if not self._is_private(status):
                return f"{path} is writable by its group"
            if _has_acl(path):  # then these bits are its mask (acl(5)), and say nothing of whom
                return f"{path} is writable by whom its access control list names"
        return ""

    def _is_private(self, status: os.stat_result) -> bool:
        key = (status.st_uid, status.st_gid)
        if key not in self._private:
            self._private[key] = _private_group(*key)
        return self._private[key]

    def _above(self, directory: str) -> str:
        if directory not in self._directories:
            try:
                refusal = self.judge(directory, os.lstat(directory))
            except OSError as error:
                refusal = f"{directory}: {os.strerror(error.errno or errno.EIO)}"
            if not refusal and directory != "/":
                refusal = self._above(os.fspath(Path(directory).parent))
            self._directories[directory] = refusal
        return self._directories[directory]

    def tree_refusal(self, directory: Path, most: int = MAX_TOOL_FILES) -> str:
        """Why something below ``directory`` can't be trusted; "" when all can."""
        seen = 0
        for folder, folders, files in os.walk(directory):
            for name in (*folders, *files):
                seen += 1
                if seen > most:
                    return f"{directory} holds more than {most:,} files"
                path = f"{folder}/{name}"
                try:
                    refusal = self.judge(path, os.lstat(path))
                except FileNotFoundError:
                    continue
                if refusal:
                    return refusal
        return ""


def read_source(
    path: Path, label: str, trust: Trust, problems: Problems, *, shipped: bool = False
) -> Source | None:
    """The file's bytes, or None after noting why it was refused.

    It is opened once, without following a symbolic link and without waiting for a FIFO, and
    judged by the open descriptor.
    """
    name = os.fspath(path)
    try:
        # openat2 isn't needed: everything above was judged, so nobody else can swap it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            problems.add(
                name,
                None,
                "is a symbolic link; expected a regular file",
                "copy the file here, or point the whole configuration directory elsewhere",
            )
        else:
            problems.add(name, None, f"can't be read: {os.strerror(error.errno or 0)}")
        return None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        problems.add(name, None, "expected a regular file")
        return None
    with os.fdopen(descriptor, "rb") as stream:
        refusal = trust.judge(name, status)
        if refusal:
            problems.add(name, None, refusal.removeprefix(f"{name} "), _fix(refusal))
            return None
        data = stream.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        problems.add(name, Position(1, 1), f"larger than {MAX_FILE:,} bytes")
        return None
    return Source(path, label, data, shipped)


def list_directory(path: Path, problems: Problems) -> list[str]:
    """Names in a directory, sorted; empty when it doesn't exist. Hidden names are left out."""
    try:
        return sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.add(os.fspath(path), None, f"can't be listed: {os.strerror(error.errno or 0)}")
        return []


def sha256_of(path: Path) -> str:
    """The hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fix(refusal: str) -> str:
    return "chown it to root" if "belongs to uid" in refusal else "chmod go-w on it"


def _has_acl(path: str) -> bool:
    try:
        return bool(os.getxattr(path, "system.posix_acl_access", follow_symlinks=False))
    except OSError:
        return False


def _sticky(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode) and bool(status.st_mode & stat.S_ISVTX)


def _private_group(uid: int, gid: int) -> bool:
    """Whether ``gid`` is the group of the user ``uid`` alone, which also bears the user's name."""
    try:
        owner = pwd.getpwuid(uid).pw_name
        group = grp.getgrgid(gid)
    except KeyError:
        return False
    others = [entry.pw_uid for entry in pwd.getpwall() if entry.pw_gid == gid]
    return (
        group.gr_name == owner
        and all(name == owner for name in group.gr_mem)
        and all(other == uid for other in others)
    )
