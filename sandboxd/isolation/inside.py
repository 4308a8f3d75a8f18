"""The broker's side of further programs: one more in a sandbox that runs (see ``further``)."""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from sandboxd.errors import Conflict, KernelError, SandboxdError, Unavailable
from sandboxd.isolation.reports import Exit, exit_of, failure_of
from sandboxd.isolation.wire import (
    FRAME,
    MAX_SPEC,
    Frame,
    Kind,
    LaunchSpec,
    check_spec,
    encode_spec,
    sealed_memfd,
)

if TYPE_CHECKING:
    from sandboxd.isolation.client import Process

__all__ = ["Further", "Orders", "open_further"]

_STARTING_LIMIT = 30.0
#: How long the end of a tree may take to be told. It is killed at once; this is for a busy host.
_ENDING_LIMIT = 10.0


class Orders:
    """The broker's end of a socket into a sandbox, on which programs are asked for.

    Used from the moment that the sandbox is there. ``theirs`` goes with its launch.
    """

    def __init__(self) -> None:
        self._sock, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)
        self._numbers = 0

    async def send(self, spec: LaunchSpec, fds: Sequence[int]) -> None:
        """Ask for the program of ``spec``, with these descriptors. Conflict when it has ended."""
        check_spec(spec, search=True)
        data = encode_spec(spec)
        if len(data) > MAX_SPEC:
            raise failure_of(Frame(Kind.FAILED, 0, errno.E2BIG, text=f"execve\t{spec.id}"))
        self._numbers += 1
        memfd = sealed_memfd(data)
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (memfd, *fds)))]
            while True:
                try:
                    self._sock.sendmsg([Frame(Kind.LAUNCH, self._numbers).pack()], rights)
                    return
                except BlockingIOError:  # the init is busy with others
                    await trio.lowlevel.wait_writable(self._sock)
        except (ConnectionError, trio.ClosedResourceError):
            raise _ended() from None
        except OSError as failure:
            if failure.errno == errno.EBADF:
                raise _ended() from None
            raise KernelError("sendmsg", failure.errno or 0, "launch frame") from None
        finally:
            os.close(memfd)

    async def answer(self) -> None:
        """Until the one who was asked has become the program; the SandboxdError that kept it."""
        while True:
            try:
                data = self._sock.recv(FRAME.size)
                break
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
            except OSError:
                raise _ended() from None
        if data:
            raise failure_of(Frame.unpack(data))

    def close(self) -> None:
        self.theirs.close()
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


class Further:
    """A further program that runs. ``exit`` is there once it has ended."""

    def __init__(self, talk: trio.socket.SocketType) -> None:
        self._talk = talk
        self.exit: Exit | None = None

    async def wait(self) -> Exit:
        """The end of the program. Not of what it left in the background, unless it was killed."""
        while self.exit is None:
            frame = await self._hear()
            if frame is None:
                # With its supervisor or with the whole sandbox, both by SIGKILL.
                self.exit = Exit(None, 9, 0, 0)
            elif frame.kind is Kind.EXITED:
                self.exit = exit_of(frame)
        return self.exit

    async def signal(self, signum: int) -> None:
        """Send the program a signal, if it still runs."""
        await self._say(Frame(Kind.SIGNAL, 0, signum))

    async def kill(self) -> None:
        """SIGKILL for the program and all that descends from it; :meth:`wait` tells the end."""
        await self._say(Frame(Kind.KILL, 0))

    async def started(self) -> None:
        """Until it runs; the SandboxdError that kept it from that."""
        frame = await self._hear()
        if frame is None:
            raise _ended()
        if frame.kind is Kind.FAILED:
            raise failure_of(frame)

    async def _hear(self) -> Frame | None:
        try:
            data = await self._talk.recv(FRAME.size)
            return Frame.unpack(data) if data else None
        except (OSError, ValueError):
            return None

    async def _say(self, frame: Frame) -> None:
        if self.exit is None:
            with suppress(OSError):  # it has ended, and wait() tells
                await self._talk.send(frame.pack())


@asynccontextmanager
async def open_further(
    process: Process, spec: LaunchSpec, *, stdin: int, stdout: int, stderr: int
) -> AsyncIterator[Further]:
    """Start the program of ``spec`` in the sandbox of ``process``; its tree ends with the block,
    if its program still runs.

    Of ``spec`` argv, environment, cwd and limits count. A tree that can't be ended takes the whole
    sandbox along. Raises Conflict when the sandbox has ended or takes no further programs, and
    KernelError naming what failed (``chdir``, ``execve``, ``fork``).
    """
    orders = process.orders
    if orders is None:
        raise Conflict("this sandbox takes no further programs")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with trio.socket.from_stdlib_socket(ours) as talk:
        further = Further(talk)
        with theirs:
            await orders.send(spec, (theirs.fileno(), stdin, stdout, stderr))
        try:
            try:
                with trio.fail_after(_STARTING_LIMIT):
                    await further.started()
            except SandboxdError:
                further.exit = Exit(None, None, 0, 0)
                raise
            except trio.TooSlowError:
                raise Unavailable(f"the program did not start in {_STARTING_LIMIT:.0f} s") from None
            yield further
        finally:
            if further.exit is None:
                with trio.CancelScope(shield=True):
                    await _end(further, process)


async def _end(further: Further, process: Process) -> None:
    await further.kill()
    with trio.move_on_after(_ENDING_LIMIT):
        await further.wait()
    if further.exit is None:
        with suppress(Unavailable):
            await process.kill()
            await process.wait()
        await further.wait()


def _ended() -> Conflict:
    return Conflict("the sandbox has ended", hint="see: sandboxctl session list")
