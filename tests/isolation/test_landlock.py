"""Landlock in real sandboxes, at every ABI up to this kernel's; each denial beside its absence.

A launcher that believes in an older ABI stands for an older kernel.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from isolation_support import Box, changed_launcher

from sandboxd.isolation import landlock
from sandboxd.isolation.wire import CgroupState, FileSpec, LaunchSpec, MountSpec
from sandboxd.sessions.layers import layers, provided

Outside = Callable[..., dict[str, Any]]

ABI = landlock.best_abi()
PROGRAM = Path("/bin/true").read_bytes()
PACKAGE = str(Path(landlock.__file__).parents[2])
pytestmark = pytest.mark.skipif(ABI == 0, reason="this kernel has no Landlock")

#: Restrict the probe itself: no sandbox, no mounts, nothing but Landlock.
ALONE = f"""
sys.path.append({PACKAGE!r})
from sandboxd.isolation import kernel
from sandboxd.isolation.landlock import Place, restrict
kernel.no_new_privileges()
"""


@pytest.fixture
async def bare() -> AsyncIterator[Box]:
    """Sandboxes that lack Landlock and nothing else."""
    async with changed_launcher("landlock.best_abi = lambda: 0") as box:
        assert box.launcher.landlock == 0
        yield box


async def test_a_launcher_tells_the_abi_it_uses(box: Box) -> None:
    assert box.launcher.landlock == ABI == min(max(landlock.SINCE), ABI)


async def test_programs_run_only_from_where_programs_are(box: Box, bare: Box) -> None:
    probe = """
import shutil
def run(directory):
    path = os.path.join(directory, "true")
    if not os.path.exists(path):
        shutil.copy("/bin/true", path)
    return attempt(os.posix_spawn, path, ["true"], {})
tell(system=run("/bin"), tmp=run("/tmp"), home=run("/home/agent"), shm=run("/dev/shm"),
     ro=run("/data"), noexec=run("/noexec"), file=run("/run/bin"), secret=run("/run/secrets"))
"""
    program = PROGRAM
    more = {
        "mounts": (
            MountSpec("/usr/bin", "/data"),
            MountSpec("/usr/bin", "/noexec", noexec=True),
        ),
        "files": (
            FileSpec("/run/bin/true", program, 0o555),
            FileSpec("/run/secrets/true", program, 0o400),
        ),
    }
    expected = dict.fromkeys(("system", "tmp", "home", "ro", "file"), "ok")
    denied = dict.fromkeys(("shm", "noexec", "secret"), "EACCES")
    assert await box.probe(probe, **more) == expected | denied
    # Without Landlock the mount's flag and the file's mode say the same, shm says nothing.
    assert await bare.probe(probe, **more) == expected | denied | {"shm": "ok"}


async def test_nothing_is_written_but_where_the_sandbox_has_writable_places(
    box: Box, bare: Box, workspace: Path
) -> None:
    probe = """
def write(path):
    return attempt(open, path, "w")
tell(
    places={p: write(p + "/x") for p in ("/tmp", "/home/agent", "/dev/shm", "/workspace")},
    devices={d: write("/dev/" + d) for d in ("null", "zero", "full")},
    own={n: write(f"/proc/self/{n}") for n in ("comm", "oom_score_adj", "mem", "coredump_filter")},
    node=attempt(os.mknod, "/tmp/n", 0o20600, os.makedev(1, 3)),
    fifo=attempt(os.mkfifo, "/tmp/fifo"),
)"""
    more = {"mounts": (MountSpec(str(workspace), "/workspace", readonly=False, idmap=True),)}
    seen, control = await box.probe(probe, **more), await bare.probe(probe, **more)
    assert set(seen["places"].values()) == set(seen["devices"].values()) == {"ok"}
    assert set(seen["own"].values()) == {"EACCES"}
    assert (seen["node"], seen["fifo"]) == ("EACCES", "ok")
    assert set(control["own"].values()) == {"ok"}
    assert control["node"] == "EPERM"  # the capability says so


async def test_tcp_ports_are_closed_with_the_network(box: Box, bare: Box) -> None:
    probe = """
def bind(kind, port=0):
    with socket.socket(socket.AF_INET, kind) as s:
        s.bind(("0.0.0.0", port))
