"""The broker's side of the launcher: start a sandbox, wait for its end, signal it, kill it."""

from __future__ import annotations

import array
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from sandboxd.errors import KernelError, SandboxdError, Unavailable
from sandboxd.isolation.wire import (
    FRAME,
    MAX_FDS,
    MAX_SPEC,
    Frame,
    Kind,
    LaunchSpec,
    encode_spec,
    sealed_memfd,
)

__all__ = ["Exit", "Launcher", "Process", "open_launcher"]

_STARTING_LIMIT = 30.0


@dataclass(frozen=True)
class Exit:
    """How a program ended: ``code`` or ``signal`` (the other is None), CPU time and peak memory."""

    code: int | None
    signal: int | None
    cpu_ms: int
    max_rss_kib: int


class Process:
    """A running sandbox. Its pid is that of the sandbox's init, as the host sees it."""

    def __init__(self, launcher: Launcher, number: int, spec_id: str) -> None:
        self.id = spec_id
        self.pid = 0
        self.pidfd = -1
        self.exit: Exit | None = None
        self._launcher, self._number = launcher, number
        self._started, self._ended = trio.Event(), trio.Event()
        self._failure: SandboxdError | None = None

    async def wait(self) -> Exit:
        """The end of the whole tree: when this returns, no process of the sandbox is left.

        Raises Unavailable when the launcher is gone (and every sandbox with it).
        """
        await self._ended.wait()
        if self.exit is None:
            raise self._failure or Unavailable("the launcher is gone")
        return self.exit

    async def signal(self, signum: int) -> None:
        """Send a signal to the program. SIGKILL ends the whole tree."""
        if signum == signal.SIGKILL:
            await self.kill()
        elif not self._ended.is_set():
            await self._launcher.send(Frame(Kind.SIGNAL, self._number, signum))

    async def kill(self) -> None:
        """SIGKILL for the sandbox's init, which takes every process in it along. Idempotent."""
        if not self._ended.is_set():
            await self._launcher.send(Frame(Kind.KILL, self._number))


