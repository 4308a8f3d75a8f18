"""What a sandbox sees: namespaces, and the root directory."""

from __future__ import annotations

from layer import ISOLATION, Change, Layer, one

__all__ = ["PLACES"]


def _namespace(name: str, flag: str, source: str, *threats: str) -> Layer:
    change = one("sandbox.py", f"    | kernel.CLONE_NEW{flag}\n")
    return Layer(f"{name} namespace", source, change, ("namespaces", *threats))


_NO_USER = (
    Change(ISOLATION + "sandbox.py", "    kernel.unshare(kernel.CLONE_NEWUSER)\n"),
    Change(ISOLATION + "sandbox.py", '    _write("/proc/self/setgroups", b"deny")\n'),
    Change(
        ISOLATION + "sandbox.py",
        '    _write("/proc/self/uid_map", b"%d %d 1" % (INSIDE_ID, uid))\n',
    ),
    Change(
        ISOLATION + "sandbox.py",
        '    _write("/proc/self/gid_map", b"%d %d 1" % (INSIDE_ID, gid))\n',
    ),
    # With the namespace, or the host's own limit would be written.
    Change(
        ISOLATION + "sandbox.py", '    _write("user/max_user_namespaces", b"0", directory=sysctl)\n'
    ),
)

_ONE_UID = (
    Change(
        ISOLATION + "uids.py",
        "            self._next = (self._next + 1) % self._count\n"
        "            if uid in self._taken:\n",
        "            if False:\n",
    ),
)