def connect():
    with socket.socket() as s:
        s.connect(("127.0.0.1", 9))
tcp, udp = socket.SOCK_STREAM, socket.SOCK_DGRAM
tell(bind=attempt(bind, tcp), connect=attempt(connect), udp=attempt(bind, udp))
"""
    if ABI >= 4:
        denied = {"bind": "EACCES", "connect": "EACCES", "udp": "ok"}
        assert await box.probe(probe) == denied
    assert await bare.probe(probe) == {"bind": "ok", "connect": "ENETUNREACH", "udp": "ok"}
    shared = await box.probe(probe, network="host")
    assert shared == {"bind": "ok", "connect": "ECONNREFUSED", "udp": "ok"}


@pytest.mark.skipif(ABI < 6, reason="needs Landlock ABI 6")
async def test_abstract_sockets_of_the_host_are_out_of_reach_even_on_its_network(
    box: Box, bare: Box
) -> None:
    name = f"\0sandboxd-landlock-{os.getpid()}"
    probe = f"""
def connect(name):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(name)
def send():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", {name + "d"!r})
own = socket.socket(socket.AF_UNIX)
own.bind("\\0own"); own.listen(1)
tell(host=attempt(connect, {name!r}), datagram=attempt(send), own=attempt(connect, "\\0own"))
"""
    with (
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mailbox,
    ):
        server.bind(name)
        server.listen(4)
        mailbox.bind(name + "d")
        seen = await box.probe(probe, network="host")
        assert seen == {"host": "EPERM", "datagram": "EPERM", "own": "ok"}
        assert set((await bare.probe(probe, network="host")).values()) == {"ok"}


@pytest.mark.skipif(ABI < 6, reason="needs Landlock ABI 6")
def test_signals_stay_inside(outside: Outside) -> None:
    probe = """
reader, writer = os.pipe()
other = os.fork()
if other == 0:  # until the probe ends
    os.close(writer)
    os.read(reader, 1)
    os._exit(0)
restrict(ABI, [], (), ports=None)
child = os.fork()
if child == 0:
    signal.pause()
tell(out=attempt(os.kill, other, 0), inside=attempt(os.kill, child, signal.SIGKILL))
"""
    assert outside(ALONE + probe.replace("ABI", str(ABI))) == {"out": "EPERM", "inside": "ok"}
    assert outside(ALONE + probe.replace("ABI", "5")) == {"out": "ok", "inside": "ok"}


TREE = """
import shutil
root = sys.argv[1] if len(sys.argv) > 1 else os.path.realpath("tree")
for place in ("open", "closed"):
    os.makedirs(f"{root}/{place}/a"); os.makedirs(f"{root}/{place}/b")
    for name in ("file", "old", "a/moving", "victim"):
        open(f"{root}/{place}/{name}", "w").close()
    os.mkdir(f"{root}/{place}/gone")
    shutil.copy("/bin/true", f"{root}/{place}/true")
loader = Place("/usr", execute=True)  # runs every program
restrict(ABI, [Place(root + "/open", write=True, execute=True), loader], (), ports=None)
def tries(place):
    at = lambda name: f"{root}/{place}/{name}"
    def listen():
        with socket.socket(socket.AF_UNIX) as s:
            os.chdir(at("."))
            s.bind("socket")
    return dict(
        read=attempt(open, at("file")), listing=attempt(os.listdir, at("")),
        write=attempt(os.open, at("file"), os.O_WRONLY), create=attempt(open, at("new"), "w"),
        append=attempt(open, at("file"), "a"), truncate=attempt(os.truncate, at("file"), 0),
        mkdir=attempt(os.mkdir, at("made")), rmdir=attempt(os.rmdir, at("gone")),
        unlink=attempt(os.unlink, at("victim")), rename=attempt(os.rename, at("old"), at("newer")),
        move=attempt(os.rename, at("a/moving"), at("b/moved")),
        link=attempt(os.link, at("file"), at("a/linked")),
        symlink=attempt(os.symlink, "x", at("s")),
        fifo=attempt(os.mkfifo, at("fifo")), socket=attempt(listen),
        run=attempt(os.posix_spawn, at("true"), ["true"], {}),
    )
