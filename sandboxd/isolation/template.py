"""A sandbox that is kept ready: one tool call after another runs in it, never two at once.

Building a sandbox costs far more than starting a program, and is the same for every call of one
tool in one session. A template is built and restricted as any other sandbox is, by the same steps
(:mod:`sandboxd.isolation.sandbox`), and its init too holds no privilege whatever. But instead of
ending with its program the init kills and reaps whatever that left, clears every trace away
(:mod:`sandboxd.isolation.lasting`) and waits for the next call; when something is left that it
can't clear, or what a program inherits was changed, it ends. It is not told a secret: it points
posix_spawn(3) to the arguments and the environment where they lie in the sealed memfd.

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
from sandboxd.isolation.sandbox import (
    SIGNALS,
    build,
    limit,
    open_program,
    restrict,
    setup_failed,
)
from sandboxd.isolation.wire import (
    FIRST_HIGH_FD,
    FRAME,
    MAX_FDS,
    MAX_SPEC,
    Frame,
    Kind,
    decode_lasting,
    failed,
    lasting_span,
    locate,
)

__all__ = ["enter"]


def enter(
    sock: socket.socket, *, privileged: bool, group: Cgroup | None = None, born: bool = False
) -> NoReturn:
    """Become a template for whatever ``sock`` asks first. Ends when its other end closes.

    ``group`` is its cgroup; ``born``: this process was made inside.

    The exit status is 0 where it ends by its own decision, never with a program half started: a
    call that it has not answered can go to another template.
    """
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
        launch = _receive(sock)
        if problem is not None:
            raise problem
        if launch is not None:
            template = _Template(sock, launch, meter, privileged=privileged)
            while launch is not None:
                template.run(launch)
                launch = _receive(sock)
        os._exit(0)
    except SandboxdError as failure:
        _send(sock, replace(failed(launch.number if launch else 0, failure), b=1))
    except BaseException as failure:
        _send(sock, replace(setup_failed(launch.number if launch else 0, failure), b=1))
    os._exit(125)


class _Launch:
    """A launch as it came: its number, and its descriptors, the memfd first."""

    def __init__(self, number: int, fds: array.array[int]) -> None:
        self.number, self.fds = number, fds

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class _Template:
    """Built for its first launch."""

    def __init__(
        self, sock: socket.socket, first: _Launch, meter: Meter, *, privileged: bool
    ) -> None:
        self.sock, self.meter = sock, meter
        with spawn.mapped(first.fds[0], MAX_SPEC) as spec:
            self.lasting = bytes(spec.view[slice(*lasting_span(spec.view))])
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
        used = self.meter.before
        if used is None:
            used = _used(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        program = 0
        try:
            program = self._start(launch)
            _send(self.sock, Frame(Kind.STARTED, launch.number, used))
        except SandboxdError as failure:
            _send(self.sock, failed(launch.number, failure))
        except BaseException as failure:
            _send(self.sock, setup_failed(launch.number, failure))
        launch.close()
        if program:
            self._see_to_its_end(launch.number, program)
        if not self._clear():
            os._exit(0)
        self.meter.mark()

    def _start(self, launch: _Launch) -> int:
        """Start the program that the launch's memfd describes. Returns its pid."""
        try:
            os.chdir(self.spec.cwd)
        except OSError as failure:
            raise KernelError("chdir", failure.errno or 0, self.spec.cwd) from None
        with spawn.mapped(launch.fds[0], MAX_SPEC) as spec:
            if spec.view[slice(*lasting_span(spec.view))] != self.lasting:
                raise KernelError("read", errno.EBADMSG, "launch spec of another template")
            own = locate(spec.view)
            if len(own.files) != len(self.files) or not own.argv:
                raise ValueError("a launch spec has one content for each of its files")
            for fd, (start, end) in zip(self.files, own.files, strict=True):
                os.lseek(fd, 0, os.SEEK_SET)
                while start < end:
                    start += os.write(fd, spec.view[start:end])
            base = spec.address
            argv = [base + start for start, _ in own.argv]
            env = [base + start for start, _, _ in own.env]
            streams = self._streams(launch.fds)
            pid, code = self._spawn(argv, env, streams)
            if code:
                path = self.spec.program or os.fsdecode(bytes(spec.view[slice(*own.argv[0])]))
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
        streams = fds[1:]
        if len(streams) != len(targets):
            raise KernelError("recvmsg", errno.EBADMSG, "launch frame")
        if set(streams).intersection(targets):
            for index, fd in enumerate(streams):
                fds[index + 1] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_HIGH_FD)
                os.close(fd)
            streams = fds[1:]
        return list(zip(streams, targets, strict=True))

    def _see_to_its_end(self, number: int, program: int) -> None:
        """Reap and pass signals on until the program ends, end whatever it left, and report."""
        cpu, memory, status = 0.0, 0, -1
        while status < 0:
            received = signal.sigwaitinfo(SIGNALS).si_signo
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
            os._exit(0)
        microseconds = int(cpu * 1e6) if used.cpu_us is None else used.cpu_us
        peak = used.peak_kib
        _send(self.sock, Frame(Kind.EXITED, number, status, microseconds, memory, peak))

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


def _discard_signals() -> None:
    while signal.sigtimedwait(SIGNALS, 0) is not None:
        pass


def _receive(sock: socket.socket) -> _Launch | None:
    """The next launch; None when the broker has closed its end."""
    fds: array.array[int] = array.array("i")
    data, ancillary, _, _ = sock.recvmsg(
        FRAME.size, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data:
        return None
    return _Launch(Frame.unpack(data).number, fds)


def _send(sock: socket.socket, frame: Frame) -> None:
    try:
        sock.send(frame.pack())
    except OSError:
        os._exit(125)  # the broker is gone, and this namespace with it
