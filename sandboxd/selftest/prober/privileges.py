"""Privileges: there are none, and no way to more."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH101, PTH108, PTH116, PTH123, S103, S108

from __future__ import annotations

import ctypes
import os
import resource
import socket
import stat
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress

from sandboxd.selftest.prober.kernel import call, checked, libc, raise_limit
from sandboxd.selftest.prober.namespaces import getpid
from sandboxd.selftest.prober.probe import HOST, OWN_UID, SCRATCH, Plan, add, open_

_THREAT = "Escape: privileges"
_AS_ROOT = "the same as root of scratch namespaces"
_NONE = "0" * 16


def status(field: str) -> str:
    with open("/proc/self/status") as lines:
        return next(line.split()[1] for line in lines if line.startswith(field + ":"))


def _capabilities(field: str) -> Callable[[Plan], str]:
    return lambda plan: status(field) if status(field) == _NONE else "ok"


for _field, _words in (
    ("CapEff", "effective"),
    ("CapPrm", "permitted"),
    ("CapInh", "inheritable"),
    ("CapBnd", "bounding"),
    ("CapAmb", "ambient"),
):
    _more = {"fallback": getpid} if _field in ("CapInh", "CapAmb") else {}
    add(f"{_words} capabilities", _THREAT, _capabilities(_field), _NONE, outside=SCRATCH,
        says="root of scratch namespaces has some", **_more)  # fmt: skip
add("no_new_privs is set", _THREAT,
    lambda plan: "set" if status("NoNewPrivs") == "1" else "ok", "set", outside=HOST,
    fallback=getpid, says="outside it isn't")  # fmt: skip


def _first(field: str) -> Callable[[Plan], str]:
    """Of this sandbox's init; outside of the host's."""

    def attack(plan: Plan) -> str:
        with open("/proc/1/status") as lines:
            value = next(line.split()[1] for line in lines if line.startswith(field + ":"))
        return value if value == _NONE else "ok"

    return attack


for _field, _words in (("CapEff", "effective"), ("CapPrm", "permitted"), ("CapBnd", "bounding")):
    add(f"{_words} capabilities of the init", _THREAT, _first(_field), _NONE, outside=HOST,
        says="the host's process 1 has some")  # fmt: skip


def _secure_bits(plan: Plan) -> str:
    """PR_GET_SECUREBITS: NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE, each locked."""
    return "locked" if libc.prctl(27, 0, 0, 0, 0) == 0xCF else "ok"


def _groups(plan: Plan) -> tuple[str, str]:
    groups = os.getgroups()
    return ("ok" if groups else "none"), " ".join(map(str, groups))


def _session(plan: Plan) -> str:
    """A process of the sandbox leads its session, and so no terminal of the host controls it."""
    return "own" if os.getsid(0) else "ok"


def _new_session(plan: Plan) -> str:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os._exit(0 if os.getsid(0) == os.getpid() else 1)
    return "ok" if os.waitpid(pid, 0)[1] == 0 else "missed"


add("secure bits", _THREAT, _secure_bits, "locked", outside=HOST, says="outside they aren't")
add("supplementary groups of the daemon", _THREAT, _groups, "none", needs=OWN_UID, outside=HOST,
    fallback=getpid, says="the selftest has some")  # fmt: skip
add("the daemon's terminal session", _THREAT, _session, "own", inside=_new_session,
    says="a process may begin one")  # fmt: skip


def _capset(plan: Plan) -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    # CAP_SYS_ADMIN, permitted and effective
    call("capset", header, (ctypes.c_uint32 * 6)(1 << 21, 1 << 21, 0, 0, 0, 0))


def _prctl(*arguments: int) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        checked(libc.prctl(*(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:5])))

    return attack


add("capset: CAP_SYS_ADMIN", _THREAT, _capset, "EPERM", outside=SCRATCH, says=_AS_ROOT)
add("raise an ambient capability", _THREAT, _prctl(47, 2, 10), "EPERM", outside=SCRATCH,
    allowed=("ok", "EPERM"), fallback=_prctl(47, 4), says="clearing them is allowed")  # fmt: skip
add("change the secure bits", _THREAT, _prctl(28, 1), "EPERM", outside=SCRATCH, says=_AS_ROOT)
add("drop from the bounding set", _THREAT, _prctl(24, 21), "EPERM", outside=SCRATCH,
    says=_AS_ROOT)  # fmt: skip
add("clear no_new_privs", _THREAT, _prctl(38, 0), "EINVAL", inside=_prctl(38, 1),
    says="setting it is allowed")  # fmt: skip

_SAME_IDS: tuple[tuple[str, Callable[[], object], str, Callable[[], object]], ...] = (
    ("setuid 0", lambda: os.setuid(0), "EINVAL", lambda: os.setuid(os.getuid())),
    ("setgid 0", lambda: os.setgid(0), "EINVAL", lambda: os.setgid(os.getgid())),
    ("become uid 1001", lambda: os.setresuid(1001, 1001, 1001), "EINVAL",
     lambda: os.setresuid(-1, -1, -1)),
    ("supplementary groups", lambda: os.setgroups([0]), "EPERM", os.getgroups),
)  # fmt: skip
for _words, _change, _denial, _own in _SAME_IDS:
    add(_words, _THREAT, lambda plan, change=_change: change() and None, _denial,
        inside=lambda plan, own=_own: own() and None, says="the own id")  # fmt: skip


def _map_file(name: str, text: str) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)

    return attack


for _name, _text, _denial in (
    ("uid_map", "0 0 1", "EPERM"),
    ("gid_map", "0 0 1", "EPERM"),
    ("setgroups", "allow", "EACCES"),
):
    add(f"write {_name}", _THREAT, _map_file(_name, _text), _denial, landlocked=(1, "EACCES"),
        inside=lambda plan, name=_name: open_(f"/proc/self/{name}"),
        says="it may be read")  # fmt: skip


def _device(kind: int, major: int, minor: int) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        path = f"/tmp/node-{os.getpid()}"
        os.mknod(path, kind | 0o600, os.makedev(major, minor))
        os.unlink(path)

    return attack


for _words, _device_attack in (
    ("make a character device", _device(stat.S_IFCHR, 1, 1)),
    ("make a block device", _device(stat.S_IFBLK, 7, 0)),
):
    add(_words, _THREAT, _device_attack, "EPERM", landlocked=(1, "EACCES"), outside=SCRATCH,
        fallback=_device(stat.S_IFIFO, 0, 0), says="root; or a FIFO inside")  # fmt: skip


def _give_away(plan: Plan) -> None:
    path = f"/tmp/given-{os.getpid()}"
    with open(path, "w"):
        pass
    os.chown(path, 0, 0)


def _capable_file(plan: Plan) -> None:
    path = f"/tmp/capable-{os.getpid()}"
    with open(path, "w"):
        pass
    # version 2, effective, CAP_SYS_ADMIN permitted (linux/capability.h)
    os.setxattr(path, "security.capability", struct.pack("<5I", 0x02000001, 1 << 21, 0, 0, 0))


def _own_mode(plan: Plan) -> None:
    path = f"/tmp/mode-{os.getpid()}"
    with open(path, "w"):
        pass
    os.chmod(path, 0o4755)


add("give a file to root", _THREAT, _give_away, "EINVAL", outside=SCRATCH, says=_AS_ROOT)
add("give a file capabilities", _THREAT, _capable_file, "EPERM", outside=SCRATCH,
    fallback=_own_mode, says=_AS_ROOT)  # fmt: skip


def _setuid_program(plan: Plan) -> str:
    """A setuid copy of id(1) that belongs to root tells who it runs as."""
    done = subprocess.run([plan.paths["setuid id"], "-u"], capture_output=True, check=False)
    return "ok" if done.stdout.strip() == b"0" else f"uid {done.stdout.decode().strip()}"


def _dropped(attack: Callable[[Plan], str]) -> Callable[[Plan], str]:
    """Outside, as an ordinary user; root would be root without any help."""

    def tried(plan: Plan) -> str:
        if not plan.inside and os.geteuid() == 0:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        return attack(plan)

    return tried


def _capable_program(plan: Plan) -> str:
    """A copy of cat(1) with a file capability shows its own status."""
    done = subprocess.run(
        [plan.paths["capable cat"], "/proc/self/status"], capture_output=True, check=False
    )
    permitted = next(line for line in done.stdout.splitlines() if line.startswith(b"CapPrm"))
    return "no gain" if int(permitted.split()[1], 16) == 0 else "ok"


def _runs(name: str) -> Callable[[Plan], None]:
    """The file itself is there and can be executed."""

    def control(plan: Plan) -> None:
        if not os.access(plan.paths[name], os.X_OK):
            raise FileNotFoundError(2, "not there")

    return control


add("run a setuid-root program", _THREAT, _dropped(_setuid_program), "uid 1000", outside=HOST,
    fallback=_runs("setuid id"), says="outside it gives uid 0")  # fmt: skip
add("run a program with a file capability", _THREAT, _dropped(_capable_program), "no gain",
    outside=HOST, fallback=_runs("capable cat"), says="outside it has it")  # fmt: skip


def _secure_execution(plan: Plan) -> str:
    """The dynamic loader shows its auxiliary vector, but not to a program with more privileges
    than its caller (ld.so(8), LD_SHOW_AUXV)."""
    for path in ("/usr/bin/mount", "/usr/bin/su", "/usr/bin/umount", "/usr/bin/chsh"):
        with suppress(OSError):
            if os.stat(path).st_mode & stat.S_ISUID:
                done = subprocess.run(
                    [path, "--version"], env={"LD_SHOW_AUXV": "1"}, stdin=subprocess.DEVNULL,
                    capture_output=True, check=False,
                )  # fmt: skip
                return "no gain" if b"AT_SECURE" in done.stdout else "ok"
    return "none here"


add("run the system's setuid programs", _THREAT, _dropped(_secure_execution), "no gain",
    "none here", outside=HOST, fallback=_runs("setuid id"), says="outside they gain")  # fmt: skip

for _words, _attack, _denial, _control in (
    ("raise the hard limit of open files",
     lambda plan: raise_limit(resource.RLIMIT_NOFILE, 1 << 22), "EPERM",
     lambda plan: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))),
    ("raise the own priority", lambda plan: os.setpriority(os.PRIO_PROCESS, 0, -10), "EACCES",
     lambda plan: os.setpriority(os.PRIO_PROCESS, 0, 19)),
    ("real-time scheduling",
     lambda plan: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)), "EPERM",
     lambda plan: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))),
    ("real-time disk priority", lambda plan: call("ioprio_set", 1, 0, 1 << 13) and None, "EPERM",
     lambda plan: call("ioprio_set", 1, 0, 2 << 13 | 4) and None),
    ("lower the own OOM score", lambda plan: _oom(-500), "EACCES",
     lambda plan: open_("/proc/self/oom_score_adj")),
):  # fmt: skip
    add(_words, _THREAT, _attack, _denial, inside=_control, says="in the other direction, or asked")


def _oom(score: int) -> None:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(score))


def _socket_option(level: int, option: int, value: int) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(level, option, value)

    return attack


for _words, _level, _option in (
    ("SO_MARK", socket.SOL_SOCKET, 36),
    ("SO_RCVBUFFORCE", socket.SOL_SOCKET, 33),
    ("TCP_REPAIR", socket.IPPROTO_TCP, 19),
    ("IP_TRANSPARENT", socket.IPPROTO_IP, 19),
):
    add(f"socket option {_words}", _THREAT, _socket_option(_level, _option, 1), "EPERM",
        outside=SCRATCH, fallback=_socket_option(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
        says=_AS_ROOT)  # fmt: skip
