"""Copying between this process's terminal or pipes and an attached agent's.

One loop over poll(2): nothing here waits for one stream while another has something to say, so a
reader that is slow, a writer that is silent and a signal in between all work. The agent's ends are
made non-blocking; ours are shared with the shell and stay as they are, so they are only written
when poll says so, and no more than a pipe then surely takes (PIPE_BUF, pipe(7)).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["FORWARDED", "copy", "raw_terminal", "signals", "window_size"]

#: Signals that become the agent's.
FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)

_CHUNK = 65536
_PIPE_BUF = select.PIPE_BUF

#: How long output may stay silent after the agent's end before it counts as complete.
_LINGER_SECONDS = 2.0


@dataclass
class _Channel:
    """One direction. ``theirs`` is the agent's end, which this owns and closes."""

    source: int
    target: int
    theirs: int
    shared: bool = False  # `theirs` is also the other direction's: a terminal
    buffer: bytearray = field(default_factory=bytearray)
    ended: bool = False  # the source has no more
    closed: bool = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if not self.shared:
                os.close(self.theirs)


def copy(
    fds: Sequence[int],
    *,
    control: int,
    on_control: Callable[[], bool],
    wakeup: int,
    on_signals: Callable[[bytes], None],
) -> None:
    """Copy until the agent ended and its output is out; takes over and closes ``fds``.

    ``fds`` are the agent's [stdin, stdout, stderr] or one [terminal]. When ``control`` is readable
    ``on_control`` is called; it returns whether the agent has ended. ``wakeup`` brings numbers of
    signals for ``on_signals``. A reader of ours that goes away closes the agent's stream, so that
    the agent learns of it as it would without us (SIGPIPE).
    """
    for fd in fds:
        os.set_blocking(fd, False)
    if len(fds) == 1:
        stdin = _Channel(0, fds[0], fds[0], shared=True)
        outputs = [_Channel(fds[0], 1, fds[0])]
    else:
        stdin = _Channel(0, fds[0], fds[0])
        outputs = [_Channel(fds[1], 1, fds[1]), _Channel(fds[2], 2, fds[2])]
    channels = [stdin, *outputs]
    over = False
    deadline = 0.0
    try:
        while not (over and all(channel.closed for channel in outputs)):
            if over and time.monotonic() > deadline:
                return
            ready = _poll([] if over else [control], wakeup, channels, 0.1 if over else None)
            if wakeup in ready:
                with contextlib.suppress(BlockingIOError):
                    on_signals(os.read(wakeup, 64))
            if control in ready and on_control():
                over = True
                deadline = time.monotonic() + _LINGER_SECONDS
            for channel in channels:
                if _step(channel, ready):
                    deadline = time.monotonic() + _LINGER_SECONDS
    finally:
        for channel in channels:
            channel.close()


@contextmanager
def signals(numbers: Sequence[signal.Signals]) -> Iterator[int]:
    """Catch these signals; yields a descriptor that brings their numbers, one byte each.

    What was ignored when this process started (nohup, a shell's background job) stays ignored.
    """
    reading, writing = socket.socketpair()
    with reading, writing:
        reading.setblocking(False)
        writing.setblocking(False)
        before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        handlers = {
            number: signal.signal(number, lambda *_: None)
            for number in numbers
            if signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            yield reading.fileno()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)


class raw_terminal:  # reads as a statement: with raw_terminal(0)
    """The terminal on ``fd`` passes every key through until the block ends (termios(3), raw)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before = termios.tcgetattr(fd)

    def __enter__(self) -> raw_terminal:
        self.enter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()

    def enter(self) -> None:
        with contextlib.suppress(termios.error):
            tty.setraw(self._fd, termios.TCSADRAIN)

    def leave(self) -> None:
        with contextlib.suppress(termios.error):  # the terminal may have hung up
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def suspend(self) -> None:
        """Stop this process as SIGTSTP would have, with the terminal in order meanwhile."""
        self.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.enter()


def window_size(fd: int, target: int | None = None) -> tuple[int, int]:
    """Rows and columns of a terminal, given to the terminal ``target`` as well (ioctl_tty(2))."""
    try:
        size = fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8)
        if target is not None:
            fcntl.ioctl(target, termios.TIOCSWINSZ, size)
    except OSError:
        return 24, 80
    rows, columns, _, _ = struct.unpack("HHHH", size)
    return rows or 24, columns or 80


def _poll(
    reading: Sequence[int], wakeup: int, channels: Sequence[_Channel], seconds: float | None
) -> set[int]:
    wanted = dict.fromkeys([*reading, wakeup], select.POLLIN)
    for channel in channels:
        if channel.closed:
            continue
        if channel.buffer:
            wanted[channel.target] = wanted.get(channel.target, 0) | select.POLLOUT
        else:
            wanted[channel.source] = wanted.get(channel.source, 0) | select.POLLIN
    poll = select.poll()
    for fd, events in wanted.items():
        poll.register(fd, events)
    return {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}


def _step(channel: _Channel, ready: set[int]) -> bool:
    """Move what can be moved; whether anything was."""
    if channel.closed:
        return False
    moved = False
    if not channel.buffer and channel.source in ready:
        data = _read(channel.source)
        if data == b"":
            channel.close()
            return True
        channel.buffer += data or b""
        moved = bool(data)
    elif channel.buffer and channel.target in ready:
        limit = _CHUNK if channel.target == channel.theirs else _PIPE_BUF
        try:
            done = os.write(channel.target, memoryview(channel.buffer)[:limit])
        except BlockingIOError:
            return False
        except OSError:  # EPIPE, EIO: nobody reads there any more
            channel.buffer.clear()
            channel.close()
            return True
        del channel.buffer[:done]
        moved = True
    return moved


def _read(fd: int) -> bytes | None:
    """Some bytes, b"" at the end, None when there are none just now."""
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        return None
    except OSError as error:
        # EIO: the last process on a terminal's other side is gone (or ours hung up); EBADF: we
        # were started with this stream closed.
        if error.errno in (errno.EIO, errno.EBADF, errno.EISDIR):
            return b""
        raise
