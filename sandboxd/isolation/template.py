"""A template: a sandbox kept ready, in which one tool call after another runs, never two at once.

Building a sandbox costs far more than starting a program, and most of it is the same for every
call of one tool in one session. A template is built once (``sandbox.build``) and stays, as pid 1
of its pid namespace; two calls at once take two templates. For each call a thread gets ready while
nobody waits yet: mount and IPC namespaces of its own, fresh private memory, every capability given
up. Then it waits for the call, points posix_spawn(3) to the arguments and the environment where
they lie in the sealed memfd, and ends. No secret enters this process's own memory, nor can one
call reach another's: no process, mount, queue, key or memory of a call is left when the next one
starts, and a template whose limits or priority a call has changed is not used again.

Standard library only.
"""

from __future__ import annotations

import _thread
import array
import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
import stat
from dataclasses import dataclass, replace
from typing import NoReturn

from sandboxd.errors import KernelError, SandboxdError
from sandboxd.isolation import kernel, spawn
from sandboxd.isolation.cgroup import Cgroup
from sandboxd.isolation.meter import Meter
from sandboxd.isolation.root import DELIVERED, memory_bounds, private_places
from sandboxd.isolation.sandbox import INSIDE_ID, SIGNALS, build, limit, restrict, setup_failed
from sandboxd.isolation.wire import (
    FIRST_HIGH_FD,
    FRAME,
    LAST,
    MAX_FDS,
    MAX_SPEC,
    Frame,
    Kind,
    LaunchSpec,
    decode_lasting,
    failed,
    lasting_span,
    locate,
)

__all__ = ["enter"]

_CLONE_FS = 0x200
_STACK = 256 << 10


