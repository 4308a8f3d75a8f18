"""The launcher process: what it survives, what it never keeps, and what is left after it."""

from __future__ import annotations

import array
import errno
import os
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from isolation_support import Box, changed_launcher, children, needs_root, read, status

from sandboxd.errors import Invalid, KernelError, SandboxdError, Unavailable
from sandboxd.isolation.client import Launcher, open_launcher
from sandboxd.isolation.launcher import fork_launcher
from sandboxd.isolation.wire import (
    FRAME,
    FileSpec,
    Frame,
    Kind,
    LaunchSpec,
    encode_spec,
    sealed_memfd,
)

Outside = Callable[..., dict[str, Any]]
StartLauncher = Callable[[str], socket.socket]


# ---- its life and end


async def test_its_death_ends_every_sandbox_and_every_wait(box: Box) -> None:
    async with box.start("/bin/sleep", "60") as one, box.start("/bin/sleep", "60") as two:
        inits = [os.pidfd_open(running.process.pid) for running in (one, two)]
        assert not any(ended(init) for init in inits)
        os.kill(box.launcher.pid, signal.SIGKILL)
        for running in (one, two):
            with trio.fail_after(10), pytest.raises(Unavailable, match="launcher is gone"):
                await running.process.wait()
        assert all(ended(init) for init in inits)
        for init in inits:
            os.close(init)
        with pytest.raises(Unavailable, match="launcher is gone") as refusal:
            await box.run("/bin/true")
        assert "restart" in refusal.value.hint


async def test_its_death_fails_the_launches_on_their_way(box: Box) -> None:
    failures: list[SandboxdError] = []

    async def launch() -> None:
        try:
            await box.run("/bin/true")
        except SandboxdError as failure:
            failures.append(failure)

    os.kill(box.launcher.pid, signal.SIGSTOP)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(40):  # more than may be on their way at once
                nursery.start_soon(launch)
            await trio.testing.wait_all_tasks_blocked()
            assert failures == []
            os.kill(box.launcher.pid, signal.SIGKILL)
    assert [type(failure) for failure in failures] == [Unavailable] * 40


async def test_it_ends_with_the_brokers_end_of_the_socket(
    launcher_mode: str, start_launcher: StartLauncher, template: str
) -> None:
    async with open_launcher(start_launcher(launcher_mode)) as launcher:
        assert (await Box(launcher, template).run("/bin/true")).exit.code == 0
        async with Box(launcher, template).start("/bin/sleep", "60") as running:
            pidfds = [os.pidfd_open(pid) for pid in (launcher.pid, running.process.pid)]
            assert not any(ended(pidfd) for pidfd in pidfds)
            launcher._sock.shutdown(socket.SHUT_RDWR)
            with trio.fail_after(10), pytest.raises(Unavailable):
                await running.process.wait()
            assert all(ended(pidfd) for pidfd in pidfds)
    for pidfd in pidfds:
        os.close(pidfd)


async def test_leaving_waits_until_nothing_is_left(
    launcher_mode: str, start_launcher: StartLauncher, template: str
) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    async with open_launcher(start_launcher(launcher_mode)) as launcher:
        spec = Box(launcher, template).spec(("/bin/sleep", "60"))
        process = await launcher.launch(spec, stdin=null, stdout=null, stderr=null)
        pidfds = [os.pidfd_open(pid) for pid in (launcher.pid, process.pid)]
    assert all(ended(pidfd) for pidfd in pidfds)
    for fd in (null, *pidfds):
        os.close(fd)


