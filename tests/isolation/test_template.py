"""Sandboxes that are kept ready: a call leaves nothing for the next, and what ends when."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from isolation_support import Box, changed_launcher, children, needs_root, read, status

from sandboxd.errors import KernelError
from sandboxd.isolation import client, pool
from sandboxd.isolation.client import Launcher
from sandboxd.isolation.reuse import template_key, template_suits
from sandboxd.isolation.wire import FileSpec, LaunchSpec, Limits, MountSpec, lasting_part

KINDS = ("mnt", "ipc", "pid", "uts", "cgroup", "net", "user")
NAMESPACES = f"tell(**{{ns: os.readlink('/proc/self/ns/' + ns) for ns in {KINDS}}})"


@pytest.fixture
def ready(launcher: Launcher) -> Box:
    return Box(launcher, "session")


async def pid_of(box: Box, *argv: str, **more: Any) -> int:
    """Run a program to its end. The pid of the sandbox's init."""
    async with box.start(*(argv or ("/bin/true",)), **more) as running:
        await running.end()
        return running.process.pid


# ---- one call after another


async def test_the_next_call_finds_the_sandbox_ready(ready: Box) -> None:
    first = await pid_of(ready)
    assert await pid_of(ready) == first
    assert status(first, "Uid") == [str(ready._free[-1])] * 4
    assert children(ready.launcher.pid) == [first]


async def test_two_calls_at_once_never_share_one(ready: Box) -> None:
    async with ready.start("/bin/sleep", "60") as one, ready.start("/bin/sleep", "60") as two:
        assert one.process.pid != two.process.pid
        assert sorted(children(ready.launcher.pid)) == sorted((one.process.pid, two.process.pid))


async def test_calls_of_one_template_have_its_namespaces_in_turn(ready: Box) -> None:
    one, two = [await ready.probe(NAMESPACES) for _ in range(2)]
    assert one == two
    ready._free.clear()
    other = await ready.probe(NAMESPACES, hostname="other")
    assert not set(one.values()) & set(other.values())


async def test_a_template_has_no_more_privileges_than_its_programs(ready: Box) -> None:
    walls = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Groups",
             "Seccomp_filters", "Uid", "Gid", "Threads")  # fmt: skip
    async with ready.start("/bin/sleep", "60") as running:
        template, program = running.process.pid, children(running.process.pid)[0]
        own = {wall: status(template, wall) for wall in walls}
        assert own == {wall: status(program, wall) for wall in walls}
        assert own["CapPrm"] == own["CapBnd"] == ["0" * 16]
        assert own["NoNewPrivs"] == ["1"]
        assert own["Seccomp"] == (["2"] if ready.launcher.seccomp else ["0"])
        for kind in KINDS if os.geteuid() == 0 else ():
            spaces = [os.readlink(f"/proc/{pid}/ns/{kind}") for pid in (template, program)]
            assert spaces[0] == spaces[1]


