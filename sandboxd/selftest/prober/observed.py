"""What only the host can see of a sandbox: who it runs as, what its cgroup allows, what it hides.

The runner looks, at ``plan.target``: the init of an agent's or a tool's sandbox, or, as the
control, an ordinary process of the host.
"""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH123

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from sandboxd.selftest.prober.probe import HOST, OWN_UID, Plan, add

_USERS = "Escape: users of the host"
_MOUNTS = "Escape: mounts"
_THREAT = "Exhaustion"
_CGROUP = "cgroup"

#: What a cgroup of ours has beside the memory limit of its sandbox, at most.
_MARGIN = 64 << 20


def _status(pid: int, field: str) -> int:
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _shares_uid(plan: Plan) -> tuple[str, str]:
    """With another session, or the daemon; the control with the selftest itself."""
    own = _status(plan.target, "Uid")
    names = ("neighbour", "daemon", "launcher") if plan.place != HOST else ("selftest",)
    shared = [name for name in names if _status(plan.pids[name], "Uid") == own]
    return ("ok" if shared else "own"), ", ".join(shared)


#: Enters a process's mount namespace, by way of the user namespace that owns it where that is
#: another, and looks for a file.
_LOOK = """
import ctypes, fcntl, os, sys
libc = ctypes.CDLL(None, use_errno=True)
mounts = os.open(f"/proc/{sys.argv[1]}/ns/mnt", os.O_RDONLY)
owner = fcntl.ioctl(mounts, 0xB701)
def same(a, b):
    return os.fstat(a).st_ino == os.stat(b).st_ino
for fd, kind, own in ((owner, 0x10000000, "user"), (mounts, 0x20000, "mnt")):
    if not same(fd, f"/proc/self/ns/{own}") and libc.setns(fd, kind) < 0:
        sys.exit(f"setns {own}: {os.strerror(ctypes.get_errno())}")
print("ok" if os.path.exists(sys.argv[2]) else "gone")
"""


def _tree(plan: Plan) -> tuple[str, str]:
    """Whether any of the host's tree is left in its mount namespace, if out of its way."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LOOK, str(plan.program), plan.paths["bait"]],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "broke", done.stderr.strip()[-200:]


add("share a host uid", _USERS, _shares_uid, "own", needs=OWN_UID, outside=HOST, observed=True,
    says="the selftest's child has its uid")  # fmt: skip
add("the host's tree in the mount namespace", _MOUNTS, _tree, "gone", outside=HOST, observed=True,
    says="in the host's own it is found")  # fmt: skip


def _setting(pid: int, controller: str, new: str, old: str) -> str:
    """A file of the cgroup that limits a process, of either version; "" where there is none."""
    groups: dict[str, str] = {}
    with open(f"/proc/{pid}/cgroup") as lines:
        for line in lines:
            _, names, path = line.rstrip("\n").split(":", 2)
            groups |= dict.fromkeys(names.split(","), path)
    for name, file in ((controller, old), ("", new)):
        for point in _mounts(name, groups.get(name)):
            try:
                with open(f"{point}/{file}") as setting:
                    return setting.read().strip()
            except OSError:
                continue
    return ""


def _mounts(name: str, path: str | None) -> list[str]:
    """Where the hierarchy of a v1 controller, or v2 (""), shows the cgroup ``path``."""
    if path is None:
        return []
    found = []
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            kind = after.split()[0]
            root, point = before.split()[3:5]
            controllers = after.split()[-1].split(",")
            if kind == "cgroup2" if not name else kind == "cgroup" and name in controllers:
                found.append(os.path.normpath(f"{point}/{os.path.relpath(path, root)}"))
    return found


def _is(
    controller: str, new: str, old: str, right: Callable[[str, Plan], bool]
) -> Callable[[Plan], tuple[str, str]]:
    def attack(plan: Plan) -> tuple[str, str]:
        value = _setting(plan.target, controller, new, old)
        return ("limited" if right(value, plan) else "ok"), value

    return attack


def _memory(value: str, plan: Plan) -> bool:
    return value.isdigit() and plan.memory <= int(value) <= plan.memory + _MARGIN


for _words, _controller, _new, _old, _right in (
    ("memory", "memory", "memory.max", "memory.limit_in_bytes", _memory),
    ("processes", "pids", "pids.max", "pids.max", lambda v, plan: v == str(plan.processes)),
    ("processors", "cpu", "cpu.max", "cpu.cfs_quota_us",
     lambda v, plan: v.split(" ")[0] == str(plan.processors * 100_000)),
):  # fmt: skip
    add(f"whole sandbox: no limit of {_words}", _THREAT,
        _is(_controller, _new, _old, _right), "limited", needs=_CGROUP, outside=HOST,
        observed=True, says="an ordinary process has no such limit")  # fmt: skip


def _disks(plan: Plan) -> tuple[str, str]:
    value = _setting(plan.target, "blkio", "io.max", "blkio.throttle.write_bps_device")
    return ("limited" if str(plan.io) in value else "ok"), value[:100]


add("whole sandbox: no limit of disk traffic", _THREAT, _disks, "limited", needs="cgroup io",
    outside=HOST, observed=True, says="an ordinary process has no such limit")  # fmt: skip


def _swap(plan: Plan) -> tuple[str, str]:
    """Off, or (v1) counted together with memory, or never used."""
    swap = _setting(plan.target, "memory", "memory.swap.max", "memory.memsw.limit_in_bytes")
    never = _setting(plan.target, "memory", "", "memory.swappiness") == "0"
    off = swap == "0" or _memory(swap, plan) or never
    return ("off" if off else "ok"), swap


add("whole sandbox: swap", _THREAT, _swap, "off", needs=_CGROUP, outside=HOST, observed=True,
    says="an ordinary process may be swapped")  # fmt: skip
