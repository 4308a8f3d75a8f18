"""Bytes from one socket to another without a copy in between (splice(2)).

A download through a sandbox's proxy would otherwise be copied into this process and out again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from types import TracebackType

import trio

__all__ = ["Splice"]

_MOST = 1 << 20
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Splice:
    """Moves what arrives at one socket to another by way of a pipe. Use it as a context manager."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # who has many pipes gets small ones (pipe(7))
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _MOST)

    async def move(self) -> int:
        """What has arrived, all of it passed on; how many bytes, 0 at the end.

        Raises OSError when either socket is broken.
        """
        await trio.lowlevel.checkpoint()
        while True:
            try:
                size = os.splice(self._source, self._in, _MOST, flags=_FLAGS)
                break
            except BlockingIOError:  # the pipe is empty here: there is nothing to take
                await trio.lowlevel.wait_readable(self._source)
        left = size
        while left:
            try:
                left -= os.splice(self._out, self._sink, left, flags=_FLAGS)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sink)
        return size

    def __enter__(self) -> Splice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._in)
        os.close(self._out)
