"""What this kernel really lets us do, found by doing it in short-lived children.

A version number or a sysctl says what should work; seccomp filters, AppArmor, container runtimes
and mount options decide what does. This file is therefore a script of its own (``python -I -S
probes.py DIRECTORY``, standard library only, no import of the project): each probe runs in a fork
that is thrown away, with a time limit, and the results are one JSON object on stdout:
``{name: {"ok": true, "detail": ...} | {"ok": false, "call": ..., "errno": ..., "detail": ...}}``.
"""

from __future__ import annotations

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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["CAP_SYS_ADMIN", "effective_capabilities", "run_probes"]

CAP_SYS_ADMIN = 21
PROBE_SECONDS = 5.0

NAMESPACES = {
    "mount": 0x00020000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
    "time": 0x00000080,
}
_NEWUSER = 0x10000000

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_IDMAP = 1, 0x00100000
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_RESOLVE_BENEATH = 0x08
_SO_PEERPIDFD = 77

# Numbers above 424 are the same everywhere (include/uapi/asm-generic/unistd.h).
_PIDFD_OPEN, _OPEN_TREE, _CLONE3, _OPENAT2, _MOUNT_SETATTR, _LANDLOCK = 434, 428, 435, 437, 442, 444
_OLD = {"x86_64": (155, 63), "aarch64": (41, 160), "riscv64": (41, 160)}  # pivot_root, uname

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def run_probes(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Every probe's result. ``directory`` is where idmapped mounts are tried.

    Runs this file in an interpreter of its own: the caller may have threads, and must not fork.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__, os.fspath(directory)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=60,
    )
    results: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return results


def effective_capabilities() -> int:
    """The calling process's effective capabilities as a bit mask (proc(5), CapEff)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


class _Failed(Exception):
    """A probe's system call that was refused."""

    def __init__(self, call: str, number: int | None = None, detail: str = "") -> None:
        self.call, self.detail = call, detail
        self.errno = ctypes.get_errno() if number is None else number


def _main(directory: str) -> None:
    privileged = bool(effective_capabilities() >> CAP_SYS_ADMIN & 1)
    probes: dict[str, Callable[[], str]] = {
        "user": _user_namespace,
        **{name: _namespace(flag, privileged) for name, flag in NAMESPACES.items()},
        "mount_setup": _inside(_build_root, privileged),
        "proc": _inside(_mount_proc, privileged),
        "proc_user": _inside(_mount_proc, privileged=False),
        "landlock": _landlock,
        "seccomp": _seccomp,
        "openat2": _openat2,
        "pidfd": _pidfd,
        "peerpidfd": _peerpidfd,
        "clone3": _clone3,
        "cgroup_write": _cgroup,
    }
    if privileged:
        probes["idmap"] = lambda: _idmap(directory)
    print(json.dumps({name: _in_child(probe) for name, probe in probes.items()}))


def _in_child(probe: Callable[[], str]) -> dict[str, Any]:
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
    except _Failed as failed:
        name = errno.errorcode.get(failed.errno, str(failed.errno))
        result = {"ok": False, "call": failed.call, "errno": name, "detail": failed.detail}
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        result = {"ok": False, "call": str(error.filename or "probe"), "errno": name, "detail": ""}
    except BaseException as error:  # noqa: BLE001 (the child must not return into the parent's code)
        result = {"ok": False, "call": "probe", "errno": "", "detail": type(error).__name__}
    os.write(to, json.dumps(result).encode())
    os._exit(0)


def _check(call: str, done: int, detail: str = "") -> int:
    if done < 0:
        raise _Failed(call, detail=detail)
    return int(done)


def _mount(source: str, target: str, kind: str | None, flags: int) -> None:
    done = _libc.mount(
        source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), None
    )
    _check("mount", done, target)


def _unshare(flags: int, name: str) -> None:
    _check("unshare", _libc.unshare(ctypes.c_int(flags)), name)


def _enter_user_namespace() -> None:
    """A user namespace in which the caller is root (user_namespaces(7))."""
    uid, gid = os.geteuid(), os.getegid()
    _unshare(_NEWUSER, "CLONE_NEWUSER")
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
            raise _Failed("write", error.errno, f"/proc/self/{file}") from None
        finally:
            os.close(fd)


def _user_namespace() -> str:
    """One that is worth something: Ubuntu's AppArmor lets it be made and takes its capabilities."""
    _enter_user_namespace()
    _unshare(NAMESPACES["mount"], "CLONE_NEWNS")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/proc", "tmpfs", _MS_NOSUID | _MS_NODEV)
    return ""


def _inside(probe: Callable[[], str], privileged: bool) -> Callable[[], str]:
    """The probe as root, real or of a user namespace, in a mount namespace of its own."""

    def run() -> str:
        if not privileged:
            _enter_user_namespace()
        _unshare(NAMESPACES["mount"], "CLONE_NEWNS")
        _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
        return probe()

    return run