async def test_nothing_that_a_call_left_is_there_for_the_next(ready: Box) -> None:
    leave = """
libc.shmget(77, 4096, 0o1666), libc.msgget(77, 0o1666), libc.semget(77, 1, 0o1666)
ring = {"x86_64": (248, 249)}.get(os.uname().machine, (217, 218))
keys = [libc.syscall(ring[0], b"user", b"left", b"secret", 6, where) for where in (-3, -4, -5)]
for place in ("/tmp", "/home/agent", "/dev/shm"):
    open(place + "/left", "w").write("secret")
    os.mkfifo(place + "/fifo")
    os.symlink("/etc/passwd", place + "/link")
    os.makedirs(place + "/a/b/c")
    open(place + "/a/b/file", "w").write("secret")
    os.link(place + "/a/b/file", place + "/a/again")
    os.chmod(place + "/a/b", 0)
    os.utime(place, (77, 77))
held = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
os.write(held, b"secret" * 9999)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        server = socket.socket(socket.AF_UNIX); server.bind("\\0left"); server.listen()
        os.close(1)
        signal.pause()
    os._exit(0)
os.wait()
tell(made=[libc.shmget(77, 0, 0) >= 0, sorted(os.listdir("/tmp"))])"""
    look = """
places = ("/tmp", "/home/agent", "/dev/shm")
def connect():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("\\0left")
ring = {"x86_64": (248, 249)}.get(os.uname().machine, (217, 218))
tell(shm=call("shmget", 77, 0, 0), msg=call("msgget", 77, 0), sem=call("semget", 77, 0, 0),
     key=call("syscall", ring[1], b"user", b"left", None, 0), abstract=attempt(connect),
     times=[os.stat(p).st_mtime for p in places],
     files={p: os.listdir(p) for p in places}, room=[os.statvfs(p).f_bfree for p in places],
     pids=[n for n in os.listdir("/proc") if n.isdigit() and int(n) not in (1, os.getpid())])"""
    fresh = await ready.probe(look)
    left = await ready.probe(leave)
    assert left["made"] == [True, ["a", "fifo", "left", "link"]]
    first = children(ready.launcher.pid)
    seen = await ready.probe(look)
    assert children(ready.launcher.pid) == first  # and it was the same template
    assert seen == fresh
    assert seen.pop("key") in ("ENOKEY", "EPERM")
    assert seen.pop("room") == [(64 << 20) // 4096] * 3
    assert seen == {
        "shm": "ENOENT", "msg": "ENOENT", "sem": "ENOENT", "abstract": "ECONNREFUSED",
        "times": [0.0] * 3,
        "files": {"/tmp": [], "/home/agent": [], "/dev/shm": []}, "pids": [],
    }  # fmt: skip


async def test_message_queues_do_not_outlive_their_call_either() -> None:
    # Landlock would keep programs from having any.
    async with changed_launcher("landlock.best_abi = lambda: 0") as ready:
        ready.template = "session"
        for _ in range(2):
            seen = await ready.probe(
                """tell(old=call("mq_open", b"/left", os.O_RDWR),
                made=call("mq_open", b"/left", os.O_CREAT | os.O_RDWR, 0o600, None))"""
            )
            assert seen == {"old": "ENOENT", "made": "ok"}
        assert len(children(ready.launcher.pid)) == 1


@pytest.mark.parametrize(
    "change",
    [
        "os.chmod('/tmp', 0o700)",
        "os.chmod('/home/agent', 0)",
        "os.chmod('/dev/shm', 0o777)",
        "[open(f'/tmp/{n}', 'w').close() for n in range(5000)]",
        "deep('/tmp', 40)",
    ],
)
async def test_what_can_not_be_cleared_away_ends_the_template(ready: Box, change: str) -> None:
    look = """
places = ("/tmp", "/home/agent", "/dev/shm")
tell(modes=[os.stat(p).st_mode for p in places], files=[os.listdir(p) for p in places])"""
    fresh = await ready.probe(look)
    old = children(ready.launcher.pid)
    await ready.probe(f"""
def deep(path, levels):
    for _ in range(levels):
        path += "/d"
        os.mkdir(path)
{change}
tell()""")
    assert await ready.probe(look) == fresh
    assert not set(old) & set(children(ready.launcher.pid))


async def test_a_delivered_file_is_the_programs_to_read_alone(ready: Box) -> None:
    files = (FileSpec("/run/secrets/TOKEN", b"secret"),)
    for _ in range(2):
        seen = await ready.probe(
            """
path = "/run/secrets/TOKEN"
tell(read=open(path).read(), mode=oct(os.stat(path).st_mode), owner=os.stat(path).st_uid,
     write=attempt(open, path, "w"), mode_change=attempt(os.chmod, path, 0o777),
     unlink=attempt(os.unlink, path), rename=attempt(os.rename, path, "/run/x"),
     new=attempt(open, "/run/new", "w"), times=attempt(os.utime, path),
     mark=attempt(os.setxattr, path, "user.x", b""))""",
            files=files,
        )
        denied = {seen[what] for what in ("mode_change", "times", "mark")}
        assert denied == {"EROFS"}
        # Landlock is asked before the mount is.
        walled = "EACCES" if ready.launcher.landlock else "EROFS"
        assert {seen[what] for what in ("unlink", "rename", "new")} <= {walled, "EROFS"}
        assert seen["write"] in ("EACCES", "EROFS")
        assert (seen["read"], seen["mode"], seen["owner"]) == ("secret", "0o100400", 1000)
    assert len(children(ready.launcher.pid)) == 1


@pytest.mark.parametrize(
    "change",
    [
        "resource.prlimit(1, resource.RLIMIT_NOFILE, (99, 99))",
        "resource.prlimit(1, resource.RLIMIT_FSIZE, (0, 0))",
        "os.setpriority(os.PRIO_PROCESS, 1, 7)",
        "os.sched_setscheduler(1, os.SCHED_BATCH, os.sched_param(0))",
        "ioprio_set(3 << 13)",
        "os.sched_setaffinity(1, {max(os.sched_getaffinity(1))})",
    ],
)
async def test_a_call_can_not_change_what_the_next_one_gets(ready: Box, change: str) -> None:
    look = """tell(files=resource.getrlimit(resource.RLIMIT_NOFILE), nice=os.nice(0),
        size=resource.getrlimit(resource.RLIMIT_FSIZE), policy=os.sched_getscheduler(0),
        cpus=len(os.sched_getaffinity(0)),
        io=libc.syscall({'x86_64': 252}.get(os.uname().machine, 31), 1, 0))"""
    before = await ready.probe(look)
    old = children(ready.launcher.pid)
    tried = await ready.probe(f"""
def ioprio_set(value):
    if libc.syscall({{'x86_64': 251}}.get(os.uname().machine, 30), 1, 1, value) < 0:
        raise OSError(ctypes.get_errno(), "ioprio_set")
tell(done=attempt(lambda: {change}))""")
    # A process with capabilities is out of reach but for its limits (prlimit(2)).
    assert tried["done"] == "ok" if "prlimit" in change else tried["done"] in ("ok", "EPERM")
    assert await ready.probe(look) == before
    if "prlimit" in change:
        with trio.fail_after(5):
            while set(old) & set(children(ready.launcher.pid)):  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_signals_that_a_call_sends_its_init_do_not_reach_the_next(ready: Box) -> None:
    first = await pid_of(
        ready, "/bin/sh", "-c", "trap '' TERM USR1; kill -TERM 1; kill -USR1 1; kill -34 1"
    )
    async with ready.start("/bin/sh", "-c", "echo ready; read line; exit 5", stdin=True) as later:
        await later.ready()
        assert later.process.pid == first
        assert (await later.finish()).exit.code == 5


async def test_a_template_that_was_signalled_is_not_used_again(ready: Box) -> None:
    async with ready.start("/bin/sh", "-c", "echo ready; exec sleep 60") as running:
        await running.ready()
        first = running.process.pid
        await running.process.signal(signal.SIGTERM)
        assert (await running.end()).exit.signal == signal.SIGTERM
    assert await pid_of(ready) != first


async def test_what_one_call_used_is_not_counted_for_the_next(ready: Box) -> None:
    argv, more = ready.python("x = bytearray(64 << 20); sum(range(9_000_000)); tell()")
    busy = (await ready.run(*argv, **more)).exit
    idle = (await ready.run(*argv[:-1], "pass", **more)).exit
    assert busy.max_rss_kib > 64 << 10 > idle.max_rss_kib
    assert busy.cpu_ms > idle.cpu_ms
    async with ready.start("/bin/sleep", "60", **more) as running:
        await running.process.kill()
        killed = await running.process.wait()
    assert killed.signal == signal.SIGKILL
    assert killed.cpu_ms < busy.cpu_ms


async def test_programs_that_can_not_run_cost_no_template(ready: Box) -> None:
    first = await pid_of(ready)
    for program, code in (("/absent", 2), ("/usr", 13)):
        with pytest.raises(KernelError) as refusal:
            await ready.run(program)
        assert (refusal.value.syscall, refusal.value.errno) == ("execve", code)
    assert await pid_of(ready) == first


async def test_files_differ_from_call_to_call(ready: Box) -> None:
    for content in (b"first" * 999, b"second", b""):
        files = (FileSpec("/run/secrets/TOKEN", content),)
        seen = await ready.run("/bin/cat", "/run/secrets/TOKEN", files=files)
        assert seen.out == content
    assert len(children(ready.launcher.pid)) == 1


async def test_a_mount_below_private_memory_is_there_for_every_call(
    ready: Box, workspace: Path
) -> None:
    (workspace / "inner").write_text("mounted")
    mounts = (
        MountSpec(str(workspace), "/tmp/a/work", readonly=False, idmap=True),
        MountSpec(str(workspace / "inner"), "/home/agent/file"),
    )
    for _ in range(2):
        seen = await ready.run("/bin/cat", "/tmp/a/work/inner", "/home/agent/file", mounts=mounts)
        assert seen.out == b"mountedmounted"
    written = await ready.sh("echo x >/tmp/a/work/new; echo y >/home/agent/file", mounts=mounts)
    assert b"Read-only" in written.err
    assert read(workspace / "new") == "x\n"
    assert len(children(ready.launcher.pid)) == 1


async def test_hundreds_of_calls_leave_a_template_as_it_was(ready: Box) -> None:
    for _ in range(20):
        first = await pid_of(ready)

    def held() -> dict[str, Any]:
        return {
            "threads": status(first, "Threads"),
            "memory": int(status(first, "VmRSS")[0]) >> 10,
            "fds": len(os.listdir(f"/proc/{first}/fd")) if os.geteuid() == 0 else 0,
            "mounts": len(read(f"/proc/{first}/mountinfo").splitlines())
            if os.geteuid() == 0
            else 0,
        }

    await settled(first)
    before = held()
    for _ in range(300):
        assert await pid_of(ready) == first
    await settled(first)
    after = held()
    assert abs(after.pop("memory") - before.pop("memory")) <= 1
    assert after == before


async def settled(pid: int) -> None:
    """Until the template waits for its next call."""
    with trio.fail_after(5):
        while status(pid, "State")[0] != "S" or children(pid):  # noqa: ASYNC110
            await trio.sleep(0.01)


# ---- what may share one


async def test_a_launch_of_another_kind_gets_another(ready: Box) -> None:
    first = await pid_of(ready)
    for change in (
        {"network": "host"},
        {"hostname": "other"},
        {"limits": Limits(open_files=99)},
        {"template": "other-session"},
        {"cwd": "/usr"},
        {"files": (FileSpec("/run/secrets/X", b""),)},
    ):
        assert await pid_of(ready, uid=ready._free.pop(), **change) != first
    assert await pid_of(ready) == first


async def test_a_directory_that_was_replaced_is_seen(ready: Box, workspace: Path) -> None:
    tool = workspace / "tool"
    mounts = (MountSpec(str(tool), "/opt/tool"),)
    for version in ("one", "two"):
        tool.mkdir(mode=0o755)
        (tool / "version").write_text(version)
        assert (await ready.run("/bin/cat", "/opt/tool/version", mounts=mounts)).out == (
            version.encode()
        )
        tool.rename(workspace / version)


async def test_a_template_refuses_the_launch_of_another(
    ready: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pid_of(ready)
    monkeypatch.setattr(client, "template_key", lambda *_: "the same for all")
    await pid_of(ready)
    with pytest.raises(KernelError) as refusal:
        await ready.run("/bin/true", hostname="other")
    assert (refusal.value.syscall, refusal.value.errno) == ("read", 74)  # EBADMSG


PLAIN = LaunchSpec("x", (b"/bin/true",), (), 1000, template="s")


@pytest.mark.parametrize(
    "change",
    [
        {"tty": True},
        {"limits": Limits(memory=1 << 20)},
        {"limits": Limits(processes=2)},
        {"limits": Limits(open_files=20)},
        {"limits": Limits(file_size=10), "files": (FileSpec("/run/x", b"x" * 11),)},
        {"extra_fds": (3,), "limits": Limits(open_files=100)},
        {"files": (FileSpec("/home/agent/.netrc", b""),)},
        {"files": (FileSpec("/run/program", b"", 0o500),)},
        {"files": (FileSpec("/run/x", b""),) * 2},
        {"files": (FileSpec("/run/x", b""),), "mounts": (MountSpec("/x", "/run/y"),)},
        {"mounts": (MountSpec("/x", "/tmp"),)},
        {"mounts": (MountSpec("/x", "/home"),)},
        {"mounts": (MountSpec("/x", "/home/agent/"),)},
        {"mounts": (MountSpec("/x", "/dev/x"),)},
    ],
    ids=str,
)
def test_what_a_template_could_not_give_is_made_for_its_launch(change: dict[str, Any]) -> None:
    assert template_suits(PLAIN)
    assert not template_suits(LaunchSpec(**(vars(PLAIN) | change)))


def key(spec: LaunchSpec) -> object:
    return template_key(spec, lasting_part(spec))


def test_what_changes_from_call_to_call_does_not_change_the_key() -> None:
    own = {"id": "y", "argv": (b"/bin/a", b"b"), "env": ((b"A", b"secret"),)}
    assert key(LaunchSpec(**(vars(PLAIN) | own))) == key(PLAIN)
    one, two = (
        LaunchSpec(**(vars(PLAIN) | {"files": (FileSpec("/run/x", content),)}))
        for content in (b"one", b"two")
    )
    assert key(one) == key(two) != key(PLAIN)


# ---- ends


async def test_a_session_that_ends_takes_its_templates_along(ready: Box) -> None:
    first = await pid_of(ready)
    other = await pid_of(ready, template="another")
    async with ready.start("/bin/sh", "-c", "echo ready; read line", stdin=True) as running:
        await running.ready()
        await ready.launcher.retire("session")
        assert set(children(ready.launcher.pid)) == {other, running.process.pid} - {first} | (
            {running.process.pid}
        )
        pidfd = os.pidfd_open(running.process.pid)
        await running.finish()
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)
    await ready.launcher.retire("session")
    assert children(ready.launcher.pid) == [other]


async def test_a_template_that_nobody_uses_ends(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "IDLE_LIMIT", 0.05)
    monkeypatch.setattr(pool, "_LOOK_PAUSE", 0.01)
    pidfd = os.pidfd_open(await pid_of(Box(launcher, "session")))
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)


