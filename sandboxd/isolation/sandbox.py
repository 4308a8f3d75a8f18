"""The child's side: from a forked launcher to a program in its own sandbox.

Runs as pid 1 of a fresh pid namespace, still with the launcher's privileges, and in this order:
leave the shared namespaces, copy the mounts that the spec names, build a new root in memory and
pivot into it, give up every privilege inside a second user namespace that owns nothing, fork the
program, and stay as its init. The mount, pid, ipc, uts, cgroup and network namespaces belong to
the *outer* user namespace, so a process in here can't regain power over them (user_namespaces(7)).

Standard library only.
"""

from __future__ import annotations

import array
import errno
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from sandboxd.errors import KernelError, SandboxdError
from sandboxd.isolation import clocks, kernel, landlock, listeners, overlay, seccomp
from sandboxd.isolation.further import Orders, from_kernel
from sandboxd.isolation.program import (
    OURS,
    SIGNALS,
    forget,
    program_to_be,
    read_spec,
    setup_failed,
    start,
)
from sandboxd.isolation.root import Root, system_layout
from sandboxd.isolation.wire import Frame, Kind, LaunchSpec, Outline, failed, outline

__all__ = [
    "INSIDE_ID",
    "build",
    "enter",
    "prepare",
    "restrict",
]

#: The user and group id that every sandboxed program sees as its own.
INSIDE_ID = 1000

_NAMESPACES = (
    kernel.CLONE_NEWNS
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWCGROUP
    | kernel.CLONE_NEWNET
)


def prepare() -> None:
    """Once, in the launcher: what would be the same for every sandbox to come."""
    for number in SIGNALS.difference(OURS):
        signal.signal(number, signal.SIG_DFL)
    system_layout()


def enter(
    number: int,
    fds: Sequence[int],
    report: int,
    *,
    privileged: bool,
    join: Callable[[], None] | None = None,
) -> NoReturn:
    """Become the sandbox described by the memfd ``fds[0]``. Never returns.

    ``join`` puts this process into its cgroup, before it takes anything that counts there.

    ``fds[1:4]`` are the program's standard streams, then come its extra descriptors, a mount
    namespace and a socket for further programs, as far as the spec has them. Progress goes to the
    pipe ``report`` as frames: STARTED once the program runs or FAILED, then EXITED.
    """
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        kernel.set_dumpable(False)
        if join is not None:
            join()
        kernel.close_all_but([report, *fds])
        sketch = outline(fds[0])
        if sketch.overlay:  # no program: what it makes is all that is wanted
            _make_view(number, fds, report, privileged=privileged)
        memfd, *streams = fds
        orders = Orders(streams.pop()) if sketch.further else None
        first = streams.pop() if sketch.waits else -1
        uid = sketch.uid if privileged else os.geteuid()
        _leave(host_network=sketch.host_network)
        sysctl, rules = _have_it_built(
            number, memfd, streams, sketch, report, uid, privileged=privileged
        )
        _become_user(uid, sysctl, privileged=privileged)
        _confine(rules)
        del streams[len(streams) - sketch.namespace - sketch.listeners :]
        kept = [report, *([orders.fd] if orders else [])]
        program = program_to_be(first) if sketch.waits else start(number, memfd, streams)
        _send(report, Frame(Kind.STARTED, number))
        kernel.close_all_but(kept)
        _be_init(number, program, report, orders)
    except SandboxdError as failure:
        _send(report, failed(number, failure))
    except BaseException as failure:  # the last frame of this process: nobody else can report it
        _send(report, setup_failed(number, failure))
    os._exit(125)


def _make_view(number: int, fds: Sequence[int], report: int, *, privileged: bool) -> NoReturn:
    spec = read_spec(fds[0])
    assert spec.overlay is not None
    overlay.make(spec, spec.overlay, fds[1], privileged=privileged)
    _send(report, Frame(Kind.STARTED, number))
    _send(report, Frame(Kind.EXITED, number))
    os._exit(0)


