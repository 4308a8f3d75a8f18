"""Devices, sysfs, kernel knobs and control groups."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH110, PTH116, PTH123, PTH208

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable

from sandboxd.selftest.prober.probe import HOST, SCRATCH, Plan, add, open_

_DEVICES = "Escape: devices"
_KNOBS = "Escape: kernel knobs"
_CGROUPS = "Escape: control groups"


def _present(path: str) -> Callable[[Plan], None]:
    return lambda plan: os.stat(path) and None


def _null(plan: Plan) -> None:
    open_("/dev/null", os.O_RDWR)


for _name in ("mem", "port", "kmsg", "kvm", "fuse", "net/tun", "vhost-net", "vhost-vsock", "vsock",
              "loop-control", "loop0", "vda", "sda", "nvme0n1", "dm-0", "mapper/control",
              "console", "tty0", "ttyS0", "vcs", "uinput", "input/event0", "dri/card0", "snd/timer",
              "rtc0", "hpet", "userfaultfd", "autofs", "btrfs-control", "hwrng"):  # fmt: skip
    add(f"/dev/{_name}", _DEVICES, _present(f"/dev/{_name}"), "ENOENT", outside=HOST,
        fallback=_null, says="outside; /dev/null inside")  # fmt: skip


def _others(plan: Plan) -> tuple[str, str]:
    """Only the six devices that every program may have."""
    allowed = {"null", "zero", "full", "random", "urandom", "tty"}
    more = []
    for name in os.listdir("/dev"):
        kind = os.lstat(f"/dev/{name}").st_mode
        if (stat.S_ISCHR(kind) or stat.S_ISBLK(kind)) and name not in allowed:
            more.append(name)
    return ("none" if not more else "ok"), ", ".join(sorted(more))[:200]


def _entropy(plan: Plan) -> None:
    """RNDADDTOENTCNT with nothing to add."""
    with open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, 0x40045201, b"\0\0\0\0")


def _asks_entropy(plan: Plan) -> None:
    with open("/dev/urandom", "rb", buffering=0) as device:
        fcntl.ioctl(device, 0x80045200, b"\0\0\0\0")  # RNDGETENTCNT


add("devices beyond the six harmless ones", _DEVICES, _others, "none", outside=HOST,
    says="outside there are more")  # fmt: skip
add("credit entropy to the kernel", _DEVICES, _entropy, "EPERM", outside=SCRATCH,
    fallback=_asks_entropy, says="asking for it inside")  # fmt: skip


def _writes(path: str) -> Callable[[Plan], None]:
    return lambda plan: open_(path, os.O_WRONLY)


def _rewrites(path: str) -> Callable[[Plan], str | None]:
    """Truncating says EROFS before the kernel looks at owners; a knob itself ignores it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    return lambda plan: open_(path, flags) if os.path.exists(path) else "absent"


def _reads_knob(plan: Plan) -> None:
    open_("/proc/sys/kernel/ostype")


for _name in ("kernel/core_pattern", "kernel/modprobe", "kernel/hostname", "kernel/sysrq",
              "kernel/randomize_va_space", "kernel/ns_last_pid", "vm/drop_caches",
              "net/ipv4/ip_forward", "user/max_user_namespaces", "fs/suid_dumpable"):  # fmt: skip
    add(f"write /proc/sys/{_name}", _KNOBS, _rewrites(f"/proc/sys/{_name}"), "EROFS", "absent",
        outside=SCRATCH, fallback=_reads_knob, says="the same as root outside")  # fmt: skip


def _masked(name: str) -> Callable[[Plan], str]:
    """Empty, absent or closed: nothing is told."""

    def attack(plan: Plan) -> str:
        try:
            fd = os.open(f"/proc/{name}", os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return "absent"
        with open(fd, "rb", buffering=0) as file:
            return "ok" if file.read(64) else "empty"

    return attack


def _own_proc(plan: Plan) -> str:
    with open("/proc/self/stat", "rb") as file:
        return "ok" if file.read(64) else "empty"


for _name in ("kcore", "kallsyms", "keys", "key-users", "kmsg", "kpagecount", "kpageflags",
              "timer_list", "sched_debug", "interrupts", "latency_stats"):  # fmt: skip
    add(f"read /proc/{_name}", _KNOBS, _masked(_name), "empty", "absent", outside=HOST,
        fallback=_own_proc, says="outside it tells something")  # fmt: skip


def _uncovered(name: str) -> Callable[[Plan], str]:
    """Whether a directory of /proc is that of the kernel, or one of ours lies over it."""

    def attack(plan: Plan) -> str:
        try:
            there = os.stat(f"/proc/{name}")
        except FileNotFoundError:
            return "absent"
        return "ok" if there.st_dev == os.stat("/proc").st_dev else "covered"

    return attack


for _name in ("acpi", "asound", "scsi"):
    add(f"see /proc/{_name}", _KNOBS, _uncovered(_name), "covered", "absent", outside=HOST,
        fallback=_own_proc, says="outside it is the kernel's")  # fmt: skip


def _sysrq(plan: Plan) -> str:
    """Opening it is harmless, writing wouldn't be."""
    try:
        fd = os.open("/proc/sysrq-trigger", os.O_WRONLY)
    except FileNotFoundError:
        return "masked"
    device = os.fstat(fd)
    return "masked" if stat.S_ISCHR(device.st_mode) else "ok"


add("write /proc/sysrq-trigger", _KNOBS, _sysrq, "masked", "EACCES", outside=HOST,
    fallback=_own_proc, says="outside it opens")  # fmt: skip
for _path in ("/sys", "/sys/kernel/debug", "/sys/kernel/security", "/sys/firmware", "/sys/module",
              "/sys/fs/bpf", "/sys/power/state"):  # fmt: skip
    add(f"see {_path}", _KNOBS, _present(_path), "ENOENT", outside=HOST, fallback=_own_proc,
        says="outside it is there")  # fmt: skip


def _cgroup_paths(plan: Plan) -> tuple[str, str]:
    """A cgroup namespace shows every path as its own root."""
    with open("/proc/self/cgroup") as lines:
        paths = [line.strip().split(":", 2)[2] for line in lines]
    told = [path for path in paths if path != "/"]
    return ("none" if not told else "ok"), " ".join(told)[:200]


add("see /sys/fs/cgroup", _CGROUPS, _present("/sys/fs/cgroup"), "ENOENT", outside=HOST,
    fallback=_own_proc, says="outside it is there")  # fmt: skip
add("cgroup paths of the host", _CGROUPS, _cgroup_paths, "none", outside=HOST, fallback=_own_proc,
    says="outside they are told")  # fmt: skip
add("move to another cgroup", _CGROUPS, _writes("/sys/fs/cgroup/cgroup.procs"), "ENOENT",
    outside=HOST, fallback=_own_proc, says="outside it opens")  # fmt: skip
add("cgroup release agent", _CGROUPS, _writes("/sys/fs/cgroup/memory/release_agent"), "ENOENT",
    outside=HOST, fallback=_own_proc, says="outside it opens")  # fmt: skip
