"""Further programs in a sandbox that runs one: confined alike, ended whole, gone with it."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import trio
from isolation_support import Box, Running, children, read, status

from sandboxd.errors import Conflict, KernelError
from sandboxd.isolation.client import Launcher, Process
from sandboxd.isolation.inside import Further, open_further
from sandboxd.isolation.wire import Limits

PATH = "PATH=/usr/bin:/bin:/usr/sbin:/sbin"
#: What a process inherits of its confinement, as proc(5) tells: one that was entered, instead of
#: forked from what the agent was forked from, would differ in one.
CONFINED = (
    *("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
    *("NoNewPrivs", "Seccomp", "Seccomp_filters", "Cpus_allowed"),
)
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


@pytest.fixture
async def box(launcher: Launcher) -> Box:
    return Box(launcher)


@dataclass
class Resident:
    """A sandbox whose program waits, and which takes further ones."""

    box: Box
    running: Running

    @property
    def process(self) -> Process:
        return self.running.process

    @asynccontextmanager
    async def open(
        self, *argv: str, env: Sequence[str] = (PATH,), **more: Any
    ) -> AsyncIterator[tuple[Further, trio.lowlevel.FdStream]]:
        spec = self.box.spec(argv, env, template="", **more)
        read, write = os.pipe2(os.O_CLOEXEC)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        async with trio.lowlevel.FdStream(read) as out:
            try:
                streams = {"stdin": null, "stdout": write, "stderr": write}
                async with open_further(self.process, spec, **streams) as one:
                    os.close(write)
                    write = -1
                    yield one, out
            finally:
                os.close(null)
                if write >= 0:
                    os.close(write)

    async def run(self, *argv: str, **more: Any) -> tuple[int | None, bytes]:
        async with self.open(*argv, **more) as (one, out):
            printed = b"".join([chunk async for chunk in out])
            return (await one.wait()).code, printed

    async def settle(self, before: set[int]) -> None:
        """Until nothing is left but these: a supervisor tells of its program's end first."""
        with trio.fail_after(10):
            while not below(self.process.pid) <= before:  # noqa: ASYNC110
                await trio.sleep(0.01)

    async def sh(self, script: str, **more: Any) -> tuple[int | None, bytes]:
        return await self.run("/bin/sh", "-c", script, **more)


@asynccontextmanager
async def resident(box: Box, **more: Any) -> AsyncIterator[Resident]:
    script = "echo ready; read line"
    async with box.start("/bin/sh", "-c", script, stdin=True, further=True, **more) as running:
        await running.ready()
        yield Resident(box, running)


async def until_ready(out: trio.lowlevel.FdStream) -> bytes:
    seen = b""
    while b"ready" not in seen:
        chunk = await out.receive_some()
        assert chunk, seen
        seen += chunk
    return seen


def below(pid: int) -> set[int]:
    """All descendants, as the host's /proc names them."""
    found = set(children(pid))
    return found.union(*(below(child) for child in found)) if found else found


async def test_it_runs_with_what_it_was_given(box: Box) -> None:
    async with resident(box) as there:
        code, out = await there.sh(
            'echo "$A $#"; pwd; exit 3',
            env=[PATH, "A=one"],
            cwd="/usr/bin",
        )
        assert (code, out) == (3, b"one 0\n/usr/bin\n")
        code, out = await there.run("env", env=[PATH])
        assert (code, out) == (0, PATH.encode() + b"\n")
        assert (await there.running.finish()).exit.code == 0


async def test_it_is_confined_as_the_first_program_is(box: Box) -> None:
    limits = Limits(
        memory=256 << 20, processes=20, open_files=100, file_size=1 << 20, cpu_seconds=9
    )
    async with resident(box, limits=limits) as there:
        first = children(there.process.pid)[0]
        sleeper = ("/bin/sh", "-c", "echo ready; sleep 60")
        async with there.open(*sleeper, limits=limits) as (one, out):
            await until_ready(out)
            supervisor = next(p for p in children(there.process.pid) if p != first)
            second = children(supervisor)[0]
            for field in CONFINED:
                assert status(second, field) == status(first, field), field
                assert status(supervisor, field) == status(first, field), field
            assert status(second, "NSpid")[-1] != "1"
            for kind in NAMESPACES:
                one_of = {os.readlink(f"/proc/{pid}/ns/{kind}") for pid in (first, second)}
                assert len(one_of) == 1, kind
                # The control: this process has another, so the comparison can fail.
                assert kind == "time" or os.readlink(f"/proc/self/ns/{kind}") not in one_of
            for path in ("cgroup", "limits", "mountinfo"):
                texts = [read(f"/proc/{pid}/{path}") for pid in (first, second)]
                assert texts[0] == texts[1], path
                # Without privileges there is no cgroup of its own.
                assert path == "cgroup" or texts[0] != read(f"/proc/self/{path}"), path
            await one.kill()
            assert (await one.wait()).signal == signal.SIGKILL


