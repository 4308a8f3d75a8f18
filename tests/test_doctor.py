"""The doctor on this kernel as it is, and with pieces really taken away: namespaces of a user
namespace that may have none, a covered /proc, a seccomp filter, a read-only or volatile state
directory, a low limit. Nothing is faked but what only other machines have."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from public_copy import PROJECT, public_copy

from sandboxd import doctor
from sandboxd.doctor import probes
from sandboxd.isolation.wire import CgroupState
from sandboxd.paths import Paths

ORDER = [
    "kernel", "a sandbox", "user namespaces", "namespaces", "mounts", "/proc", "idmapped mounts",
    "Landlock", "seccomp filters", "openat2", "pidfd", "SO_PEERPIDFD", "clone3", "cgroups",
    "systemd", "key custody", "swap", "Python", "state directory", "runtime directory",
    "temporary files", "open files", "keyrings",
]  # fmt: skip

RUN = "import sys; from sandboxd import doctor; sys.exit(doctor.run(json=True))"
#: Put before RUN: a filter that answers one system call with an errno, like a container runtime.
FILTERED = """
import ctypes, struct, sys
number, error = int(sys.argv[1]), int(sys.argv[2])
code = b"".join(struct.pack("=HBBI", *i) for i in (
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error), (0x06, 0, 0, 0x7FFF0000)))
buffer = ctypes.create_string_buffer(code, len(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)), 0, 0) == 0
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="prepares the host's side as root")
x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="filters by x86-64 numbers")


def python_for_everybody() -> str:
    """An interpreter that an ordinary user may run: this one can lie in root's home."""
    system = shutil.which("python3", path="/usr/bin")
    if system is None:
        pytest.skip("no system Python that an ordinary user may run")
    version = subprocess.check_output([system, "-c", "import sys; print(*sys.version_info[:2])"])
    if tuple(map(int, version.split())) < (3, 11):
        pytest.skip("the system's Python is older than 3.11")
    return system


class Findings:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.stderr == ""
        self.status = done.returncode
        report = json.loads(done.stdout)
        self.ready: bool = report["ready"]
        self.checks: dict[str, dict] = {c["name"]: c for c in report["checks"]}

    def __getitem__(self, name: str) -> dict:
        return self.checks[name]


def examine(
    *, code: str = RUN, arguments: tuple[str, ...] = (), before: str = "", user: bool = False,
    wrap: tuple[str, ...] = (), **environ: str,
) -> Findings:  # fmt: skip
    """Run the doctor in its own process, after the shell lines ``before``, as nobody if asked."""
    python = python_for_everybody() if user else sys.executable
    command = [python, "-c", code, *arguments]
    if user:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", *command]
    script = f"set -e\n{before}\nexec {shlex.join(command)}"
    with public_copy() if user else contextlib.nullcontext(PROJECT) as project:
        done = subprocess.run(
            [*wrap, "/bin/sh", "-c", script],
            cwd=project,
            env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "PYTHONPATH": str(project),
                 "PYTHONDONTWRITEBYTECODE": "1", **environ},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
    return Findings(done)


