"""Exhaustion: each thing that could be used up has an end. And process games."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH102, PTH108, S108

from __future__ import annotations

import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from sandboxd.selftest.prober.probe import Plan, add

_THREAT = "Exhaustion"
_GAMES = "Process games"


def _fill(directory: str, share: float) -> Callable[[Plan], None]:
    """Reserve ``share`` of what a private file system may have."""

    def attack(plan: Plan) -> None:
        path = f"{directory}/fill-{os.getpid()}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            step = 1 << 20
            for offset in range(0, int(plan.tmp_size * share) + 1, step):
                os.posix_fallocate(fd, offset, step)
        finally:
            os.close(fd)
            os.unlink(path)

    return attack


def _inodes(most: int) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        directory = f"/tmp/inodes-{os.getpid()}"
        os.mkdir(directory)
        try:
            for number in range(most):
                os.mknod(f"{directory}/{number}")
        finally:
            subprocess.run(["/bin/rm", "-r", directory], check=False)

    return attack


for _at in ("/tmp", "/dev/shm", "$HOME"):
    _directory = os.path.expandvars(_at) if _at != "$HOME" else "."
    add(f"fill {_at}", _THREAT,
        lambda plan, at=_at: _fill(os.environ["HOME"] if at == "$HOME" else at, 1.5)(plan),
        "ENOSPC", inside=lambda plan, at=_at: _fill(os.environ["HOME"] if at == "$HOME" else at,
                                                    0.2)(plan),
        says="a fifth of it is there")  # fmt: skip
add("use up the inodes of /tmp", _THREAT, _inodes(20_000), "ENOSPC", inside=_inodes(100),
    says="a hundred can be had")  # fmt: skip


def _open_files(most: int) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        for _ in range(most):
            os.open("/dev/null", os.O_RDONLY)

    return attack


def _forks(count: Callable[[Plan], int]) -> Callable[[Plan], None]:
    """All in our process group, which ends with the probe."""

    def attack(plan: Plan) -> None:
        for _ in range(count(plan)):
            if os.fork() == 0:
                signal.pause()

    return attack


def _threads(count: Callable[[Plan], int]) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        ended = threading.Event()
        threading.stack_size(64 << 10)
        try:
            for _ in range(count(plan)):
                threading.Thread(target=ended.wait, daemon=True).start()
        except RuntimeError:
            raise BlockingIOError(11, "can't start a new thread") from None
        finally:
            ended.set()

    return attack


def _memory(size: int) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()

    return attack


def _file_size(size: int) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        fd = os.open(f"/tmp/large-{os.getpid()}", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, size)
        finally:
            os.unlink(f"/tmp/large-{os.getpid()}")

    return attack


add("open 10,000 files", _THREAT, _open_files(10_000), "EMFILE", inside=_open_files(50),
    says="fifty can be had")  # fmt: skip
add("fork without end", _THREAT, _forks(lambda plan: plan.processes * 2), "EAGAIN",
    inside=_forks(lambda plan: 5), says="five can be had")  # fmt: skip
add("start threads without end", _THREAT, _threads(lambda plan: plan.processes * 2), "EAGAIN",
    inside=_threads(lambda plan: 5), says="five can be had")  # fmt: skip
add("take 8 GiB of memory", _THREAT, _memory(8 << 30), "ENOMEM", inside=_memory(8 << 20),
    says="eight MiB can be had")  # fmt: skip
add("write a file of 1 GiB", _THREAT, _file_size(1 << 30), "EFBIG", inside=_file_size(1 << 20),
    says="one of a MiB can be had")  # fmt: skip


def _limit(kind: int) -> Callable[[Plan], str]:
    def attack(plan: Plan) -> str:
        _, hard = resource.getrlimit(kind)
        if kind == resource.RLIMIT_NPROC:  # a host has one of its own
            return "ok" if not 0 <= hard <= plan.processes else "limited"
        return "ok" if hard == resource.RLIM_INFINITY else "limited"

    return attack


def _stack(plan: Plan) -> str:
    resource.getrlimit(resource.RLIMIT_STACK)
    return "ok"


for _words, _kind in (
    ("processes", resource.RLIMIT_NPROC),
    ("memory", resource.RLIMIT_DATA),
    ("file size", resource.RLIMIT_FSIZE),
    ("open files", resource.RLIMIT_NOFILE),
    ("processor time", resource.RLIMIT_CPU),
):
    add(f"no hard limit on {_words}", _THREAT, _limit(_kind), "limited", inside=_stack,
        says="another limit is read")  # fmt: skip


def _leave(plan: Plan) -> str:
    """A daemon with the marker in its arguments, deaf to signals, in a session of its own.

    It is meant to stay: whether it outlives the sandbox is for the runner to see.
    """
    code = (
        "import os, signal, sys, time\n"
        "os.setsid()\n"
        "for n in (1, 2, 3, 15, 20): signal.signal(n, signal.SIG_IGN)\n"
        "time.sleep(600)\n"
    )
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(
                sys.executable,
                [sys.executable, "-I", "-S", "-c", code, f"{plan.marker}-{plan.place}"],
            )
        os._exit(0)
    os.waitpid(pid, 0)
    return "started"


add("leave a daemon behind", _GAMES, _leave, "gone", inside=lambda plan: time.sleep(0.5),
    says="the runner sees it while the sandbox lives")  # fmt: skip