#: What the first program is refused, each with the word for it, and a control that works.
REFUSED = """
facts = dict(
    mount=call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    unshare=call("unshare", 0x10000000),
    bpf=call("syscall", 321, 0, 0, 0),
    abstract=attempt(socket.socket(socket.AF_UNIX).connect, ABSTRACT),
    write=attempt(open, "/usr/planted", "w"),
    inet=attempt(socket.create_connection, ("127.0.0.1", 9), 1),
    init=attempt(open, "/proc/1/environ"),
    ptrace=call("ptrace", 16, 1, 0, 0),
    chroot=attempt(os.chroot, "/tmp"),
    setuid=attempt(os.setuid, 0),
    own=attempt(open, "/tmp/own", "w"),
)
tell(**facts)
"""


async def test_it_is_refused_what_the_first_program_is_refused(box: Box) -> None:
    name = f"\0sandboxd-further-{os.getpid()}"
    code = REFUSED.replace("ABSTRACT", repr(name))
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(name)
        listener.listen()
        argv, more = box.python(code)
        first = await box.probe(code)
        async with resident(box, mounts=more["mounts"]) as there:
            exited, out = await there.run(*argv)
        second = json.loads(out)
        assert exited == 0
        assert first == second
        assert second.pop("own") == "ok"
        assert "ok" not in second.values(), second
        # The control: outside, where nothing forbids it, the listener is reached.
        with trio.socket.socket(trio.socket.AF_UNIX) as caller:
            await caller.connect(name)


async def test_no_descriptor_of_the_init_reaches_it(box: Box) -> None:
    async with resident(box) as there:
        _, out = await there.run("/bin/ls", "/proc/self/fd")
        assert out.split() == [b"0", b"1", b"2", b"3"]  # 3 is the directory that ls reads
        _, out = await there.sh("cd /proc; cat 1/environ $PPID/environ; ls $PPID/fd")
        assert out.count(b"Permission denied") == 3, out


async def test_what_can_not_be_run_is_told(box: Box) -> None:
    async with resident(box) as there:
        for argv, call, code in (
            (("absent-program",), "execve", errno.ENOENT),
            (("/usr/bin/absent",), "execve", errno.ENOENT),
            (("/etc/passwd",), "execve", errno.EACCES),
        ):
            with pytest.raises(KernelError) as refusal:
                await there.run(*argv)
            assert (refusal.value.syscall, refusal.value.errno) == (call, code)
        with pytest.raises(KernelError) as refusal:
            await there.run("/bin/true", cwd="/absent")
        assert (refusal.value.syscall, refusal.value.errno) == ("chdir", errno.ENOENT)
        assert (await there.run("true"))[0] == 0
        await there.settle(set(children(there.process.pid)[:1]))


async def test_a_sandbox_that_takes_none_says_so(box: Box) -> None:
    async with box.start("/bin/sh", "-c", "echo ready; read line", stdin=True) as running:
        await running.ready()
        there = Resident(box, running)
        with pytest.raises(Conflict, match="no further programs"):
            await there.run("/bin/true")


TREE = """
import os, signal, sys, time
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
there, write = os.pipe()
for depth in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.setsid()
        os.write(write, b'x')
        if depth == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)
for _ in range(3):
    os.read(there, 1)
print("ready", flush=True)
time.sleep(600)
"""


