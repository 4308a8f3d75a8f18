"""What a program may do: privileges, Landlock, system calls."""

from __future__ import annotations

from layer import CALLS, ISOLATION, Change, Layer, one

__all__ = ["RIGHTS"]


def _calls(name: str, source: str, names: str, *threats: str) -> Layer:
    """System calls that the filter leaves out, put into its list."""
    change = Change(CALLS, '_FILES = """\n', f'_FILES = """\n{names}\n')
    return Layer(f"seccomp: {name}", source, (change,), threats, filters=True)


_AMBIENT = Change(
    ISOLATION + "kernel.py",
    "    drop_bounding_set()\n    _libc.prctl(_PR_CAP_AMBIENT,",
    "    set_effective_capabilities()\n"
    "    header, data = _capability_header(), (ctypes.c_uint32 * 6)()\n"
    "    _libc.capget(header, data)\n"
    "    data[2], data[5] = data[1], data[4]\n"
    "    _libc.capset(header, data)\n"
    "    _libc.prctl(_PR_CAP_AMBIENT, 2, 10, 0, 0)  # PR_CAP_AMBIENT_RAISE: NET_BIND_SERVICE\n"
    "    drop_bounding_set()\n    _libc.prctl(_PR_CAP_AMBIENT,",
)

RIGHTS: tuple[Layer, ...] = (
    # ---- privileges
    Layer(
        "bounding set",
        "capabilities(7)",
        one("kernel.py", "    drop_bounding_set()\n    _libc.prctl", "    _libc.prctl"),
        ("privileges",),
    ),
    Layer(
        "permitted, effective and ambient sets",
        "capabilities(7)",
        (
            Change(
                ISOLATION + "kernel.py",
                "    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)\n",
            ),
            Change(
                ISOLATION + "kernel.py",
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
        one("kernel.py", "    _libc.prctl(_PR_SET_SECUREBITS, ctypes.c_ulong(0xCF), 0, 0, 0)\n"),
        ("privileges",),
    ),
    Layer(
        "no_new_privs",
        "prctl(2), PR_SET_NO_NEW_PRIVS",
        (
            # Capabilities, which would do for the filters, are then given up after those.
            Change(ISOLATION + "sandbox.py", "    kernel.no_new_privileges()\n"),
            Change(
                ISOLATION + "sandbox.py",
                "    kernel.drop_capabilities()\n    if rules >= 0:\n",
                "    if rules >= 0:\n",
            ),
            Change(
                ISOLATION + "sandbox.py",
                "    seccomp.restrict_sandbox()\n",
                "    seccomp.restrict_sandbox()\n    kernel.drop_capabilities()\n",
            ),
        ),
        ("privileges",),
    ),
    Layer(
        "no supplementary groups",
        "setgroups(2)",
        one("sandbox.py", "        os.setgroups([])\n"),
        ("privileges",),
    ),
    Layer(
        "a terminal session of its own",
        "setsid(2)",
        one("program.py", "    os.setsid()\n"),
        ("privileges",),
    ),
    Layer(
        "an init that can't be read",
        "prctl(2), PR_SET_DUMPABLE",
        one("kernel.py", "_PR_SET_DUMPABLE, int(dumpable))", "_PR_SET_DUMPABLE, 1)"),
        ("sandbox's init",),
    ),
    Layer(
        "no core dumps",
        "core(5), setrlimit(2)",
        (
            *one("program.py", "    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"),
            *one("launcher.py", "        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"),
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
        one("landlock.py", '_allow(rules, "/", _READ)', '_allow(rules, "/", handled)'),
        ("planted", "privileges", "sandbox's init"),
    ),
    Layer(
        "Landlock: TCP ports",
        "landlock(7), ABI 4",
        one(
            "landlock.py",
            "net = _NET_BIND_AND_CONNECT if abi >= 4 and ports is not None else 0",
            "net = 0",
        ),
        ("network",),
    ),
    Layer(
        "Landlock: abstract sockets",
        "landlock(7), ABI 6",
        one("landlock.py", "scoped = _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if", "scoped = 2 if"),
        ("shared",),
        behind=("network namespace",),
    ),
    Layer(
        "Landlock: signals",
        "landlock(7), ABI 6",
        one("landlock.py", "scoped = _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if", "scoped = 1 if"),
        tests=("tests/isolation/test_landlock.py::test_signals_stay_inside",),
    ),
    # ---- seccomp
    Layer(
        "seccomp",
        "seccomp(2)",
        one("seccomp.py", "    machine = os.uname().machine\n", "    return False\n"),
        ("syscalls", "families"),
    ),
    Layer(
        "seccomp: typing into terminals",
        "ioctl_tty(2), TIOCSTI, TIOCLINUX",
        (
            Change(
                CALLS,
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
        (Change(CALLS, '"clone": ((Test(0, 0, _NEW_NAMESPACES),),)', '"clone": ((),)'),),
        ("namespaces",),
        filters=True,
    ),
    Layer(
        "seccomp: clone3",
        "clone(2), clone3",
        (
            Change(CALLS, ' | {"clone3": errno.ENOSYS}', ""),
            Change(CALLS, '_FILES = """\n', '_FILES = """\nclone3\n'),
        ),
        ("namespaces",),
        filters=True,
    ),
    Layer(
        "seccomp: namespaces and mounts",
        "seccomp(2), sandboxd/isolation/filters/calls.py",
        one("seccomp.py", "        _install(_Installed.built)\n", "        pass\n"),
        ("namespaces", "mounts"),
    ),
    Layer(
        "seccomp: socket families",
        "socket(2), address_families(7)",
        (
            Change(
                CALLS, "        (Test(0, socket.AF_UNIX),),\n        *(", "        (),\n        *("
            ),
            Change(
                CALLS,
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
        (Change(CALLS, ", Test(1, kind, 0xF), Test(2, 0, 0xFFFFFFC0))", ",)"),),
        ("families",),
        filters=True,
    ),
    Layer(
        "seccomp: netlink protocols",
        "netlink(7)",
        (
            Change(
                CALLS,
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
                CALLS,
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
                ISOLATION + "filters/build.py",
                'ARCHITECTURES: dict[str, tuple[Abi, ...]] = {\n    "x86_64": '
                '(Abi("x86_64", 0xC000003E), Abi("x86", 0x40000003)),',
                'ARCHITECTURES: dict[str, tuple[Abi, ...]] = {\n    "x86_64": '
                '(Abi("x86_64", 0xC000003E),),',
            ),
            Change(
                ISOLATION + "filters/build.py",
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
                CALLS,
                '"socketcall": (errno.EAFNOSUPPORT, (Test(0, 1), Test(0, 8)))',
                '"socketcall": (errno.EAFNOSUPPORT, (Test(0, 99),))',
            ),
            # A rule on socket() is one on socketcall(1) too, where libseccomp sees no family.
            Change(
                CALLS,
                '"socket": (errno.EAFNOSUPPORT, tuple(Test(0, f)',
                '"timer_create": (errno.EAFNOSUPPORT, tuple(Test(0, f + 64)',
            ),
        ),
        ("32-bit",),
        filters=True,
    ),
    Layer(
        "seccomp: numbers of later kernels",
        "syscalls(2), ENOSYS",
        (Change(ISOLATION + "filters/build.py", "_newer_than_the_list() + _allowed", "_allowed"),),
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
                CALLS, "fsconfig fsmount fsopen keyctl mount ", "fsconfig fsmount fsopen mount "
            ),
            Change(CALLS, '_FILES = """\n', '_FILES = """\nkeyctl add_key request_key\n'),
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
)
