"""What a program gets: limits, what is handed over, sandboxes that are kept ready, paths."""

from __future__ import annotations

from layer import ISOLATION, Change, Layer, one

__all__ = ["BOUNDS"]


def _rlimit(name: str, line: str, *more: Change) -> Layer:
    change = one("program.py", f"        (resource.RLIMIT_{line}),\n")
    return Layer(f"rlimit: {name}", "setrlimit(2)", (*change, *more), ("exhaustion",))


def _kept_ready(name: str, source: str, old: str, new: str, tests: str) -> Layer:
    """A rule of sandboxes that serve one call after another (isolation/template.py)."""
    selected = (f"tests/isolation/test_template.py -k {tests}",)
    return Layer(f"kept ready: {name}", source, one("template.py", old, new), tests=selected)


_LEAK = Change(
    ISOLATION + "program.py",
    "def _exec(spec: LaunchSpec, streams: Sequence[int], done: int) -> NoReturn:\n",
    "def _exec(spec: LaunchSpec, streams: Sequence[int], done: int) -> NoReturn:\n"
    '    os.dup2(os.open("/", os.O_RDONLY), 200, inheritable=True)\n',
)

BOUNDS: tuple[Layer, ...] = (
    # ---- limits
    _rlimit("memory", "DATA, limits.memory"),
    _rlimit("processes", "NPROC, limits.processes"),
    _rlimit("open files", "NOFILE, limits.open_files"),
    _rlimit("file size", "FSIZE, limits.file_size"),
    _rlimit("processor time", "CPU, limits.cpu_seconds"),
    Layer(
        "cgroup: memory",
        "cgroups(7), memory.max",
        one(
            "cgroup.py",
            'b"%d" % (share.memory + OVERHEAD) if share.memory else b""',
            'b""',
        ),
        ("exhaustion",),
    ),
    Layer(
        "cgroup: processes",
        "cgroups(7), pids.max",
        one("cgroup.py", 'if "pids" in place.controllers and share.processes:', "if False:"),
        ("exhaustion",),
    ),
    Layer(
        "cgroup: processors",
        "cgroups(7), cpu.max",
        one("cgroup.py", "share.millicpus * _PERIOD // 1000)", "10 * _PERIOD)"),
        ("exhaustion",),
    ),
    Layer(
        "cgroup: disk traffic",
        "cgroups(7), io.max",
        one("client.py", 'str(spec.limits.io) if spec.limits.io else ""', '""'),
        ("exhaustion",),
    ),
    Layer(
        "cgroup: swap off",
        "cgroups(7), memory.swap.max",
        (
            Change(
                ISOLATION + "cgroup.py", '/memory.swap.max", b"0")', '/memory.swap.max", b"max")'
            ),
            Change(ISOLATION + "cgroup.py", 'yield "memory.memsw.limit_in_bytes", memory', "pass"),
            Change(
                ISOLATION + "cgroup_places.py",
                '/memory.swappiness", b"0")',
                '/memory.swappiness", b"60")',
            ),
        ),
        ("exhaustion",),
    ),
    Layer(
        "cgroup: everything is inside",
        "cgroups(7), CLONE_INTO_CGROUP",
        (
            *one("launcher.py", "        if self.birth and group", "        if False and group"),
            *one("sandbox.py", "        if join is not None:\n", "        if False:\n"),
        ),
        ("exhaustion",),
    ),
    # ---- what is handed over
    Layer(
        "session keyring of its own",
        "session-keyring(7)",
        (
            *one("sandbox.py", "    kernel.join_new_keyring()\n"),
            # Where it is shared, the first call's template would empty it before a probe looks.
            *one("template.py", " or (self.keyrings and not spawn.clear_keyrings())"),
        ),
        ("shared",),
        behind=("seccomp",),
    ),
    Layer(
        "no inherited descriptors",
        "close_range(2)",
        one("program.py", "    kernel.close_all_but([*targets, done])\n"),
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
                "    environment = {**dict(_BASE), ",
                "    environment = {**os.environ, **dict(_BASE), ",
            ),
        ),
        ("unix sockets",),
    ),
    # ---- sandboxes that are kept ready for one call after another
    _kept_ready(
        "what a call wrote is cleared away",
        "tmpfs(5), sysvipc(7)",
        "not self.traces.clear() or ",
        "",
        "nothing_that_a_call_left",
    ),
    _kept_ready(
        "what a call left running is ended",
        "kill(2), pid -1",
        "        ended = _reap(os.WNOHANG)\n        if ended is not None:\n",
        "        ended = None\n        if ended is not None:\n",
        "nothing_that_a_call_left",
    ),
    _kept_ready(
        "limits and priorities are as before",
        "prlimit(2), sched_setattr(2)",
        "if spawn.inherited_attributes() != self.attributes:",
        "if False:",
        "can_not_change_what_the_next_one_gets",
    ),
    _kept_ready(
        "late signals are dropped",
        "sigtimedwait(2)",
        "    while _next_signal(0):\n",
        "    while False:\n",
        "signals_that_a_call_sends",
    ),
    _kept_ready(
        "another kind of launch is refused",
        "docs/architecture.md",
        "if view[slice(*own.lasting)] != self.lasting:",
        "if False:",
        "refuses_the_launch_of_another",
    ),
    # ---- paths that an agent could turn
    Layer(
        "no links on the way to a workspace",
        "openat2(2), RESOLVE_NO_SYMLINKS",
        one("root.py", "            resolve |= kernel.RESOLVE_NO_SYMLINKS\n", "            pass\n"),
        tests=("tests/isolation/test_sandbox_files.py -k link",),
    ),
    Layer(
        "no links on the way to a mount point",
        "openat2(2), RESOLVE_BENEATH",
        one(
            "root.py",
            "_BENEATH = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | "
            "kernel.RESOLVE_NO_MAGICLINKS",
            "_BENEATH = 0",
        ),
        tests=("tests/isolation/test_sandbox_files.py -k link",),
        behind=("Landlock follows no link of an agent's",),
    ),
    Layer(
        "Landlock follows no link of an agent's",
        "openat2(2), RESOLVE_NO_SYMLINKS",
        one(
            "landlock.py",
            "resolve = kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS",
            "resolve = 0",
        ),
        tests=("tests/isolation/test_landlock.py -k link",),
    ),
    Layer(
        "everything ends with the daemon",
        "pid_namespaces(7)",
        one("launcher.py", "os.geteuid() == 0 and _try(kernel.CLONE_NEWPID)", "True"),
        tests=("tests/isolation/test_launcher.py -k its_death_ends",),
    ),
)