tell(open=tries("open"), closed=tries("closed"))
"""
OPENED = {
    "read": "ok", "listing": "ok", "write": "ok", "create": "ok", "append": "ok", "truncate": "ok",
    "mkdir": "ok", "rmdir": "ok", "unlink": "ok", "rename": "ok", "move": "ok", "link": "ok",
    "symlink": "ok", "fifo": "ok", "socket": "ok", "run": "ok",
}  # fmt: skip


@pytest.mark.parametrize("abi", range(8))
def test_each_abi_denies_what_it_can_and_nothing_else(
    outside: Outside, tmp_path: Path, abi: int
) -> None:
    if abi > ABI:
        pytest.skip(f"this kernel's ABI is {ABI}")
    if abi == 0:
        opened = closed = OPENED
    else:
        opened, closed = OPENED, dict.fromkeys(OPENED, "EACCES") | {"read": "ok", "listing": "ok"}
    if abi == 1:  # it can't allow what it doesn't know
        opened = OPENED | {"move": "EXDEV", "link": "EXDEV"}
    if abi in (1, 2):
        closed = closed | {"truncate": "ok"}
    seen = outside(ALONE + TREE.replace("ABI", str(abi)), cwd=tmp_path)
    assert seen["open"] == opened
    assert seen["closed"] == closed


@pytest.mark.skipif(ABI < 5, reason="needs Landlock ABI 5")
def test_devices_take_requests_only_below_dev(outside: Outside) -> None:
    probe = """
import fcntl
restrict(ABI, [Place("/dev", devices=True)] if DEVICES else [], (), ports=None)
tell(zero=attempt(fcntl.ioctl, os.open("/dev/zero", os.O_RDONLY), 0x5401, bytes(60)))
"""
    there = ALONE + probe.replace("ABI", str(ABI))
    assert outside(there.replace("DEVICES", "False")) == {"zero": "EACCES"}
    assert outside(there.replace("DEVICES", "True")) == {"zero": "ENOTTY"}
    older = ALONE + probe.replace("ABI", "4").replace("DEVICES", "False")
    assert outside(older) == {"zero": "ENOTTY"}


async def test_what_a_program_was_given_open_it_may_open_again(
    box: Box, outside: Outside, tmp_path: Path
) -> None:
    probe = """
given = os.open("given", os.O_RDWR | os.O_CREAT)
readable = os.open("given", os.O_RDONLY)
terminal, slave = os.openpty()
restrict(ABI, [], [given, readable, slave, os.memfd_create("m"), *os.pipe()] if GIVEN else [],
         ports=None)
tell(file=attempt(open, f"/proc/self/fd/{given}", "w"), pty=attempt(open, os.ttyname(slave), "w"),
     beside=attempt(open, "beside", "w"))
"""
    there = ALONE + probe.replace("ABI", str(ABI))
    seen = outside(there.replace("GIVEN", "True"), cwd=tmp_path)
    assert seen == {"file": "ok", "pty": "ok", "beside": "EACCES"}
    seen = outside(there.replace("GIVEN", "False"), cwd=tmp_path)
    assert set(seen.values()) == {"EACCES"}
    # And all the way into a sandbox.
    given = os.open(tmp_path / "handed", os.O_RDWR | os.O_CREAT)
    os.fchmod(given, 0o666)
    try:
        probe = "tell(again=attempt(open, '/proc/self/fd/9', 'w'))"
        argv, more = box.python(probe, extra_fds=(9,), extra=(given,))
        assert (await box.run(*argv, **more)).out == b'{"again": "ok"}'
    finally:
        os.close(given)


def test_a_stream_for_reading_is_not_opened_for_writing(outside: Outside, tmp_path: Path) -> None:
    (tmp_path / "given").touch()
    probe = """
