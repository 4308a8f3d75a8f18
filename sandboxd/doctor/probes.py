"""What this kernel really lets us do, found by doing it in short-lived children.

A version number or a sysctl says what should work; seccomp filters, AppArmor, container runtimes
and mount options decide what does. The probes use the launcher's own system calls, and the last
one starts a whole sandbox. Each runs in a fork that is thrown away, with a time limit, below an
interpreter of their own (the caller may have threads, and must not fork). A result is
``{"ok": true, "detail": ...}`` or ``{"ok": false, "call": ..., "errno": ..., "detail": ...}``.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import json
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sandboxd.errors import KernelError
from sandboxd.isolation import cgroup, kernel
from sandboxd.isolation.launcher import fork_launcher
from sandboxd.isolation.wire import FRAME, Frame, Kind, LaunchSpec, encode_spec, sealed_memfd

__all__ = ["run_probes"]

#: A host that is slow or busy is not one that can't.
PROBE_SECONDS = 30.0

_NAMESPACES = {
    "mount": kernel.CLONE_NEWNS,
    "pid": kernel.CLONE_NEWPID,
    "net": kernel.CLONE_NEWNET,
    "ipc": kernel.CLONE_NEWIPC,
    "uts": kernel.CLONE_NEWUTS,
    "cgroup": kernel.CLONE_NEWCGROUP,
    "time": 0x00000080,
}
_CAP_SYS_ADMIN = 21
_SO_PEERPIDFD = 77
# Numbers above 424 are the same everywhere (include/uapi/asm-generic/unistd.h).
_SYS_CLONE3, _SYS_LANDLOCK_CREATE_RULESET = 435, 444
_SYS_UNAME = {"x86_64": 63, "aarch64": 160}  # where sandboxd/isolation/filters has programs

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_MAIN = "import sys; sys.path.insert(0, sys.argv[1]); from sandboxd.doctor import probes; " \
    "probes.main(sys.argv[2])"  # fmt: skip


def run_probes(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Every probe's result. ``directory`` is where idmapped mounts are tried."""
    package = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MAIN, str(package), os.fspath(directory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=600,
    )
    results: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return results


def main(directory: str) -> None:
    """Run the probes and print their results as one JSON object. The process must be fresh."""
    privileged = bool(_effective_capabilities() >> _CAP_SYS_ADMIN & 1)
    probes: dict[str, Callable[[], str]] = {
        "user": _user_namespace,
        **{name: _namespace(flag, privileged) for name, flag in _NAMESPACES.items()},
        "mounts": _inside(_build_root, privileged),
        "proc": _inside(_mount_proc, privileged),
        "proc_user": _inside(_mount_proc, privileged=False),
        "landlock": _landlock,
        "seccomp": _seccomp,
        "openat2": _openat2,
        "pidfd": _pidfd,
        "peerpidfd": _peerpidfd,
        "clone3": _clone3,
        "cgroups": _cgroup,
        "sandbox": _sandbox,
    }
    if privileged:
        probes["idmap"] = lambda: _idmap(directory)
    print(json.dumps({name: in_child(probe) for name, probe in probes.items()}))


def in_child(probe: Callable[[], str]) -> dict[str, Any]:
    """Run one probe in a fork with a time limit. Whatever it changes dies with it."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        _report(probe, theirs)
    os.close(theirs)
    deadline, said = time.monotonic() + PROBE_SECONDS, b""
    while True:
        ready, _, _ = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(ours, 65536) if ready else b""
        if not chunk:
            break
        said += chunk
    os.close(ours)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    try:
        result: dict[str, Any] = json.loads(said)
    except ValueError:
        how = f"ended with wait status {status}" if ready else "hung"
        return {"ok": False, "call": "probe", "errno": "", "detail": f"the probe {how}"}
    return result


def _report(probe: Callable[[], str], to: int) -> NoReturn:
    """The child's side: run the probe, write its result, leave without any cleanup."""
    try:
        result: dict[str, Any] = {"ok": True, "detail": probe()}
    except KernelError as failed:
        name = errno.errorcode.get(failed.errno, "")
        result = {"ok": False, "call": failed.syscall, "errno": name, "detail": failed.path}
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        result = {"ok": False, "call": "probe", "errno": name, "detail": str(error.filename or "")}
    except BaseException as error:  # noqa: BLE001 (the child must not return into the parent's code)
        result = {"ok": False, "call": "probe", "errno": "", "detail": type(error).__name__}
    os.write(to, json.dumps(result).encode())
    os._exit(0)


