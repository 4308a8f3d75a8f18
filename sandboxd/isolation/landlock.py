"""A second wall behind mounts and namespaces: what a sandbox may do with what is there.

Landlock (landlock(7)) lets a process give up access by place: here reading everywhere in the
sandbox's own root, running programs where programs are, writing where the sandbox has writable
places. Mounts say the same; if one of them were wrong, this would still hold. It also covers what
they can't: TCP ports, abstract Unix sockets and signals beyond the sandbox. The kernel's ABI
decides how much of that there is; :data:`SINCE` names what each version brought.

Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandboxd.errors import KernelError
from sandboxd.isolation import kernel
from sandboxd.isolation.wire import LaunchSpec

__all__ = ["SINCE", "Place", "best_abi", "enforce", "places", "restrict", "ruleset"]

#: What each version of the kernel's Landlock can restrict that the one before couldn't.
SINCE = {
    1: "reading, writing and running files",
    2: "moving files between directories",
    3: "truncation",
    4: "TCP bind and connect",
    5: "device ioctls",
    6: "abstract sockets and signals",
    7: "the audit of nested domains",
}

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_ALL = (1 << 16) - 1
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

_READ = _READ_FILE | _READ_DIR
#: Everything that changes files, but never a device node, which is a door into the kernel.
_WRITE = _ALL & ~(_READ | _EXECUTE | _MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV)

_NET_BIND_AND_CONNECT, _NET_CONNECT = 3, 2
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 3
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2
_LOG_SUBDOMAINS_OFF = 1 << 2

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True)
class Place:
    """A file, or a directory with all below it. Reading is allowed everywhere, ``/`` included."""

    path: str
    write: bool = False
    execute: bool = False
    devices: bool = False
    optional: bool = False


def best_abi() -> int:
    """The highest ABI that this kernel and this module both know; 0 without Landlock."""
    version: int = _libc.syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    return min(max(0, version), max(SINCE))


def places(spec: LaunchSpec, system: Iterable[str]) -> Iterator[Place]:
    """Where a sandbox may do more than read. ``system`` are the directories of programs."""
    for path in system:
        yield Place(path, execute=True)
    yield Place("/tmp", write=True, execute=True)  # noqa: S108 - the sandbox's own
    yield Place(f"/home/{spec.user}", write=True, execute=True)
    yield Place("/dev", devices=True)
    yield Place("/dev/shm", write=True)  # noqa: S108
    for mount in spec.mounts:
        write, execute = not mount.readonly, not mount.noexec
        if write or execute:
            yield Place(mount.target, write, execute, optional=mount.optional)
    for file in spec.files:
        if file.mode & 0o111:
            yield Place(file.path, execute=True)


def restrict(
    abi: int, allowed: Iterable[Place], streams: Sequence[int], *, ports: Iterable[int] | None
) -> None:
    """Restrict this process, and all that it will start, by a ruleset that is made here."""
    rules = ruleset(abi, allowed, streams, ports=ports)
    if rules >= 0:
        enforce(abi, rules)


def ruleset(
    abi: int, allowed: Iterable[Place], streams: Sequence[int], *, ports: Iterable[int] | None
) -> int:
    """A descriptor of what will be allowed, for :func:`enforce`; -1 without Landlock.

    ``streams`` are descriptors that the program gets; what they are open for it may open again
    (``/dev/stderr``). Of TCP, what remains is to connect to ``ports``; None leaves TCP alone.
    Raises KernelError.
    """
    if abi < 1:
        return -1
    handled = _rights_of(abi)
    net = _NET_BIND_AND_CONNECT if abi >= 4 and ports is not None else 0
    scoped = _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0
    # Older kernels know the first members alone (struct landlock_ruleset_attr).
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    attributes = struct.pack("=QQQ", handled, net, scoped)[:size]
    rules: int = _libc.syscall(_CREATE_RULESET, attributes, size, 0)
    if rules < 0:
        raise KernelError("landlock_create_ruleset", ctypes.get_errno())
    try:
        _allow(rules, "/", _READ)
        for place in allowed:
            rights = (_WRITE if place.write else 0) | (_EXECUTE if place.execute else 0)
            if place.devices:
                rights |= _WRITE_FILE | _IOCTL_DEV
            _allow(rules, place.path, rights & handled, optional=place.optional)
        for stream in streams:
            _allow_again(rules, stream, handled)
        for port in set(ports or ()) if net else ():
            _allow_connect(rules, port)
    except BaseException:
        os.close(rules)
        raise
    return rules


def enforce(abi: int, ruleset: int) -> None:
    """Restrict this process, and all that it will start, for good; closes ``ruleset``.

    Needs no_new_privs. Raises KernelError.
    """
    try:
        # A program's own nested domains can't fill the host's audit log.
        flags = _LOG_SUBDOMAINS_OFF if abi >= 7 else 0
        if _libc.syscall(_RESTRICT_SELF, ruleset, flags) < 0:
            raise KernelError("landlock_restrict_self", ctypes.get_errno())
    finally:
        os.close(ruleset)


def _rights_of(abi: int) -> int:
    newest = {1: _REFER, 2: _TRUNCATE, 3: _IOCTL_DEV, 4: _IOCTL_DEV}.get(abi, _ALL + 1)
    return newest - 1


def _allow(ruleset: int, path: str, rights: int, *, optional: bool = False) -> None:
    # Part of the tree can be an agent's own: no link of its making is followed.
    resolve = kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS
    try:
        fd = kernel.open_beneath(kernel.AT_FDCWD, path, os.O_PATH, resolve=resolve)
    except KernelError as failure:
        # Out of this user's reach, and so out of the program's.
        if failure.errno == errno.EACCES or (optional and failure.errno == errno.ENOENT):
            return
        raise
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        _add_rule(ruleset, fd, rights, path)
    finally:
        os.close(fd)


def _allow_connect(ruleset: int, port: int) -> None:
    rule = struct.pack("=QQ", _NET_CONNECT, port)  # struct landlock_net_port_attr
    if _libc.syscall(_ADD_RULE, ruleset, _RULE_NET_PORT, rule, 0) < 0:
        raise KernelError("landlock_add_rule", ctypes.get_errno(), f"TCP port {port}")


def _allow_again(ruleset: int, stream: int, handled: int) -> None:
    """Let a terminal, device or file be opened again by way of /proc/self/fd."""
    kind = stat.S_IFMT(os.fstat(stream).st_mode)
    if kind not in (stat.S_IFCHR, stat.S_IFREG):
        return  # pipes and sockets aren't subject to Landlock
    rights = {
        os.O_RDONLY: _READ_FILE,
        os.O_WRONLY: _WRITE_FILE | _TRUNCATE,
        os.O_RDWR: _READ_FILE | _WRITE_FILE | _TRUNCATE,
    }[_open_mode(stream)]
    if kind == stat.S_IFCHR:
        rights |= _IOCTL_DEV
    _add_rule(ruleset, stream, rights & handled, f"fd {stream}", anonymous=True)


def _open_mode(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def _add_rule(ruleset: int, fd: int, rights: int, path: str, *, anonymous: bool = False) -> None:
    rule = struct.pack("=Qi", rights, fd)  # packed: struct landlock_path_beneath_attr
    if rights and _libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0) < 0:
        code = ctypes.get_errno()
        if not (anonymous and code == errno.EBADFD):  # a memfd: not subject to Landlock either
            raise KernelError("landlock_add_rule", code, path)
