"""The broker's side of the launcher: start a sandbox, wait for its end, signal it, kill it."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from sandboxd.errors import Conflict, Invalid, KernelError, SandboxdError, Unavailable
from sandboxd.isolation.inside import Orders
from sandboxd.isolation.pool import Key, Pool, Template
from sandboxd.isolation.reports import Exit, descriptors_in, exit_of, failure_of, gone, pid_of
from sandboxd.isolation.reuse import template_key, template_suits
from sandboxd.isolation.wire import (
    FRAME,
    MAX_SPEC,
    CgroupState,
    Frame,
    Kind,
    LaunchSpec,
    check_spec,
    encode_spec,
    lasting_part,
    sealed_memfd,
)

__all__ = ["Exit", "Launcher", "Process", "open_launcher"]

_STARTING_LIMIT = 30.0
_ENDING_LIMIT = 5.0
#: Launches on their way at once. Descriptors in flight count against a limit (unix(7),
#: ETOOMANYREFS), and more than a few only wait for each other.
_STARTING_AT_ONCE = 32


def _nothing() -> None:
    """What most have to do while a sandbox starts."""


class Process:
    """A running sandbox. Its pid is that of the sandbox's init, as the host sees it."""

    def __init__(self, launcher: Launcher, number: int, spec_id: str) -> None:
        self.id = spec_id
        self.pid = 0
        self.pidfd = -1
        self.exit: Exit | None = None
        #: Where its program, if it waits for that, and further ones are asked for.
        self.first: Orders | None = None
        self.orders: Orders | None = None
        self._launcher, self._number = launcher, number
        self._template: Template | None = None
        self._declined = False
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

    async def begin(self, spec: LaunchSpec, *, stdin: int, stdout: int, stderr: int) -> None:
        """Run the program of ``spec`` in a sandbox that waits for it; returns once it runs.

        argv, environment, cwd and limits of it count. Raises KernelError naming what failed
        (``chdir``, ``execve``), and Conflict when the sandbox has ended or has its program.
        """
        first, self.first = self.first, None
        if first is None:
            raise Conflict("this sandbox waits for no program")
        try:
            await first.send(replace(spec, mounts=(), files=()), (stdin, stdout, stderr))
            with trio.fail_after(_STARTING_LIMIT):
                await first.answer()
        except trio.TooSlowError:
            raise Unavailable(f"the program did not start in {_STARTING_LIMIT:.0f} s") from None
        finally:
            first.close()

    def _open(self, spec: LaunchSpec) -> Iterator[int]:
        """The other ends of the sockets into the sandbox, which go with its launch."""
        if spec.waits:
            self.first = Orders()
            yield self.first.theirs.fileno()
        if spec.further:
            self.orders = Orders()
            yield self.orders.theirs.fileno()

    def _passed_on(self) -> None:
        for orders in (self.first, self.orders):
            if orders is not None:
                orders.theirs.close()

    async def signal(self, signum: int) -> None:
        """Send a signal to the program. SIGKILL ends the whole tree.

        Raises Invalid for SIGSTOP and for what is no signal.
        """
        if signum not in signal.valid_signals() or signum == signal.SIGSTOP:
            raise Invalid(f"signal {signum} can't be sent to a sandbox", hint="SIGTSTP stops it")
        if signum == signal.SIGKILL:
            await self.kill()
        elif not self._ended.is_set():
            if self._template is not None:
                # It may arrive after this program's end, and must not hit the next one.
                self._template.worn = True
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
        self._pool = Pool()
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
        meanwhile: Callable[[], None] = _nothing,
    ) -> Process:
        """Start a sandbox; returns once its program runs, has ended already, or waits to be told.

        ``meanwhile`` is called once the order is given, while it is carried out; again where it
        has to be given again.
        ``extra`` holds the descriptors for ``spec.extra_fds``, where the spec has shared mounts
        their mount namespace, and where it has listeners a Unix socket that brings them. All stay
        the caller's to close. Raises KernelError naming the system call and path that failed, or
        Unavailable when the launcher is gone. A cancelled launch is killed.
        """
        check_spec(spec)
        if self.privileged and spec.uid == 0:
            raise Invalid("a sandbox never runs as root")
        if len(extra) != len(spec.extra_fds) + spec.brings_namespace + bool(spec.listeners):
            raise Invalid("a launch needs one descriptor for each thing that it names")
        lasting = lasting_part(spec)
        data = encode_spec(spec, lasting)
        if len(data) > MAX_SPEC:
            raise failure_of(Frame(Kind.FAILED, 0, errno.E2BIG, text=f"execve\t{spec.id}"))
        streams = (stdin, stdout, stderr, *extra)
        if spec.template and template_suits(spec, streams):
            key = (spec.template, template_key(spec, lasting))
            return await self._launch_in_template(spec, data, streams, key, meanwhile)
        memfd = sealed_memfd(data)
        try:
            fds = (memfd, *streams)
            async with self._starting:
                process = self._new_process(spec)
                fds = (*fds, *process._open(spec))
                try:
                    await self.send(
                        Frame(
                            Kind.LAUNCH, process._number, len(fds), *_share(spec), text=_io(spec)
                        ),
                        *fds,
                    )
                except BaseException:
                    self._finish(process)
                    raise
                process._passed_on()
                await self._await_start(process, meanwhile)
                return process
        finally:
            os.close(memfd)

    async def retire(self, group: str) -> None:
        """End the templates of a group: the idle ones now, the others after their call."""
        await self._pool.retire(group)

    def _new_process(self, spec: LaunchSpec) -> Process:
        self._numbers += 1
        process = Process(self, self._numbers, spec.id)
        self._processes[process._number] = process
        return process

    async def _launch_in_template(
        self,
        spec: LaunchSpec,
        data: bytes,
        fds: Sequence[int],
        key: Key,
        meanwhile: Callable[[], None],
    ) -> Process:
        while True:
            template = self._pool.take(key) or await self._new_template(key, spec)
            number = self._numbers = self._numbers + 1
            process = Process(self, template.number, spec.id)
            process._template, process.pid = template, template.pid
            take = partial(self._take_from_template, process)
            if await template.send(number, data, fds, take):
                await self._await_start(process, meanwhile)
                if not process._declined:
                    return process
            # It ended just now, by itself, and has started nothing: a call had left traces in it.

    async def _new_template(self, key: Key, spec: LaunchSpec) -> Template:
        self._numbers += 1
        template = self._pool.add(self._numbers, key)
        async with self._starting:
            try:
                await self.send(
                    Frame(Kind.TEMPLATE, template.number, 0, *_share(spec), text=_io(spec))
                )
                with trio.fail_after(_STARTING_LIMIT):
                    await template.ready.wait()
            except BaseException as failure:
                self._pool.drop(template)
                if isinstance(failure, trio.TooSlowError):
                    raise Unavailable(
                        f"the sandbox did not start in {_STARTING_LIMIT:.0f} s"
                    ) from None
                raise
        if template.failure is not None:
            raise template.failure
        return template

    def _take_from_template(self, process: Process, frame: Frame | None) -> None:
        """News of a call from its template; None: the template has ended."""
        template = process._template
        assert template is not None
        if frame is None and template.usage is None:
            process._failure = self._failure or gone()
        elif frame is None and not process._started.is_set() and template.left:
            process._declined = True
        elif frame is None and not process._started.is_set():
            process._failure = failure_of(
                Frame(Kind.FAILED, 0, errno.ECHILD, text="setup\tkilled while starting")
            )
        elif frame is None or frame.kind is Kind.EXITED:
            process.exit = exit_of(frame or template.last_words())
        elif frame.kind is Kind.FAILED:
            process._failure = failure_of(frame)
        elif frame.kind is Kind.STARTED:
            process._started.set()
            return
        process._started.set()
        process._ended.set()

    async def _await_start(self, process: Process, meanwhile: Callable[[], None]) -> None:
        try:
            meanwhile()
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
                raise self._failure or gone()
            try:
                await self._sock.sendmsg([frame.pack()], ancillary)
            except (ConnectionError, trio.ClosedResourceError):
                raise gone() from None
            except OSError as failure:
                raise KernelError("sendmsg", failure.errno or 0, "launch frame") from None

    async def run(self) -> None:
        """Take the launcher's reports until it ends. Started by :func:`open_launcher`."""
        try:
            while True:
                data, ancillary, _, _ = await self._sock.recvmsg(
                    FRAME.size, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC
                )
                if not data:
                    break
                fds = descriptors_in(ancillary)
                try:
                    self._take(Frame.unpack(data), fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        except (OSError, ValueError):
            pass  # told below: a launcher that can't be read is gone
        finally:
            self._sock.close()
            self._failure = self._failure or gone()
            self.gone.set()
            await self._last_process()
            self._pool.launcher_is_gone(self._failure)
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
                self.pid = pid_of(self._pidfd)
            self._ready.set()
            return
        if frame.kind is Kind.FAILED and frame.number == 0:
            self._failure = failure_of(frame)
            return
        if self._pool.take_report(frame, fds):
            return
        process = self._processes.get(frame.number)
        if process is None:
            return
        if frame.kind is Kind.STARTED:
            if fds:  # none when this process has no descriptor left; it runs all the same
                process.pidfd = fds.pop()
                process.pid = pid_of(process.pidfd)
            process._started.set()
        elif frame.kind is Kind.FAILED:
            process._failure = failure_of(frame)
            self._finish(process)
        elif frame.kind is Kind.EXITED:
            process.exit = exit_of(frame)
            self._finish(process)

    def _finish(self, process: Process) -> None:
        self._processes.pop(process._number, None)
        if process.pidfd >= 0:
            os.close(process.pidfd)
            process.pidfd = -1
        for orders in (process.first, process.orders):
            if orders is not None:
                orders.close()
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
        launcher._pool.nursery = nursery
        nursery.start_soon(launcher.run)
        await launcher._ready.wait()
        if not launcher.gone.is_set():
            started = True
            try:
                yield launcher
            finally:
                nursery.cancel_scope.cancel()
    if not started:  # told out here, where no nursery makes a group of it
        raise launcher._failure or gone()


def _share(spec: LaunchSpec) -> tuple[int, int, int]:
    limits = spec.limits
    return limits.memory, limits.processes, limits.millicpus


def _io(spec: LaunchSpec) -> str:
    return str(spec.limits.io) if spec.limits.io else ""
