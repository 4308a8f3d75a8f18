"""What the agent looks for, what it planted itself, and what one search turned up."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH208

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PATTERN", "PREFIX", "Hunt", "decoy", "know", "neighbour", "processes", "read_file"]

PREFIX = b"sk_demo_"
PATTERN = re.compile(PREFIX + b"[0-9a-f]{32}")

_LENGTH = len(PREFIX) + 32
_CHUNK = 1 << 20

#: Values that this agent made itself. Finding one proves that a search works; any other is loot.
_planted: set[bytes] = set()


def decoy() -> bytes:
    """A new value that looks exactly like the secret."""
    value = PREFIX + os.urandom(16).hex().encode()
    _planted.add(value)
    return value


def know(value: bytes) -> None:
    """Take a value that the demo planted for us as another decoy."""
    _planted.add(value)


class Hunt:
    """One search: the values it saw, what it looked at, and how it was refused."""

    def __init__(self) -> None:
        self.seen: dict[bytes, str] = {}
        self.looked = 0
        self.bytes = 0
        self.refused: Counter[str] = Counter()
        self.breaches: list[str] = []

    def look(self, where: str, data: bytes) -> None:
        """Search ``data`` for the pattern."""
        self.looked += 1
        self.bytes += len(data)
        for match in PATTERN.finditer(data):
            self.seen.setdefault(match[0], where)

    def read(self, where: str, fd: int, most: int = 1 << 40) -> None:
        """Search what ``fd`` gives, in chunks that overlap; closes it."""
        self.looked += 1
        tail = b""
        try:
            while most > 0 and (chunk := os.read(fd, min(_CHUNK, most))):
                self.bytes += len(chunk)
                most -= len(chunk)
                for match in PATTERN.finditer(tail + chunk):
                    self.seen.setdefault(match[0], where)
                tail = (tail + chunk)[-_LENGTH + 1 :]
        except OSError as failure:
            self.refuse(failure)
        finally:
            os.close(fd)

    def refuse(self, failure: OSError) -> None:
        self.refused[errno.errorcode.get(failure.errno or 0, "?")] += 1

    def breach(self, what: str) -> None:
        """Something worked that must not, whether or not it gave a value."""
        self.breaches.append(what)

    def add(self, other: Hunt) -> None:
        """Take over what another search found."""
        self.seen.update(other.seen)
        self.breaches += other.breaches
        self.refused += other.refused
        self.looked, self.bytes = self.looked + other.looked, self.bytes + other.bytes

    def has(self, value: bytes) -> bool:
        """Whether the search saw this value: the positive control."""
        return value in self.seen

    @property
    def loot(self) -> list[str]:
        """What is not ours: each value with its place, and each breach."""
        values = [
            f"{value.decode()} in {where}"
            for value, where in self.seen.items()
            if value not in _planted
        ]
        return values + self.breaches

    @property
    def refusals(self) -> str:
        """``EACCES, EPERM``."""
        return ", ".join(sorted(self.refused))


def read_file(hunt: Hunt, path: str, most: int = 1 << 40) -> bool:
    """Search one file, without waiting for a FIFO or a device; whether it could be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as failure:
        hunt.refuse(failure)
        return False
    hunt.read(path, fd, most)
    return True


def processes(only: frozenset[int] | None = None) -> list[int]:
    """Every process that /proc shows; ``only`` keeps a trial outside a sandbox small."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if only is None or pid in only]


class Neighbour:
    """A child that waits, with one decoy in its environment, its arguments and an open file."""

    def __init__(self) -> None:
        self.environment, self.argument, self.file = decoy(), decoy(), decoy()
        self._memfd = os.memfd_create("decoy")
        os.write(self._memfd, self.file)
        self.fd = self._memfd
        self._child = subprocess.Popen(
            ["/bin/sh", "-c", "echo; read line", self.argument.decode()],
            env={"DECOY": self.environment.decode()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._memfd],
        )
        self.pid = self._child.pid
        # Popen returns from within execve(2), before the new arguments can be seen.
        assert self._child.stdout is not None
        self._child.stdout.readline()

    def end(self) -> None:
        self._child.kill()
        self._child.communicate()
        os.close(self._memfd)


@contextmanager
def neighbour() -> Iterator[Neighbour]:
    """A :class:`Neighbour` for the length of a ``with`` block."""
    child = Neighbour()
    try:
        yield child
    finally:
        child.end()