PLACES: tuple[Layer, ...] = (
    # ---- namespaces
    Layer(
        "user namespace",
        "user_namespaces(7)",
        _NO_USER,
        ("namespaces", "privileges"),
    ),
    Layer("a host uid of its own", "credentials(7)", _ONE_UID, ("users",)),
    Layer(
        "mount namespace",
        "mount_namespaces(7)",
        one(
            "sandbox.py",
            "    kernel.CLONE_NEWNS\n    | kernel.CLONE_NEWIPC\n",
            "    kernel.CLONE_NEWIPC\n",
        ),
        ("namespaces", "mounts"),
    ),
    Layer(
        "pid namespace",
        "pid_namespaces(7)",
        one(
            "launcher.py",
            "            kernel.setns(self.own_pidns, kernel.CLONE_NEWPID)\n"
            "            kernel.unshare(kernel.CLONE_NEWPID)\n",
        ),
        ("namespaces", "processes", "process games"),
    ),
    Layer(
        "ipc namespace",
        "ipc_namespaces(7)",
        one("sandbox.py", "    | kernel.CLONE_NEWIPC\n"),
        ("namespaces", "shared"),
    ),
    _namespace("uts", "UTS", "uts_namespaces(7)", "facts"),
    _namespace("cgroup", "CGROUP", "cgroup_namespaces(7)", "control groups"),
    Layer(
        "network namespace",
        "network_namespaces(7)",
        one(
            "sandbox.py",
            "network = 0 if host_network else kernel.CLONE_NEWNET",
            "network = 0",
        ),
        ("namespaces", "network", "shared"),
    ),
    Layer(
        "time namespace",
        "time_namespaces(7)",
        one("sandbox.py", "    clocks.enter()\n"),
        ("namespaces", "facts"),
    ),
    Layer(
        "time namespace: its offsets",
        "time_namespaces(7), /proc/PID/timens_offsets",
        one("clocks.py", "        os.write(fd, text.encode())\n", "        pass\n"),
        ("facts",),
    ),
    Layer(
        "a generic host name",
        "sethostname(2)",
        one("sandbox.py", "    kernel.sethostname(root.spec.hostname)\n"),
        ("facts",),
    ),
    Layer(
        "no user namespace inside",
        "namespaces(7), /proc/sys/user",
        one("sandbox.py", '    _write("user/max_user_namespaces", b"0", directory=sysctl)\n'),
        ("namespaces",),
        behind=("seccomp",),
    ),
    # ---- the root directory
    Layer(
        "pivot_root",
        "pivot_root(2)",
        one(
            "root.py",
            '        kernel.pivot_root(".", ".")\n        kernel.umount_detached(".")\n',
            '        os.chroot(".")\n',
        ),
        ("mounts", "paths"),
        # In one, the kernel gives no user namespace to who isn't at the root of its mounts.
        behind=("user namespace",),
    ),
    Layer(
        "the host's tree unmounted",
        "pivot_root(2), NOTES",
        one("root.py", '        kernel.umount_detached(".")\n'),
        ("mounts", "paths", "files of the host"),
        behind=("user namespace",),
    ),
    Layer(
        "nosuid",
        "mount_setattr(2)",
        one("kernel.py", "MOUNT_ATTR_NOSUID = 0x02", "MOUNT_ATTR_NOSUID = 0"),
        ("mounts",),
    ),
    Layer(
        "nodev",
        "mount_setattr(2)",
        one("kernel.py", "MOUNT_ATTR_NODEV = 0x04", "MOUNT_ATTR_NODEV = 0"),
        ("mounts",),
    ),
    Layer(
        "read-only system",
        "mount_setattr(2)",
        one("root.py", "READONLY = _LOCKED | kernel.MOUNT_ATTR_RDONLY", "READONLY = _LOCKED"),
        ("planted",),
    ),
    Layer(
        "read-only root directory",
        "mount_setattr(2)",
        one(
            "root.py",
            "        kernel.set_mount_attributes(self.fd, kernel.MOUNT_ATTR_RDONLY, "
            "recursive=False)\n        return sysctl\n",
            "        return sysctl\n",
        ),
        ("planted",),
    ),
    Layer(
        "a root of listed directories",
        "hier(7), sandboxd/isolation/root.py",
        one("root.py", '_SYSTEM = ("/usr", ', '_SYSTEM = ("/usr", "/var", '),
        ("files of the host",),
    ),
    Layer(
        "an /etc of listed files",
        "hier(7), sandboxd/isolation/root.py",
        one("root.py", "_ETC = (\n", '_ETC = (\n    "/etc/shadow",\n'),
        ("files of the host",),
    ),
    Layer(
        "no /sys",
        "sysfs(5)",
        one("root.py", '_SYSTEM = ("/usr", ', '_SYSTEM = ("/usr", "/sys", '),
        ("kernel knobs", "control groups"),
    ),
    Layer(
        "read-only knobs in /proc",
        "proc(5), OCI runtime-spec readonlyPaths",
        one("root.py", "present.intersection(_PROC_READONLY)", "()"),
        ("kernel knobs",),
    ),
    Layer(
        "masked files in /proc",
        "proc(5), OCI runtime-spec maskedPaths",
        one("root.py", "            if name in present:\n", "            if False:\n"),
        ("kernel knobs", "shared"),
    ),
    Layer(
        "masked directories in /proc",
        "proc(5), OCI runtime-spec maskedPaths",
        one("root.py", "present.intersection(_PROC_MASKED_DIRECTORIES)", "()"),
        ("kernel knobs",),
    ),
    Layer(
        "a small /dev",
        "null(4), random(4), tty(4)",
        one(
            "root.py",
            '_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")',
            '_DEVICES = (\n    *("null", "zero", "full", "random", "urandom", "tty"),\n'
            '    *(n for n in ("mem", "kmsg", "console") if os.path.exists(f"/dev/{n}")),\n)',
        ),
        ("devices",),
    ),
    Layer(
        "private /tmp",
        "tmpfs(5)",
        one(
            "root.py",
            '            if not place.startswith("/dev/"):\n',
            # The host's own, and read-only: what a sandbox clears away is not to be that.
            '            if place == "/tmp" and (tree := _clone_system(place)) is not None:\n'
            "                self.place_own(place, tree)\n"
            '            elif not place.startswith("/dev/"):\n',
        ),
        ("files of the host", "paths", "unix sockets"),
    ),
    Layer(
        "private /dev/shm",
        "shm_overview(7)",
        one(
            "root.py",
            '            if place.startswith("/dev/"):\n',
            '            if place == "/dev/shm" and (tree := _clone_system(place)) is not None:\n'
            "                self.place_own(place, tree)\n"
            '            elif place.startswith("/dev/"):\n',
        ),
        ("shared",),
    ),
    Layer(
        "private memory bounded in bytes",
        "tmpfs(5), size",
        one("root.py", "            size=str(size),\n"),
        ("exhaustion",),
    ),
    Layer(
        "private memory bounded in inodes",
        "tmpfs(5), nr_inodes",
        one("root.py", "            nr_inodes=str(max(1024, size >> 12)),\n"),
        ("exhaustion",),
    ),
)