NEW_MOUNTS = ("unshare", "--mount", "--propagation=private")
#: Starts a command in a user namespace that knows root and nobody, with limits of its own.
IN_USER_NAMESPACE = """
import ctypes, os, sys
ready, go = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    assert ctypes.CDLL(None).unshare(0x10000000) == 0
    os.close(ready[1]), os.close(go[1]), os.read(go[0], 1)
    os.execvp(sys.argv[1], sys.argv[1:])
os.close(ready[1]), os.read(ready[0], 1)
for file in ("uid_map", "gid_map"):
    open(f"/proc/{pid}/{file}", "w").write("0 0 65536")
os.close(go[1])
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
NEW_USERS = (sys.executable, "-c", IN_USER_NAMESPACE)


def test_every_piece_is_looked_at_and_explained() -> None:
    found = doctor.checks()
    named = [c.name for c in found if not c.name.endswith(" namespace")]
    assert [n for n in ORDER if n in named] == named
    for check in found:
        assert check.detail
        assert (check.state == "ok") == (check.costs == "") == (check.fix == ""), check


@needs_root
def test_root_on_a_capable_kernel_is_ready() -> None:
    found = examine()
    assert found.status == 0
    assert found.ready
    assert found["namespaces"]["detail"].startswith("mount pid net ipc uts")
    assert [found[n]["state"] for n in ("mounts", "/proc")] == ["ok", "ok"]
    assert found["a sandbox"]["detail"].startswith("built, used and gone in ")


@needs_root
def test_an_ordinary_user_on_a_capable_kernel_is_ready() -> None:
    found = examine(user=True, HOME="/nonexistent", SANDBOXD_RUNTIME="/tmp/r")
    assert found.status == 0
    assert found["user namespaces"]["state"] == "ok"
    assert found["a sandbox"]["state"] == "ok"
    assert found["idmapped mounts"]["detail"].startswith("not used")
    assert found["cgroups"]["state"] == "degraded"
    assert "systemd-run --user" in found["cgroups"]["fix"]


@needs_root
def test_a_user_who_may_make_no_user_namespace_can_isolate_nothing() -> None:
    found = examine(
        user=True, wrap=NEW_USERS, before="echo 0 > /proc/sys/user/max_user_namespaces",
        HOME="/nonexistent",
    )  # fmt: skip
    assert found.status == 6
    assert not found.ready
    users = found["user namespaces"]
    assert (users["state"], users["detail"]) == ("missing", "user.max_user_namespaces is 0")
    assert users["fix"].startswith("sysctl -w user.max_user_namespaces=")
    assert found["mount namespace"]["fix"] == "solve user namespaces first"


@needs_root
def test_root_needs_user_namespaces_too() -> None:
    found = examine(wrap=NEW_USERS, before="echo 0 > /proc/sys/user/max_user_namespaces")
    assert found.status == 6
    assert found["user namespaces"]["state"] == "missing"
    assert found["namespaces"]["state"] == "ok"
    assert found["a sandbox"]["detail"] == "can't be built: unshare: ENOSPC (user)"


@needs_root
def test_a_namespace_limit_is_named_with_its_setting() -> None:
    found = examine(wrap=NEW_USERS, before="echo 0 > /proc/sys/user/max_net_namespaces")
    assert found.status == 6
    net = found["net namespace"]
    assert (net["state"], net["detail"]) == ("missing", "unshare: ENOSPC (net)")
    assert net["fix"] == "raise user.max_net_namespaces (sysctl)"
    assert "net" not in found["namespaces"]["detail"].split()


@needs_root
def test_a_time_namespace_is_not_worth_stopping_for() -> None:
    found = examine(wrap=NEW_USERS, before="echo 0 > /proc/sys/user/max_time_namespaces")
    assert found["time namespace"]["state"] == "degraded"
    assert found.status == 0


COVER_PROC = "mount --bind /dev/null /proc/kallsyms"


@needs_root
def test_a_covered_proc_stops_an_ordinary_user() -> None:
    found = examine(user=True, wrap=NEW_MOUNTS, before=COVER_PROC, HOME="/nonexistent")
    assert found.status == 6
    proc = found["/proc"]
    assert (proc["state"], proc["detail"]) == ("missing", "fsmount: EPERM (proc)")
    assert "mount too revealing" in proc["fix"]


@needs_root
def test_a_covered_proc_is_no_obstacle_for_root() -> None:
    found = examine(wrap=NEW_MOUNTS, before=COVER_PROC)
    assert found["/proc"]["state"] == "ok"
    assert "not inside a user namespace (fsmount: EPERM" in found["/proc"]["detail"]


@needs_root
@x86_64
@pytest.mark.parametrize(
    ("number", "error", "name", "state", "fix"),
    [
        (444, 1, "Landlock", "missing", "let the container's seccomp profile pass"),
        (444, 95, "Landlock", "missing", "add landlock to the kernel's lsm="),
        (444, 38, "Landlock", "missing", "boot a kernel of 5.13"),
        (437, 38, "openat2", "missing", "not RestrictSUIDSGID="),
        (435, 38, "clone3", "degraded", "Linux 5.3 or later"),
        (434, 38, "pidfd", "missing", "Linux 5.3 or later"),
        (442, 38, "mounts", "missing", "boot a kernel of 5.12"),
        (442, 1, "mounts", "missing", "let the container runtime"),
    ],
)
def test_a_refused_system_call_is_told_with_its_fix(
    number: int, error: int, name: str, state: str, fix: str
) -> None:
    found = examine(code=FILTERED + RUN, arguments=(str(number), str(error)))
    assert found[name]["state"] == state
    assert fix in found[name]["fix"]
    assert found.status == (6 if name in ("mounts", "openat2", "pidfd") else 0)
    assert found["a sandbox"]["state"] == ("ok" if found.ready else "missing")


@needs_root
@x86_64
def test_root_that_may_not_unshare_can_isolate_nothing() -> None:
    found = examine(code=FILTERED + RUN, arguments=("272", "1"))
    assert found.status == 6
    assert "CAP_SYS_ADMIN" in found["pid namespace"]["fix"]
    assert found["pid namespace"]["detail"] == "unshare: EPERM (pid)"


@needs_root
@pytest.mark.parametrize(
    ("options", "costs"),
    [("rw", "store and audit log are gone after a reboot"), ("ro", "nothing is audited")],
)
def test_a_state_directory_that_keeps_nothing_is_told(
    tmp_path: Path, options: str, costs: str
) -> None:
    found = examine(
        wrap=NEW_MOUNTS,
        before=f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(tmp_path))}",
        SANDBOXD_STATE=str(tmp_path / "state"),
    )
    assert found["state directory"]["state"] == "degraded"
    assert costs in found["state directory"]["costs"]
    assert "on tmpfs" in found["state directory"]["detail"]
    assert found.status == 0


@needs_root
def test_a_mount_point_with_a_space_is_recognised(tmp_path: Path) -> None:
    at = tmp_path / "a place"
    at.mkdir()
    found = examine(
        wrap=NEW_MOUNTS,
        before=f"mount -t tmpfs tmpfs {shlex.quote(str(at))}",
        SANDBOXD_STATE=str(at),
    )
    assert "on tmpfs" in found["state directory"]["detail"]


@needs_root
def test_unencrypted_swap_is_told_and_memory_backed_swap_is_not(tmp_path: Path) -> None:
    header = "Filename\tType\tSize\tUsed\tPriority\n"
    (tmp_path / "swaps").write_text(
        header + "/dev/vdz1 partition 1 0 -2\n/dev/zram0 partition 1 0 9\n"
    )
    cover = f"mount --bind {shlex.quote(str(tmp_path / 'swaps'))} /proc/swaps"
    found = examine(wrap=NEW_MOUNTS, before=cover)
    assert found["swap"]["state"] == "degraded"
    assert found["swap"]["detail"] == "unencrypted: /dev/vdz1"


def test_a_low_limit_of_open_files_is_told() -> None:
    found = examine(wrap=("prlimit", "--nofile=512:1024"))
    assert found["open files"]["state"] == "degraded"
    assert found["open files"]["detail"] == "512, can be raised to 1,024"
    assert "LimitNOFILE=" in found["open files"]["fix"]


@needs_root
@pytest.mark.parametrize(
    ("setting", "value", "room", "fix"),
    [
        ("maxkeys", 200, 200, "sysctl -w kernel.keys.maxkeys=5000 "),
        ("maxbytes", 1000, 200, "sysctl -w kernel.keys.maxbytes=25"),
    ],
)
def test_a_quota_of_few_keys_is_a_remark_to_an_ordinary_user(
    tmp_path: Path, setting: str, value: int, room: int, fix: str
) -> None:
    (tmp_path / "limit").write_text(f"{value}\n")
    cover = f"mount --bind {shlex.quote(str(tmp_path / 'limit'))} /proc/sys/kernel/keys/{setting}"
    found = examine(user=True, wrap=NEW_MOUNTS, before=cover, HOME="/nonexistent")
    keyrings = found["keyrings"]
    assert (keyrings["state"], keyrings["required"]) == ("degraded", False)
    # Other processes of that user may have keys of their own.
    told = int(keyrings["detail"].removeprefix("room for ").split()[0])
    assert 0 < told <= room
    assert "kernel.keys.maxkeys is " in keyrings["detail"]
    assert keyrings["costs"].startswith(f"{told} more sandboxes at once")
    assert fix in keyrings["fix"]
    assert examine(wrap=NEW_MOUNTS, before=cover)["keyrings"]["state"] == "ok"  # root has another


@needs_root
def test_root_of_a_user_namespace_has_the_quota_of_whom_it_is_outside() -> None:
    """``unshare --map-root-user``, as rootless containers: uid 0 there, an ordinary one here."""
    wrap = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
            "unshare", "--user", "--map-root-user")  # fmt: skip
    code = "from sandboxd.doctor import host; import os; print(os.geteuid(), host._outer_uid())"
    with public_copy() as project:
        python = python_for_everybody()
        done = subprocess.run(
            [*wrap, python, "-c", code],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(project)},
            capture_output=True, text=True, check=True, cwd=project,
        )  # fmt: skip
    assert done.stdout.split() == ["0", "65534"]


def test_a_runtime_directory_too_long_for_a_socket_is_told() -> None:
    found = examine(SANDBOXD_RUNTIME="/run/" + "x" * 100)
    assert found["runtime directory"]["state"] == "missing"
    assert "bytes too long" in found["runtime directory"]["detail"]
    assert "--runtime DIR" in found["runtime directory"]["fix"]


def test_the_table_says_costs_and_fixes_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    paths = Paths(Path("/etc/x"), Path("/var/lib/x"), Path("/run/" + "x" * 100))
    status = doctor.run(json=False, paths=paths)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("missing   runtime directory"))
    costs = lines[at + 1].lstrip()
    assert costs == "costs: sockets can't be made: the daemon doesn't start"
    assert lines[at + 2].lstrip().startswith("fix:   choose a shorter one")
    assert lines[-1].startswith("ready" if status == 0 else "not ready")


def test_probes_leave_no_process_no_mount_and_no_cgroup_behind() -> None:
    def traces() -> tuple[list[str], list[str], list[str]]:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        groups = [str(p) for p in Path("/sys/fs/cgroup").rglob("sandboxd-*") if abandoned(p)]
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return mounts, groups, children

    def abandoned(path: Path) -> bool:
        """Whether no launcher holds on to a cgroup of ours: a living one locks it (flock(2))."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # a file, or gone by now
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return path.exists()

    for _ in range(3):  # other daemons of this host come and go, and share its cgroups
        before = traces()
        found = probes.run_probes("/usr")
        after = traces()
        if after == before:
            break
    assert after == before
    assert CgroupState.unpack(found["cgroups"]["detail"]) != CgroupState()


def test_a_probe_that_dies_is_a_finding_not_a_crash() -> None:
    assert probes.in_child(lambda: str(os.kill(os.getpid(), 15))) == {
        "ok": False, "call": "probe", "errno": "", "detail": "the probe ended with wait status 15",
    }  # fmt: skip


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.05)
    result = probes.in_child(lambda: str(os.read(os.pipe()[0], 1)))
    assert result["detail"] == "the probe hung"
