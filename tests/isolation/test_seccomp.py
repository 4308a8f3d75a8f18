"""The system call filter in real sandboxes. Each refusal beside the same call without the filter.

What the programs say to calls that this kernel doesn't have, or of other architectures, is in
``test_seccomp_programs``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from isolation_support import Box, changed_launcher, needs_root, status

from sandboxd.errors import KernelError
from sandboxd.isolation.wire import MountSpec

Outside = Callable[..., dict[str, Any]]

MACHINE = os.uname().machine
pytestmark = pytest.mark.skipif(MACHINE not in ("x86_64", "aarch64"), reason="no filter for it")

#: Name, number on x86_64, on aarch64, arguments that do no harm. "root" makes the control: the
#: call without the filter gets as far as its arguments only with root's capabilities.
CALLS = (
    ("add_key", 248, 217, "b'user', b'sandboxd-test', b'x', 1, -3", ""),
    ("request_key", 249, 218, "b'user', b'sandboxd-absent', None, 0", ""),
    ("keyctl", 250, 219, "0, -3, 0", ""),
    ("bpf", 321, 280, "0xFFFF, None, 0", "root"),
    ("perf_event_open", 298, 241, "None, 0, -1, -1, 0", "root"),
    ("userfaultfd", 323, 282, "0xFFFF", "root"),
    ("io_uring_setup", 425, 425, "1, None", ""),
    ("io_uring_enter", 426, 426, "-1, 0, 0, 0, None, 0", ""),
    ("io_uring_register", 427, 427, "-1, 0, None, 0", ""),
    ("ptrace", 101, 117, "2, 1 << 22, None, None", ""),
    ("process_vm_readv", 310, 270, "1 << 22, None, 0, None, 0, 0", ""),
    ("process_vm_writev", 311, 271, "1 << 22, None, 0, None, 0, 0", ""),
    ("process_madvise", 440, 440, "-1, None, 0, 0, 0", ""),
    ("process_mrelease", 448, 448, "-1, 0", ""),
    ("pidfd_getfd", 438, 438, "-1, 0, 0", ""),
    ("kcmp", 312, 272, "1 << 22, 1 << 22, 0, 0, 0", ""),
    ("kexec_load", 246, 104, "0, 0, None, 0xFFFF", "root"),
    ("kexec_file_load", 320, 294, "-1, -1, 0, None, 0xFFFF", "root"),
    ("init_module", 175, 105, "None, 0, b''", "root"),
    ("finit_module", 313, 273, "-1, b'', 0", "root"),
    ("delete_module", 176, 106, "b'sandboxd_absent', 0", "root"),
    ("mount", 165, 40, "None, b'/absent', None, 0, None", "root"),
    ("umount2", 166, 39, "b'/absent', 0", "root"),
    ("pivot_root", 155, 41, "b'/absent', b'/absent'", "root"),
    ("chroot", 161, 51, "b'/absent'", ""),
    ("open_tree", 428, 428, "-1, b'x', 0", ""),
    ("move_mount", 429, 429, "-1, b'', -1, b'', 4", "root"),
    ("fsopen", 430, 430, "b'absent', 0", "root"),
    ("fsconfig", 431, 431, "-1, 6, None, None, 0", ""),
    ("fsmount", 432, 432, "-1, 0, 0", "root"),
    ("fspick", 433, 433, "-1, b'x', 0", "root"),
    ("mount_setattr", 442, 442, "-1, b'', 0x1000, bytes(32), 32", "root"),
    ("unshare", 272, 97, "0", ""),
    ("setns", 308, 268, "-1, 0", ""),
    ("clone3", 435, 435, "None, 0", ""),
    ("memfd_secret", 447, 447, "0xFFFF", ""),
    ("mbind", 237, 235, "0, 0, 0, None, 0, 0", ""),
    ("set_mempolicy", 238, 237, "0, None, 0", ""),
    ("get_mempolicy", 239, 236, "None, None, 0, None, 0", ""),
    ("migrate_pages", 256, 238, "1 << 22, 1, None, None", ""),
    ("move_pages", 279, 239, "0, 0, None, None, None, 0", ""),
    ("name_to_handle_at", 303, 264, "-100, b'/', None, None, 0", ""),
    ("open_by_handle_at", 304, 265, "-1, None, 0", "root"),
    ("quotactl", 179, 60, "0, None, 0, None", "root"),
    ("quotactl_fd", 443, 443, "-1, 0, 0, None", ""),
    ("swapon", 167, 224, "b'/absent', 0", "root"),
    ("swapoff", 168, 225, "b'/absent'", "root"),
    ("reboot", 169, 142, "0, 0, 0, None", "root"),
    ("acct", 163, 89, "b'/absent'", "root"),
    ("syslog", 103, 116, "99, None, 0", "root"),
    ("fanotify_init", 300, 262, "0xFFFFFFFF, 0", "root"),
    ("fanotify_mark", 301, 263, "-1, 0, 0, -1, None", ""),
    ("settimeofday", 164, 170, "1, None", ""),
    ("clock_settime", 227, 112, "0, None", ""),
    ("clock_adjtime", 305, 266, "0, None", ""),
    ("adjtimex", 159, 171, "None", ""),
    ("sethostname", 170, 161, "None, -1", "root"),
    ("setdomainname", 171, 162, "None, -1", "root"),
    ("remap_file_pages", 216, 234, "1, 0, 0, 0, 0", ""),
    ("iopl", 172, None, "4", ""),
    ("ioperm", 173, None, "0xFFFFFF, 1, 1", ""),
    ("modify_ldt", 154, None, "0, None, 0", ""),
    ("ustat", 136, None, "0, None", ""),
    ("sysfs", 139, None, "3", ""),
    ("uselib", 134, None, "b'/absent'", ""),
)
HERE = 1 if MACHINE == "x86_64" else 2
PROBE = (
    "def number(nr, *args):\n"
    "    words = [a if isinstance(a, bytes) or a is None else ctypes.c_long(a) for a in args]\n"
    "    return call('syscall', nr, *words)\n"
    "tell("
    + ", ".join(f"{row[0]}=number({row[HERE]}, {row[3]})" for row in CALLS if row[HERE] is not None)
    + ")"
)
EXPECTED = {
    row[0]: "ENOSYS" if row[0] == "clone3" else "EPERM" for row in CALLS if row[HERE] is not None
}
NEEDS_ROOT = {row[0] for row in CALLS if row[4]}


@pytest.fixture
async def bare() -> AsyncIterator[Box]:
    """Sandboxes that lack the filter and nothing else."""
    async with changed_launcher("seccomp.restrict_launcher = lambda: False") as box:
        assert not box.launcher.seccomp
        yield box


async def test_programs_and_the_launcher_are_filtered(box: Box, bare: Box) -> None:
    assert box.launcher.seccomp
    async with box.start("/bin/sleep", "60") as running:
        init = running.process.pid
        assert status(init, "Seccomp") == ["2"]
        assert status(box.launcher.pid, "Seccomp") == ["2"]
    probe = "tell(mode=status('Seccomp'))"
    assert await box.probe(probe) == {"mode": ["2"]}
    assert await bare.probe(probe) == {"mode": ["0"]}


async def test_calls_that_no_sandbox_needs_are_refused(
    box: Box, bare: Box, outside: Outside
) -> None:
    assert await box.probe(PROBE) == EXPECTED
    control = await bare.probe(PROBE)
    reached = {name for name, code in control.items() if code != EXPECTED[name]}
    assert set(EXPECTED) - reached <= NEEDS_ROOT
    if os.geteuid() == 0:
        control = outside(PROBE)
        assert not {name for name in NEEDS_ROOT if control[name] == EXPECTED[name]}


CLONE = f"""
def clone(flags):
    pid = libc.syscall({56 if MACHINE == "x86_64" else 220}, ctypes.c_ulong(flags | 17), 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    if pid < 0:
        return errno.errorcode[ctypes.get_errno()]
    os.waitpid(pid, 0)
    return "ok"
bits = dict(ns=17, cgroup=25, uts=26, ipc=27, user=28, pid=29, net=30)
tell(plain=clone(0), dirty=clone(1 << 40), **{{n: clone(1 << bit) for n, bit in bits.items()}})
"""


@needs_root
async def test_clone_makes_processes_but_no_namespace(box: Box, outside: Outside) -> None:
    seen = await box.probe(CLONE)
    assert (seen.pop("plain"), seen.pop("dirty")) == ("ok", "ok")
    assert set(seen.values()) == {"EPERM"}
    assert set(outside(CLONE).values()) == {"ok"}


async def test_no_terminal_is_typed_into_whatever_the_upper_half_of_the_request_holds(
    box: Box, bare: Box
) -> None:
    probe = """
ioctl = 16 if os.uname().machine == "x86_64" else 29
null, (_, slave) = os.open("/dev/null", os.O_RDWR), os.openpty()
def request(fd, number):
    return call("syscall", ioctl, fd, ctypes.c_ulong(number), ctypes.create_string_buffer(8))
tell(refused=[request(null, n | high) for n in (0x5412, 0x541C) for high in (0, 1 << 32, 1 << 63)],
     discipline=request(slave, 0x5423), allowed=request(slave, 0x5413), none=request(null, 0x5413))
"""
    seen = await box.probe(probe)
    assert seen == {
        "refused": ["EPERM"] * 6, "discipline": "EPERM", "allowed": "ok", "none": "ENOTTY"
    }  # fmt: skip
    assert await bare.probe(probe) == {
        "refused": ["ENOTTY"] * 6, "discipline": "ok", "allowed": "ok", "none": "ENOTTY"
    }  # fmt: skip


async def test_sockets_are_local_or_internet_ones(box: Box, bare: Box) -> None:
    probe = """
def new(*arguments):
    return attempt(lambda: socket.socket(*arguments).close())
tell(
    vsock=new(40, 1), packet=new(17, 3), algorithms=new(38, 5), bluetooth=new(31, 3, 0),
    key=new(15, 3, 2), can=new(29, 3, 1), xdp=new(44, 3), tipc=new(30, 2), rds=new(21, 5),
    netfilter=new(16, 3, 12), diagnostics=new(16, 3, 4), generic=new(16, 3, 16),
    raw=new(2, 3, 1), sctp=new(2, 1, 132), mptcp=new(2, 1, 262), udplite=new(2, 2, 136),
    unix=new(1, 1), tcp=new(2, 1), udp=new(2, 2), tcp6=new(10, 1), udp6=new(10, 2),
    route=new(16, 3, 0), pair=attempt(socket.socketpair), interfaces=attempt(socket.if_nameindex),
)"""
    seen, control = await box.probe(probe), await bare.probe(probe)
    allowed = ("unix", "tcp", "udp", "tcp6", "udp6", "route", "pair", "interfaces")
    assert {seen.pop(name) for name in allowed} == {"ok"}
    others = ("netfilter", "diagnostics", "generic", "raw", "sctp", "mptcp", "udplite")
    assert {seen.pop(name) for name in others} == {"EPERM"}
    assert set(seen.values()) == {"EAFNOSUPPORT"}
    # Which of them a kernel has differs; some it has.
    assert "ok" in {control[name] for name in ("vsock", "tipc", "rds", "can")}
    assert "ok" in {control[name] for name in others}


async def test_personality_answers_and_changes_nothing(box: Box, bare: Box) -> None:
    probe = """
libc.personality.argtypes = [ctypes.c_ulong]
tell(query=call("personality", 0xFFFFFFFF), fixed_addresses=call("personality", 0x0040000),
     executable_data=call("personality", 0x0400000), high=call("personality", 1 << 32 | 0x40000))
"""
    seen = await box.probe(probe)
    assert seen.pop("query") == "ok"
    assert set(seen.values()) == {"EPERM"}
    assert set((await bare.probe(probe)).values()) == {"ok"}


INT_80 = """
import mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
# push rbx; mov eax, edi; mov ebx, esi; xchg ecx, edx; int 0x80; pop rbx; ret
code.write(bytes.fromhex("53 89f8 89f3 87d1 cd80 5b c3"))
enter = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint] * 4)(
    ctypes.addressof(ctypes.c_char.from_buffer(code)))
