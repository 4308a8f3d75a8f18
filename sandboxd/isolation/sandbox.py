"""The child's side: from a forked launcher to a program in its own sandbox.

Runs as pid 1 of a fresh pid namespace, still with the launcher's privileges, and in this order:
leave the shared namespaces, copy the mounts that the spec names, build a new root in memory and
pivot into it, give up every privilege inside a second user namespace that owns nothing, fork the
program, and stay as its init. The mount, pid, ipc, uts, cgroup and network namespaces belong to
the *outer* user namespace, so a process in here can't regain power over them (user_namespaces(7)).

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import termios
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from sandboxd.errors import KernelError, SandboxdError
from sandboxd.isolation import clocks, kernel, landlock, overlay, seccomp
from sandboxd.isolation.root import Root, check_pin, system_layout
from sandboxd.isolation.wire import (
    FIRST_HIGH_FD,
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
    "INSIDE_ID",
    "SIGNALS",
    "build",
    "enter",
    "limit",
    "open_program",
    "prepare",
    "restrict",
    "setup_failed",
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
#: How to open a file that is only looked at or executed.
_BY_PATH = os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW
SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
#: What Python and the launcher ignore or handle, and a program must not inherit.
_OURS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ)


def prepare() -> None:
    """Once, in the launcher: what would be the same for every sandbox to come."""
    for number in SIGNALS.difference(_OURS):
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

    ``fds[1:4]`` are the program's standard streams, the rest its extra descriptors. Progress goes
    to the pipe ``report`` as frames: STARTED once the program runs or FAILED, then EXITED.
    """
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        kernel.set_dumpable(False)
        if join is not None:
            join()
        spec = _read_spec(fds[0])
        kernel.close_all_but([report, *fds[1:]])
        if spec.overlay is not None:  # no program: what it makes is all that is wanted
            overlay.make(spec, spec.overlay, fds[1], privileged=privileged)
            _send(report, Frame(Kind.STARTED, number))
            _send(report, Frame(Kind.EXITED, number))
            os._exit(0)
        program = _start(spec, fds[1:], privileged=privileged)
        _forget(spec)
        _send(report, Frame(Kind.STARTED, number))
        kernel.close_all_but([report])
        _be_init(number, program, report)
    except SandboxdError as failure:
        _send(report, failed(number, failure))
    except BaseException as failure:  # the last frame of this process: nobody else can report it
        _send(report, setup_failed(number, failure))
    os._exit(125)


def setup_failed(number: int, failure: BaseException) -> Frame:
    """The FAILED frame of an exception that nobody foresaw."""
    code = failure.errno if isinstance(failure, OSError) and failure.errno else errno.EINVAL
    # Only the class and the file: an exception's text may quote what it choked on.
    path = failure.filename if isinstance(failure, OSError) else None
    where = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
    text = f"setup\t{type(failure).__name__} {where}".rstrip()
    return Frame(Kind.FAILED, number, code, text=text)


def _start(spec: LaunchSpec, streams: Sequence[int], *, privileged: bool) -> int:
    """Build the sandbox around this process and start the program in it. Returns its pid."""
    namespace = -1
    if spec.brings_namespace:
        *streams, namespace = streams
    build(spec, privileged=privileged, namespace=namespace)
    restrict(spec, streams)
    try:
        os.chdir(spec.cwd)
    except OSError as failure:
        raise KernelError("chdir", failure.errno or 0, spec.cwd) from None
    return _spawn(spec, streams)


def build(
    spec: LaunchSpec, *, privileged: bool, namespace: int = -1, kind: type[Root] = Root
) -> Root:
    """Put this process into namespaces and a root of its own, and make an ordinary user of it.

    Capabilities are left in the innermost user namespace, which owns none of the others.
    """
    uid = spec.uid if privileged else os.geteuid()
    network = 0 if spec.network == "host" else kernel.CLONE_NEWNET
    kernel.unshare(_NAMESPACES & ~kernel.CLONE_NEWNET | network)
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
    landlock.restrict(landlock.best_abi(), places, streams, tcp=spec.network == "host")
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


def _spawn(spec: LaunchSpec, streams: Sequence[int]) -> int:
    """Fork and execve(2) the program; its pid once it runs, KernelError if it can't."""
    result, done = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        # Above every target number, so that placing the streams does not overwrite it.
        done = fcntl.fcntl(done, fcntl.F_DUPFD_CLOEXEC, FIRST_HIGH_FD)
        try:
            _exec(spec, streams, done)
        except (OSError, KernelError) as failure:
            os.write(done, (failure.errno or errno.EINVAL).to_bytes(4, "big"))
        except BaseException:
            os.write(done, errno.EINVAL.to_bytes(4, "big"))
        os._exit(127)
    os.close(done)
    failed = os.read(result, 4)
    os.close(result)
    if failed:
        os.waitpid(pid, 0)
        raise KernelError("execve", int.from_bytes(failed, "big"), os.fsdecode(spec.argv[0]))
    return pid


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
    for number in _OURS:
        signal.signal(number, signal.SIG_DFL)
    program = open_program(spec)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execve(spec.argv[0] if program < 0 else program, spec.argv, dict(spec.env))


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


def _be_init(number: int, program: int, report: int) -> NoReturn:
    """Reap, pass signals on, and end with the program: the kernel then kills the whole tree."""
    while True:
        received = signal.sigwaitinfo(SIGNALS).si_signo
        if received != signal.SIGCHLD:
            os.kill(program, received)
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


def _read_spec(fd: int) -> LaunchSpec:
    size = os.fstat(fd).st_size
    if size > MAX_SPEC:
        raise KernelError("read", errno.EMSGSIZE, "launch spec")
    data = os.pread(fd, size, 0)
    try:
        return decode_spec(data)
    finally:
        kernel.wipe(data)


def _forget(spec: LaunchSpec) -> None:
    """The program has its secrets now; its init, which lives as long, keeps none."""
    for secret in (*spec.argv, *(value for _, value in spec.env), *(f.content for f in spec.files)):
        kernel.wipe(secret)


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
