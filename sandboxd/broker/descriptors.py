"""The descriptors that a tool starts with, and the broker's ends of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence

import trio

from sandboxd.broker.launch import Prepared
from sandboxd.isolation.wire import sealed_memfd

__all__ = ["input_", "memory", "output", "pipe", "reading", "standard_input"]


def pipe(ours: contextlib.ExitStack, given: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe for output: our end, which never blocks, and the tool's; each closed by its stack."""
    read, write = os.pipe2(os.O_CLOEXEC)
    ours.callback(os.close, read)
    given.callback(os.close, write)
    os.set_blocking(read, False)
    # The tool runs as another user: let it open /dev/stdout, which opens the pipe anew (proc(5)).
    os.fchmod(write, 0o666)
    return read, write


def output(given: contextlib.ExitStack) -> tuple[trio.lowlevel.FdStream, int]:
    """The same with our end as a stream."""
    with contextlib.ExitStack() as ours:
        read, write = pipe(ours, given)
        ours.pop_all()
    return trio.lowlevel.FdStream(read), write


def input_(given: contextlib.ExitStack) -> tuple[trio.lowlevel.FdStream, int]:
    """A pipe to the tool: our end as a stream, its end as a descriptor that ``given`` closes."""
    read, write = os.pipe2(os.O_CLOEXEC)
    given.callback(os.close, read)
    stream = trio.lowlevel.FdStream(write)
    os.fchmod(read, 0o666)  # as for output
    return stream, read


def standard_input(prepared: Prepared, given: contextlib.ExitStack) -> int:
    """What the tool reads: its bytes, or the end of file at once so that it can't hang."""
    if prepared.stdin is not None:
        return memory(prepared.stdin, given)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    given.callback(os.close, null)
    return null


def memory(data: bytes, given: contextlib.ExitStack) -> int:
    """An unnamed file of ``data``, positioned at its start: never on a disk, and no writer task."""
    fd = sealed_memfd(data)
    given.callback(os.close, fd)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@contextlib.asynccontextmanager
async def reading(grace: float) -> AsyncIterator[Sequence[trio.CancelScope]]:
    """The scopes that both streams are read in, ended when the block is.

    Who has ``grace`` to tidy up when its client leaves must not be ended by SIGPIPE meanwhile.
    """
    scopes = [trio.CancelScope(shield=grace > 0) for _ in range(2)]
    try:
        yield scopes
    finally:
        for scope in scopes:
            scope.cancel()