def test_it_ends_when_the_broker_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from sandboxd.isolation.launcher import fork_launcher
from sandboxd.isolation.wire import *
import array, socket
sock = fork_launcher()
_, ancillary, _, _ = sock.recvmsg(300, 64)
null = os.open("/dev/null", os.O_RDWR)
spec = LaunchSpec("x", (b"/bin/sleep", b"60"), (), {os.geteuid() or 1_900_000_001})
fds = [sealed_memfd(encode_spec(spec)), null, null, null]
sock.sendmsg([Frame(Kind.LAUNCH, 1, 4).pack()], [(1, 1, array.array("i", fds))])
_, ancillary, _, _ = sock.recvmsg(300, 64)
for line in open(f"/proc/self/fdinfo/{{array.array('i', ancillary[0][2])[0]}}"):
    if line.startswith("Pid:"):
        print(line.split()[1], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as broker:
        assert broker.stdout is not None
        init = os.pidfd_open(int(broker.stdout.readline()))
        assert not ended(init)
        broker.kill()
        assert ended(init, within=10)
    os.close(init)


async def test_it_can_not_be_stopped_by_polite_signals(box: Box) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(box.launcher.pid, signum)
    assert (await box.run("/bin/true")).exit.code == 0


def test_a_python_that_can_not_be_run_again_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr(sys, "executable", "/absent/python")
    with pytest.raises(Unavailable) as refusal:
        fork_launcher()
    assert "/absent/python" in refusal.value.hint
    assert descriptors() == before


async def test_a_launcher_that_never_got_its_namespaces_says_which_call() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(Frame(Kind.FAILED, 0, 1, text="unshare\tuser").pack())
    theirs.close()
    with pytest.raises(KernelError) as refusal:
        async with open_launcher(ours):
            pytest.fail("there is no launcher")
    assert (refusal.value.syscall, refusal.value.errno) == ("unshare", 1)
    assert "doctor" in refusal.value.hint


#: Be an ordinary user that other tests aren't, and use up the quota of keys (keyrings(7)): a full
#: last key is what leaves no room for the five bytes of one more keyring.
_WITHOUT_QUOTA = """
import ctypes, os
uid = 1_890_000_000 + os.getpid()
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
kernel.join_new_keyring()
libc = ctypes.CDLL(None, use_errno=True)
add = {"x86_64": 248}.get(os.uname().machine, 217)
def key(name, size):
    ring = ctypes.c_int(-3)  # KEY_SPEC_SESSION_KEYRING
    if libc.syscall(add, b"user", name, bytes(size), ctypes.c_size_t(size), ring) >= 0:
        return True
    assert ctypes.get_errno() == 122, ctypes.get_errno()  # EDQUOT
    return False
if FILL:
    number, size = 0, 1
    assert key(b"pad", size)
    while key(b"%d" % number, 16000):
        number += 1
    for step in (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
        while key(b"pad", size + step):
            size += step
"""


@needs_root
async def test_no_room_for_a_session_keyring_is_told_with_its_setting() -> None:
    async with changed_launcher(_WITHOUT_QUOTA.replace("FILL", "False")) as box:
        assert (await box.sh("exit 7")).exit.code == 7
    async with changed_launcher(_WITHOUT_QUOTA.replace("FILL", "True")) as box:
        with pytest.raises(KernelError) as refusal:
            await box.sh("exit 7")
    assert (refusal.value.syscall, refusal.value.errno) == ("keyctl", errno.EDQUOT)
    assert "sysctl -w kernel.keys.maxkeys=5000" in refusal.value.hint


# ---- what it holds


def test_it_imports_the_standard_library_alone() -> None:
    code = """
import sys
sys.path.append(sys.argv[1])
import sandboxd.isolation.launcher
print(*sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, root], capture_output=True, text=True, check=True
    )
    modules = set(done.stdout.split())
    foreign = {m for m in modules if m.partition(".")[0] not in sys.stdlib_module_names}
    ours = {f"sandboxd.isolation.{part}" for part in _PRIVILEGED}
    assert foreign - {"__main__"} == {
        "sandboxd", "sandboxd.errors", "sandboxd.isolation", "sandboxd.isolation.wire", *ours
    }  # fmt: skip
    assert not modules & {"asyncio", "http", "ssl", "subprocess", "threading", "sqlite3", "json"}


_PRIVILEGED = (
    "cgroup", "cgroup_places", "cgroup_state", "clocks", "further", "kernel", "landlock",
    "lasting", "launcher", "listeners", "meter", "overlay", "packing", "program", "root",
    "sandbox", "seccomp", "spawn", "template",
)  # fmt: skip


async def test_it_shows_no_host_path_and_has_no_environment(box: Box) -> None:
    assert read(f"/proc/{box.launcher.pid}/cmdline").rstrip("\0") == "sandboxd-launcher"
    if box.launcher.privileged or os.geteuid() == 0:
        assert read(f"/proc/{box.launcher.pid}/environ") == ""
        assert os.readlink(f"/proc/{box.launcher.pid}/cwd") == "/"


async def test_it_can_not_be_read_or_dumped(box: Box, outside: Outside) -> None:
    limits = read(f"/proc/{box.launcher.pid}/limits").splitlines()
    core = next(line for line in limits if line.startswith("Max core"))
    assert core.split()[4:6] == ["0", "0"]
    async with box.start("/bin/sleep", "60") as running:
        for pid in (box.launcher.pid, running.process.pid):
            probe = f"""tell(**{{name: attempt(open, "/proc/{pid}/" + name, "rb")
                for name in ("mem", "environ", "maps")}},
                fd=attempt(os.listdir, "/proc/{pid}/fd"), trace=call("ptrace", 0x4206, {pid}, 0, 0),
                own=attempt(open, "/proc/self/mem", "rb"))"""
            seen = outside(probe, user=box.user)  # in mode user: the launcher's own uid
            assert seen == {
                "mem": "EACCES", "environ": "EACCES", "maps": "EACCES", "fd": "EACCES",
                "trace": "EPERM", "own": "ok",
            }  # fmt: skip


@needs_root
async def test_its_memory_keeps_no_secret_of_a_launch(box: Box) -> None:
    secret = secrets.token_hex(16)
    async with box.start(
        "/bin/sh",
        "-c",
        "echo ready; read line",
        stdin=True,
        env=[f"SECRET={secret}"],
        files=(FileSpec("/run/secrets/S", secret.encode() * 9),),
    ) as tool:
        await tool.ready()
        program = children(tool.process.pid)[0]
        assert in_memory(program, secret.encode())  # the search finds what is there
        for pid in (tool.process.pid, box.launcher.pid):
            assert not in_memory(pid, secret.encode())
        async with box.start("/bin/sh", "-c", "echo ready; exec sleep 60") as later:
            await later.ready()
            for pid in (later.process.pid, children(later.process.pid)[0], box.launcher.pid):
                assert not in_memory(pid, secret.encode())
    assert not in_memory(box.launcher.pid, secret.encode())


@pytest.mark.soak
async def test_hundreds_of_launches_leave_nothing_behind(box: Box) -> None:
    async def launch(argv: tuple[str, ...] = ("/bin/true",)) -> None:
        assert (await box.run(*argv)).exit.code == 0

    async def fail() -> None:
        with pytest.raises(KernelError):
            await box.run("/absent")

    await launch()
    await fail()
    await box.settle()
    before = Holdings(box.launcher.pid)
    for _ in range(190):
        await launch()
    for _ in range(10):
        await fail()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(launch, ("/bin/sleep", "0.1"))
    await box.settle()
    assert Holdings(box.launcher.pid) == before


@needs_root
async def test_a_full_table_of_descriptors_fails_that_launch_only() -> None:
    async with open_launcher(fork_launcher()) as launcher:
        await fill_descriptors(Box(launcher))


async def fill_descriptors(box: Box) -> None:
    async with box.start("/bin/sleep", "60") as alive:
        held = len(os.listdir(f"/proc/{box.launcher.pid}/fd"))
        for room in range(1, 9):  # each step of a launch is the one that fails, in turn
            resource.prlimit(box.launcher.pid, resource.RLIMIT_NOFILE, (held + 2 + room, 4096))
            with pytest.raises(KernelError) as refusal:
                await box.run("/bin/true")
            assert refusal.value.errno in (24, 22)  # EMFILE; EINVAL from fcntl(F_DUPFD)
        resource.prlimit(box.launcher.pid, resource.RLIMIT_NOFILE, (4096, 4096))
        assert (await box.run("/bin/true")).exit.code == 0
        assert not alive.process._ended.is_set()
        assert len(os.listdir(f"/proc/{box.launcher.pid}/fd")) == held


# ---- what it is told


class Raw:
    """A bare connection to a launcher, for frames that the client never sends."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(10)
        self.null = os.open("/dev/null", os.O_RDWR)
        assert self.receive().kind is Kind.READY

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], ancillary)

    def receive(self) -> Frame:
        data, ancillary, _, _ = self.sock.recvmsg(FRAME.size, socket.CMSG_SPACE(16))
        for _, _, payload in ancillary:
            for fd in array.array("i", payload):
                os.close(fd)
        return Frame.unpack(data)

    def launch(self, number: int, spec: bytes, count: int | None = None, fds: int = 3) -> None:
        memfd = sealed_memfd(spec)
        passed = (memfd, *[self.null] * fds)
        self.send(
            Frame(Kind.LAUNCH, number, len(passed) if count is None else count).pack(), passed
        )
        os.close(memfd)

    def close(self) -> None:
        self.sock.close()
        os.close(self.null)


