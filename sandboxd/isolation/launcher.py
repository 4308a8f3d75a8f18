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
import gc
import os
import resource
import select
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

from sandboxd.errors import KernelError, SandboxdError, Unavailable
from sandboxd.isolation import cgroup, clocks, kernel, landlock, seccomp, template
from sandboxd.isolation.cgroup import Cgroup, Cgroups, Share, Usage
from sandboxd.isolation.sandbox import enter, prepare
from sandboxd.isolation.wire import FRAME, MAX_FDS, Frame, Kind, failed

__all__ = ["fork_launcher", "main", "serve"]

#: With -I and -S no environment variable, user directory or site-packages has a say. The package
#: comes last on the path, so that nothing beside it can stand in for the standard library.
_BOOT = (
    "import sys; sys.path.append(sys.argv[2]); from sandboxd.isolation.launcher import main; main()"
)
_MAX_OPEN_FILES = 65536
#: How long to wait at the end for killed sandboxes, so that their cgroups can go; and how long
#: until the next try where a cgroup is still busy.
_ENDING_LIMIT = 3.0
_BUSY_PAUSE = 0.1


def fork_launcher() -> socket.socket:
    """Start the launcher, a fresh and small interpreter; call it before giving up root.

    Executed anew rather than only forked, it shares neither memory nor address layout with the
    broker, and every sandbox is forked off a few megabytes. Returns the broker's end of the
    SOCK_SEQPACKET pair: closing it ends the launcher and every sandbox it started. Raises
    Unavailable when this Python can't be run a second time.
    """
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # A Python that lives outside the loader's path needs this to start; nothing else is passed.
    env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        fd = theirs.fileno()
        argv = (sys.executable, "-I", "-S", "-c", _BOOT, str(fd), package)
        try:
            # Duplicating a descriptor onto itself makes it inheritable (posix_spawn(3)).
            actions = [(os.POSIX_SPAWN_DUP2, fd, fd)]
            pid = os.posix_spawn(sys.executable, argv, env, file_actions=actions)
        except OSError as failure:
            ours.close()
            raise Unavailable(
                f"the launcher could not be started: {failure.strerror}",
                hint=f"is {sys.executable or 'the Python interpreter'} there and executable?",
            ) from None
    os.waitpid(pid, 0)  # the first process only makes the namespaces and leaves
    return ours


def main() -> NoReturn:
    """``python -c 'main()' FD``: a launcher on an inherited socket."""
    _run(socket.socket(fileno=int(sys.argv[1])))


def serve(sock: socket.socket, cgroups: Cgroups, *, privileged: bool) -> None:
    """Answer the broker until its end closes."""
    _Launcher(sock, cgroups, privileged=privileged).run()


def _run(sock: socket.socket) -> NoReturn:
    """Enter the launcher's namespaces, fork into them, and serve."""
    code = 1
    try:
        kernel.set_dumpable(False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.setsid()
        os.chdir("/")
        os.umask(0o022)
        prepare()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)  # the broker decides when it is time
        kernel.close_all_but([0, 1, 2, sock.fileno()])
        kernel.set_title(kernel.argument_area(), "sandboxd-launcher")
        cgroups = cgroup.set_up()
        privileged = _make_namespaces()
        if os.fork() == 0:
            serve(sock, cgroups, privileged=privileged)
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
        kernel.set_dumpable(True)  # else /proc/self belongs to root (proc(5))
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
        kernel.set_dumpable(False)
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


@dataclass
class _Sandbox:
    number: int
    pid: int
    pidfd: int
    report: int
    cgroup: Cgroup | None
    started: bool = False
    watched: bool = False  # for running out of memory (v1)
    oom: bool = False
    last: Frame | None = None  # FAILED or EXITED, told once every process has gone


