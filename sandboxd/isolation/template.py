"""A sandbox that is kept ready: one tool call after another runs in it, never two at once.

Building a sandbox costs far more than starting a program, and is the same for every call of one
tool in one session. A template is built and restricted as any other sandbox is, by the same steps
(:mod:`sandboxd.isolation.sandbox`), and its init too holds no privilege whatever. But instead of
ending with its program the init kills and reaps whatever that left, clears every trace away
(:mod:`sandboxd.isolation.lasting`) and waits for the next call; when something is left that it
can't clear, or what a program inherits was changed, it ends. Secrets pass through one buffer, or
stay in a sealed memfd: posix_spawn(3) is pointed to where they lie, and the buffer wiped.

Standard library only.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
from dataclasses import replace
from typing import NoReturn

from sandboxd.errors import KernelError, SandboxdError
from sandboxd.isolation import kernel, spawn
from sandboxd.isolation.cgroup import Cgroup
from sandboxd.isolation.lasting import LastingRoot, Traces
from sandboxd.isolation.meter import Meter
from sandboxd.isolation.program import SIGNALS, limit, open_program, setup_failed
from sandboxd.isolation.sandbox import build, restrict
from sandboxd.isolation.wire import (
    FIRST_HIGH_FD,
    FRAME,
    MAX_FDS,
    MAX_INLINE,
    MAX_SPEC,
    Frame,
    Kind,
    decode_lasting,
    failed,
    locate,
)

__all__ = ["enter"]

#: Seconds within which a program's start is not told before its end.
_AT_ONCE = 0.002

_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_CLOSE_ON_EXEC = socket.MSG_CMSG_CLOEXEC


def enter(
    sock: socket.socket, *, privileged: bool, group: Cgroup | None = None, born: bool = False
) -> NoReturn:
    """Become a template for whatever ``sock`` asks first. Ends when its other end closes.

    ``group`` is its cgroup; ``born``: this process was made inside.

    The exit status is 0 where it ends by its own decision, never with a program half started: a
    call that it has not answered can go to another template.
    """
    inbox = spawn.Inbox(FRAME.size + MAX_INLINE)
    launch: _Launch | None = None
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        kernel.set_dumpable(False)
        problem: SandboxdError | None = None
        try:
            if group is not None:
                group.join(born=born)
        except SandboxdError as failure:
            problem = failure  # told to whoever asks for the first launch
        meter = Meter(group)
        kernel.close_all_but([sock.fileno(), *meter.fds])
        while os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) < 2:
            pass  # so that no stream of a call ever has one of these numbers
        launch = _receive(sock, inbox)
        if problem is not None:
            raise problem
        if launch is not None:
            template = _Template(sock, launch, meter, privileged=privileged)
            while launch is not None:
                template.run(launch)
                launch = _receive(sock, inbox)
        os._exit(0)
    except SandboxdError as failure:
        _send(sock, replace(failed(launch.number if launch else 0, failure), b=1))
    except BaseException as failure:
        _send(sock, replace(setup_failed(launch.number if launch else 0, failure), b=1))
    os._exit(125)


class _Launch:
    """A launch as it came: its number, its descriptors, and where its spec lies."""

    def __init__(self, number: int, fds: array.array[int], inbox: spawn.Inbox, end: int) -> None:
        """``end``: of the spec in ``inbox``, or 0 when it is in a memfd, the first descriptor."""
        self.number, self.fds = number, fds
        self._inbox, self._end = inbox, end
        if end:
            self.spec = inbox.part(FRAME.size, end)
        else:
            memfd = fds.pop(0)
            self.spec = spawn.Mapping.of(memfd, MAX_SPEC)
            os.close(memfd)

    def forget(self) -> None:
        """Keep nothing of the spec, and no descriptor."""
        if self._end:
            self._inbox.wipe(self._end)
        else:
            self.spec.unmap()
        for fd in self.fds:
            os.close(fd)


class _Template:
    """Built for its first launch."""

    def __init__(
        self, sock: socket.socket, first: _Launch, meter: Meter, *, privileged: bool
    ) -> None:
        self.sock, self.meter = sock, meter
        view = first.spec.view
        self.lasting = bytes(view[slice(*locate(view).lasting)])
        self.spec = decode_lasting(self.lasting)
        root = build(self.spec, privileged=privileged, kind=LastingRoot)
        assert isinstance(root, LastingRoot)
        self.files = root.files
        limit(self.spec.limits)
        os.umask(0o022)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        # Of the streams to come only this one could be opened again, and so needs a rule.
        restrict(self.spec, [null])
        os.close(null)
        self.traces = Traces(root)
        self.keyrings = spawn.has_keyrings()
        self.attributes = spawn.inherited_attributes()
        self.meter.mark()

    def run(self, launch: _Launch) -> None:
        """Start the program, see to its end, and be as before. Exits where that can't be had."""
        # A signal for the call before may have been sent until the launcher knew of its end.
        _discard_signals()
        program, problem = 0, None
        try:
            program = self._start(launch)
        except SandboxdError as failure:
            problem = failed(launch.number, failure)
        except BaseException as failure:
            problem = setup_failed(launch.number, failure)
        launch.forget()
        if problem is None:
            self._see_to_its_end(launch.number, program)
        else:
            _send(self.sock, problem)
        if not self._clear():
            os._exit(0)
        self.meter.mark()

    def _start(self, launch: _Launch) -> int:
        """Start the program that the launch's memfd describes. Returns its pid."""
        try:
            os.chdir(self.spec.cwd)
        except OSError as failure:
            raise KernelError("chdir", failure.errno or 0, self.spec.cwd) from None
        view, base = launch.spec.view, launch.spec.address
        own = locate(view)
        if view[slice(*own.lasting)] != self.lasting:
            raise KernelError("read", errno.EBADMSG, "launch spec of another template")
        if len(own.files) != len(self.files) or not own.argv:
            raise ValueError("a launch spec has one content for each of its files")
        for fd, (start, end) in zip(self.files, own.files, strict=True):
            os.lseek(fd, 0, os.SEEK_SET)
            while start < end:
                start += os.write(fd, view[start:end])
        argv = [base + start for start, _ in own.argv]
        env = [base + start for start, _, _ in own.env]
        pid, code = self._spawn(argv, env, self._streams(launch.fds))
        if code:
            path = self.spec.program or os.fsdecode(bytes(view[slice(*own.argv[0])]))
            raise KernelError("execve", code, path)
        return pid

    def _spawn(
        self, argv: list[int], env: list[int], streams: list[tuple[int, int]]
    ) -> tuple[int, int]:
        """The pid and 0, or 0 and the errno of what failed."""
        try:
            fd = open_program(self.spec)
        except (OSError, KernelError) as failure:
            return 0, failure.errno or errno.EINVAL
        if fd < 0:
            return spawn.spawn(argv[0], argv, env, streams)
        free = max(target for _, target in streams) + 1
        program = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, free)  # where no stream takes its place
        os.close(fd)
        try:
            name = ctypes.create_string_buffer(b"/proc/self/fd/%d" % program)
            return spawn.spawn(ctypes.addressof(name), argv, env, streams)
        finally:
            os.close(program)

    def _streams(self, fds: array.array[int]) -> list[tuple[int, int]]:
        """Which descriptor goes to which number, no source being overwritten before its turn."""
        targets = (0, 1, 2, *self.spec.extra_fds)
        if len(fds) != len(targets):
            raise KernelError("recvmsg", errno.EBADMSG, "launch frame")
        if self.spec.extra_fds and set(fds).intersection(targets):
            for index, fd in enumerate(fds):
                fds[index] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_HIGH_FD)
                os.close(fd)
        return list(zip(fds, targets, strict=True))

    def _see_to_its_end(self, number: int, program: int) -> None:
        """Reap and pass signals on until the program ends, end whatever it left, and report.

        A program that ends at once is told of by its end alone.
        """
        cpu, memory, status = 0.0, 0, -1
        told = False
        while status < 0:
            received = _next_signal(None if told else _AT_ONCE)
            if not received:
                self._tell_start(number)
                told = True
                continue
            if received != signal.SIGCHLD:
                os.kill(program, received)
                continue
            while status < 0 and (ended := _reap(os.WNOHANG)) is not None and ended[0]:
                cpu, memory = cpu + ended[2], max(memory, ended[3])
                if ended[0] == program:
                    status = ended[1]
        ended = _reap(os.WNOHANG)
        if ended is not None:
            # No fork passes by this: it either sees the signal pending or is seen here.
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        while ended is not None:
            cpu, memory = cpu + ended[2], max(memory, ended[3])
            ended = _reap(0)
        used = self.meter.read()
        if used.oom or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            # Perhaps for want of memory, on which the launcher acts, and which it will report.
            if not told:
                self._tell_start(number)
            os._exit(0)
        microseconds = int(cpu * 1e6) if used.cpu_us is None else used.cpu_us
        peak = used.peak_kib
        _send(self.sock, Frame(Kind.EXITED, number, status, microseconds, memory, peak))

    def _tell_start(self, number: int) -> None:
        used = self.meter.before
        if used is None:
            used = _used(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        _send(self.sock, Frame(Kind.STARTED, number, used))

    def _clear(self) -> bool:
        """Whether all is as it was before the call, so that the next may come."""
        _discard_signals()
        if not self.traces.clear() or (self.keyrings and not spawn.clear_keyrings()):
            return False
        if spawn.inherited_attributes() != self.attributes:
            return False
        most = self.spec.limits.cpu_seconds
        # The limit counts this process's own time too.
        return not most or _used(resource.RUSAGE_SELF) < most * 1e6 / 4


def _reap(flags: int) -> tuple[int, int, float, int] | None:
    """The next ended child: pid (0: none yet), status, CPU seconds, peak KiB. None: no child."""
    try:
        pid, status, usage = os.wait4(-1, flags)
    except ChildProcessError:
        return None
    return pid, status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss


def _used(*whose: int) -> int:
    """CPU time in microseconds."""
    usages = [resource.getrusage(who) for who in whose]
    return int(sum(usage.ru_utime + usage.ru_stime for usage in usages) * 1e6)


def _next_signal(within: float | None) -> int:
    """The number of the next signal; 0 when none comes in so many seconds."""
    if within is None:
        return signal.sigwaitinfo(SIGNALS).si_signo
    received = signal.sigtimedwait(SIGNALS, within)
    return received.si_signo if received is not None else 0


def _discard_signals() -> None:
    while _next_signal(0):
        pass


def _receive(sock: socket.socket, inbox: spawn.Inbox) -> _Launch | None:
    """The next launch; None when the broker has closed its end."""
    fds: array.array[int] = array.array("i")
    size, ancillary, flags, _ = sock.recvmsg_into([inbox.memory], _ANCILLARY, _CLOSE_ON_EXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not size:
        return None
    frame = Frame.unpack(inbox.memory[: FRAME.size])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise KernelError("recvmsg", errno.EMSGSIZE, "launch frame")
    return _Launch(frame.number, fds, inbox, 0 if frame.a else size)


def _send(sock: socket.socket, frame: Frame) -> None:
    try:
        sock.send(frame.pack())
    except OSError:
        os._exit(125)  # the broker is gone, and this namespace with it
