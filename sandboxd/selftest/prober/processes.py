"""Looking into other processes: the sandbox's own init, and those of the host."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH115, PTH116, PTH123, PTH208

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import time
from collections.abc import Callable
from typing import Any

from sandboxd.selftest.prober.kernel import call, checked, libc
from sandboxd.selftest.prober.probe import HOST, Plan, add, open_

_INIT = "Secret: processes of the sandbox's init"
_HOSTS = "Secret: processes of the host"
_SEIZE = 0x4206


def victim(plan: Plan) -> int:
    """The init of this sandbox; outside, where it must work, a child of ours."""
    return 1 if plan.inside else child()


def child() -> int:
    """A process that waits. It ends with our process group."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
    return pid


def _read(name: str) -> Callable[[int], object]:
    def attack(pid: int) -> None:
        path = name.replace("task/1/", f"task/{pid}/")
        with open(f"/proc/{pid}/{path}", "rb", buffering=0) as file:
            if not path.endswith(("mem", "pagemap")):
                file.read(16)

    return attack


def _list(name: str) -> Callable[[int], object]:
    return lambda pid: len(os.listdir(f"/proc/{pid}/{name}")) and "ok"


def _link(name: str) -> Callable[[int], object]:
    return lambda pid: os.readlink(f"/proc/{pid}/{name}") and "ok"


def _write(name: str) -> Callable[[int], object]:
    return lambda pid: open_(f"/proc/{pid}/{name}", os.O_WRONLY)


def _ptrace(pid: int) -> None:
    call("ptrace", _SEIZE, pid, 0, 0)


def _stack_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/maps") as maps:
            return next(int(line.split("-")[0], 16) for line in maps if "[stack]" in line)
    except (OSError, StopIteration):
        return 0x400000


def _vm(name: str) -> Callable[[int], object]:
    def attack(pid: int) -> None:
        buffer = ctypes.create_string_buffer(8)
        remote = struct.pack("PN", _stack_of(pid), 8)
        local = struct.pack("PN", ctypes.addressof(buffer), 8)
        # Reading first, so that what is written back is what was there.
        if name == "process_vm_writev":
            call("process_vm_readv", pid, local, 1, remote, 1, 0)
        call(name, pid, local, 1, remote, 1, 0)

    return attack


def _getfd(pid: int) -> None:
    call("pidfd_getfd", os.pidfd_open(pid), 0, 0)


def _kcmp(pid: int) -> None:
    call("kcmp", os.getpid(), pid, 1, 0, 0)


def _robust_list(pid: int) -> None:
    head, size = ctypes.c_void_p(), ctypes.c_size_t()
    call("get_robust_list", pid, ctypes.byref(head), ctypes.byref(size))


def _slack(pid: int) -> None:
    with open(f"/proc/{pid}/timerslack_ns", "w") as file:
        file.write("50000")


def _madvise(pid: int) -> None:
    page = struct.pack("PN", _stack_of(pid) & ~4095, 4096)
    call("process_madvise", os.pidfd_open(pid), page, 1, 20, 0)  # MADV_COLD


def _move_pages(pid: int) -> None:
    page, status = (ctypes.c_void_p * 1)(_stack_of(pid) & ~4095), (ctypes.c_int * 1)()
    call("move_pages", pid, 1, page, None, status, 0)


def _counters(pid: int) -> None:
    attributes = struct.pack("IIQQQQQ", 1, 112, 0, 0, 0, 0, 0x60).ljust(112, b"\0")
    call("perf_event_open", attributes, pid, -1, -1, 0)


def _kill_init(plan: Plan) -> str:
    """Signal 9 to init is taken and ignored: the kernel shields a namespace's init from inside."""
    pid = victim(plan)
    os.kill(pid, signal.SIGKILL)
    if plan.inside:
        time.sleep(0.05)
        os.kill(pid, 0)
        return "ignored"
    os.waitpid(pid, 0)
    return "ok"


_OUTSIDE = "the same on a child outside"


def _on_init(words: str, attack: Callable[[int], object], *denials: str, **more: Any) -> None:
    add(words, _INIT, lambda plan: _done(attack(victim(plan))), *denials, outside=HOST,
        says=_OUTSIDE, **more)  # fmt: skip


def _done(_: object) -> None:
    """Whatever it gave, it worked."""


for _name in ("environ", "mem", "maps", "smaps", "auxv", "pagemap", "syscall", "personality",
              "task/1/environ", "task/1/mem"):  # fmt: skip
    _on_init(f"read /proc/1/{_name}", _read(_name), "EACCES")
_on_init("read /proc/1/stack", _read("stack"), "EACCES", fallback=lambda plan: _own("environ"))
for _name in ("fd", "fdinfo", "root", "cwd"):
    _on_init(f"list /proc/1/{_name}", _list(_name), "EACCES")