def _have_it_built(
    number: int,
    memfd: int,
    streams: Sequence[int],
    sketch: Outline,
    report: int,
    uid: int,
    *,
    privileged: bool,
) -> tuple[int, int]:
    """Have a child build the root directory, and move into it.

    Reading a spec and building by it takes far more memory than waiting for a program's end, which
    the init does as long as the sandbox lives. The child's goes with it. It shares the namespaces,
    and pivot_root(2) moves every process that is at the old root.

    Returns /proc/sys as a writable descriptor, and that of a Landlock ruleset or -1. Exits when
    the child failed, which has told then.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        _build_for(number, theirs, memfd, streams, sketch, report, uid, privileged=privileged)
    theirs.close()
    there, got, _, _ = ours.recvmsg(64, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
    os.waitpid(pid, 0)
    ours.close()
    if not there:
        os._exit(125)
    now = os.stat("/")
    if there != b"%d %d" % (now.st_dev, now.st_ino):
        raise KernelError("pivot_root", errno.EXDEV, "/")  # somewhere else than its builder
    fds = array.array("i", got[0][2] if got else b"")
    if len(fds) != (2 if landlock.best_abi() else 1):
        raise KernelError("recvmsg", errno.EMFILE, "sandbox")
    return fds[0], fds[1] if len(fds) > 1 else -1


def _build_for(
    number: int,
    init: socket.socket,
    memfd: int,
    streams: Sequence[int],
    sketch: Outline,
    report: int,
    uid: int,
    *,
    privileged: bool,
) -> NoReturn:
    namespace = outlet = -1
    if sketch.listeners:
        *streams, outlet = streams
    if sketch.namespace:
        *streams, namespace = streams
    try:
        spec = read_spec(memfd)
        root = Root(spec, uid, inside_id=INSIDE_ID, privileged=privileged, namespace=namespace)
        sysctl = _furnish(root, outlet)
        rules = landlock.ruleset(landlock.best_abi(), _allowed(spec), streams, ports=_ports(spec))
        forget(spec)
        now = os.stat("/")
        fds = array.array("i", [sysctl, rules] if rules >= 0 else [sysctl])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
        init.sendmsg([b"%d %d" % (now.st_dev, now.st_ino)], rights)
        os._exit(0)
    except SandboxdError as failure:
        _send(report, failed(number, failure))
    except BaseException as failure:
        _send(report, setup_failed(number, failure))
    os._exit(125)


def build(spec: LaunchSpec, *, privileged: bool, kind: type[Root] = Root) -> Root:
    """Put this process into namespaces and a root of its own, and make an ordinary user of it.

    Capabilities are left in the innermost user namespace, which owns none of the others.
    """
    uid = spec.uid if privileged else os.geteuid()
    _leave(host_network=spec.network == "host")
    root = kind(spec, uid, inside_id=INSIDE_ID, privileged=privileged)
    sysctl = _furnish(root)
    _become_user(uid, sysctl, privileged=privileged)
    return root


def _leave(*, host_network: bool) -> None:
    """Leave the shared namespaces and the session keyring."""
    network = 0 if host_network else kernel.CLONE_NEWNET
    kernel.unshare(_NAMESPACES & ~kernel.CLONE_NEWNET | network)
    kernel.join_new_keyring()


def _furnish(root: Root, outlet: int = -1) -> int:
    """Name the host, pass listeners out, build the root and move there. Returns /proc/sys."""
    if root.spec.listeners:
        listeners.provide(root.spec.listeners, outlet)
    kernel.sethostname(root.spec.hostname)
    sysctl = root.build()
    root.pivot()
    return sysctl


def restrict(spec: LaunchSpec, streams: Sequence[int]) -> None:
    """Give up for good, here and in whatever is started, what building the sandbox needed.

    The last step before the program, whether in a sandbox made for it or in one that is kept ready.
    ``streams`` are the descriptors that the program gets.
    """
    landlock_rules = landlock.ruleset(
        landlock.best_abi(), _allowed(spec), streams, ports=_ports(spec)
    )
    _confine(landlock_rules)


def _allowed(spec: LaunchSpec) -> Iterator[landlock.Place]:
    system, _ = system_layout()
    return landlock.places(spec, system)


def _ports(spec: LaunchSpec) -> list[int] | None:
    return None if spec.network == "host" else [one.port for one in spec.listeners]


def _confine(rules: int) -> None:
    """Give up every capability, and what is no Landlock ``rules`` and no filter allows."""
    kernel.drop_capabilities()
    if rules >= 0:
        landlock.enforce(landlock.best_abi(), rules)
    seccomp.restrict_sandbox()


def _become_user(uid: int, sysctl: int, *, privileged: bool) -> None:
    """Become an ordinary user that no program can make more of."""
    if privileged:
        os.setgroups([])
        # Keeping capabilities across the change of uid lets a host that denies user namespaces
        # to ordinary users (sysctl, AppArmor) still give us this one.
        kernel.set_keep_capabilities(True)
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        kernel.set_effective_capabilities()
    gid = os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER)
    # A process that isn't dumpable finds its own /proc/self owned by root (proc(5)).
    kernel.set_dumpable(True)
    _write("/proc/self/setgroups", b"deny")
    _write("/proc/self/uid_map", b"%d %d 1" % (INSIDE_ID, uid))
    _write("/proc/self/gid_map", b"%d %d 1" % (INSIDE_ID, gid))
    clocks.enter()
    kernel.set_dumpable(False)
    # No user namespace below this one: each would hand out capabilities over new attack surface.
    _write("user/max_user_namespaces", b"0", directory=sysctl)
    os.close(sysctl)
    kernel.no_new_privileges()


def _be_init(number: int, program: int, report: int, orders: Orders | None) -> NoReturn:
    """Reap, pass signals on, and end with the program: the kernel then kills the whole tree.

    Meanwhile start what further programs ``orders`` brings.
    """
    while True:
        info = signal.sigwaitinfo(SIGNALS)
        if orders is not None and from_kernel(info):
            orders.take()
            continue
        if info.si_signo != signal.SIGCHLD:
            os.kill(program, info.si_signo)
            continue
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == program:
                used = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = int((used.ru_utime + used.ru_stime) * 1e6)
                _send(report, Frame(Kind.EXITED, number, status, cpu, used.ru_maxrss))
                os._exit(0)
            if pid == 0:
                break


def _send(report: int, frame: Frame) -> None:
    try:
        os.write(report, frame.pack())
    except OSError:
        os._exit(125)  # the launcher is gone, and this namespace with it


def _write(path: str, data: bytes, *, directory: int | None = None) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    except OSError as failure:
        raise KernelError("write", failure.errno or 0, path) from None