async def test_an_old_template_is_not_used_again(
    ready: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "AGE_LIMIT", 0.0)
    assert await pid_of(ready) != await pid_of(ready)


async def test_idle_ones_beyond_the_most_end(ready: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MOST_IDLE", 2)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(pid_of, ready, "/bin/sleep", "0.1")
    with trio.fail_after(5):
        while len(children(ready.launcher.pid)) > 2:  # noqa: ASYNC110
            await trio.sleep(0.01)


@needs_root
async def test_a_template_that_dies_fails_its_call_only(ready: Box) -> None:
    first = await pid_of(ready)
    pidfd = os.pidfd_open(first)
    os.kill(first, signal.SIGKILL)
    await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)
    await trio.testing.wait_all_tasks_blocked()
    assert await pid_of(ready) != first
    async with ready.start("/bin/sleep", "60") as running:
        inside = [os.pidfd_open(pid) for pid in children(running.process.pid)]
        os.kill(running.process.pid, signal.SIGKILL)
        with trio.fail_after(5):
            exited = await running.process.wait()
        assert (exited.code, exited.signal) == (None, signal.SIGKILL)
        assert inside
        assert all(ended(pidfd) for pidfd in inside)
        for pidfd in inside:
            os.close(pidfd)
    assert (await ready.run("/bin/true")).exit.code == 0


async def test_a_template_ends_before_its_own_cpu_time_runs_out(ready: Box) -> None:
    limits = Limits(cpu_seconds=1)
    first = await pid_of(ready, limits=limits)
    for _ in range(3000):
        if await pid_of(ready, limits=limits) != first:
            return
    raise AssertionError("it lives beyond its limit")


def ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