@pytest.fixture
def raw(launcher_mode: str, start_launcher: StartLauncher) -> Iterator[Raw]:
    connection = Raw(start_launcher(launcher_mode))
    yield connection
    connection.close()


def spec(uid: int = 1_900_000_050, *argv: bytes) -> bytes:
    return encode_spec(LaunchSpec("x", argv or (b"/bin/true",), (), uid))


def test_malformed_frames_do_not_end_it(raw: Raw) -> None:
    good = Frame(Kind.KILL, 1).pack()
    for noise in (b"", b"\0", good[:-1], good + b"\0" * 100, os.urandom(FRAME.size), b"x" * 65536):
        raw.send(noise)
        raw.send(noise, (raw.null,) * 5)
    for kind in Kind:
        raw.send(good[:4] + bytes([kind]) + good[5:], (raw.null,))
        if kind is Kind.LAUNCH:
            assert raw.receive().kind is Kind.FAILED
    raw.send(good[:4] + b"\xff" + good[5:])
    for signum in (-1, 0, 9999, 2**63 - 1, -(2**63)):
        raw.send(Frame(Kind.SIGNAL, 1, signum).pack())
    raw.launch(5, spec())
    assert [raw.receive().kind, raw.receive().kind] == [Kind.STARTED, Kind.EXITED]


