"""The broker's side of the launcher: start a sandbox, wait for its end, signal it, kill it."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from sandboxd.errors import Invalid, KernelError, SandboxdError, Unavailable
from sandboxd.isolation.wire import (
    FRAME,
    MAX_SPEC,
    CgroupState,
    Frame,
    Kind,
    LaunchSpec,
    check_spec,
    encode_spec,
    sealed_memfd,
)

__all__ = ["Exit", "Launcher", "Process", "open_launcher"]

_STARTING_LIMIT = 30.0
_ENDING_LIMIT = 5.0
#: Launches on their way at once. Descriptors in flight count against a limit (unix(7),
#: ETOOMANYREFS), and more than a few only wait for each other.
_STARTING_AT_ONCE = 32


@dataclass(frozen=True)
class Exit:
    """How a program ended: ``code`` or ``signal`` (the other is None), and what was used.

    ``cpu_ms`` is that of the whole tree, ``max_rss_kib`` the largest process's. ``peak_kib`` is
    the most that the tree held at once, caches of files included; 0 where no cgroup tells.
    ``oom``: the kernel ended it, or a process of it, for want of memory.
    """

    code: int | None
    signal: int | None
    cpu_ms: int
    max_rss_kib: int
    peak_kib: int = 0
    oom: bool = False


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
        """Send a signal to the program. SIGKILL ends the whole tree.

        Raises Invalid for SIGSTOP and for what is no signal.
        """
        if signum not in signal.valid_signals() or signum == signal.SIGSTOP:
            raise Invalid(f"signal {signum} can't be sent to a sandbox", hint="SIGTSTP stops it")
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
        self._starting = trio.Semaphore(_STARTING_AT_ONCE)
        self._processes: dict[int, Process] = {}
        self._numbers = 0
        self._ready = trio.Event()
        self._failure: SandboxdError | None = None
        self._pidfd = -1
        self.privileged = False
        #: The kernel's Landlock ABI, as far as it is used; 0 without Landlock.
        self.landlock = 0
        #: Whether sandboxes have system call filters.
        self.seccomp = False
        #: Whether sandboxes have clocks of their own.
        self.time = False
        #: What limits a whole sandbox.
        self.cgroup = CgroupState()
        #: Of the launcher process, as this host's /proc names it.
        self.pid = 0
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

        ``extra`` holds the descriptors for ``spec.extra_fds`` and, where the spec has shared
        mounts, their mount namespace. All stay the caller's to close. Raises KernelError naming
        the system call and path that failed, or Unavailable when the launcher is gone. A cancelled
        launch is killed.
        """
        check_spec(spec)
        if self.privileged and spec.uid == 0:
            raise Invalid("a sandbox never runs as root")
        if len(extra) != len(spec.extra_fds) + spec.brings_namespace:
            raise Invalid("a launch needs one descriptor for each of its extra_fds")
        data = encode_spec(spec)
        if len(data) > MAX_SPEC:
            raise _failure(Frame(Kind.FAILED, 0, errno.E2BIG, text=f"execve\t{spec.id}"))
        async with self._starting:
            self._numbers += 1
            process = Process(self, self._numbers, spec.id)
            memfd = sealed_memfd(data)
            self._processes[process._number] = process
            try:
                fds = (memfd, stdin, stdout, stderr, *extra)
                limits = spec.limits
                share = (limits.memory, limits.processes, limits.millicpus)
                await self.send(Frame(Kind.LAUNCH, process._number, len(fds), *share), *fds)
            except BaseException:
                self._processes.pop(process._number, None)
                raise
            finally:
                os.close(memfd)
            await self._await_start(process)
        return process

    async def _await_start(self, process: Process) -> None:
        try:
            with trio.fail_after(_STARTING_LIMIT):
                await process._started.wait()
        except BaseException as failure:
            with trio.move_on_after(_ENDING_LIMIT, shield=True):
                with contextlib.suppress(Unavailable):
                    await process.kill()
                await process._ended.wait()
            if isinstance(failure, trio.TooSlowError):
                raise Unavailable(f"the sandbox did not start in {_STARTING_LIMIT:.0f} s") from None
            raise
        if process._failure is not None:
            raise process._failure

    async def send(self, frame: Frame, *fds: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        async with self._sending:
            if self.gone.is_set():
                raise self._failure or _gone()
            try:
                await self._sock.sendmsg([frame.pack()], ancillary)
            except (ConnectionError, trio.ClosedResourceError):
                raise _gone() from None
            except OSError as failure:
                raise KernelError("sendmsg", failure.errno or 0, "launch frame") from None

    async def run(self) -> None:
        """Take the launcher's reports until it ends. Started by :func:`open_launcher`."""
        try:
            while True:
                data, ancillary, _, _ = await self._sock.recvmsg(
                    FRAME.size, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
                )
                if not data:
                    break
                fds = _descriptors(ancillary)
                try:
                    self._take(Frame.unpack(data), fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        except (OSError, ValueError):
            pass  # told below: a launcher that can't be read is gone
        finally:
            self._sock.close()
            self._failure = self._failure or _gone()
            self.gone.set()
            await self._last_process()
            self._ready.set()
            for process in list(self._processes.values()):
                process._failure = self._failure
                self._finish(process)

    async def _last_process(self) -> None:
        """Wait for the launcher's end as pid 1: the kernel has then ended every sandbox."""
        if self._pidfd >= 0:
            with trio.move_on_after(_ENDING_LIMIT, shield=True):
                await trio.lowlevel.wait_readable(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _take(self, frame: Frame, fds: list[int]) -> None:
        """Act on one report. A descriptor that is kept is taken out of ``fds``."""
        if frame.kind is Kind.READY:
            self.privileged, self.landlock, self.seccomp = bool(frame.a), frame.b, bool(frame.c)
            self.time = bool(frame.d)
            self.cgroup = CgroupState.unpack(frame.text)
            if fds:
                self._pidfd = fds.pop()
                self.pid = _pid_of(self._pidfd)
            self._ready.set()
            return
        if frame.kind is Kind.FAILED and frame.number == 0:
            self._failure = _failure(frame)
            return
        process = self._processes.get(frame.number)
        if process is None:
            return
        if frame.kind is Kind.STARTED:
            if fds:  # none when this process has no descriptor left; it runs all the same
                process.pidfd = fds.pop()
                process.pid = _pid_of(process.pidfd)
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
                frame.d,
                frame.text == "oom",
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

    When it returns no process of theirs is left. Raises KernelError when the launcher could not
    make its namespaces on this host.
    """
    launcher = Launcher(sock)
    started = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(launcher.run)
        await launcher._ready.wait()
        if not launcher.gone.is_set():
            started = True
            try:
                yield launcher
            finally:
                nursery.cancel_scope.cancel()
    if not started:  # told out here, where no nursery makes a group of it
        raise launcher._failure or _gone()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds)


def _pid_of(pidfd: int) -> int:
    """The pid behind a pidfd as this process's /proc names it (pidfd_open(2)); 0 if ended."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{pidfd}") as info:
        for line in info:
            if line.startswith("Pid:"):
                return max(0, int(line.split()[1]))
    return 0


def _gone() -> Unavailable:
    return Unavailable("the launcher is gone", hint="restart the daemon: it can launch nothing now")


def _failure(frame: Frame) -> SandboxdError:
    call, _, path = frame.text.partition("\t")
    return KernelError(call, frame.a, path, hint=_hint(call, frame.a, path))


def _hint(call: str, code: int, path: str) -> str:
    if call == "execve" and code == errno.ENOENT:
        return f"{path} is not in the sandbox, or its interpreter isn't; mount what it needs"
    if call == "execve" and code == errno.EACCES:
        return f"{path} is not executable in the sandbox"
    if call == "execve" and code == errno.E2BIG:
        return "arguments and environment are larger than the kernel takes (execve(2), E2BIG)"
    if call == "mount_setattr" and code == errno.EINVAL:
        return f"the file system of {path} has no id-mapped mounts; use a local one (ext4, xfs...)"
    if call == "idmap":
        return "give the workspace to an ordinary user: chown USER DIR"
    if call == "setxattr" or path.startswith("overlay"):
        return "a copy-on-write workspace can't be had here; see docs/configuration.md, workspace"
    if call in ("unshare", "write", "setns", "fsmount"):
        return "this host withholds what a sandbox needs; see: sandboxctl doctor"
    return ""