fd = os.open("given", os.O_RDONLY)
restrict(ABI, [], [fd], ports=None)
tell(again=attempt(open, f"/proc/self/fd/{fd}"), write=attempt(os.open, "given", os.O_WRONLY))
"""
    seen = outside(ALONE + probe.replace("ABI", str(ABI)), cwd=tmp_path)
    assert seen == {"again": "ok", "write": "EACCES"}


@pytest.mark.parametrize("abi", range(8))
async def test_sandboxes_run_at_every_abi(abi: int) -> None:
    if abi > ABI:
        pytest.skip(f"this kernel's ABI is {ABI}")
    async with changed_launcher(f"landlock.best_abi = lambda: {abi}") as box:
        assert box.launcher.landlock == abi
        result = await box.sh("echo x >/tmp/x; mkdir /tmp/a; mv /tmp/x /tmp/a/; cat /tmp/a/x")
        assert (result.out, result.err) == (b"x\n", b"")
        seen = await box.probe("""tell(shm=attempt(open, "/proc/self/comm", "w"),
            bind=attempt(socket.socket().bind, ("0.0.0.0", 0)))""")
        assert seen == {"shm": "EACCES" if abi else "ok", "bind": "EACCES" if abi >= 4 else "ok"}


def test_a_link_of_an_agents_making_leads_to_no_right(outside: Outside, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "link").symlink_to("victim")
    probe = f"""
try:
    restrict({ABI}, [Place(os.path.realpath(".") + "/link", write=True)], (), ports=None)
except Exception as failure:
    told = str(failure)
tell(told=told, write=attempt(open, "victim/x", "w"))
"""
    seen = outside(ALONE + probe, cwd=tmp_path)
    assert "openat2" in seen["told"]
    assert seen["write"] == "ok"  # nothing was restricted: the launch has failed


def test_an_absent_place_fails_the_launch_unless_it_is_optional(
    outside: Outside, tmp_path: Path
) -> None:
    probe = f"""
def try_with(**more):
    try:
        restrict({ABI}, [Place("/absent", write=True, **more)], (), ports=None)
    except Exception as failure:
        return str(failure)
tell(must=try_with(), may=try_with(optional=True), restricted=attempt(open, "x", "w"))
"""
    seen = outside(ALONE + probe, cwd=tmp_path)
    assert "/absent" in seen["must"]
    assert (seen["may"], seen["restricted"]) == (None, "EACCES")


def test_places_follow_the_mounts_and_files_of_a_launch() -> None:
    spec = LaunchSpec(
        id="x",
        argv=(b"/bin/true",),
        env=(),
        uid=1,
        user="tool",
        mounts=(
            MountSpec("/a", "/data", noexec=True),
            MountSpec("/b", "/workspace", readonly=False, noexec=True, optional=True),
            MountSpec("/c", "/opt/program"),
        ),
        files=(FileSpec("/run/secrets/TOKEN", b"x"), FileSpec("/run/bin/bridge", b"x", 0o555)),
    )
    found = {place.path: place for place in landlock.places(spec, ("/usr",))}
    writable = {path for path, place in found.items() if place.write}
    runnable = {path for path, place in found.items() if place.execute}
    assert writable == {"/tmp", "/home/tool", "/dev/shm", "/workspace"}
    assert runnable == {"/usr", "/tmp", "/home/tool", "/opt/program", "/run/bin/bridge"}
    assert [path for path, place in found.items() if place.devices] == ["/dev"]
    assert [path for path, place in found.items() if place.optional] == ["/workspace"]


@pytest.mark.parametrize(("abi", "network", "there", "absent"), [
    (7, "none", "TCP bind and connect", "missing"),
    (7, "host", "abstract sockets and signals", "TCP"),
    (1, "none", "reading, writing and running files", "moving"),
    (0, "none", "not in this kernel", "ABI"),
])  # fmt: skip
def test_operators_are_told_what_the_kernel_can(
    abi: int, network: str, there: str, absent: str
) -> None:
    launcher: Any = SimpleNamespace(
        mode="user", landlock=abi, seccomp=abi > 0, time=True, cgroup=CgroupState()
    )
    found = {layer["layer"]: layer for layer in layers(network, launcher)}
    assert found["landlock"]["state"] == ("on" if abi else "missing")
    assert there in found["landlock"]["remark"]
    assert absent not in found["landlock"]["remark"]
    assert found["seccomp"]["state"] == ("on" if abi else "missing")
    assert {"landlock", "seccomp"} & provided(network, launcher) == (
        {"landlock", "seccomp"} if abi else set()
    )