def compat(nr, *arguments):
    done = enter(nr, *(*arguments, 0, 0, 0)[:3])
    return "ok" if done >= 0 else errno.errorcode[-done]
tell(
    same=enter(20, 0, 0, 0) == os.getpid(),
    ptrace=compat(26, 2, 1 << 22), keyctl=compat(288, 0, 0xFFFFFFFD), unshare=compat(310, 0),
    setns=compat(346, 0xFFFFFFFF), io_uring=compat(425, 1), mbind=compat(274),
    personality=compat(136, 0x40000), adjtimex=compat(124), clone3=compat(435),
    namespace=compat(120, 1 << 17 | 1 << 9), vsock=compat(359, 40, 1),
    hidden=compat(102, 1, 0), sti=compat(54, 0, 0x5412), unknown=compat(600),
)
"""


@pytest.mark.skipif(MACHINE != "x86_64", reason="int 0x80 is x86's")
async def test_32_bit_calls_meet_the_same_wall(box: Box, bare: Box) -> None:
    argv, more = bare.python("import os\n" + INT_80)
    control = await bare.run(*argv, **more)
    if control.exit.signal is not None:
        pytest.skip("this kernel has no 32-bit calls")
    seen, reached = await box.probe(INT_80), await bare.probe(INT_80)
    assert seen.pop("same") is reached.pop("same") is True
    assert seen.pop("clone3") == seen.pop("unknown") == "ENOSYS"
    assert seen.pop("vsock") == seen.pop("hidden") == "EAFNOSUPPORT"
    assert set(seen.values()) == {"EPERM"}
    assert reached.pop("clone3") == "EINVAL"
    assert not {name for name in seen if reached[name] == "EPERM"}, reached


@pytest.mark.skipif(MACHINE != "x86_64", reason="x32 is x86's")
async def test_x32_calls_are_not_there(box: Box) -> None:
    probe = "tell(getpid=call('syscall', 0x40000000 | 39), native=call('syscall', 39))"
    assert await box.probe(probe) == {"getpid": "ENOSYS", "native": "ok"}


async def test_what_runtimes_rely_on_works(box: Box) -> None:
    seen = await box.probe("""