def _enter_user_namespace() -> None:
    """A user namespace in which the caller is root (user_namespaces(7))."""
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER)
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        # One write(2) each, as the kernel demands.
        fd = os.open(f"/proc/self/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        except OSError as error:
            raise KernelError("write", error.errno or 0, f"/proc/self/{file}") from None
        finally:
            os.close(fd)


def _user_namespace() -> str:
    """One that is worth something: Ubuntu's AppArmor lets it be made and takes its capabilities."""
    _enter_user_namespace()
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/proc", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV)
    return ""


def _inside(probe: Callable[[], str], privileged: bool) -> Callable[[], str]:
    """The probe as root, real or of a user namespace, in a mount namespace of its own."""

    def run() -> str:
        if not privileged:
            _enter_user_namespace()
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        return probe()

    return run


def _namespace(flag: int, privileged: bool) -> Callable[[], str]:
    def run() -> str:
        if not privileged:
            _enter_user_namespace()
        kernel.unshare(flag)
        if flag == kernel.CLONE_NEWPID and _fork_and_ask(os.getpid) != 1:
            raise KernelError("getpid", 0, "the child is not pid 1")
        return ""

    return run


def _fork_and_ask(question: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(question())
        except BaseException:  # noqa: BLE001 (must not return into the parent's code)
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _build_root() -> str:
    """A tmpfs, a recursive copy of /usr made read-only and placed in it, pivot_root(2)."""
    usr = os.open("/usr", os.O_PATH | os.O_CLOEXEC)
    tree = kernel.clone_tree(usr, recursive=True, path="/usr")
    kernel.set_mount_attributes(tree, kernel.MOUNT_ATTR_RDONLY, recursive=True, path="/usr")
    root = kernel.mount_filesystem("tmpfs", kernel.MOUNT_ATTR_NOSUID, mode="0755", size="65536")
    kernel.move_mount(root, kernel.AT_FDCWD, "/proc")
    os.mkdir("usr", dir_fd=root)
    kernel.move_mount(tree, root, "usr")
    os.fchdir(root)
    kernel.pivot_root(".", ".")
    return ""


def _mount_proc() -> str:
    """A fresh /proc of a fresh pid namespace; refused where the old one is partly covered."""
    kernel.unshare(kernel.CLONE_NEWPID)

    def mount() -> int:
        try:
            kernel.mount_filesystem("proc", kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV)
        except KernelError as failed:
            return failed.errno
        return 0

    if code := _fork_and_ask(mount):
        raise KernelError("fsmount", code, "proc")
    return ""


def _landlock() -> str:
    """The ABI version (landlock_create_ruleset(2), LANDLOCK_CREATE_RULESET_VERSION)."""
    version = _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 0:
        raise KernelError("landlock_create_ruleset", ctypes.get_errno())
    return str(version)


def _seccomp() -> str:
    """Install a filter that refuses uname(2), and see it refused."""
    uname = _SYS_UNAME.get(platform.machine())
    if uname is None:
        raise KernelError("seccomp", errno.ENOSYS, f"no filter for {platform.machine()} yet")
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # load the system call's number
            (0x15, 0, 1, uname),
            (0x06, 0, 0, 0x00050000 | errno.EXDEV),  # SECCOMP_RET_ERRNO
            (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        )
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    kernel.no_new_privileges()
    if _libc.prctl(22, 2, fprog, 0, 0) < 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise KernelError("prctl", ctypes.get_errno(), "PR_SET_SECCOMP")
    try:
        os.uname()
    except OSError as error:
        if error.errno == errno.EXDEV:
            return ""
    raise KernelError("prctl", 0, "the filter has no effect")


def _openat2() -> str:
    """RESOLVE_BENEATH opens what lies below and refuses what doesn't."""
    usr = os.open("/usr", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    kernel.open_beneath(usr, ".", os.O_PATH, resolve=kernel.RESOLVE_BENEATH)
    try:
        kernel.open_beneath(usr, "..", os.O_PATH, resolve=kernel.RESOLVE_BENEATH)
    except KernelError as failed:
        if failed.errno == errno.EXDEV:
            return ""
    raise KernelError("openat2", 0, "RESOLVE_BENEATH has no effect")


def _pidfd() -> str:
    try:
        signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 0)
    except OSError as error:
        raise KernelError("pidfd_open", error.errno or 0) from None
    return ""


def _peerpidfd() -> str:
    a, b = socket.socketpair()
    with a, b:
        try:
            a.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError as error:
            raise KernelError("getsockopt", error.errno or 0, "SO_PEERPIDFD") from None
    return ""


def _clone3() -> str:
    """clone3(2) exists when it finds fault with an empty argument."""
    _libc.syscall(_SYS_CLONE3, None, 0)
    if ctypes.get_errno() != errno.EINVAL:
        raise KernelError("clone3", ctypes.get_errno())
    return ""


def _idmap(directory: str) -> str:
    """An idmapped mount of ``directory``'s filesystem (mount_setattr(2), MOUNT_ATTR_IDMAP)."""
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        _libc.unshare(ctypes.c_int(kernel.CLONE_NEWUSER))
        os.write(ready[1], b".")
        os.close(go[1])
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        # The child sits in a namespace without a mapping until its parent writes one.
        for file in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{file}").write_text("1000 60999 1")
        namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(go[1])
        os.waitpid(pid, 0)
    tree = kernel.clone_tree(os.open(directory, os.O_PATH), recursive=False, path=directory)
    kernel.set_mount_attributes(
        tree, kernel.MOUNT_ATTR_IDMAP, recursive=False, userns=namespace, path=directory
    )
    return ""


def _cgroup() -> str:
    """What the launcher would have here, found as it finds it; the cgroups are removed again."""
    groups = cgroup.set_up()
    groups.close()
    return groups.state.pack()


def _sandbox() -> str:
    """A real launcher, a real sandbox, a program that runs in it; how long the latter took."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    with fork_launcher() as sock:
        sock.settimeout(PROBE_SECONDS)
        _hear(sock, Kind.READY)
        spec = LaunchSpec(id="doctor", argv=(b"/usr/bin/true",), env=(), uid=60999)
        fds = [sealed_memfd(encode_spec(spec)), null, null, null]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        begun = time.monotonic()
        sock.sendmsg([Frame(Kind.LAUNCH, 1, len(fds)).pack()], rights)
        _hear(sock, Kind.STARTED)
        status = _hear(sock, Kind.EXITED).a
        if status != 0:
            raise KernelError("wait4", 0, f"the program ended with wait status {status}")
    return f"{(time.monotonic() - begun) * 1000:.1f}"


def _hear(sock: socket.socket, wanted: Kind) -> Frame:
    data = sock.recv(FRAME.size)
    if not data:
        raise KernelError("recv", 0, "the launcher ended")
    frame = Frame.unpack(data)
    if frame.kind is Kind.FAILED:
        call, _, path = frame.text.partition("\t")
        raise KernelError(call, frame.a, path)
    if frame.kind is not wanted:
        raise KernelError("recv", errno.EBADMSG, frame.kind.name)
    return frame


def _effective_capabilities() -> int:
    """The process's effective capabilities as a bit mask (proc(5), CapEff)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0