class Launcher:
    """The connection to the launcher process; made by :func:`open_launcher`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = trio.socket.from_stdlib_socket(sock)
        self._sending = trio.Lock()
        self._processes: dict[int, Process] = {}
        self._numbers = 0
        self._ready = trio.Event()
        self._failure: SandboxdError | None = None
        self.privileged = False
        #: Set when the launcher has gone; nothing can be launched any more.
        self.gone = trio.Event()

    @property
    def mode(self) -> str:
        """``root``: sandboxes have uids of their own; ``user``: everything is the caller's uid."""
        return "root" if self.privileged else "user"

    async def launch(
        self,
        spec: LaunchSpec,
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        extra: Sequence[int] = (),
    ) -> Process:
        """Start a sandbox; returns once its program runs.

        The descriptors stay the caller's to close. Raises KernelError naming the system call and
        path that failed, or Unavailable when the launcher is gone. A cancelled launch is killed.
        """
        if self.gone.is_set():
            raise self._failure or Unavailable("the launcher is gone")
        data = encode_spec(spec)
        if len(data) > MAX_SPEC or 4 + len(extra) > MAX_FDS:
            raise KernelError("execve", 7, spec.id, hint="arguments and environment are too large")
        self._numbers += 1
        process = Process(self, self._numbers, spec.id)
        self._processes[self._numbers] = process
        memfd = sealed_memfd(data)
        try:
            fds = (memfd, stdin, stdout, stderr, *extra)
            await self.send(Frame(Kind.LAUNCH, self._numbers, len(fds)), *fds)
        except BaseException:
            self._processes.pop(process._number, None)
            raise
        finally:
            os.close(memfd)
        try:
            with trio.fail_after(_STARTING_LIMIT):
                await process._started.wait()
        except trio.TooSlowError:
            await process.kill()
            raise Unavailable(f"the sandbox did not start in {_STARTING_LIMIT:.0f} s") from None
        except BaseException:
            with trio.CancelScope(shield=True):
                await process.kill()
            raise
        if process._failure is not None:
            raise process._failure
        return process

    async def send(self, frame: Frame, *fds: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        async with self._sending:
            try:
                await self._sock.sendmsg([frame.pack()], ancillary)
            except OSError:
                raise Unavailable(
                    "the launcher is gone", hint="restart the daemon: it can launch nothing now"
                ) from None

    async def run(self) -> None:
        """Take the launcher's reports until it ends. Started by :func:`open_launcher`."""
        try:
            while True:
                data, ancillary, _, _ = await self._sock.recvmsg(
                    FRAME.size, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
                )
                if not data:
                    break
                self._take(Frame.unpack(data), _descriptors(ancillary))
        except (OSError, ValueError):
            pass  # told below: a launcher that can't be read is gone
        finally:
            failure = self._failure or Unavailable(
                "the launcher is gone", hint="restart the daemon: it can launch nothing now"
            )
            self._failure = failure
            self.gone.set()
            self._ready.set()
            for process in list(self._processes.values()):
                process._failure = failure
                self._finish(process)
            self._sock.close()

    def _take(self, frame: Frame, fds: list[int]) -> None:
        if frame.kind is Kind.READY:
            self.privileged = bool(frame.a)
            self._ready.set()
            return
        if frame.kind is Kind.FAILED and frame.number == 0:
            self._failure = _failure(frame)
            return
        process = self._processes.get(frame.number)
        if process is None:
            for fd in fds:
                os.close(fd)
        elif frame.kind is Kind.STARTED:
            process.pidfd = fds[0]
            process.pid = _pid_of(fds[0])
            process._started.set()
        elif frame.kind is Kind.FAILED:
            process._failure = _failure(frame)
            self._finish(process)
        elif frame.kind is Kind.EXITED:
            code = os.waitstatus_to_exitcode(frame.a)
            process.exit = Exit(
                code if code >= 0 else None,
                -code if code < 0 else None,
                frame.b // 1000,
                frame.c,
            )
            self._finish(process)

    def _finish(self, process: Process) -> None:
        self._processes.pop(process._number, None)
        if process.pidfd >= 0:
            os.close(process.pidfd)
            process.pidfd = -1
        process._started.set()
        process._ended.set()


@asynccontextmanager
async def open_launcher(sock: socket.socket) -> AsyncIterator[Launcher]:
    """Talk to the launcher at the other end of ``sock``; leaving ends it and its sandboxes.

    Raises KernelError when the launcher could not make its namespaces on this host.
    """
    launcher = Launcher(sock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(launcher.run)
        await launcher._ready.wait()
        if launcher.gone.is_set():
            raise launcher._failure or Unavailable("the launcher did not start")
        try:
            yield launcher
        finally:
            nursery.cancel_scope.cancel()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds)


def _pid_of(pidfd: int) -> int:
    """The pid behind a pidfd as this process's /proc names it (pidfd_open(2)); 0 if ended."""
    with open(f"/proc/self/fdinfo/{pidfd}") as info:
        for line in info:
            if line.startswith("Pid:"):
                return max(0, int(line.split()[1]))
    return 0


def _failure(frame: Frame) -> SandboxdError:
    call, _, path = frame.text.partition("\t")
    return KernelError(call, frame.a, path, hint=_hint(call, frame.a, path))


def _hint(call: str, code: int, path: str) -> str:
    if call == "execve" and code == 2:
        return f"{path} is not in the sandbox, or its interpreter isn't; mount what it needs"
    if call == "execve" and code == 13:
        return f"{path} is not executable in the sandbox"
    if call == "execve" and code == 7:
        return "arguments and environment are larger than the kernel takes (execve(2), E2BIG)"
    if call == "idmap":
        return "give the workspace to an ordinary user: chown USER DIR"
    if call in ("unshare", "write", "setns", "fsmount"):
        return "this host withholds what a sandbox needs; see: sandboxctl doctor"
    return ""
