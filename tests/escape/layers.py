"""Every layer of a sandbox, where its rule comes from, and how a copy of the package loses it.

A change is a piece of source text, which must occur exactly once, and what stands in its place. A
layer ``behind`` others is seen only once those are gone too: both runs, with it and without it,
are then made without them. ``planted`` is what a careless host or daemon would have left there for
the layer to take away; it too is in both runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LAYERS", "Change", "Layer"]

_I = "sandboxd/isolation/"
_CALLS = _I + "filters/calls.py"


@dataclass(frozen=True)
class Change:
    """In ``file``, ``old`` becomes ``new``."""

    file: str
    old: str
    new: str = ""


@dataclass(frozen=True)
class Layer:
    """``threats``: words of the selftest's threats whose probes are to notice. ``tests``: pytest
    selections that notice instead. ``filters``: the filter programs are compiled anew."""

    name: str
    source: str
    changes: tuple[Change, ...]
    threats: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    planted: tuple[Change, ...] = ()
    filters: bool = field(default=False)


def _one(file: str, old: str, new: str = "") -> tuple[Change, ...]:
    return (Change(_I + file, old, new),)


def _namespace(name: str, flag: str, source: str, *threats: str) -> Layer:
    change = _one("sandbox.py", f"    | kernel.CLONE_NEW{flag}\n")
    return Layer(f"{name} namespace", source, change, ("namespaces", *threats))


def _calls(name: str, source: str, names: str, *threats: str) -> Layer:
    """System calls that the filter leaves out, put into its list."""
    change = Change(_CALLS, '_FILES = """\n', f'_FILES = """\n{names}\n')
    return Layer(f"seccomp: {name}", source, (change,), threats, filters=True)


def _rlimit(name: str, line: str, *more: Change) -> Layer:
    change = _one("sandbox.py", f"        (resource.RLIMIT_{line}),\n")
    return Layer(f"rlimit: {name}", "setrlimit(2)", (*change, *more), ("exhaustion",))


_NO_USER = (
    Change(_I + "sandbox.py", "    kernel.unshare(kernel.CLONE_NEWUSER)\n"),
    Change(_I + "sandbox.py", '    _write("/proc/self/setgroups", b"deny")\n'),
    Change(_I + "sandbox.py", '    _write("/proc/self/uid_map", b"%d %d 1" % (INSIDE_ID, uid))\n'),
    Change(_I + "sandbox.py", '    _write("/proc/self/gid_map", b"%d %d 1" % (INSIDE_ID, gid))\n'),
    # With the namespace, or the host's own limit would be written.
    Change(_I + "sandbox.py", '    _write("user/max_user_namespaces", b"0", directory=sysctl)\n'),
)
_LEAK = Change(
    _I + "sandbox.py",
    "def _exec(spec: LaunchSpec, streams: Sequence[int], done: int) -> NoReturn:\n",
    "def _exec(spec: LaunchSpec, streams: Sequence[int], done: int) -> NoReturn:\n"
    '    os.set_inheritable(os.open("/", os.O_RDONLY), True)\n',
)
_AMBIENT = Change(
    _I + "kernel.py",
    "    drop_bounding_set()\n    _libc.prctl(_PR_CAP_AMBIENT,",
    "    set_effective_capabilities()\n"
    "    header, data = _capability_header(), (ctypes.c_uint32 * 6)()\n"
    "    _libc.capget(header, data)\n"
    "    data[2], data[5] = data[1], data[4]\n"
    "    _libc.capset(header, data)\n"
    "    _libc.prctl(_PR_CAP_AMBIENT, 2, 10, 0, 0)  # PR_CAP_AMBIENT_RAISE: NET_BIND_SERVICE\n"
    "    drop_bounding_set()\n    _libc.prctl(_PR_CAP_AMBIENT,",
)
_ONE_UID = (
    Change(
        _I + "uids.py",
        "            self._next = (self._next + 1) % self._count\n"
        "            if uid in self._taken:\n",
        "            if False:\n",
    ),
)

LAYERS: tuple[Layer, ...] = (
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
        _one(
            "sandbox.py",
            "    kernel.CLONE_NEWNS\n    | kernel.CLONE_NEWIPC\n",
            "    kernel.CLONE_NEWIPC\n",
        ),
        ("namespaces", "mounts"),
    ),
    Layer(
        "pid namespace",
        "pid_namespaces(7)",
        _one(
            "launcher.py",
            "            kernel.setns(self.own_pidns, kernel.CLONE_NEWPID)\n"
            "            kernel.unshare(kernel.CLONE_NEWPID)\n",
        ),
        ("namespaces", "processes", "process games"),
    ),
    Layer(
        "ipc namespace",
        "ipc_namespaces(7)",
        _one("sandbox.py", "    | kernel.CLONE_NEWIPC\n"),
        ("namespaces", "shared"),
    ),
    _namespace("uts", "UTS", "uts_namespaces(7)", "facts"),
    _namespace("cgroup", "CGROUP", "cgroup_namespaces(7)", "control groups"),
    Layer(
        "network namespace",
        "network_namespaces(7)",
        _one(
            "sandbox.py",
            'network = 0 if spec.network == "host" else kernel.CLONE_NEWNET',
            "network = 0",
        ),
        ("namespaces", "network", "shared"),
    ),
    Layer(
        "time namespace",
        "time_namespaces(7)",
        _one("sandbox.py", "    clocks.enter()\n"),
        ("namespaces", "facts"),
    ),
    Layer(
        "time namespace: its offsets",
        "time_namespaces(7), /proc/PID/timens_offsets",
        _one("clocks.py", "        os.write(fd, text.encode())\n", "        pass\n"),
        ("facts",),
    ),
    Layer(
        "a generic host name",
        "sethostname(2)",
        _one("sandbox.py", "    kernel.sethostname(spec.hostname)\n"),
        ("facts",),
    ),
    Layer(
        "no user namespace inside",
        "namespaces(7), /proc/sys/user",
        _one("sandbox.py", '    _write("user/max_user_namespaces", b"0", directory=sysctl)\n'),
        ("namespaces",),
        behind=("seccomp",),
    ),
    # ---- the root directory
    Layer(
        "pivot_root",
        "pivot_root(2)",
        _one(
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
        _one("root.py", '        kernel.umount_detached(".")\n'),
        ("mounts", "paths", "files of the host"),
        behind=("user namespace",),
    ),
    Layer(
        "nosuid",
        "mount_setattr(2)",
        _one("kernel.py", "MOUNT_ATTR_NOSUID = 0x02", "MOUNT_ATTR_NOSUID = 0"),
        ("mounts",),
    ),
    Layer(
        "nodev",
        "mount_setattr(2)",
        _one("kernel.py", "MOUNT_ATTR_NODEV = 0x04", "MOUNT_ATTR_NODEV = 0"),
        ("mounts",),
    ),
    Layer(
        "read-only system",
        "mount_setattr(2)",
        _one("root.py", "READONLY = _LOCKED | kernel.MOUNT_ATTR_RDONLY", "READONLY = _LOCKED"),
        ("planted",),
    ),
    Layer(
        "read-only root directory",
        "mount_setattr(2)",
        _one(
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
        _one("root.py", '_SYSTEM = ("/usr", ', '_SYSTEM = ("/usr", "/var", '),
        ("files of the host",),
    ),
    Layer(
        "an /etc of listed files",
        "hier(7), sandboxd/isolation/root.py",
        _one("root.py", "_ETC = (\n", '_ETC = (\n    "/etc/shadow",\n'),
        ("files of the host",),
    ),
    Layer(
        "no /sys",
        "sysfs(5)",
        _one("root.py", '_SYSTEM = ("/usr", ', '_SYSTEM = ("/usr", "/sys", '),
        ("kernel knobs", "control groups"),
    ),
    Layer(
        "read-only knobs in /proc",
        "proc(5), OCI runtime-spec readonlyPaths",
        _one("root.py", "present.intersection(_PROC_READONLY)", "()"),
        ("kernel knobs",),
    ),
    Layer(
        "masked files in /proc",
        "proc(5), OCI runtime-spec maskedPaths",
        _one("root.py", "            if name in present:\n", "            if False:\n"),
        ("kernel knobs", "shared"),
    ),
    Layer(
        "masked directories in /proc",
        "proc(5), OCI runtime-spec maskedPaths",
        _one("root.py", "present.intersection(_PROC_MASKED_DIRECTORIES)", "()"),
        ("kernel knobs",),
    ),
    Layer(
        "a small /dev",
        "null(4), random(4), tty(4)",
        _one(
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
        _one(
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
        _one(
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
        _one("root.py", "            size=str(size),\n"),
        ("exhaustion",),
    ),
    Layer(
        "private memory bounded in inodes",
        "tmpfs(5), nr_inodes",
        _one("root.py", "            nr_inodes=str(max(1024, size >> 12)),\n"),
        ("exhaustion",),
    ),
    # ---- privileges
    Layer(
        "bounding set",
        "capabilities(7)",
        _one("kernel.py", "    drop_bounding_set()\n    _libc.prctl", "    _libc.prctl"),
        ("privileges",),
    ),
    Layer(
        "permitted, effective and ambient sets",
        "capabilities(7)",
        (
            Change(
                _I + "kernel.py",
                "    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)\n",
            ),
            Change(
                _I + "kernel.py",
                "    if _libc.capset(_capability_header(), (ctypes.c_uint32 * 6)()) < 0:\n",
                "    if False:\n",
            ),
        ),
        ("privileges",),
        planted=(_AMBIENT,),
    ),
    Layer(
        "secure bits",
        "capabilities(7), securebits",
        _one("kernel.py", "    _libc.prctl(_PR_SET_SECUREBITS, ctypes.c_ulong(0xCF), 0, 0, 0)\n"),
        ("privileges",),
    ),
    Layer(
        "no_new_privs",
        "prctl(2), PR_SET_NO_NEW_PRIVS",
        (
            # Capabilities, which would do for the filters, are then given up after those.
            Change(_I + "sandbox.py", "    kernel.no_new_privileges()\n"),
            Change(
                _I + "sandbox.py",
                "    kernel.drop_capabilities()\n    system, _ = system_layout()\n",
                "    system, _ = system_layout()\n",
            ),
            Change(
                _I + "sandbox.py",
                "    seccomp.restrict_sandbox()\n",
                "    seccomp.restrict_sandbox()\n    kernel.drop_capabilities()\n",
            ),
        ),
        ("privileges",),
    ),
    Layer(
        "no supplementary groups",
        "setgroups(2)",
        _one("sandbox.py", "        os.setgroups([])\n"),
        ("privileges",),
    ),
    Layer(
        "a terminal session of its own",
        "setsid(2)",
        _one("sandbox.py", "    os.setsid()\n"),
        ("privileges",),
    ),
    Layer(
        "an init that can't be read",
        "prctl(2), PR_SET_DUMPABLE",
        _one("kernel.py", "_PR_SET_DUMPABLE, int(dumpable))", "_PR_SET_DUMPABLE, 1)"),
        ("sandbox's init",),
    ),
    Layer(
        "no core dumps",
        "core(5), setrlimit(2)",
        (
            *_one("sandbox.py", "    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"),
            *_one("launcher.py", "        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"),
            Change(
                "sandboxd/privileges.py", "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", "pass"
            ),
        ),
        ("core dumps",),
    ),
    # ---- Landlock
    Layer(
        "Landlock: paths",
        "landlock(7)",
        _one("landlock.py", '_allow(ruleset, "/", _READ)', '_allow(ruleset, "/", handled)'),
        ("planted", "privileges", "sandbox's init"),
    ),
    Layer(
        "Landlock: TCP ports",
        "landlock(7), ABI 4",
        _one(
            "landlock.py",
            "net = _NET_BIND_AND_CONNECT if abi >= 4 and not tcp else 0",
            "net = 0",
        ),
        ("network",),
    ),
    Layer(
        "Landlock: abstract sockets",
        "landlock(7), ABI 6",
        _one("landlock.py", "scoped = _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if", "scoped = 2 if"),
        ("shared",),
        behind=("network namespace",),
    ),
    Layer(
        "Landlock: signals",
        "landlock(7), ABI 6",
        _one("landlock.py", "scoped = _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if", "scoped = 1 if"),
        tests=("tests/isolation/test_landlock.py::test_signals_stay_inside",),
    ),
    # ---- seccomp
    Layer(
        "seccomp",
        "seccomp(2)",
        _one("seccomp.py", "    machine = os.uname().machine\n", "    return False\n"),
        ("syscalls", "families"),
    ),
    Layer(
        "seccomp: typing into terminals",
        "ioctl_tty(2), TIOCSTI, TIOCLINUX",
        (
            Change(
                _CALLS,
                "tuple(Test(1, n) for n in (_TIOCSTI, _TIOCLINUX, _TIOCSETD))",
                "(Test(1, 0xFFFFFFFF),)",
            ),
        ),
        ("terminals",),
        filters=True,
    ),
    Layer(
        "seccomp: flags of clone",
        "clone(2), CLONE_NEW*",
        (Change(_CALLS, '"clone": ((Test(0, 0, _NEW_NAMESPACES),),)', '"clone": ((),)'),),
        ("namespaces",),
        filters=True,
    ),
    Layer(
        "seccomp: clone3",
        "clone(2), clone3",
        (
            Change(_CALLS, ' | {"clone3": errno.ENOSYS}', ""),
            Change(_CALLS, '_FILES = """\n', '_FILES = """\nclone3\n'),
        ),
        ("namespaces",),
        filters=True,
    ),
    Layer(
        "seccomp: namespaces and mounts",
        "seccomp(2), sandboxd/isolation/filters/calls.py",
        _one("seccomp.py", "        _install(_Installed.built)\n", "        pass\n"),
        ("namespaces", "mounts"),
    ),
    Layer(
        "seccomp: socket families",
        "socket(2), address_families(7)",
        (
            Change(
                _CALLS, "        (Test(0, socket.AF_UNIX),),\n        *(", "        (),\n        *("
            ),
            Change(
                _CALLS,
                "tuple(Test(0, f) for f in range(64) if f not in _FAMILIES)",
                "(Test(0, 0xFFFFFFFF),)",
            ),
        ),
        ("families",),
        filters=True,
    ),
    Layer(
        "seccomp: socket types and protocols",
        "ip(7), raw(7)",
        (Change(_CALLS, ", Test(1, kind, 0xF), Test(2, 0, 0xFFFFFFC0))", ",)"),),
        ("families",),
        filters=True,
    ),
    Layer(
        "seccomp: netlink protocols",
        "netlink(7)",
        (
            Change(
                _CALLS,
                "(Test(0, socket.AF_NETLINK), Test(2, 0)),",
                "(Test(0, socket.AF_NETLINK),),",
            ),
        ),
        ("families",),
        filters=True,
    ),
    Layer(
        "seccomp: personality",
        "personality(2)",
        (
            Change(
                _CALLS,
                '"personality": tuple((Test(0, persona),) for persona in (0, 8, 0xFFFFFFFF))',
                '"personality": ((),)',
            ),
        ),
        ("syscalls",),
        filters=True,
    ),
    Layer(
        "seccomp: the 32-bit ABI",
        "syscall(2), architecture-specific requirements",
        (
            Change(
                _I + "filters/build.py",
                'ARCHITECTURES: dict[str, tuple[Abi, ...]] = {\n    "x86_64": '
                '(Abi("x86_64", 0xC000003E), Abi("x86", 0x40000003)),',
                'ARCHITECTURES: dict[str, tuple[Abi, ...]] = {\n    "x86_64": '
                '(Abi("x86_64", 0xC000003E),),',
            ),
            Change(
                _I + "filters/build.py",
                "default=refusal(errno.EPERM), elsewhere=KILL)",
                "default=refusal(errno.EPERM), elsewhere=ALLOW)",
            ),
        ),
        ("32-bit",),
        filters=True,
    ),
    Layer(
        "seccomp: sockets by socketcall",
        "socketcall(2)",
        (
            Change(
                _CALLS,
                '"socketcall": (errno.EAFNOSUPPORT, (Test(0, 1), Test(0, 8)))',
                '"socketcall": (errno.EAFNOSUPPORT, (Test(0, 99),))',
            ),
        ),
        ("32-bit",),
        filters=True,
    ),
    Layer(
        "seccomp: numbers of later kernels",
        "syscalls(2), ENOSYS",
        (Change(_I + "filters/build.py", "_newer_than_the_list() + _allowed", "_allowed"),),
        ("syscalls",),
        filters=True,
    ),
    _calls(
        "what programs the kernel",
        "io_uring(7), bpf(2), userfaultfd(2), perf_event_open(2), fanotify(7)",
        "bpf io_uring_setup io_uring_enter io_uring_register perf_event_open userfaultfd "
        "fanotify_init fanotify_mark kexec_load kexec_file_load init_module finit_module "
        "delete_module",
        "syscalls",
    ),
    _calls(
        "what reaches into processes",
        "ptrace(2), process_vm_readv(2), pidfd_getfd(2), kcmp(2)",
        "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp",
        "syscalls",
        "processes",
    ),
    Layer(
        "seccomp: keyrings",
        "keyrings(7)",
        (
            Change(
                _CALLS, "fsconfig fsmount fsopen keyctl mount ", "fsconfig fsmount fsopen mount "
            ),
            Change(_CALLS, '_FILES = """\n', '_FILES = """\nkeyctl add_key request_key\n'),
        ),
        ("shared",),
        filters=True,
    ),
    _calls(
        "file handles",
        "open_by_handle_at(2)",
        "name_to_handle_at open_by_handle_at",
        "mounts",
    ),
    _calls(
        "memory policy, hidden memory",
        "set_mempolicy(2), memfd_secret(2)",
        "set_mempolicy get_mempolicy migrate_pages move_pages mbind memfd_secret",
        "syscalls",
    ),
    _calls(
        "calls of old programs",
        "uselib(2), ustat(2), sysfs(2), modify_ldt(2)",
        "uselib ustat sysfs modify_ldt remap_file_pages",
        "syscalls",
    ),
    # ---- limits
    _rlimit("memory", "DATA, limits.memory"),
    _rlimit("processes", "NPROC, limits.processes"),
    _rlimit("open files", "NOFILE, limits.open_files"),
    _rlimit("file size", "FSIZE, limits.file_size"),
    _rlimit("processor time", "CPU, limits.cpu_seconds"),
    Layer(
        "cgroup: memory",
        "cgroups(7), memory.max",
        _one(
            "cgroup.py",
            'b"%d" % (share.memory + OVERHEAD) if share.memory else b""',
            'b""',
        ),
        ("exhaustion",),
    ),
    Layer(
        "cgroup: processes",
        "cgroups(7), pids.max",
        _one("cgroup.py", 'if "pids" in place.controllers and share.processes:', "if False:"),
        ("exhaustion",),
    ),
    Layer(
        "cgroup: processors",
        "cgroups(7), cpu.max",
        _one("cgroup.py", "share.millicpus * _PERIOD // 1000)", "10 * _PERIOD)"),
        ("exhaustion",),
    ),
    Layer(
        "cgroup: swap off",
        "cgroups(7), memory.swap.max",
        (
            Change(_I + "cgroup.py", '/memory.swap.max", b"0")', '/memory.swap.max", b"max")'),
            Change(_I + "cgroup.py", 'yield "memory.memsw.limit_in_bytes", memory', "pass"),
            Change(
                _I + "cgroup_places.py", '/memory.swappiness", b"0")', '/memory.swappiness", b"60")'
            ),
        ),
        ("exhaustion",),
    ),
    Layer(
        "cgroup: everything is inside",
        "cgroups(7), CLONE_INTO_CGROUP",
        (
            *_one("launcher.py", "        if self.birth and group", "        if False and group"),
            *_one("sandbox.py", "        if join is not None:\n", "        if False:\n"),
        ),
        ("exhaustion",),
    ),
    # ---- what is handed over
    Layer(
        "session keyring of its own",
        "session-keyring(7)",
        _one("sandbox.py", "    kernel.join_new_keyring()\n"),
        ("shared",),
        behind=("seccomp",),
    ),
    Layer(
        "no inherited descriptors",
        "close_range(2)",
        _one("sandbox.py", "    kernel.close_all_but([*targets, done])\n"),
        ("shared", "paths"),
        planted=(_LEAK,),
    ),
    Layer(
        "an agent's environment is listed",
        "environ(7), docs/architecture.md",
        (
            Change(
                "sandboxd/sessions/spec.py",
                "    environment = {\n",
                "    environment = {\n        **os.environ,\n",
            ),
        ),
        ("unix sockets",),
    ),
    Layer(
        "a tool's environment is listed",
        "environ(7), docs/architecture.md",
        (
            Change(
                "sandboxd/broker/launch.py",
                "    environment = dict(_BASE)\n",
                "    environment = {**os.environ, **dict(_BASE)}\n",
            ),
        ),
        ("unix sockets",),
    ),
    # ---- paths that an agent could turn
    Layer(
        "no links on the way to a workspace",
        "openat2(2), RESOLVE_NO_SYMLINKS",
        _one(
            "root.py", "            resolve |= kernel.RESOLVE_NO_SYMLINKS\n", "            pass\n"
        ),
        tests=("tests/isolation/test_sandbox_files.py -k link",),
    ),
    Layer(
        "no links on the way to a mount point",
        "openat2(2), RESOLVE_BENEATH",
        _one(
            "root.py",
            "_BENEATH = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | "
            "kernel.RESOLVE_NO_MAGICLINKS",
            "_BENEATH = 0",
        ),
        tests=("tests/isolation/test_sandbox_files.py -k link",),
    ),
    Layer(
        "Landlock follows no link of an agent's",
        "openat2(2), RESOLVE_NO_SYMLINKS",
        _one(
            "landlock.py",
            "resolve = kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS",
            "resolve = 0",
        ),
        tests=("tests/isolation/test_landlock.py -k link",),
    ),
    Layer(
        "everything ends with the daemon",
        "pid_namespaces(7)",
        _one("launcher.py", "os.geteuid() == 0 and _try(kernel.CLONE_NEWPID)", "True"),
        tests=("tests/isolation/test_launcher.py -k broker_is_killed",),
    ),
)
