"""An agent's standard streams: pipes or a terminal for an attached operator, a log otherwise.

The agent never holds the operator's own terminal. It gets a fresh pair; the operator's ends go
to sandboxctl, which copies.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from dataclasses import dataclass, field

__all__ = ["Streams", "attached", "recorded", "terminal"]


@dataclass
class Streams:
    """``child``: the agent's stdin, stdout, stderr. ``operator``: the other ends."""

    child: tuple[int, int, int]
    operator: tuple[int, ...]
    _open: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._open = {*self.child, *self.operator}

    def close_child(self) -> None:
        """After the launch: only the agent holds its ends now."""
        self._close(set(self.child))

    def take_operator(self) -> tuple[int, ...]:
        """Hand the operator's ends to somebody who will close them."""
        self._open -= set(self.operator)
        return self.operator

    def close(self) -> None:
        """Close whatever is still ours. Idempotent."""
        self._close(set(self._open))

    def _close(self, fds: set[int]) -> None:
        for fd in fds & self._open:
            os.close(fd)
        self._open -= fds


def attached() -> Streams:
    """Three pipes."""
    in_read, in_write = _pipe()
    out_read, out_write = _pipe()
    err_read, err_write = _pipe()
    return Streams((in_read, out_write, err_write), (in_write, out_read, err_read))


def terminal(rows: int, columns: int) -> Streams:
    """A new pseudo-terminal of the given size; the operator's end is its master (pty(7))."""
    master, slave = os.openpty()
    os.set_inheritable(master, False)
    size = struct.pack("HHHH", rows, columns, 0, 0)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
    return Streams((slave, slave, slave), (master,))


def recorded() -> Streams:
    """No input; output and errors as they come, into one pipe."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    read, write = _pipe()
    return Streams((null, write, write), (read,))


def _pipe() -> tuple[int, int]:
    """A pipe that its holders can open again by /dev/stdout and the like, whatever their uid is.

    Nobody else can: it has no name but the descriptors'.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    os.fchmod(write, 0o666)
    return read, write
