"""How programs start, end, are signalled and killed, and what is left afterwards: nothing."""

from __future__ import annotations

import errno
import os
import select
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from isolation_support import Box, children, status

from sandboxd.errors import Invalid, KernelError
from sandboxd.isolation.wire import FileSpec, Limits


async def test_the_exit_code_is_the_programs(box: Box) -> None:
    for code in (0, 1, 3, 126, 127, 255):
        exited = (await box.sh(f"exit {code}")).exit
        assert (exited.code, exited.signal) == (code, None)


async def test_the_signal_that_ended_the_program_is_told(box: Box) -> None:
    for name in ("KILL", "TERM", "SEGV", "PIPE", "USR1"):
        exited = (await box.sh(f"kill -{name} $$")).exit
        assert (exited.code, exited.signal) == (None, signal.Signals[f"SIG{name}"])


#: program, its content and mode if it is to be delivered, the errno, a part of the hint
UNRUNNABLE: tuple[tuple[str, tuple[bytes, int] | None, int, str], ...] = (
    ("/run/absent", None, errno.ENOENT, "is not in the sandbox"),
    ("/run/plain", (b"echo", 0o444), errno.EACCES, "is not executable"),
    ("/usr", None, errno.EACCES, "is not executable"),
    ("/run/noise", (b"\x7fnot a program", 0o555), errno.ENOEXEC, ""),
    ("/run/script", (b"#!/run/no-interpreter\n", 0o555), errno.ENOENT, "its interpreter"),
)


async def test_programs_that_can_not_be_run_are_told_apart(box: Box) -> None:
    for program, content, code, hint in UNRUNNABLE:
        files = () if content is None else (FileSpec(program, *content),)
        with pytest.raises(KernelError) as refusal:
            await box.run(program, "an-argument", env=["SECRET=canary"], files=files)
        assert (refusal.value.syscall, refusal.value.errno) == ("execve", code)
        assert refusal.value.path == program
        assert hint in refusal.value.hint
        told = str(refusal.value) + refusal.value.hint + repr(refusal.value)
        assert "canary" not in told
        assert "an-argument" not in told


async def test_a_directory_that_is_not_there_is_named(box: Box) -> None:
    with pytest.raises(KernelError) as refusal:
        await box.run("/bin/true", cwd="/absent")
    failure = refusal.value
    assert (failure.syscall, failure.errno, failure.path) == ("chdir", errno.ENOENT, "/absent")
    assert (await box.sh("pwd", cwd="/usr/bin")).out == b"/usr/bin\n"


async def test_an_environment_that_is_too_large_is_told(box: Box) -> None:
    with pytest.raises(KernelError) as refusal:
        await box.run("/bin/true", env=["BIG=" + "x" * (128 << 10)])  # MAX_ARG_STRLEN
    assert (refusal.value.syscall, refusal.value.errno) == ("execve", errno.E2BIG)
    assert "larger than the kernel takes" in refusal.value.hint
    with pytest.raises(KernelError) as refusal:
        await box.run("/bin/true", env=[f"BIG{n}=" + "x" * (100 << 10) for n in range(170)])
    assert (refusal.value.syscall, refusal.value.errno) == ("execve", errno.E2BIG)
    fits = await box.sh('echo "${#BIG}"', env=["BIG=" + "x" * (127 << 10)])
    assert fits.out == b"%d\n" % (127 << 10)


async def test_signals_reach_the_program(box: Box) -> None:
    names = ("TERM", "HUP", "INT", "USR1", "ALRM", "WINCH")
    script = "".join(f"trap 'echo {name}' {name}; " for name in names)
    script += "trap 'exit 7' QUIT; echo ready; while :; do sleep 0.01; done"
    async with box.start("/bin/sh", "-c", script, env=["PATH=/bin"]) as running:
        await running.ready()
        for name in names:
            await running.process.signal(signal.Signals[f"SIG{name}"])
            await running.ready(name.encode() + b"\n")
        await running.process.signal(signal.SIGQUIT)
        assert (await running.end()).exit.code == 7


