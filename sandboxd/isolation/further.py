"""A further program in a sandbox that has one already, as the sandbox's init starts it.

Whoever launched the sandbox holds a socket to its init. A frame on it brings a launch spec and
descriptors. The init, which has given up all that its program has (it *is* what the program was
forked from), forks a supervisor, and that starts the program: nothing is entered, so nothing can
be forgotten on the way in. Namespaces, user, root, Landlock domain, filters, cgroup and the
missing capabilities are inherited; limits and descriptors are set as for the first program.

A supervisor adopts what its program leaves behind (PR_SET_CHILD_SUBREAPER), so that the whole tree
stays below it, and can be ended. It speaks with the one who asked over a socket of their own; when
that closes, it ends the tree. What still runs in the background when the program has ended by
itself becomes the init's, and ends with the sandbox.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
from collections.abc import Iterator
from typing import NoReturn

from sandboxd.errors import KernelError, SandboxdError
from sandboxd.isolation import kernel
from sandboxd.isolation.program import SIGNALS, receive, setup_failed, start
from sandboxd.isolation.wire import Frame, Kind, failed

__all__ = ["Orders", "from_kernel"]

#: How often the tree is looked through and killed, and how long is waited in between, before
#: everything in the sandbox is held for a moment to kill what multiplies faster than that.
_ROUNDS = 20
_PAUSE = 0.01


def from_kernel(info: signal.struct_siginfo) -> bool:
    """Whether a SIGIO says that a socket of ours has news; who sends one by kill(2) can't."""
    return info.si_signo == signal.SIGIO and info.si_code > 0  # sigaction(2), si_code


class Orders:
    """The init's end of the socket on which further programs are asked for."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)
        _notify(fd)

    @property
    def fd(self) -> int:
        """-1 once the other end has closed."""
        return self._sock.fileno()

    def take(self) -> None:
        """Act on all that has come; after each SIGIO of the kernel's."""
        while self._sock.fileno() >= 0:
            try:
                frame, fds = receive(self._sock)
            except BlockingIOError:
                return
            except OSError:
                frame, fds = None, []
            if frame is None and not fds:
                self._sock.close()
            elif frame is not None and frame.kind is Kind.LAUNCH and len(fds) >= 2:
                self._start(frame.number, fds)
            for fd in fds:
                os.close(fd)

    def _start(self, number: int, fds: list[int]) -> None:
        try:
            if os.fork() == 0:
                _supervise(number, fds[0], fds[1], fds[2:])
        except OSError as failure:  # the sandbox has as many processes as it may
            _send(fds[1], failed(number, KernelError("fork", failure.errno or 0)))


def _supervise(number: int, memfd: int, talk: int, streams: list[int]) -> NoReturn:
    """Start the program of the spec in ``memfd`` and see to its end."""
    try:
        kernel.adopt_orphans()
        kernel.close_all_but([talk, memfd, *streams])
        _notify(talk)
        program = start(number, memfd, streams)
        kernel.close_all_but([talk])
        _send(talk, Frame(Kind.STARTED, number))
        _see_to_its_end(number, program, socket.socket(fileno=talk))
    except SandboxdError as failure:
        _send(talk, failed(number, failure))
    except BaseException as failure:  # the last frame of this process: nobody else can report it
        _send(talk, setup_failed(number, failure))
    os._exit(125)


def _see_to_its_end(number: int, program: int, talk: socket.socket) -> None:
    status = -1
    while True:
        if not _listen(talk, program):
            status = _end_tree(program, status)
            break
        while status < 0 and (ended := _reap()) is not None and ended[0]:
            status = ended[1] if ended[0] == program else status
        if status >= 0:
            break
        info = signal.sigwaitinfo(SIGNALS)
        if info.si_signo != signal.SIGCHLD and not from_kernel(info):
            os.kill(program, info.si_signo)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = int((used.ru_utime + used.ru_stime) * 1e6)
    _send(talk.fileno(), Frame(Kind.EXITED, number, status, cpu, used.ru_maxrss))
    os._exit(0)


def _listen(talk: socket.socket, program: int) -> bool:
    """Pass signals on; False when the tree is to end."""
    while True:
        try:
            frame, _ = receive(talk)
        except BlockingIOError:
            return True
        except OSError:
            frame = None
        if frame is None or frame.kind is Kind.KILL:
            return False
        if frame.kind is Kind.SIGNAL and frame.a in SIGNALS:
            os.kill(program, frame.a)


def _end_tree(program: int, status: int) -> int:
    """Kill all that descends from this process, however it multiplies. The program's status."""
    for _ in range(_ROUNDS):
        for pid in _descendants():
            _kill(pid, signal.SIGKILL)
        while (ended := _reap()) and ended[0]:
            status = ended[1] if ended[0] == program else status
        if ended is None:
            return status
        signal.sigtimedwait([signal.SIGCHLD], _PAUSE)
    # A process that is held can't fork, and none is made that would not be held (fork(2): what
    # arrives meanwhile starts it over). So what is found now is all there is.
    _kill(-1, signal.SIGSTOP)
    for pid in _descendants():
        _kill(pid, signal.SIGKILL)
    _kill(-1, signal.SIGCONT)
    while ended := _reap(0):
        status = ended[1] if ended[0] == program else status
    return status


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, parent in _processes():
        children.setdefault(parent, []).append(pid)
    found, at = [], [os.getpid()]
    while at:
        below = children.get(at.pop(), [])
        found += below
        at += below
    return found


def _processes() -> Iterator[tuple[int, int]]:
    """Each process in the sandbox, and its parent (proc(5), /proc/PID/stat)."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fd = os.open(f"/proc/{name}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            _, parent, *_ = os.read(fd, 512).rpartition(b")")[2].split()
        except (OSError, ValueError):
            continue
        finally:
            os.close(fd)
        yield int(name), int(parent)


def _reap(flags: int = os.WNOHANG) -> tuple[int, int] | None:
    """The next ended child, (0, 0) when none has, None when there is none."""
    try:
        return os.waitpid(-1, flags)
    except ChildProcessError:
        return None


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError as failure:
        if failure.errno not in (errno.ESRCH, errno.EPERM):
            raise


def _notify(fd: int) -> None:
    """Have the kernel send SIGIO, which is blocked and waited for, when ``fd`` has news."""
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)


def _send(talk: int, frame: Frame) -> None:
    with contextlib.suppress(OSError):  # nobody asks any more
        os.write(talk, frame.pack())
