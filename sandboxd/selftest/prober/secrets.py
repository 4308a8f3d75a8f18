"""Searching for the secret itself: everything readable is read. Each search has a decoy to find."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH113, PTH123, PTH208

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable

from sandboxd.selftest.prober.kernel import raise_limit
from sandboxd.selftest.prober.probe import Plan, add
from sandboxd.trial import reach
from sandboxd.trial.hunt import Hunt, decoy, neighbour, processes, read_file

_THREAT = "Secret: the canary, wherever it could be"
#: Endless, or no text, or read with an effect.
_SKIPPED = ("/proc/kcore", "/proc/kmsg", "/proc/kpage", "/proc/sysrq-trigger", "/proc/self/",
            "/proc/thread-self/")  # fmt: skip
_SPECIAL = ("/mem", "/pagemap", "/clear_refs", "/kpagecgroup")


def found(hunt: Hunt, looked: str) -> tuple[str, str]:
    loot = hunt.loot
    return ("ok", "; ".join(loot)[:250]) if loot else ("nothing", looked)


def _control(search: Callable[[Hunt], object], planted: Callable[[], bytes]) -> str:
    hunt = Hunt()
    value = planted()
    search(hunt)
    return "ok" if hunt.has(value) else "decoy missed"


def _by_process(name: str) -> Callable[[Hunt], int]:
    def search(hunt: Hunt) -> int:
        pids = processes()
        for pid in pids:
            read_file(hunt, f"/proc/{pid}/{name}")
        return len(pids)

    return search


def _memory(hunt: Hunt) -> int:
    pids = processes()
    for pid in pids:
        reach.search_memory(hunt, pid)
    return len(pids)


def _descriptors(hunt: Hunt) -> int:
    count = 0
    for pid in processes():
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError as failure:
            hunt.refuse(failure)
            continue
        for name in names:
            path = f"/proc/{pid}/fd/{name}"
            count += 1
            if os.path.isfile(path):
                read_file(hunt, path, 64 << 20)
    return count


def _proc(hunt: Hunt) -> int:
    """Every file of /proc, at any depth, up to a mebibyte each."""
    count = 0
    todo = ["/proc"]
    while todo:
        try:
            entries = list(os.scandir(todo.pop()))
        except OSError:
            continue
        for entry in entries:
            path = entry.path
            if entry.is_symlink() or path.startswith(_SKIPPED) or path.endswith(_SPECIAL):
                continue
            if entry.is_dir(follow_symlinks=False):
                if "/task/" not in path or path.count("/") < 6:
                    todo.append(path)
            elif read_file(hunt, path, 1 << 20):
                count += 1
    return count


def _files(plan: Plan, hunt: Hunt, top: str = "/") -> int:
    """Every file that changed since the secret was made, wherever it is (inode(7), ctime)."""
    count = 0
    todo = [top]
    while todo:
        try:
            entries = list(os.scandir(todo.pop()))
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.path not in ("/proc", "/sys"):
                    todo.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                count += 1
                try:
                    changed = entry.stat(follow_symlinks=False).st_ctime >= plan.since
                except OSError:
                    continue
                if changed:
                    read_file(hunt, entry.path)
    return count


def _search(words: str, search: Callable[[Hunt], int]) -> Callable[[Plan], tuple[str, str]]:
    def attack(plan: Plan) -> tuple[str, str]:
        hunt = Hunt()
        count = search(hunt)
        return found(hunt, f"in {count:,} {words}, {hunt.bytes >> 10:,} KiB")

    return attack


def _decoyed(search: Callable[[Hunt], int], what: str) -> Callable[[Plan], str]:
    def control(plan: Plan) -> str:
        with neighbour() as child:
            hunt = Hunt()
            search(hunt)
            return "ok" if hunt.has(getattr(child, what)) else "decoy missed"

    return control


def _environment(plan: Plan) -> tuple[str, str]:
    hunt = Hunt()
    for name, value in os.environb.items():
        hunt.look(f"${name.decode(errors='replace')}", name + b"=" + value)
    read_file(hunt, "/proc/self/environ")
    return found(hunt, f"in {len(os.environ)} variables")


def _environment_control(plan: Plan) -> str:
    value = decoy()
    os.environb[b"DECOY"] = value
    hunt = Hunt()
    for each in os.environb.values():
        hunt.look("environment", each)
    return "ok" if hunt.has(value) else "decoy missed"


def _files_control(plan: Plan) -> str:
    value = decoy()
    with open(f"/tmp/decoy-{os.getpid()}", "wb") as file:  # noqa: S108
        file.write(value)
    hunt = Hunt()
    _files(plan, hunt, "/tmp")  # noqa: S108
    return "ok" if hunt.has(value) else "decoy missed"


def _memory_control(plan: Plan) -> str:
    own = bytearray(decoy())
    hunt = Hunt()
    reach.search_memory(hunt, os.getpid())
    return "ok" if hunt.has(bytes(own)) else "decoy missed"


_FOUND = "a decoy planted there is found"
add("own environment", _THREAT, _environment, "nothing", inside=_environment_control, says=_FOUND)
add("environments of all processes", _THREAT, _search("processes", _by_process("environ")),
    "nothing", inside=_decoyed(_by_process("environ"), "environment"), says=_FOUND)  # fmt: skip
add("command lines of all processes", _THREAT, _search("processes", _by_process("cmdline")),
    "nothing", inside=_decoyed(_by_process("cmdline"), "argument"), says=_FOUND)  # fmt: skip
add("memory of all processes", _THREAT, _search("processes", _memory), "nothing",
    inside=_memory_control, says=_FOUND)  # fmt: skip
add("open descriptors of all processes", _THREAT, _search("descriptors", _descriptors), "nothing",
    inside=_decoyed(_descriptors, "file"), says=_FOUND)  # fmt: skip
add("every readable file of /proc", _THREAT, _search("files", _proc), "nothing",
    inside=_decoyed(_proc, "environment"), says=_FOUND)  # fmt: skip
add("every file on every mount", _THREAT,
    lambda plan: _search("files", lambda hunt: _files(plan, hunt))(plan), "nothing",
    inside=_files_control, says=_FOUND)  # fmt: skip


def _core_limit(plan: Plan) -> None:
    raise_limit(resource.RLIMIT_CORE, 1 << 20)


def _core_dump(plan: Plan) -> str:
    """A child that crashes is not dumped (core(5)): the status says whether it was."""
    pid = os.fork()
    if pid == 0:
        os.chdir("/tmp")  # noqa: S108
        os.abort()
    status = os.waitpid(pid, 0)[1]
    return "dumped" if os.WCOREDUMP(status) else "no dump"


def _lower_limit(plan: Plan) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))


def _aborts(plan: Plan) -> str:
    pid = os.fork()
    if pid == 0:
        os.abort()
    return "ok" if os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGABRT else "did not abort"


_CORES = "Secret: core dumps"
add("raise the core size limit", _CORES, _core_limit, "EPERM", inside=_lower_limit,
    says="another limit, below its maximum")  # fmt: skip
add("dump core", _CORES, _core_dump, "no dump", inside=_aborts, says="the crash itself happens")


def _names(plan: Plan) -> str:
    """No variable that an agent owns is told to it, not even by name."""
    names = [name for name in os.environ if "CANARY" in name.upper()]
    return f"{len(names)} names"


def _finds_name(plan: Plan) -> str:
    os.environ["CANARY_DECOY"] = "1"
    return "ok" if _names(plan) == "1 names" else "missed"


add("names of secret variables", "Secret: names and existence", _names, "0 names",
    inside=_finds_name, says="a planted name is seen")  # fmt: skip