async def test_default_actions_of_signals_are_in_force(box: Box) -> None:
    """The program is no pid 1, for which the kernel would drop them, and inherits no ignoring."""
    async with box.start("/bin/sh", "-c", "echo ready; exec sleep 60") as running:
        await running.ready()
        await running.process.signal(signal.SIGTERM)
        assert (await running.end()).exit.signal == signal.SIGTERM
    seen = await box.probe("tell(ignored=status('SigIgn'), blocked=status('SigBlk'))")
    python = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1  # what Python itself ignores
    internal = 1 << 32 - 1 | 1 << 33 - 1  # the C library's own (nptl(7))
    assert int(seen["ignored"][0], 16) & ~internal == python
    assert int(seen["blocked"][0], 16) == 0


async def test_what_is_no_signal_for_a_program_is_refused(box: Box) -> None:
    async with box.start("/bin/sleep", "60") as running:
        for signum in (0, -1, 9999, signal.SIGSTOP):
            with pytest.raises(Invalid):
                await running.process.signal(signum)
        await running.process.signal(signal.SIGTERM)
        assert (await running.end()).exit.signal == signal.SIGTERM


async def test_a_signal_after_the_end_is_no_error(box: Box) -> None:
    async with box.start("/bin/true") as running:
        await running.end()
        await running.process.signal(signal.SIGTERM)
        await running.process.kill()
        assert (await running.process.wait()).code == 0


#: Ways in which processes hang on; each prints "ready" when its processes are there.
STUBBORN = {
    "a plain tree": "/bin/sleep 60 & /bin/sleep 60 & echo ready; wait",
    "setsid": "setsid /bin/sleep 60 & setsid -f /bin/sleep 60; echo ready; wait",
    "double fork": "(/bin/sleep 60 & /bin/sleep 60 &) ; echo ready; /bin/sleep 60",
    "ignores signals": "trap '' TERM HUP INT QUIT; (trap '' TERM; sleep 60) & echo ready; wait",
    "stopped": "/bin/sleep 60 & kill -STOP $!; echo ready; kill -STOP $$",
    "many": "for i in 1 2 3 4 5 6 7 8 9; do /bin/sleep 60 & done; echo ready; wait",
}


async def test_kill_leaves_no_process_and_no_open_pipe(box: Box) -> None:
    for script in STUBBORN.values():
        await kill(box, script)


async def kill(box: Box, script: str) -> None:
    path = ["PATH=/usr/bin:/bin"]
    async with box.start("/bin/sh", "-c", script, env=path) as running:
        await running.ready()
        tree = Tree(running.process.pid)
        assert len(tree.pids) >= 3  # the init, the shell and at least one more
        assert tree.alive() == tree.pids
        await running.process.kill()
        exited = await running.process.wait()
        assert tree.alive() == []
        assert (exited.code, exited.signal) == (None, signal.SIGKILL)
        with trio.fail_after(1):
            result = await running.end()
        assert (result.out, result.err) == (b"", b"")
        tree.close()


async def test_a_program_that_ends_takes_its_tree_along(box: Box) -> None:
    for way in ("a plain tree", "setsid", "double fork", "many"):
        await end(box, STUBBORN[way].rpartition("echo ready")[0] + "echo ready; read line; exit 5")


async def end(box: Box, script: str) -> None:
    null, stdin = os.pipe2(os.O_CLOEXEC)
    out, out_end = os.pipe2(os.O_CLOEXEC)
    spec = box.spec(("/bin/sh", "-c", script), env=["PATH=/usr/bin:/bin"])
    process = await box.launcher.launch(spec, stdin=null, stdout=out_end, stderr=out_end)
    os.close(out_end)
    os.close(null)
    async with trio.lowlevel.FdStream(out) as output:
        assert await output.receive_some() == b"ready\n"
        tree = Tree(process.pid)
        assert len(tree.pids) >= 3
        os.write(stdin, b"go\n")
        exited = await process.wait()
        # A template's init stays for the next launch, alone.
        assert tree.alive() == ([process.pid] if box.template else [])
        assert exited.code == 5
        with trio.fail_after(1):
            assert await output.receive_some() == b""
    tree.close()
    os.close(stdin)


