"""What a sandboxed program is, and what it can't do; each denial beside where it is allowed."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from isolation_support import ORDINARY_UID, Box, needs_root, read, status

from sandboxd.isolation import kernel
from sandboxd.isolation.client import open_launcher
from sandboxd.isolation.wire import MountSpec

Outside = Callable[..., dict[str, Any]]
StartLauncher = Callable[[str], socket.socket]

NAMESPACES = ("mnt", "pid", "ipc", "uts", "cgroup", "net", "user")


def namespaces(box: Box) -> tuple[str, ...]:
    """Those that this kernel has (time: Linux 5.6)."""
    return (*NAMESPACES, "time") if box.launcher.time else NAMESPACES


async def test_the_environment_is_what_was_listed_and_nothing_else(
    launcher_mode: str,
    start_launcher: StartLauncher,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
) -> None:
    monkeypatch.setenv("SANDBOXD_PLANTED", "by the launcher's parent")
    async with open_launcher(start_launcher(launcher_mode)) as launcher:
        result = await Box(launcher, template).run(
            "/usr/bin/env", env=["A=1", "EMPTY=", "LINES=x\ny"]
        )
    assert result.out == b"A=1\nEMPTY=\nLINES=x\ny\n"


async def test_every_byte_but_nul_survives_in_a_value(box: Box) -> None:
    value = bytes(range(1, 256))
    async with box.start("/bin/cat", "/proc/self/environ", env=[os.fsdecode(b"V=" + value)]) as run:
        assert (await run.end()).out == b"V=" + value + b"\0"


async def test_a_program_is_an_ordinary_user_without_capabilities(
    box: Box, outside: Outside
) -> None:
    probe = """tell(
        uid=status("Uid"), gid=status("Gid"), groups=status("Groups"), nnp=status("NoNewPrivs"),
        caps=[status(f"Cap{kind}") for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")],
        securebits=libc.prctl(27), whoami=os.popen("id -un").read().strip(),
    )"""
    seen = await box.probe(probe, env=["PATH=/usr/bin:/bin"])
    assert seen == {
        "uid": ["1000"] * 4,
        "gid": ["1000"] * 4,
        "groups": [] if box.launcher.privileged else seen["groups"],
        "nnp": ["1"],
        "caps": [["0" * 16]] * 5,
        "securebits": 0xCF,
        "whoami": "agent",
    }
    control = outside(probe)
    assert control["nnp"] == ["0"]
    assert control["caps"][3] != ["0" * 16]  # the bounding set of anybody on the host


@needs_root
async def test_the_launchers_supplementary_groups_are_left_behind(
    start_launcher: StartLauncher, outside: Outside, template: str
) -> None:
    probe = "tell(groups=status('Groups'))"
    own = os.getgroups()
    os.setgroups([4, 24])
    try:
        assert outside(probe) == {"groups": ["4", "24"]}
        sock = start_launcher("root")
    finally:
        os.setgroups(own)
    async with open_launcher(sock) as launcher:
        assert await Box(launcher, template).probe(probe) == {"groups": []}


async def test_the_host_sees_the_uid_that_the_launch_named(box: Box) -> None:
    uid = box.uid()
    async with box.start("/bin/sleep", "60", uid=uid) as running:
        assert status(running.process.pid, "Uid") == [str(uid)] * 4


async def test_every_namespace_is_the_sandboxs_own(box: Box, outside: Outside) -> None:
    names = namespaces(box)
    probe = f"tell(**{{ns: os.readlink('/proc/self/ns/' + ns) for ns in {names}}})"
    host = {ns: os.readlink(f"/proc/self/ns/{ns}") for ns in names}
    assert outside(probe) == host
    argv, more = box.python(probe + "; print(); print('ready', flush=True); signal.pause()")
    async with box.start(*argv, **more) as other:  # alive, for the kernel reuses numbers
        first = json.loads((await other.ready()).splitlines()[0])
        second = await box.probe(probe)
    for ns in names:
        assert len({host[ns], first[ns], second[ns]}) == 3, ns


async def test_network_host_shares_the_network_namespace_alone(box: Box) -> None:
    names = namespaces(box)
    seen = await box.probe(
        f"tell(**{{ns: os.readlink('/proc/self/ns/' + ns) for ns in {names}}})",
        network="host",
    )
    shared = [ns for ns in names if seen[ns] == os.readlink(f"/proc/self/ns/{ns}")]
    assert shared == ["net"]


async def test_no_user_namespace_can_be_nested(box: Box, outside: Outside) -> None:
    before = read("/proc/sys/user/max_user_namespaces")
    probe = """tell(
        unshare=call("unshare", 0x10000000), with_mounts=call("unshare", 0x10020000),
        limit=open("/proc/sys/user/max_user_namespaces").read().strip(),
    )"""
    # Two walls: the limit of zero says ENOSPC, the system call filter before it EPERM.
    denied = "EPERM" if box.launcher.seccomp else "ENOSPC"
    assert await box.probe(probe) == {"unshare": denied, "with_mounts": denied, "limit": "0"}
    control = outside("tell(unshare=call('unshare', 0x10000000))", user=box.user)
    assert control == {"unshare": "ok"}
    assert read("/proc/sys/user/max_user_namespaces") == before


async def test_nothing_of_the_mount_tree_can_be_changed(box: Box, outside: Outside) -> None:
    probe = """
attributes = ctypes.create_string_buffer((0).to_bytes(8, "little") + (1).to_bytes(8, "little")
                                         + bytes(16), 32)
handle = ctypes.create_string_buffer((8).to_bytes(4, "little") + bytes(16))
tell(
    tmpfs=call("mount", b"x", b"/tmp", b"tmpfs", 0, None),
    remount=call("mount", None, b"/tmp", None, 32, None),
    bind=call("mount", b"/tmp", b"/tmp", None, 4096, None),
    umount=call("umount2", b"/tmp", 2),
    fsopen=call("syscall", 430, b"tmpfs", 0),
    setattr=call("syscall", 442, -100, b"/tmp", 0, attributes, 32),
    open_tree=call("syscall", 428, -100, b"/tmp", 1),
    unshare=call("unshare", 0x00020000),
    setns=call("setns", os.open("/proc/self/ns/mnt", os.O_RDONLY), 0),
    handle=call("open_by_handle_at", -100, handle, 0),
    mknod=attempt(os.mknod, "/tmp/disk", 0o60600, os.makedev(254, 0)),
    pivot=call("syscall", 155 if os.uname().machine == "x86_64" else 41, b"/tmp", b"/tmp"),
    chroot=attempt(os.chroot, "/"),
)"""
    denied = await box.probe(probe)
    # handle: a kernel with unprivileged file handles (6.11) finds none of that shape
    assert denied.pop("handle") in ("EPERM", "ESTALE")
    # Landlock comes before the capability that is also missing.
    assert denied.pop("mknod") == ("EACCES" if box.launcher.landlock else "EPERM")
    assert set(denied.values()) == {"EPERM"}, denied
    # The same calls where they are allowed: as the owner of a user and mount namespace.
    allowed = outside("libc.unshare(0x10020000)" + probe, user=box.user)
    for call in (
        "tmpfs",
        "bind",
        "chroot",
        "fsopen",
        "setattr",
        "open_tree",
        "unshare",
        "umount",
        "pivot",
    ):
        assert allowed[call] == "ok", (call, allowed)


async def test_the_system_is_read_only_and_private_memory_is_not(box: Box) -> None:
    probe = """
def write(directory):
    return attempt(open, os.path.join(directory, "planted"), "w")
tell(
    denied={d: write(d) for d in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/home", "/proc/sys")},
    allowed={d: write(d) for d in ("/tmp", "/home/agent", "/dev/shm")},
    flags={d: os.statvfs(d).f_flag & 7 for d in ("/", "/usr", "/etc", "/dev", "/tmp")},
    existing=attempt(os.open, "/etc/passwd", os.O_WRONLY),
    unlink=attempt(os.unlink, "/etc/passwd"), chmod=attempt(os.chmod, "/usr/bin", 0o777),
)"""
    seen = await box.probe(probe)
    assert seen["denied"].pop("/proc/sys") in ("EROFS", "EACCES", "ENOENT")  # has no such file
    assert set(seen["denied"].values()) == {"EROFS"}
    assert set(seen["allowed"].values()) == {"ok"}
    readonly, nosuid, nodev = os.ST_RDONLY, os.ST_NOSUID, os.ST_NODEV
    assert seen["flags"].pop("/tmp") == nosuid | nodev
    assert set(seen["flags"].values()) == {readonly | nosuid | nodev}
    assert (seen["existing"], seen["unlink"], seen["chmod"]) == ("EACCES", "EROFS", "EROFS")


async def test_the_hosts_files_are_not_there(box: Box, outside: Outside, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.write_text("on the host")
    paths = ["/root", "/var", "/work", "/srv", "/opt", "/boot", "/sys", "/run", "/mnt", "/media"]
    paths += ["/etc/shadow", "/etc/ssh", "/etc/machine-id", str(marker), "/proc/1/root/etc/shadow"]
    probe = f"tell(seen=[p for p in {paths} if os.path.lexists(p)], root=sorted(os.listdir('/')))"
    seen = await box.probe(probe)
    assert seen["seen"] == []
    system = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"}
    assert set(seen["root"]) - system == {"dev", "etc", "home", "proc", "tmp"}
    assert {"/root", "/var", "/etc/shadow", str(marker)} <= set(outside(probe)["seen"])


async def test_home_and_tmp_start_empty_and_are_shared_with_nobody(box: Box) -> None:
    async with box.start("/bin/sh", "-c", "echo x >/tmp/a; echo x >/dev/shm/b; echo ready; cat -",
                         env=["PATH=/bin"]) as other:  # fmt: skip
        await other.ready()
        seen = await box.probe(
            "tell(**{d.strip('/').replace('/', '_'): os.listdir(d)"
            " for d in ('/tmp', '/dev/shm', '/home/agent')})",
            uid=box.uid(),
        )
    assert seen == {"tmp": [], "dev_shm": [], "home_agent": []}


async def test_proc_shows_the_sandboxs_own_processes_only(box: Box, outside: Outside) -> None:
    probe = """tell(pids=sorted(int(n) for n in os.listdir("/proc") if n.isdigit()), me=os.getpid(),
        init=open("/proc/1/cmdline").read().rstrip("\\0"), comm=open("/proc/1/comm").read(),
        cgroup=open("/proc/self/cgroup").read().split())"""
    async with box.start("/bin/sleep", "60"):
        seen = await box.probe(probe)
    assert seen["pids"] == [1, seen["me"]]
    assert (seen["init"], seen["comm"]) == ("sandboxd-init", "sandboxd-init\n")
    assert all(line.endswith(":/") for line in seen["cgroup"])
    assert os.getpid() in outside(probe)["pids"]


async def test_the_init_can_not_be_looked_into(box: Box, outside: Outside) -> None:
    probe = """
def look(pid):
    size = ctypes.c_size_t(8)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
    remote = (ctypes.c_size_t * 2)(ctypes.addressof(size), 8)
    pidfd = os.pidfd_open(pid)
    kcmp = {"x86_64": 312}.get(os.uname().machine, 272)
    seen = {name: attempt(open, f"/proc/{pid}/{name}", "rb")
            for name in ("environ", "mem", "maps", "smaps", "auxv")}
    for name in ("fd", "fdinfo", "map_files", "root", "cwd"):
        seen[name] = attempt(os.listdir, f"/proc/{pid}/{name}")
    seen["exe"] = attempt(os.readlink, f"/proc/{pid}/exe")
    seen["ns"] = attempt(os.readlink, f"/proc/{pid}/ns/mnt")
    seen["readv"] = call("process_vm_readv", pid, local, 1, remote, 1, 0)
    seen["getfd"] = call("syscall", 438, pidfd, 0, 0)
    seen["kcmp"] = call("syscall", kcmp, os.getpid(), pid, 0, 0, 0)
    seen["seize"] = call("ptrace", 0x4206, pid, None, None)
    return seen
child = os.fork()
if child == 0:
    signal.pause()
own = look(child)
os.kill(child, signal.SIGKILL)
tell(init=look(1), own=own)
"""
    seen, control = await box.probe(probe), outside(probe)["own"]
    own, init = seen["own"], seen["init"]
    assert own.pop("map_files") in ("ok", "EPERM")  # needs a capability before Linux 5.8
    del control["map_files"]
    assert set(control.values()) == {"ok"}, control
    calls = ("readv", "getfd", "kcmp", "seize")
    assert {init.pop(name) for name in calls} == {"EPERM"}
    if box.launcher.seccomp:
        assert {own.pop(name) for name in calls} == {"EPERM"}
    assert set(own.values()) == {"ok"}, own
    assert init.pop("map_files") in ("EACCES", "EPERM")
    assert {n: v for n, v in init.items() if v != "EACCES"} == {}


async def test_kernel_files_that_tell_of_the_host_are_empty(box: Box, outside: Outside) -> None:
    probe = """
files = ["kcore", "keys", "key-users", "kallsyms", "timer_list", "interrupts", "sched_debug"]
sizes = {}
for name in files:
    try:
        with open(f"/proc/{name}", "rb") as file:
            sizes[name] = len(file.read(4096))
    except OSError as failure:
        sizes[name] = errno.errorcode[failure.errno]
directories = {n: os.listdir(f"/proc/{n}") for n in ("acpi", "scsi") if os.path.isdir(f"/proc/{n}")}
tell(sizes=sizes, directories=directories)
"""
    host, seen = outside(probe), await box.probe(probe)
    present = {name for name, size in host["sizes"].items() if size != "ENOENT"}
    assert {"interrupts", "kallsyms"} <= present
    assert host["sizes"]["interrupts"] > 0
    assert host["sizes"]["kallsyms"] > 0
    assert {name: seen["sizes"][name] for name in present} == dict.fromkeys(present, 0)
    assert seen["directories"] == {name: [] for name in host["directories"]}


async def test_kernel_knobs_are_read_only(box: Box, outside: Outside) -> None:
    seen = await box.probe("""tell(
        knobs={p: attempt(open, p, "w") for p in
               ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname",
                "/proc/sys/net/ipv4/ip_forward", "/proc/sys/user/max_user_namespaces")},
        own=attempt(open, "/proc/self/comm", "w"),
        flag=os.statvfs("/proc/sys").f_flag & os.ST_RDONLY)""")
    assert set(seen["knobs"].values()) == {"EROFS"}
    assert (seen["own"], seen["flag"]) == ("EACCES" if box.launcher.landlock else "ok", 1)
    assert outside("tell(own=attempt(open, '/proc/self/comm', 'w'))") == {"own": "ok"}


async def test_dev_holds_six_devices_and_a_terminal_directory(box: Box) -> None:
    seen = await box.probe("""tell(
        names=sorted(os.listdir("/dev")), zero=open("/dev/zero", "rb").read(2).hex(),
        null=attempt(open, "/dev/null", "wb"), full=attempt(lambda: os.write(
            os.open("/dev/full", os.O_WRONLY), b"x")), pts=os.listdir("/dev/pts"))""")
    devices = ["full", "null", "random", "tty", "urandom", "zero"]
    links = ["fd", "ptmx", "stderr", "stdin", "stdout"]
    assert seen["names"] == sorted([*devices, *links, "pts", "shm"])
    assert (seen["zero"], seen["null"], seen["full"]) == ("0000", "ok", "ENOSPC")
    assert seen["pts"] == ["ptmx"]


@needs_root
async def test_a_setuid_program_gives_nothing(box: Box, outside: Outside, workspace: Path) -> None:
    program = workspace / "id"
    shutil.copy("/usr/bin/id", program)
    os.chown(program, 0, 0)
    program.chmod(0o4755)
    control = outside(
        f"tell(uid=os.popen('{program} -u').read())",
        user=ORDINARY_UID,
    )
    assert control == {"uid": "0\n"}
    mount = MountSpec(str(workspace), "/workspace", readonly=False, idmap=True)
    result = await box.run("/workspace/id", "-u", mounts=(mount,))
    assert result.out == b"1000\n"


async def test_keys_of_the_launchers_parent_are_not_inherited(
    launcher_mode: str, start_launcher: StartLauncher, outside: Outside, template: str
) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    add, request = {"x86_64": (248, 249)}.get(os.uname().machine, (217, 218))
    name = f"sandboxd-test-{os.getpid()}".encode()
    key = libc.syscall(add, b"user", name, b"payload", 7, -3)  # KEY_SPEC_SESSION_KEYRING
    if key < 0:
        pytest.skip("this host has no keyrings")
    probe = f"tell(found=call('syscall', {request}, b'user', {name!r}, None, 0))"
    try:
        assert outside(probe) == {"found": "ok"}
        async with open_launcher(start_launcher(launcher_mode)) as launcher:
            denied = "EPERM" if launcher.seccomp else "ENOKEY"
            assert await Box(launcher, template).probe(probe) == {"found": denied}
        package = str(Path(kernel.__file__).parents[2])
        join = f"""
sys.path.append({package!r})
from sandboxd.isolation import kernel
kernel.join_new_keyring()
"""
        assert outside(join + probe) == {"found": "ENOKEY"}
    finally:
        keyctl = {"x86_64": 250}.get(os.uname().machine, 219)
        libc.syscall(keyctl, 3, key)  # KEYCTL_REVOKE


async def test_a_program_holds_its_streams_and_declared_descriptors_only(
    launcher_mode: str,
    start_launcher: StartLauncher,
    outside: Outside,
    tmp_path: Path,
    template: str,
) -> None:
    probe = "tell(fds=[int(n) for n in os.listdir('/proc/self/fd') if int(n) != 3])"
    leaked = os.open(tmp_path, os.O_RDONLY)
    source, sink = os.pipe2(os.O_CLOEXEC)
    try:
        os.dup2(leaked, 200, inheritable=True)
        assert 200 in outside(probe, close_fds=False)["fds"]
        async with open_launcher(start_launcher(launcher_mode)) as launcher:
            box = Box(launcher, template)
            assert (await box.probe(probe))["fds"] == [0, 1, 2]
            os.write(sink, b"declared")
            told = await box.probe(
                "tell(fds=[int(n) for n in os.listdir('/proc/self/fd')],"
                " read=os.read(9, 8).decode())",
                extra_fds=(9,),
                extra=[source],
            )
            assert told == {"fds": [0, 1, 2, 3, 9], "read": "declared"}
    finally:
        for fd in (leaked, 200, source, sink):
            os.close(fd)