def _namespace(flag: int, privileged: bool) -> Callable[[], str]:
    def run() -> str:
        if not privileged:
            _enter_user_namespace()
        _unshare(flag, "")
        if flag == NAMESPACES["pid"] and _fork_and_ask(os.getpid) != 1:
            raise _Failed("getpid", 0, "the child is not pid 1")
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
    """tmpfs, a recursive bind made read-only with mount_setattr(2), pivot_root(2)."""
    _mount("tmpfs", "/proc", "tmpfs", _MS_NOSUID | _MS_NODEV)
    for name in ("usr", "old"):
        os.mkdir(f"/proc/{name}")  # noqa: PTH102
    _mount("/usr", "/proc/usr", None, _MS_BIND | _MS_REC)
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    done = _libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, b"/proc/usr", _AT_RECURSIVE, attributes, len(attributes)
    )
    _check("mount_setattr", done)
    old = _OLD.get(platform.machine())
    if old is not None:
        _check("pivot_root", _libc.syscall(old[0], b"/proc", b"/proc/old"))
    return ""


def _mount_proc() -> str:
    """A fresh /proc of a fresh pid namespace; refused where the old one is partly covered."""
    _unshare(NAMESPACES["pid"], "CLONE_NEWPID")

    def mount() -> int:
        flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        return (
            0 if _libc.mount(b"proc", b"/proc", b"proc", flags, None) == 0 else ctypes.get_errno()
        )

    code = _fork_and_ask(mount)
    if code:
        raise _Failed("mount", code, "proc on /proc")
    return ""


def _landlock() -> str:
    """The ABI version (landlock_create_ruleset(2), LANDLOCK_CREATE_RULESET_VERSION)."""
    return str(_check("landlock_create_ruleset", _libc.syscall(_LANDLOCK, None, 0, 1)))


def _seccomp() -> str:
    """Install a filter that refuses uname(2), and see it refused."""
    old = _OLD.get(platform.machine())
    if old is None:
        raise _Failed("seccomp", errno.ENOSYS, f"no filter for {platform.machine()} yet")
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # load the system call's number
            (0x15, 0, 1, old[1]),  # uname?
            (0x06, 0, 0, 0x00050000 | errno.EXDEV),  # SECCOMP_RET_ERRNO
            (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        )
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _check("prctl", _libc.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _check("prctl", _libc.prctl(22, 2, fprog, 0, 0), "PR_SET_SECCOMP")
    try:
        os.uname()
    except OSError as error:
        if error.errno == errno.EXDEV:
            return ""
    raise _Failed("seccomp", 0, "the filter has no effect")


def _openat2() -> str:
    """RESOLVE_BENEATH opens what lies below and refuses what doesn't."""
    how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_BENEATH)
    directory = os.open("/usr", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    _check("openat2", _libc.syscall(_OPENAT2, directory, b".", how, len(how)))
    if _libc.syscall(_OPENAT2, directory, b"..", how, len(how)) >= 0:
        raise _Failed("openat2", 0, "RESOLVE_BENEATH has no effect")
    return ""


def _pidfd() -> str:
    fd = _check("pidfd_open", _libc.syscall(_PIDFD_OPEN, os.getpid(), 0))
    signal.pidfd_send_signal(fd, 0)
    return ""


def _peerpidfd() -> str:
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(s) for s in socket.socketpair())
        a.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        b.close()
    return ""


def _clone3() -> str:
    """clone3(2) exists when it finds fault with an empty argument."""
    _libc.syscall(_CLONE3, None, 0)
    if ctypes.get_errno() != errno.EINVAL:
        raise _Failed("clone3")
    return ""


def _idmap(directory: str) -> str:
    """An idmapped mount of ``directory``'s filesystem (mount_setattr(2), MOUNT_ATTR_IDMAP)."""
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        _libc.unshare(ctypes.c_int(_NEWUSER))
        os.write(ready[1], b".")
        os.close(go[1])
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        for file in ("uid_map", "gid_map"):
            # The child sits in a namespace without a mapping until its parent writes one.
            Path(f"/proc/{pid}/{file}").write_text("1000 100000 1")
        namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(go[1])
        os.waitpid(pid, 0)
    flags = 1 | os.O_CLOEXEC  # OPEN_TREE_CLONE
    tree = _libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(directory), flags)
    _check("open_tree", tree, directory)
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace)
    done = _libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, len(attributes))
    _check("mount_setattr", done, directory)
    return ""


def _cgroup() -> str:
    """Where below the own cgroup a child cgroup can be made: ``hierarchy:controller,...`` words."""
    mounts: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        point = before.split()[4]
        if kind == "cgroup2":
            mounts[""] = point
        elif kind == "cgroup":
            for word in options.split(","):
                mounts.setdefault(word, point)
    writable: list[str] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        mount = mounts.get(controllers.split(",")[0])
        if mount is None:
            continue
        at = Path(mount + path)
        if not at.is_dir():
            at = Path(mount)
        try:
            made = Path(tempfile.mkdtemp(prefix="sandboxd-probe-", dir=at))
        except OSError:
            continue
        kill = (made / "cgroup.kill").exists()
        made.rmdir()
        names = controllers
        if not controllers:
            names = (at / "cgroup.controllers").read_text().strip().replace(" ", ",")
        writable.append(f"{'v1' if controllers else 'v2'}:{names}{':kill' if kill else ''}")
    return " ".join(writable)


if __name__ == "__main__":
    _main(sys.argv[1])
