"""The child's side: from a forked launcher to a program in its own sandbox.

Runs as pid 1 of a fresh pid namespace, still with the launcher's privileges, and in this order:
leave the shared namespaces, copy the mounts that the spec names, build a new root in memory and
pivot into it, give up every privilege inside a second user namespace that owns nothing, fork the
program, and stay as its init. The mount, pid, ipc, uts, cgroup and network namespaces belong to
the *outer* user namespace, so a process in here can't regain power over them (user_namespaces(7)).

Standard library only.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Sequence
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
    spawn,
)
from sandboxd.isolation.root import Root, system_layout
from sandboxd.isolation.wire import Frame, Kind, LaunchSpec, failed

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
        spec = read_spec(fds[0])
        kernel.close_all_but([report, *fds[1:]])
        streams, orders, first = fds[1:], None, -1
        if spec.further:
            *streams, last = streams
            orders = Orders(last)
        if spec.waits:
            *streams, first = streams
        if spec.overlay is not None:  # no program: what it makes is all that is wanted
            overlay.make(spec, spec.overlay, streams[0], privileged=privileged)
            _send(report, Frame(Kind.STARTED, number))
            _send(report, Frame(Kind.EXITED, number))
            os._exit(0)
        program = _start(spec, streams, first, privileged=privileged)
        forget(spec)
        _send(report, Frame(Kind.STARTED, number))
        kernel.close_all_but([report, *([orders.fd] if orders else [])])
        _be_init(number, program, report, orders)
    except SandboxdError as failure:
        _send(report, failed(number, failure))
    except BaseException as failure:  # the last frame of this process: nobody else can report it
        _send(report, setup_failed(number, failure))
    os._exit(125)


def _start(spec: LaunchSpec, streams: Sequence[int], first: int, *, privileged: bool) -> int:
    """Build the sandbox around this process and start the program in it. Returns its pid.

    Of one that is told its program later, by ``first``, that of the process to become it.
    """
    namespace = outlet = -1
    if spec.listeners:
        *streams, outlet = streams
    if spec.brings_namespace:
        *streams, namespace = streams
    build(spec, privileged=privileged, namespace=namespace, outlet=outlet)
    restrict(spec, streams)
    if spec.waits:
        return program_to_be(first)
    try:
        os.chdir(spec.cwd)
    except OSError as failure:
        raise KernelError("chdir", failure.errno or 0, spec.cwd) from None
    return spawn(spec, streams)


def build(
    spec: LaunchSpec,
    *,
    privileged: bool,
    namespace: int = -1,
    outlet: int = -1,
    kind: type[Root] = Root,
) -> Root:
    """Put this process into namespaces and a root of its own, and make an ordinary user of it.

    The spec's listeners go out by ``outlet``. Capabilities are left in the innermost user
    namespace, which owns none of the others.
    """
    uid = spec.uid if privileged else os.geteuid()
    network = 0 if spec.network == "host" else kernel.CLONE_NEWNET
    kernel.unshare(_NAMESPACES & ~kernel.CLONE_NEWNET | network)
    if spec.listeners:
        listeners.provide(spec.listeners, outlet)
    kernel.sethostname(spec.hostname)
    kernel.join_new_keyring()
    root = kind(spec, uid, inside_id=INSIDE_ID, privileged=privileged, namespace=namespace)
    sysctl = root.build()
    root.pivot()
    _become_user(uid, sysctl, privileged=privileged)
    return root


def restrict(spec: LaunchSpec, streams: Sequence[int]) -> None:
    """Give up for good, here and in whatever is started, what building the sandbox needed.

    The last step before the program, whether in a sandbox made for it or in one that is kept ready.
    ``streams`` are the descriptors that the program gets.
    """
    kernel.drop_capabilities()
    system, _ = system_layout()
    places = landlock.places(spec, system)
    ports = None if spec.network == "host" else [one.port for one in spec.listeners]
    landlock.restrict(landlock.best_abi(), places, streams, ports=ports)
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