async def test_killing_it_ends_its_whole_tree_and_nothing_else(box: Box) -> None:
    argv, more = box.python(TREE)
    async with resident(box, mounts=more["mounts"]) as there:
        before = below(there.process.pid)
        async with there.open(*argv) as (one, out):
            await until_ready(out)
            with trio.fail_after(20):  # it, three, and the supervisor; those between are gone
                while len(below(there.process.pid) - before) != 5:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            await one.kill()
            assert (await one.wait()).signal == signal.SIGKILL
        await there.settle(before)
        assert (await there.sh("echo still here"))[1] == b"still here\n"
        assert (await there.running.finish()).exit.code == 0


async def test_leaving_ends_its_tree(box: Box) -> None:
    async with resident(box) as there:
        before = below(there.process.pid)
        with trio.move_on_after(600) as scope:
            script = "sleep 600 & echo ready; wait"
            async with there.open("/bin/sh", "-c", script) as (one, out):
                await until_ready(out)
                scope.cancel()
                await one.wait()
        assert scope.cancelled_caught
        await there.settle(before)


#: A chain whose links are each gone before anybody could look at them.
OUTRUN = """
import os, sys
print("ready", flush=True)
while True:
    if os.fork():
        os._exit(0)
    os.setsid()
"""


async def test_a_tree_that_outruns_its_killer_ends_too(box: Box) -> None:
    argv, more = box.python(OUTRUN)
    async with resident(box, mounts=more["mounts"]) as there:
        before = below(there.process.pid)
        script = f'exec {argv[0]} -I -S -c "$CODE" & echo started; sleep 600'
        env = [PATH, f"CODE={OUTRUN}"]
        async with there.open("/bin/sh", "-c", script, env=env) as (one, out):
            await until_ready(out)
            await one.kill()
            with trio.fail_after(20):
                await one.wait()
        await there.settle(before)
        assert (await there.running.finish()).exit.code == 0  # the first program goes on


async def test_what_runs_in_the_background_goes_on_and_ends_with_the_sandbox(box: Box) -> None:
    async with resident(box) as there:
        before = below(there.process.pid)
        code, _ = await there.sh("sleep 600 >/dev/null 2>&1 &")
        assert code == 0
        with trio.fail_after(10):
            while len(left := below(there.process.pid) - before) != 1:  # noqa: ASYNC110
                await trio.sleep(0.01)  # until its supervisor has gone
        assert (await there.running.finish()).exit.code == 0
    assert left.isdisjoint(psutil.pids())


async def test_it_ends_with_the_sandbox(box: Box) -> None:
    async with resident(box) as there:
        async with there.open("/bin/sh", "-c", "echo ready; sleep 600") as (
            one,
            out,
        ):
            await until_ready(out)
            await there.process.kill()
            assert (await one.wait()).signal == signal.SIGKILL
        with pytest.raises(Conflict, match="has ended"):
            await there.run("/bin/true")


async def test_signals_reach_the_program(box: Box) -> None:
    async with resident(box) as there:
        script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done"
        async with there.open("/bin/sh", "-c", script) as (one, out):
            await until_ready(out)
            await one.signal(signal.SIGTERM)
            assert (await one.wait()).code == 7


async def test_many_at_once_each_get_their_own(box: Box) -> None:
    async with resident(box) as there:
        got: dict[int, tuple[int | None, bytes]] = {}
        before = below(there.process.pid)

        async def one(number: int) -> None:
            got[number] = await there.sh(f"echo {number}; exit {number}")

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(one, number)
        assert got == {number: (number, b"%d\n" % number) for number in range(12)}
        await there.settle(before)


async def test_without_room_for_a_process_it_is_told(box: Box) -> None:
    """The first program has taken all that its cgroup allows."""
    if "pids" not in box.launcher.cgroup.controllers:
        pytest.skip("no cgroup limits processes here")
    code = """
import time
room = True
while room:
    try:
        room = os.fork()
    except BlockingIOError:
        break
    if not room:
        time.sleep(600)
print("ready", flush=True)
time.sleep(600)
"""
    argv, more = box.python(code)
    more |= {"further": True, "limits": Limits(processes=6)}
    async with box.start(*argv, **more) as running:
        await running.ready()
        with pytest.raises(KernelError) as refusal:
            await Resident(box, running).run("/bin/true")
        assert (refusal.value.syscall, refusal.value.errno) == ("fork", errno.EAGAIN)
