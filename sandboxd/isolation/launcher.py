"""The privileged process: takes LAUNCH frames from the broker, forks sandboxes, reports their end.

It is single-threaded, imports the standard library only, opens no file that an agent could have
written, and never reads a launch spec (the forked child does). It lives as pid 1 of a pid
namespace of its own, so that nothing it started can outlive it, and it ends when the broker's
end of the socket closes, however the broker died.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import resource
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from typing import NoReturn

from sandboxd.errors import KernelError, SandboxdError
from sandboxd.isolation import kernel
from sandboxd.isolation.sandbox import enter
from sandboxd.isolation.wire import FRAME, MAX_FDS, Frame, Kind, failed

__all__ = ["fork_launcher", "main", "serve"]


def fork_launcher() -> socket.socket:
    """Fork the launcher off this process; call it before any thread, event loop or secret exists.

    Returns the broker's end of the SOCK_SEQPACKET pair. Closing it ends the launcher and every
    sandbox it started.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _run(theirs)
    theirs.close()
    os.waitpid(pid, 0)  # the first child only makes the namespaces and leaves
    return ours


def serve(sock: socket.socket, *, privileged: bool) -> None:
    """Answer the broker until its end closes."""
    _Launcher(sock, privileged=privileged).run()


def main() -> NoReturn:
    """``python -m sandboxd.isolation.launcher FD``: a launcher on an inherited socket."""
    _run(socket.socket(fileno=int(sys.argv[1])))


def _run(sock: socket.socket) -> NoReturn:
    """Enter the launcher's namespaces, fork into them, and serve."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the broker decides when it is time
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _keep(sock)
        privileged = _make_namespaces()
        if os.fork() == 0:
            kernel.set_dumpable(False)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            serve(sock, privileged=privileged)
        code = 0
    except KernelError as failure:
        with contextlib.suppress(OSError):
            sock.send(failed(0, failure).pack())
    except BaseException as failure:
        print(f"sandboxd launcher: {type(failure).__name__}", file=sys.stderr, flush=True)
    os._exit(code)


def _make_namespaces() -> bool:
    """A pid namespace for everything to be launched; without privileges a user namespace first."""
    privileged = os.geteuid() == 0 and _try(kernel.CLONE_NEWPID)
    if not privileged:
        uid, gid = os.geteuid(), os.getegid()
        kernel.unshare(kernel.CLONE_NEWUSER)
        kernel.set_dumpable(True)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            try:
                fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(fd, text.encode())
                finally:
                    os.close(fd)
            except OSError as failure:
                raise KernelError("write", failure.errno or 0, f"/proc/self/{name}") from None
        kernel.unshare(kernel.CLONE_NEWPID)
    return privileged


def _try(flags: int) -> bool:
    try:
        kernel.unshare(flags)
    except KernelError as failure:
        if failure.errno != errno.EPERM:
            raise
        return False
    return True


def _keep(sock: socket.socket) -> None:
    """Close everything but the standard streams and ``sock``."""
    os.closerange(3, sock.fileno())
    os.closerange(sock.fileno() + 1, 65536)


@dataclass
class _Sandbox:
    number: int
    pid: int
    pidfd: int
    report: int
    started: bool = False
    failed: bool = False
    ended: Frame | None = None


class _Launcher:
    def __init__(self, sock: socket.socket, *, privileged: bool) -> None:
        self.sock, self.privileged = sock, privileged
        self.sandboxes: dict[int, _Sandbox] = {}
        self.selector = selectors.DefaultSelector()
        self.own_pidns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.serving = True

    def run(self) -> None:
        self.selector.register(self.sock, selectors.EVENT_READ, self._on_frame)
        self._send(Frame(Kind.READY, 0, int(self.privileged)))
        while self.serving:
            for key, _ in self.selector.select():
                key.data()

    def _on_frame(self) -> None:
        fds = array.array("i")
        try:
            data, ancillary, _, _ = self.sock.recvmsg(
                FRAME.size, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            data, ancillary = b"", []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        try:
            if not data:
                self.serving = False  # our end as pid 1 ends every sandbox
                return
            frame = Frame.unpack(data)
            if frame.kind is Kind.LAUNCH and frame.a == len(fds) >= 4:
                self._launch(frame.number, list(fds))
            elif frame.kind is Kind.SIGNAL:
                self._signal(frame.number, frame.a)
            elif frame.kind is Kind.KILL:
                self._signal(frame.number, signal.SIGKILL)
            else:
                self._fail(frame.number, KernelError("recvmsg", errno.EBADMSG, "launch frame"))
        finally:
            for fd in fds:
                os.close(fd)

    def _launch(self, number: int, fds: list[int]) -> None:
        try:
            # unshare(CLONE_NEWPID) works once until the children's namespace is set back.
            kernel.setns(self.own_pidns, kernel.CLONE_NEWPID)
            kernel.unshare(kernel.CLONE_NEWPID)
            read, write = os.pipe2(os.O_CLOEXEC)
            pid = os.fork()
        except SandboxdError as failure:
            self._fail(number, failure)
            return
        except OSError as failure:
            self._fail(number, KernelError("fork", failure.errno or 0))
            return
        if pid == 0:
            enter(number, fds, write, privileged=self.privileged)
        os.close(write)
        sandbox = _Sandbox(number, pid, os.pidfd_open(pid), read)
        self.sandboxes[number] = sandbox
        self.selector.register(read, selectors.EVENT_READ, lambda: self._on_report(sandbox))
        self.selector.register(sandbox.pidfd, selectors.EVENT_READ, lambda: self._on_exit(sandbox))

    def _on_report(self, sandbox: _Sandbox) -> None:
        data = os.read(sandbox.report, FRAME.size)
        if not data:
            self.selector.unregister(sandbox.report)
            return
        frame = Frame.unpack(data)
        if frame.kind is Kind.STARTED:
            sandbox.started = True
            self._send(frame, sandbox.pidfd)
        elif frame.kind is Kind.FAILED:
            sandbox.failed = True
            self._send(frame)
        elif frame.kind is Kind.EXITED:
            sandbox.ended = frame

    def _on_exit(self, sandbox: _Sandbox) -> None:
        while sandbox.report in self.selector.get_map():
            self._on_report(sandbox)  # what the child said last, up to the end of its pipe
        _, status, usage = os.wait4(sandbox.pid, 0)
        self.selector.unregister(sandbox.pidfd)
        os.close(sandbox.pidfd)
        os.close(sandbox.report)
        del self.sandboxes[sandbox.number]
        if sandbox.failed:
            return
        if not sandbox.started:
            self._fail(sandbox.number, KernelError("setup", errno.ECHILD, "killed while starting"))
            return
        cpu = int((usage.ru_utime + usage.ru_stime) * 1e6)
        self._send(
            sandbox.ended or Frame(Kind.EXITED, sandbox.number, status, cpu, usage.ru_maxrss)
        )

    def _signal(self, number: int, signum: int) -> None:
        sandbox = self.sandboxes.get(number)
        if sandbox is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(sandbox.pidfd, signum)

    def _fail(self, number: int, failure: SandboxdError) -> None:
        self._send(failed(number, failure))

    def _send(self, frame: Frame, *fds: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([frame.pack()], ancillary)
        except ConnectionError:
            self.serving = False


if __name__ == "__main__":
    main()