import _thread, fcntl, select, tempfile, time
def thread():
    lock = _thread.allocate_lock()
    lock.acquire()
    _thread.start_new_thread(lock.release, ())
    lock.acquire()
def spawn():
    assert os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)[1] == 0
def child():
    pid = os.fork()
    if pid == 0:
        os._exit(3)
    fd = os.pidfd_open(pid)
    select.select([fd], [], [])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
def flock():
    with tempfile.TemporaryFile() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.posix_fallocate(file.fileno(), 0, 4096)
def rename():
    os.makedirs("/tmp/a/b"); os.makedirs("/tmp/c")
    open("/tmp/a/b/file", "w").close()
    os.rename("/tmp/a/b/file", "/tmp/c/file")
    os.link("/tmp/c/file", "/tmp/a/link"); os.symlink("file", "/tmp/c/symlink")
    os.mkfifo("/tmp/c/fifo"); os.chmod("/tmp/c/file", 0o700); os.utime("/tmp/c/file")
def sandbox_of_its_own():
    buffer = ctypes.create_string_buffer(8)
    fd = libc.syscall(444, None, 0, 1)
    assert fd >= 0 or ctypes.get_errno() in (errno.EOPNOTSUPP, errno.ENOSYS)
    program = ctypes.create_string_buffer(bytes.fromhex("0600000000 00ff7f".replace(" ", "")), 8)
    header = ctypes.create_string_buffer(16)
    ctypes.c_ushort.from_buffer(header).value = 1
    ctypes.c_void_p.from_buffer(header, 8).value = ctypes.addressof(program)
    if libc.prctl(22, 2, header, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
checks = dict(
    thread=thread, spawn=spawn, child=child, flock=flock, rename=rename,
    timer=lambda: os.close(libc.timerfd_create(1, 0o2000000)), event=lambda: os.eventfd(0),
    random=lambda: os.getrandom(8), limits=lambda: resource.prlimit(0, resource.RLIMIT_NOFILE),
    pty=os.openpty, memfd=lambda: os.memfd_create("x"), epoll=select.epoll,
    affinity=lambda: os.sched_getaffinity(0), nice=lambda: os.nice(1), copy=lambda: os.sync(),
    shared=lambda: call("shmget", 0, 4096, 0o1600), sandbox=sandbox_of_its_own,
    inotify=lambda: call("inotify_init1", 0), sleep=lambda: time.sleep(0.001),
)
tell(**{name: attempt(check) for name, check in checks.items()})
""")
    assert set(seen.values()) == {"ok"}, seen


@pytest.mark.skipif(shutil.which("git", path="/usr/bin") is None, reason="no git in the system")
async def test_git_works(box: Box, workspace: Path) -> None:
    mount = MountSpec(str(workspace), "/workspace", readonly=False, idmap=True)
    result = await box.sh(
        "cd /workspace && git init -q . && git config user.email a@example.org &&"
        " git config user.name a && seq 9999 > file && git add . && git commit -qm one &&"
        " git checkout -qb side && echo x >> file && git commit -qam two && git gc -q &&"
        " git clone -q . /tmp/copy && git -C /tmp/copy log --format=%s && git fsck",
        mounts=(mount,),
        env=["PATH=/usr/bin:/bin", "HOME=/home/agent"],
    )
    assert result.out.split() == [b"two", b"one"], result.err
    assert result.exit.code == 0


@pytest.mark.skipif(shutil.which("node", path="/usr/bin") is None, reason="no node in the system")
async def test_node_works(box: Box) -> None:
    result = await box.run(
        "/usr/bin/node",
        "-e",
        """
const {Worker} = require("worker_threads"), cp = require("child_process"), fs = require("fs");
const os = require("os"), net = require("net"), crypto = require("crypto");
os.networkInterfaces(); crypto.randomBytes(8); fs.watch("/tmp").close();
const child = cp.execFileSync("/bin/echo", ["child"]).toString().trim();
const server = net.createServer(s => s.end("socket")).listen("/tmp/s", () =>
  net.connect("/tmp/s").on("data", said => {
    server.close();
    new Worker("require('worker_threads').parentPort.postMessage('worker')", {eval: true})
      .on("message", m => fs.promises.readFile("/etc/hostname", "utf8")
        .then(name => console.log(child, String(said), m, name.trim())));
  }));
""",
        env=["PATH=/usr/bin:/bin", "HOME=/home/agent"],
    )
    assert result.out == b"child socket worker sandbox\n", result.err
    assert result.exit.code == 0


async def test_a_machine_that_has_no_programs_says_so() -> None:
    async with changed_launcher("seccomp.MACHINES = ()") as box:
        assert not box.launcher.seccomp
        assert await box.probe("tell(mode=status('Seccomp'))") == {"mode": ["0"]}


async def test_a_launcher_that_lost_its_programs_does_not_start() -> None:
    with pytest.raises(KernelError, match=r"open /absent/.*calls\.bpf: ENOENT"):
        async with changed_launcher("seccomp._DIRECTORY = '/absent'"):
            pytest.fail("it runs without its filter")


async def test_a_sandbox_that_gets_no_filter_does_not_start() -> None:
    change = "seccomp._install = lambda program, once=iter((0, 0)): next(once)"
    async with changed_launcher(change) as box:
        assert box.launcher.seccomp
        with pytest.raises(KernelError):
            await box.run("/bin/true")