async def test_the_init_can_not_be_killed_or_stopped_from_inside(box: Box) -> None:
    script = "kill -KILL 1; kill -STOP 1; kill -TERM 1; while :; do sleep 0.01; done"
    exited = (await box.sh(f"trap 'exit 4' TERM; {script}")).exit
    assert exited.code == 4  # the last one came back: the init passes signals on


async def test_a_storm_of_orphans_leaves_no_zombie(box: Box) -> None:
    probe = """
for _ in range(50):
    if os.fork() == 0:
        os.fork()
        os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
def is_zombie(pid):
    try:
        return status("State", pid)[0] == "Z"
    except OSError:  # it has gone
        return False
def zombies():
    return [n for n in os.listdir("/proc") if n.isdigit() and is_zombie(n)]
import time
deadline = time.monotonic() + 5
while zombies() and time.monotonic() < deadline:
    time.sleep(0.01)
tell(zombies=zombies())"""
    assert await box.probe(probe, limits=Limits(processes=200)) == {"zombies": []}


async def test_a_terminal_becomes_the_programs_own(box: Box) -> None:
    probe = """
tell(tty=os.isatty(0), own=attempt(os.open, "/dev/tty", os.O_RDWR), leader=os.getsid(0) ==
     os.getpid(), foreground=os.tcgetpgrp(0) == os.getpgrp() if os.isatty(0) else None)"""
    without = await box.probe(probe)
    assert without == {"tty": False, "own": "ENXIO", "leader": True, "foreground": None}
    master, slave = os.openpty()
    argv, more = box.python(probe.replace("tell(", "sys.stdout = sys.stderr; tell("), tty=True)
    errors, errors_end = os.pipe2(os.O_CLOEXEC)
    spec = box.spec(argv, **more)
    process = await box.launcher.launch(spec, stdin=slave, stdout=slave, stderr=errors_end)
    for fd in (slave, errors_end):
        os.close(fd)
    async with trio.lowlevel.FdStream(errors) as stream:
        told = b"".join([chunk async for chunk in stream])
    assert (await process.wait()).code == 0, told
    assert told == b'{"tty": true, "own": "ok", "leader": true, "foreground": true}'
    os.close(master)


async def test_a_launch_that_is_cancelled_leaves_nothing(box: Box) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    launch = partial(box.launcher.launch, stdin=null, stdout=null, stderr=null)
    os.kill(box.launcher.pid, signal.SIGSTOP)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as launches:
                for _ in range(4):
                    launches.start_soon(launch, box.spec(("/bin/sleep", "60")))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                nursery.start_soon(resume, box.launcher.pid)
    assert scope.cancelled_caught
    assert children(box.launcher.pid) == []
    # Nor does one appear later: the launcher has read everything before it answers this.
    assert (await box.run("/bin/true")).exit.code == 0
    await box.settle()
    assert children(box.launcher.pid) == []
    os.close(null)


async def resume(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)


class Tree:
    """Every process of a sandbox, held by pidfd from outside."""

    def __init__(self, init: int) -> None:
        # Whoever loses its parent becomes the init's child: the tree by parents is complete.
        self.pids = [init]
        for pid in self.pids:
            for entry in Path("/proc").iterdir():
                with suppress(OSError, StopIteration):
                    if entry.name.isdigit() and status(int(entry.name), "PPid") == [str(pid)]:
                        self.pids.append(int(entry.name))
        self._pidfds = {pid: os.pidfd_open(pid) for pid in self.pids}

    def alive(self) -> list[int]:
        poll = select.poll()
        for pidfd in self._pidfds.values():
            poll.register(pidfd, select.POLLIN)
        ended = {pidfd for pidfd, _ in poll.poll(0)}
        return [pid for pid, pidfd in self._pidfds.items() if pidfd not in ended]

    def close(self) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)