_on_init("list /proc/1/map_files", _list("map_files"), "EACCES", "EPERM",
         fallback=lambda plan: _own("maps"))  # fmt: skip
for _name in ("exe", "ns/mnt", "ns/user", "ns/net"):
    _on_init(f"follow /proc/1/{_name}", _link(_name), "EACCES")
for _name in ("oom_score_adj", "coredump_filter", "clear_refs"):
    _on_init(f"write /proc/1/{_name}", _write(_name), "EACCES")
_on_init("write /proc/1/timerslack_ns", _slack, "EPERM", landlocked=(1, "EACCES"),
         fallback=lambda plan: _own("environ"))  # fmt: skip
_on_init("ptrace init", _ptrace, "EPERM", filtered="EPERM")
for _name in ("process_vm_readv", "process_vm_writev"):
    _on_init(f"{_name} on init", _vm(_name), "EPERM")
_on_init("pidfd_getfd on init", _getfd, "EPERM")
_on_init("kcmp on init", _kcmp, "EPERM", fallback=lambda plan: _own("environ"))
_on_init("get_robust_list of init", _robust_list, "EPERM")
_on_init(
    "process_madvise on init",
    _madvise,
    "EACCES",
    filtered="EPERM",
    fallback=lambda plan: _own("maps"),
)
_on_init("move_pages of init", _move_pages, "EPERM", fallback=lambda plan: _own("maps"))
_on_init("perf_event_open on init", _counters, "EACCES", "EPERM", filtered="EPERM",
         fallback=lambda plan: _own("stat"))  # fmt: skip
add("kill init", _INIT, _kill_init, "ignored", outside=HOST, says="kills a child outside")


def _own(name: str) -> None:
    _read(name)(os.getpid())


# Processes of the host. In here their numbers may stand for something of ours: those whose
# ancestors lead to us are left out.


def _any(attack: Callable[[int], object]) -> Callable[[Plan], object]:
    """The attack on each of the host's processes; one that works is enough."""

    def tried(plan: Plan) -> tuple[str, str]:
        failures: list[OSError] = []
        for name, pid in plan.pids.items():
            if plan.inside and _is_ours(pid):
                continue
            try:
                attack(pid)
            except OSError as failure:
                failures.append(failure)
            else:
                return "ok", f"{name}, process {pid}"
        raise max(failures, key=lambda failure: failure.errno not in (errno.ESRCH, errno.ENOENT))

    return tried


def _is_ours(pid: int) -> bool:
    ours = {os.getpid(), os.getppid()}
    try:
        while pid > 1 and pid not in ours:
            with open(f"/proc/{pid}/stat", "rb") as stat:
                pid = int(stat.read().rpartition(b")")[2].split()[1])
    except OSError:
        return False
    return pid in ours


def _limits(pid: int) -> None:
    checked(libc.prlimit(pid, 7, None, ctypes.create_string_buffer(16)))


for _words, _attack, _denial, _filtered in (
    ("see them in /proc", lambda pid: os.stat(f"/proc/{pid}"), "ENOENT", ""),
    ("read their environ", _read("environ"), "ENOENT", ""),
    ("read their memory", _read("mem"), "ENOENT", ""),
    ("read their arguments", _read("cmdline"), "ENOENT", ""),
    ("enter their root", _list("root"), "ENOENT", ""),
    ("list their descriptors", _list("fd"), "ENOENT", ""),
    ("signal them", lambda pid: os.kill(pid, 0), "ESRCH", ""),
    ("open a pidfd", lambda pid: os.close(os.pidfd_open(pid)), "ESRCH", ""),
    ("take a descriptor", _getfd, "ESRCH", ""),
    ("ptrace", _ptrace, "ESRCH", "EPERM"),
    ("process_vm_readv", _vm("process_vm_readv"), "ESRCH", "EPERM"),
    ("kcmp", _kcmp, "ESRCH", "EPERM"),
    ("read their scheduler", os.sched_getscheduler, "ESRCH", ""),
    ("read their processors", os.sched_getaffinity, "ESRCH", ""),
    ("read their session", os.getsid, "ESRCH", ""),
    ("read their limits", _limits, "ESRCH", ""),
    ("read their priority", lambda pid: os.getpriority(os.PRIO_PROCESS, pid), "ESRCH", ""),
):
    _more = {"fallback": lambda plan: _own("environ")} if _words == "kcmp" else {}
    add(f"host processes: {_words}", _HOSTS, _any(_attack), _denial, filtered=_filtered,
        outside=HOST, says="on an ordinary process outside", **_more)  # fmt: skip


def _first_process(plan: Plan) -> str:
    with open("/proc/1/comm") as file:
        return "own init" if file.read() == "sandboxd-init\n" else "ok"


add("whose process 1 is", _HOSTS, _first_process, "own init", outside=HOST,
    says="outside it is another")  # fmt: skip