def test_a_frame_with_something_after_it_is_no_frame(raw: Raw) -> None:
    raw.launch(1, spec(1_900_000_052, b"/bin/sleep", b"60"))
    assert raw.receive().kind is Kind.STARTED
    raw.send(Frame(Kind.KILL, 1).pack() + b"\0")
    raw.send(Frame(Kind.SIGNAL, 1, signal.SIGTERM).pack())
    assert raw.receive().a == signal.SIGTERM


def test_a_launch_with_the_wrong_descriptors_is_refused(raw: Raw) -> None:
    for count, fds in ((3, 3), (5, 3), (2**40, 3), (-1, 3), (3, 2), (1, 0)):
        raw.launch(7, spec(), count, fds)
        frame = raw.receive()
        assert (frame.kind, frame.number, frame.text) == (
            Kind.FAILED, 7, "recvmsg\tlaunch frame"
        )  # fmt: skip
    raw.launch(7, spec())
    assert raw.receive().kind is Kind.STARTED


def test_a_launch_under_a_number_in_use_is_ignored(raw: Raw) -> None:
    raw.launch(9, spec(1_900_000_051, b"/bin/sleep", b"60"))
    assert raw.receive().kind is Kind.STARTED
    raw.launch(9, spec())
    raw.launch(0, spec())
    raw.send(Frame(Kind.SIGNAL, 9, 2**40).pack())
    raw.send(Frame(Kind.SIGNAL, 9, signal.SIGTERM).pack())
    ended = raw.receive()
    assert (ended.kind, ended.number, ended.a) == (Kind.EXITED, 9, signal.SIGTERM)
    raw.launch(9, spec())
    assert [raw.receive().kind, raw.receive().kind] == [Kind.STARTED, Kind.EXITED]


def test_a_spec_that_can_not_be_read_fails_that_launch_only(raw: Raw) -> None:
    whole = spec()
    for damaged in (b"", whole[:-1], whole + b"x", os.urandom(300), b"\xff" * 64):
        raw.launch(3, damaged)
        frame = raw.receive()
        assert (frame.kind, frame.number) == (Kind.FAILED, 3)
        assert frame.text.startswith("setup\tValueError")
    raw.send(Frame(Kind.LAUNCH, 4, 4).pack(), (raw.null,) * 4)  # no memfd at all
    assert raw.receive().kind is Kind.FAILED
    raw.launch(3, whole)
    assert [raw.receive().kind, raw.receive().kind] == [Kind.STARTED, Kind.EXITED]


async def test_the_client_refuses_what_nobody_can_mean(launcher: Launcher, template: str) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    box = Box(launcher, template)
    for wrong in (
        box.spec(("true",)),
        box.spec(("/bin/true",), extra_fds=(5,)),
        box.spec(("/bin/true",), uid=0 if launcher.privileged else -1),
    ):
        with pytest.raises(Invalid):
            await launcher.launch(wrong, stdin=null, stdout=null, stderr=null)
    with pytest.raises(KernelError) as refusal:
        await launcher.launch(box.spec(("/bin/true",)), stdin=1 << 20, stdout=null, stderr=null)
    assert (refusal.value.syscall, refusal.value.errno) == ("sendmsg", 9)
    assert (await box.run("/bin/true")).exit.code == 0
    os.close(null)


# ---- helpers


class Holdings:
    """What a launcher, and this process, hold: descriptors, children, mounts."""

    def __init__(self, pid: int) -> None:
        self.ours = len(descriptors())
        self.children = children(pid)
        self.mounts = read("/proc/self/mountinfo")
        self.theirs: list[str] = []
        self.memory = int(status(pid, "VmRSS")[0]) // 1024
        if os.geteuid() == 0:
            folder = f"/proc/{pid}/fd"
            self.theirs = sorted(
                os.readlink(f"{folder}/{n}").split(":")[0] for n in os.listdir(folder)
            )
            self.mounts += read(f"/proc/{pid}/mountinfo")

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Holdings)
        memory = abs(self.memory - other.memory)
        return memory <= 2 and all(
            getattr(self, name) == getattr(other, name)
            for name in ("ours", "children", "mounts", "theirs")
        )

    def __repr__(self) -> str:
        return f"{self.ours} {self.children} {self.memory} MiB {self.theirs} {self.mounts}"


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


def ended(pidfd: int, *, within: float = 0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(within * 1000))


def in_memory(pid: int, needle: bytes) -> bool:
    """Whether ``needle`` is anywhere in a process's readable memory."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, access, *_ = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if access.startswith("r") and "[v" not in line:
                memory.seek(start)
                if needle in memory.read(end - start):
                    return True
    return False
