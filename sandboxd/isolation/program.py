"""The last steps to a program: its descriptors, its limits, execve(2).

For a process that is confined already (:mod:`sandboxd.isolation.sandbox`) and starts a program.

Standard library only.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
import termios
from collections.abc import Iterator, Sequence
from typing import NoReturn

from sandboxd.errors import KernelError, SandboxdError
from sandboxd.isolation import kernel
from sandboxd.isolation.root import check_pin
from sandboxd.isolation.wire import (
    FIRST_HIGH_FD,
    FRAME,
    MAX_FDS,
    MAX_SPEC,
    UNPINNED,
    Frame,
    Kind,
    LaunchSpec,
    Limits,
    decode_spec,
    failed,
)

__all__ = [
    "OURS",
    "SIGNALS",
    "forget",
    "limit",
    "open_program",
    "program_to_be",
    "read_spec",
    "receive",
    "setup_failed",
    "start",
]

#: How to open a file that is only looked at or executed.
_BY_PATH = os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW
SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
#: What Python and the launcher ignore or handle, and a program must not inherit.
OURS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ)

_DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"


def read_spec(fd: int) -> LaunchSpec:
    """The launch spec in a sealed memfd. KernelError or ValueError where there is none."""
    size = os.fstat(fd).st_size
    if size > MAX_SPEC:
        raise KernelError("read", errno.EMSGSIZE, "launch spec")
    data = os.pread(fd, size, 0)
    try:
        return decode_spec(data)
    finally:
        kernel.wipe(data)


def forget(spec: LaunchSpec) -> None:
    """The program has its secrets now; its parent, which lives as long, keeps none."""
    for secret in (*spec.argv, *(value for _, value in spec.env), *(f.content for f in spec.files)):
        kernel.wipe(secret)


def start(number: int, memfd: int, streams: Sequence[int]) -> int:
    """Fork and execve(2) the program of the spec in ``memfd``; its pid once it runs.

    This process never reads the spec, and so holds nothing of it. Raises KernelError.
    """
    result, done = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError as failure:
        os.close(result)
        os.close(done)
        raise KernelError("fork", failure.errno or 0) from None
    if pid == 0:
        _become(number, memfd, streams, done)
    os.close(done)
    told = os.read(result, FRAME.size)
    os.close(result)
    if told:
        os.waitpid(pid, 0)
        refused = Frame.unpack(told)
        call, _, path = refused.text.partition("\t")
        raise KernelError(call, refused.a, path)
    return pid


def program_to_be(told: int) -> int:
    """Fork a process that waits on the socket ``told`` for its launch, and then executes it.

    A frame brings the spec, of which argv, environment, cwd and limits count, and the streams. What
    keeps it from running goes back as a FAILED frame; nothing does when it runs, and the socket
    closes. Where that closes first, it ends.
    """
    pid = os.fork()
    if pid == 0:
        try:
            kernel.close_all_but([told])
            sock = socket.socket(fileno=told)
            frame, fds = receive(sock)
            if frame is not None and fds:
                _become(frame.number, fds[0], fds[1:], sock.detach())
        finally:
            os._exit(127)
    return pid


def _become(number: int, memfd: int, streams: Sequence[int], back: int) -> NoReturn:
    """Execute the program of a spec. What keeps it from that is written to ``back``."""
    try:
        # Above every target number, so that placing the streams does not overwrite it.
        back = fcntl.fcntl(back, fcntl.F_DUPFD_CLOEXEC, FIRST_HIGH_FD)
        spec = read_spec(memfd)
        try:
            os.chdir(spec.cwd)
        except OSError as failure:
            raise KernelError("chdir", failure.errno or 0, spec.cwd) from None
        try:
            _exec(spec, streams, back)
        except (OSError, KernelError) as failure:
            name = os.fsdecode(spec.argv[0])
            raise KernelError("execve", failure.errno or errno.EINVAL, name) from None
    except SandboxdError as failure:
        problem = failed(number, failure)
    except BaseException as failure:  # the last words of this process: nobody else can say them
        problem = setup_failed(number, failure)
    with contextlib.suppress(OSError):
        os.write(back, problem.pack())
    os._exit(127)


def receive(sock: socket.socket) -> tuple[Frame | None, list[int]]:
    """A frame and its descriptors; None instead of a frame at the end, and for what is none."""
    fds = array.array("i")
    room = socket.CMSG_SPACE(MAX_FDS * fds.itemsize)
    data, ancillary, _, _ = sock.recvmsg(FRAME.size, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    try:
        return Frame.unpack(data), list(fds)
    except ValueError:
        return None, list(fds)


def _exec(spec: LaunchSpec, streams: Sequence[int], done: int) -> NoReturn:
    os.setsid()
    targets = (0, 1, 2, *spec.extra_fds)
    # Two steps, so that no target number overwrites a source that is still to be placed.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_HIGH_FD) for fd in streams]
    for fd, target in zip(high, targets, strict=True):
        os.dup2(fd, target, inheritable=True)
    kernel.close_all_but([*targets, done])
    if spec.tty:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    limit(spec.limits)
    os.umask(0o022)
    for number in OURS:
        signal.signal(number, signal.SIG_DFL)
    program = open_program(spec)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    env = dict(spec.env)
    if program >= 0:
        os.execve(program, spec.argv, env)
    name = spec.argv[0]
    if b"/" in name:
        os.execve(name, spec.argv, env)
    _exec_by_name(name, spec.argv, env)


def _exec_by_name(name: bytes, argv: tuple[bytes, ...], env: dict[bytes, bytes]) -> NoReturn:
    """As execvp(3) does, along the program's own PATH."""
    refused: OSError = FileNotFoundError(errno.ENOENT, "")
    for directory in env.get(b"PATH", _DEFAULT_PATH).split(b":"):
        try:
            os.execve((directory or b".") + b"/" + name, argv, env)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except PermissionError as failure:
            refused = failure
    raise refused


def open_program(spec: LaunchSpec) -> int:
    """The pinned program as the sandbox shows it, to be executed by this very descriptor; or -1.

    What the sandbox mounts of pinned files must be there still: with a directory entry of the
    host goes what is mounted on it, in every namespace (rename(2), unlink(2)). Raises OSError and
    KernelError, ESTALE where another file stands in the place of one, or one was written.
    """
    for mount in spec.mounts:
        if mount.pin != UNPINNED:
            with _opened(mount.target) as fd:
                check_pin(fd, mount.pin, mount.target)
    if spec.pin == UNPINNED:
        return -1
    path = spec.program or os.fsdecode(spec.argv[0])
    fd = os.open(path, _BY_PATH)
    try:
        check_pin(fd, spec.pin, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, _BY_PATH)
    try:
        yield fd
    finally:
        os.close(fd)


def limit(limits: Limits) -> None:
    """Set the resource limits of this process, never above those it has."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind, value in (
        (resource.RLIMIT_DATA, limits.memory),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_FSIZE, limits.file_size),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
    ):
        if value:
            _, hard = resource.getrlimit(kind)
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            resource.setrlimit(kind, (value, value))


def setup_failed(number: int, failure: BaseException) -> Frame:
    """The FAILED frame of an exception that nobody foresaw."""
    code = failure.errno if isinstance(failure, OSError) and failure.errno else errno.EINVAL
    # Only the class and the file: an exception's text may quote what it choked on.
    path = failure.filename if isinstance(failure, OSError) else None
    where = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
    text = f"setup\t{type(failure).__name__} {where}".rstrip()
    return Frame(Kind.FAILED, number, code, text=text)
