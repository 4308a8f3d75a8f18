"""Sandboxes that wait for their program: built and confined before, used once or never."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
import trio
from isolation_support import Box, children, needs_root, read, status
from real_daemon import until

from sandboxd.errors import Conflict, KernelError
from sandboxd.isolation.client import Launcher, Process
from sandboxd.isolation.wire import FileSpec, LaunchSpec, Limits

PATH = "PATH=/usr/bin:/bin"
CONFINED = (
    *("Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
    *("NoNewPrivs", "Seccomp", "Seccomp_filters", "SigBlk", "SigIgn", "SigCgt"),
)


@pytest.fixture
async def box(launcher: Launcher) -> Box:
    return Box(launcher)


@contextmanager
def streams() -> Iterator[tuple[int, dict[str, int]]]:
    """A pipe to read from, and the streams that write to it."""
    read_end, write = os.pipe2(os.O_CLOEXEC)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield read_end, {"stdin": null, "stdout": write, "stderr": write}
    finally:
        for fd in (read_end, write, null):
            os.close(fd)


@asynccontextmanager
async def waiting(box: Box, **more: Any) -> AsyncIterator[tuple[Process, LaunchSpec]]:
    """A sandbox without a program, and its spec."""
    spec = box.spec((), template="", waits=True, **more)
    with streams() as (_, ends):
        process = await box.launcher.launch(spec, **ends)
    try:
        yield process, spec
    finally:
        with trio.CancelScope(shield=True):
            await process.kill()
            await process.wait()


async def begin(box: Box, process: Process, spec: LaunchSpec, *argv: str, **more: Any) -> bytes:
    """Have it run ``argv``, to its end; what it printed."""
    told = box.spec(argv, [PATH, "A=one"], template="", uid=spec.uid, limits=spec.limits, **more)
    with streams() as (out, ends):
        await process.begin(told, **ends)
        await process.wait()
        os.set_blocking(out, False)
        with suppress(BlockingIOError):  # it printed nothing
            return os.read(out, 1 << 20)
        return b""


async def test_it_runs_what_it_is_told_later(box: Box) -> None:
    files = (FileSpec("/run/greeting", b"hello\n"),)
    async with waiting(box, files=files) as (process, spec):
        assert process.exit is None
        script = 'echo "$A $$"; pwd; cat /run/greeting; exit 3'
        out = await begin(box, process, spec, "/bin/sh", "-c", script, cwd="/usr")
        assert out.splitlines()[1:] == [b"/usr", b"hello"]
        assert process.exit is not None
        assert process.exit.code == 3


async def test_it_is_confined_as_one_that_was_made_with_its_program(box: Box) -> None:
    limits = Limits(memory=256 << 20, open_files=100, file_size=1 << 20, cpu_seconds=9)
    script = "echo ready; exec sleep 600"
    async with waiting(box, limits=limits) as (process, spec):
        told = box.spec(("/bin/sh", "-c", script), [PATH], uid=spec.uid, limits=limits)
        with streams() as (out, ends):
            await process.begin(told, **ends)
            assert await trio.to_thread.run_sync(os.read, out, 6) == b"ready\n"
            async with box.start("/bin/sh", "-c", script, env=[PATH], limits=limits) as made:
                await made.ready()
                inits = (process.pid, made.process.pid)
                programs = (children(inits[0])[0], children(inits[1])[0])
                for init in inits:  # sigwaitinfo(2) takes what it waits for out of the mask
                    until(lambda pid=init: int(status(pid, "SigBlk")[0], 16) == 0)
                for program in programs:  # the shell before it catches signals
                    until(lambda pid=program: read(f"/proc/{pid}/comm") == "sleep\n")
                pairs = [inits, programs]
                for one, other in pairs:
                    for field in CONFINED:
                        assert status(one, field) == status(other, field), field
                    assert read(f"/proc/{one}/limits") == read(f"/proc/{other}/limits")
                    assert _mounts(one) == _mounts(other) != _mounts(os.getpid())
                # This process is not confined, or the comparison could not fail.
                assert status(os.getpid(), "Seccomp") != status(pairs[1][0], "Seccomp")


def _mounts(pid: int) -> list[tuple[str, ...]]:
    """Place, options and kind of each mount; sizes and uids belong to one sandbox."""
    rows = (line.split() for line in read(f"/proc/{pid}/mountinfo").splitlines())
    return [(row[4], row[5], row[row.index("-") + 1]) for row in rows]


async def test_what_can_not_be_run_is_told_and_ends_it(box: Box) -> None:
    for argv, cwd, call, code in (
        (("/absent",), "/", "execve", errno.ENOENT),
        (("/etc/passwd",), "/", "execve", errno.EACCES),
        (("/bin/true",), "/absent", "chdir", errno.ENOENT),
    ):
        async with waiting(box) as (process, spec):
            with pytest.raises(KernelError) as refusal:
                await begin(box, process, spec, *argv, cwd=cwd)
            assert (refusal.value.syscall, refusal.value.errno) == (call, code)
            with trio.fail_after(10):
                assert (await process.wait()).code == 127


async def test_it_takes_one_program(box: Box) -> None:
    async with waiting(box) as (process, spec):
        assert await begin(box, process, spec, "/bin/echo", "once") == b"once\n"
        with pytest.raises(Conflict):
            await begin(box, process, spec, "/bin/echo", "twice")


async def test_one_that_has_ended_takes_none(box: Box) -> None:
    async with waiting(box) as (process, spec):
        await process.kill()
        await process.wait()
        with pytest.raises(Conflict):
            await begin(box, process, spec, "/bin/true")


async def test_one_that_nobody_wants_ends(box: Box) -> None:
    async with waiting(box) as (process, _):
        assert process.first is not None
        process.first.close()
        with trio.fail_after(10):
            await process.wait()


async def test_a_signal_before_the_program_meets_it(box: Box) -> None:
    async with waiting(box) as (process, spec):
        await process.signal(signal.SIGTERM)
        assert await begin(box, process, spec, "/bin/sleep", "600") == b""
        assert process.exit is not None
        assert process.exit.signal == signal.SIGTERM


@needs_root  # nobody else may read an init's memory
async def test_no_init_holds_anything_of_what_its_program_was_given(box: Box) -> None:
    """Neither of a sandbox that waited, nor of one made with its program."""
    canary = os.urandom(8).hex()
    needles = (canary, "/bin/sleep")  # the control: it is found where it is
    async with waiting(box) as (process, spec):
        told = box.spec(("/bin/sleep", "600"), [PATH, f"CANARY={canary}"], uid=spec.uid)
        with streams() as (_, ends):
            await process.begin(told, **ends)
        async with box.start("/bin/sleep", "600", env=[f"CANARY={canary}"]) as made:
            for init in (process.pid, made.process.pid):
                assert not _holds(init, needles[0])
                assert _holds(children(init)[0], needles[0])


def _holds(pid: int, needle: str) -> bool:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in read(f"/proc/{pid}/maps").splitlines():
            if " rw" not in line:
                continue
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            memory.seek(start)
            if needle.encode() in memory.read(end - start):
                return True
    return False