def enter(
    sock: socket.socket, *, privileged: bool, group: Cgroup | None = None, born: bool = False
) -> NoReturn:
    """Become a template for whatever ``sock`` asks first. Ends when its other end closes.

    ``group`` is its cgroup; ``born``: this process was made inside.
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
            with spawn.mapped(launch.fds[0], MAX_SPEC) as spec:
                lasting = bytes(spec.view[slice(*lasting_span(spec.view))])
            _Template(sock, lasting, meter, privileged=privileged).serve(launch)
    except SandboxdError as failure:
        _send(sock, replace(failed(launch.number if launch else 0, failure), b=1))
    except BaseException as failure:
        _send(sock, replace(setup_failed(launch.number if launch else 0, failure), b=1))
    os._exit(125)


@dataclass(frozen=True)
class _Launch:
    number: int
    fds: array.array[int]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class _Template:
    def __init__(
        self, sock: socket.socket, lasting: bytes, meter: Meter, *, privileged: bool
    ) -> None:
        self.sock, self.lasting, self.meter = sock, lasting, meter
        self.spec = decode_lasting(lasting)
        build(self.spec, privileged=privileged, lasting=True)
        kernel.drop_bounding_set()
        spawn.drop_all_but(spawn.CAP_SYS_ADMIN, spawn.CAP_KILL)
        limit(self.spec.limits)
        os.umask(0o022)
        _thread.stack_size(_STACK)
        self.attributes = spawn.inherited_attributes()
        self.launched = _thread.allocate_lock()
        self.launched.acquire()
        # Of the call that runs, or comes next; ``used``: microseconds of CPU before it.
        self.number, self.program, self.mounts, self.used = 0, 0, -1, 0
        self.unusable = self.keyrings = False

    def serve(self, launch: _Launch | None) -> NoReturn:
        while not self.unusable:
            _thread.start_new_thread(self._ready_one, (launch,))
            launch = None
            self.launched.acquire()
            if self.program:
                self._see_to_its_end()
            if self.mounts >= 0:  # what takes long is left for now, when nobody waits
                os.close(self.mounts)
                self.mounts = -1
        os._exit(0)

    # ---- in a thread that lives for one launch

    def _ready_one(self, launch: _Launch | None) -> None:
        """Get ready for a call, wait for it, start it."""
        self.number = launch.number if launch else 0
        self.program = 0
        try:
            problem: BaseException | None = None
            files: list[int] = []
            try:
                files = self._prepare()
            except BaseException as failure:
                problem, self.unusable = failure, True
            launch = launch or _receive(self.sock)
            if launch is None:
                os._exit(0)
            self.number = launch.number
            # A signal for the call before may have been sent until the launcher knew of its end.
            _discard_signals()
            if problem is not None:
                raise problem
            self.program = self._start(launch, files)
            _send(self.sock, Frame(Kind.STARTED, self.number, self.used))
        except SandboxdError as failure:
            _send(self.sock, replace(failed(self.number, failure), b=self.unusable))
        except BaseException as failure:
            _send(self.sock, replace(setup_failed(self.number, failure), b=self.unusable))
        finally:
            if launch is not None:
                launch.close()
            self.launched.release()

    def _prepare(self) -> list[int]:
        """Namespaces, memory and privileges of the coming call; its files, open for writing."""
        kernel.unshare(_CLONE_FS | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
        # Kept open so that its end is not the program's to wait for, when it exits.
        self.mounts = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        covered = [(target, _copy(target)) for target in _below_private_places(self.spec)]
        bounds = ",".join(f"{k}={v}" for k, v in memory_bounds(self.spec).items())
        for path, mode in private_places(self.spec):
            _mount_memory(path, f"mode={mode:04o},{bounds}")
        for target, tree in covered:
            _place(target, tree)
        files = self._files() if self.spec.files else []
        try:
            os.chdir(self.spec.cwd)
        except OSError as failure:
            raise KernelError("chdir", failure.errno or 0, self.spec.cwd) from None
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        # Of the streams to come only this one could be opened again, and so needs a rule.
        restrict(self.spec, [null])
        os.close(null)
        self.keyrings = spawn.has_keyrings()
        self.meter.mark()
        total = self.meter.cpu()
        self.used = (
            _used(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) if total is None else total
        )
        return files

    def _files(self) -> list[int]:
        """Make the files that the call will get, still empty, and what shows them read-only."""
        _mount_memory(DELIVERED, f"mode=0755,size={32 << 20},nr_inodes=4096")
        opened = []
        for file in self.spec.files:
            try:
                os.makedirs(os.path.dirname(file.path), exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(file.path, flags, file.mode)
                opened.append(fd)
                os.fchmod(fd, file.mode)
            except OSError as failure:
                raise KernelError("open", failure.errno or 0, file.path) from None
        tree = kernel.clone_tree(kernel.AT_FDCWD, DELIVERED, recursive=False)
        attributes = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
        kernel.set_mount_attributes(tree, attributes, recursive=False, path=DELIVERED)
        kernel.move_mount(tree, kernel.AT_FDCWD, DELIVERED)
        os.close(tree)
        return opened

    def _start(self, launch: _Launch, files: list[int]) -> int:
        """Start the program that the launch's memfd describes. Returns its pid."""
        with spawn.mapped(launch.fds[0], MAX_SPEC) as spec:
            if spec.view[slice(*lasting_span(spec.view))] != self.lasting:
                raise KernelError("read", errno.EBADMSG, "launch spec of another template")
            own = locate(spec.view)
            if len(own.files) != len(files) or not own.argv:
                raise ValueError("a launch spec has one content for each of its files")
            for fd, (start, end) in zip(files, own.files, strict=True):
                while start < end:
                    start += os.write(fd, spec.view[start:end])
                os.close(fd)
            base = spec.address
            argv = [base + start for start, _ in own.argv]
            env = [base + start for start, _, _ in own.env]
            pid, code = spawn.spawn(argv[0], argv, env, self._streams(launch.fds))
            if code:
                program = os.fsdecode(bytes(spec.view[slice(*own.argv[0])]))
                raise KernelError("execve", code, program)
            return pid

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

    # ---- in the first thread

    def _see_to_its_end(self) -> None:
        """Reap and pass signals on until the program ends, end whatever it left, and report."""
        cpu, memory, status = 0.0, 0, -1
        while status < 0:
            received = signal.sigwaitinfo(SIGNALS).si_signo
            if received != signal.SIGCHLD:
                os.kill(self.program, received)
                continue
            while status < 0 and (ended := _reap(os.WNOHANG)) is not None and ended[0]:
                cpu, memory = cpu + ended[2], max(memory, ended[3])
                if ended[0] == self.program:
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
        _discard_signals()
        if self.keyrings and not spawn.clear_keyrings():
            self.unusable = True
        self.unusable = self.unusable or self._is_changed()
        text = LAST if self.unusable else ""
        microseconds = int(cpu * 1e6) if used.cpu_us is None else used.cpu_us
        peak = used.peak_kib
        _send(self.sock, Frame(Kind.EXITED, self.number, status, microseconds, memory, peak, text))

    def _is_changed(self) -> bool:
        """Whether the call left traces in what the next would inherit, or time has run out."""
        if spawn.inherited_attributes() != self.attributes:
            return True
        most = self.spec.limits.cpu_seconds
        return (
            bool(most) and _used(resource.RUSAGE_SELF) > most * 1e6 / 4
        )  # the limit counts this process's own too


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


def _below_private_places(spec: LaunchSpec) -> list[str]:
    """The outermost targets of mounts that a call's private memory would cover."""
    places = tuple(f"{path}/" for path, _ in private_places(spec))
    targets = sorted({"/" + m.target.strip("/") for m in spec.mounts})
    found: list[str] = []
    for target in targets:
        if target.startswith(places) and not any(target.startswith(f"{at}/") for at in found):
            found.append(target)
    return found


def _copy(path: str) -> int | None:
    try:
        return kernel.clone_tree(kernel.AT_FDCWD, path, recursive=True)
    except KernelError as failure:
        if failure.errno == errno.ENOENT:  # an optional one
            return None
        raise


def _place(path: str, tree: int | None) -> None:
    if tree is None:
        return
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mknod(path, stat.S_IFREG | 0o444)
    kernel.move_mount(tree, kernel.AT_FDCWD, path)
    os.close(tree)


def _mount_memory(path: str, options: str) -> None:
    options += f",uid={INSIDE_ID},gid={INSIDE_ID}"
    kernel.mount("tmpfs", path, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)


def _receive(sock: socket.socket) -> _Launch | None:
    """The next launch; None when the launcher has closed its end."""
    fds: array.array[int] = array.array("i")
    data, ancillary, _, _ = sock.recvmsg(
        FRAME.size, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data:
        return None
    frame = Frame.unpack(data)
    return _Launch(frame.number, fds)


def _send(sock: socket.socket, frame: Frame) -> None:
    try:
        sock.send(frame.pack())
    except OSError:
        os._exit(125)  # the launcher is gone, and this namespace with it