class _Launcher:
    def __init__(self, sock: socket.socket, cgroups: Cgroups, *, privileged: bool) -> None:
        self.sock, self.cgroups, self.privileged = sock, cgroups, privileged
        self.filtered = seccomp.restrict_launcher()
        self.birth = True  # until the kernel refuses to fork into a cgroup
        self.busy: list[Cgroup] = []  # of ended sandboxes, not removed yet
        self.sandboxes: dict[int, _Sandbox] = {}
        self.selector = selectors.DefaultSelector()
        self.own_pidns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.arguments = kernel.argument_area()
        self.serving = True
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

    def run(self) -> None:
        self.selector.register(self.sock, selectors.EVENT_READ, self._on_frame)
        me = os.pidfd_open(os.getpid())
        state = self.cgroups.state.pack()
        walls = landlock.best_abi(), int(self.filtered), int(clocks.available())
        self._send(Frame(Kind.READY, 0, int(self.privileged), *walls, text=state), me)
        os.close(me)
        # What exists now lives for good: children then collect garbage without copying its pages.
        gc.collect()
        gc.freeze()
        while self.serving:
            self._turn(_BUSY_PAUSE if self.busy else None)
        self._end()

    def _turn(self, timeout: float | None) -> None:
        for key, _ in self.selector.select(timeout):
            # An earlier event of the same batch may have closed it, or reused its number.
            if self.selector.get_map().get(key.fd) is key:
                key.data()
        self.busy = [group for group in self.busy if not group.remove()]
        if self.serving:
            self.cgroups.prepare()  # while the sandbox of this turn builds itself

    def _end(self) -> None:
        """Our end as pid 1 ends every sandbox; here it is waited for, so that no cgroup is left."""
        with contextlib.suppress(KeyError):
            self.selector.unregister(self.sock)
        for number in self.sandboxes:
            self._signal(number, signal.SIGKILL)
        deadline = time.monotonic() + _ENDING_LIMIT
        while (self.sandboxes or self.busy) and time.monotonic() < deadline:
            self._turn(_BUSY_PAUSE)
        self.cgroups.close()

    def _on_frame(self) -> None:
        fds = array.array("i")
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(
                FRAME.size, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            self.serving = False
            return
        except OSError:
            return  # out of memory for now: the frame waits
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        try:
            if not data and self._peer_is_gone():
                self.serving = False  # our end as pid 1 ends every sandbox
                return
            if flags & socket.MSG_TRUNC:
                return  # longer than any frame
            self._answer(Frame.unpack(data), list(fds), lost_fds=bool(flags & socket.MSG_CTRUNC))
        except ValueError:
            return  # not a frame: nobody to answer
        finally:
            for fd in fds:
                os.close(fd)

    def _peer_is_gone(self) -> bool:
        """Whether an empty read is the end, and not an empty packet (unix(7))."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _answer(self, frame: Frame, fds: list[int], *, lost_fds: bool) -> None:
        if frame.kind is Kind.LAUNCH:
            if frame.number == 0 or frame.number in self.sandboxes:
                return  # its report would be taken for another's
            if lost_fds:
                self._fail(frame.number, KernelError("recvmsg", errno.EMFILE, "launch frame"))
            elif frame.a != len(fds) or len(fds) < 4:
                self._fail(frame.number, KernelError("recvmsg", errno.EBADMSG, "launch frame"))
            else:
                self._launch(frame.number, fds, _share(frame))
        elif frame.kind is Kind.TEMPLATE:
            if frame.number and frame.number not in self.sandboxes:
                self._launch(frame.number, [], _share(frame))
        elif frame.kind is Kind.SIGNAL:
            self._signal(frame.number, frame.a)
        elif frame.kind is Kind.KILL:
            self._signal(frame.number, signal.SIGKILL)

    def _launch(self, number: int, fds: list[int], share: Share) -> None:
        """Fork a sandbox's init. Without ``fds`` it becomes a template, which the broker talks to.

        That conversation isn't ours: a template is told from any other sandbox by it alone.
        """
        read = write = -1
        group = None
        ends: tuple[socket.socket, ...] = ()
        try:
            if not fds:
                ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            group = self.cgroups.create(share)
            # unshare(CLONE_NEWPID) works once until the children's namespace is set back.
            kernel.setns(self.own_pidns, kernel.CLONE_NEWPID)
            kernel.unshare(kernel.CLONE_NEWPID)
            read, write = os.pipe2(os.O_CLOEXEC)
            pid, born = self._fork(group)
            if pid == 0:
                gc.disable()
                kernel.set_title(self.arguments, "sandboxd-init")
                if ends:
                    template.enter(ends[1], privileged=self.privileged, group=group, born=born)
                join = partial(group.join, born=born) if group is not None else None
                enter(number, fds, write, privileged=self.privileged, join=join)
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
        except (SandboxdError, OSError) as failure:
            if read >= 0:
                os.close(read)
            if group is not None and not group.remove():
                self.busy.append(group)
            if isinstance(failure, OSError):
                failure = KernelError("fork", failure.errno or 0)
            self._fail(number, failure)
        else:
            sandbox = _Sandbox(number, pid, pidfd, read, group, started=bool(ends))
            self.sandboxes[number] = sandbox
            self.selector.register(read, selectors.EVENT_READ, lambda: self._on_report(sandbox))
            self.selector.register(pidfd, selectors.EVENT_READ, lambda: self._on_exit(sandbox))
            if group is not None and group.oom >= 0:
                on_oom = partial(self._on_oom, sandbox)
                sandbox.watched = True
                self.selector.register(group.oom, selectors.EVENT_READ, on_oom)
            if ends:
                self._send(Frame(Kind.STARTED, number), ends[0].fileno(), pidfd)
        finally:
            if write >= 0:
                os.close(write)
            for end in ends:
                end.close()

    def _fork(self, group: Cgroup | None) -> tuple[int, bool]:
        """fork(2); the pid, and whether the child was born in its cgroup (v2)."""
        if self.birth and group is not None and group.birth >= 0:
            try:
                return kernel.fork_into(group.birth), True
            except KernelError as failure:
                if failure.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
                    raise
                self.birth = False  # an old kernel, or a container's seccomp filter
        return os.fork(), False

    def _on_report(self, sandbox: _Sandbox) -> None:
        data = os.read(sandbox.report, FRAME.size)
        if not data:
            self.selector.unregister(sandbox.report)
            return
        frame = Frame.unpack(data)
        if frame.kind is Kind.STARTED:
            sandbox.started = True
            self._send(frame, sandbox.pidfd)
        else:
            sandbox.last = frame

    def _on_exit(self, sandbox: _Sandbox) -> None:
        while sandbox.report in self.selector.get_map():
            self._on_report(sandbox)  # what the child said last, up to the end of its pipe
        _, status, usage = os.wait4(sandbox.pid, 0)
        self.selector.unregister(sandbox.pidfd)
        os.close(sandbox.pidfd)
        os.close(sandbox.report)
        del self.sandboxes[sandbox.number]
        used = self._used(sandbox)
        last = sandbox.last
        if last is None and sandbox.started:
            cpu = int((usage.ru_utime + usage.ru_stime) * 1e6)
            last = Frame(Kind.EXITED, sandbox.number, status, cpu, usage.ru_maxrss)
        if last is None:
            why = "out of memory" if used.oom else "killed while starting"
            self._fail(sandbox.number, KernelError("setup", errno.ECHILD, why))
        elif last.kind is Kind.EXITED:
            cpu = last.b if used.cpu_us is None else used.cpu_us
            self._send(replace(last, b=cpu, d=used.peak_kib, text="oom" if used.oom else ""))
        else:
            self._send(last)
        if sandbox.cgroup is not None and not sandbox.cgroup.remove():
            self.busy.append(sandbox.cgroup)

    def _used(self, sandbox: _Sandbox) -> Usage:
        """What the whole tree used, as its cgroup tells before it goes."""
        group = sandbox.cgroup
        if group is None:
            return Usage()
        if sandbox.watched:
            self.selector.unregister(group.oom)
        used = group.usage()
        group.close()
        return replace(used, oom=used.oom or sandbox.oom)

    def _on_oom(self, sandbox: _Sandbox) -> None:
        """The tree is out of memory (v1): the kernel kills one process, and the others follow.

        The end of the others can come first, and then the kernel kills, and counts, none itself.
        """
        group = sandbox.cgroup
        assert group is not None
        self.selector.unregister(group.oom)
        sandbox.watched = False
        if group.exists():  # its removal by somebody else is told by the same event
            sandbox.oom = True
            self._signal(sandbox.number, signal.SIGKILL)

    def _signal(self, number: int, signum: int) -> None:
        sandbox = self.sandboxes.get(number)
        if sandbox is not None and signum in _SIGNALS:
            with contextlib.suppress(OSError):  # it has just ended
                signal.pidfd_send_signal(sandbox.pidfd, signum)
            if signum == signal.SIGKILL and sandbox.cgroup is not None:
                sandbox.cgroup.kill()

    def _fail(self, number: int, failure: SandboxdError) -> None:
        self._send(failed(number, failure))

    def _send(self, frame: Frame, *fds: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([frame.pack()], ancillary)
        except ConnectionError:
            self.serving = False


def _share(frame: Frame) -> Share:
    """ValueError where the text is no number."""
    return Share(frame.b, frame.c, frame.d, int(frame.text or 0))


#: SIGSTOP would stop the sandbox's init, and with it the news of the program's end.
_SIGNALS = frozenset(signal.valid_signals()) - {signal.SIGSTOP}


if __name__ == "__main__":
    main()
