"""Searches of everything an agent can see by itself. Each returns its :class:`Outcome`.

Every search runs twice in one go: over what must not hold the secret, and over a decoy planted
where the agent may look. A search that misses its decoy proves nothing, and says so.
"""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH108, PTH110, PTH113, PTH116, PTH123, PTH208

from __future__ import annotations

import errno
import functools
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sandboxd.trial import reach
from sandboxd.trial.hunt import Hunt, decoy, neighbour, processes, read_file

__all__ = ["CONTROLS", "PROBES", "Outcome", "Plan", "own_environments"]


@dataclass(frozen=True)
class Plan:
    """What the demo tells the agent, to be generous: the places where the secret really is."""

    paths: tuple[str, ...] = ()
    open_path: str = ""
    open_value: str = ""
    admin: str = ""
    abstract: str = ""
    addresses: tuple[str, ...] = ()
    port: int = 0
    metadata: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    since: float = 0.0
    roots: tuple[str, ...] = ("/",)
    only: frozenset[int] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Plan:
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
        }
        return cls(**values)


@dataclass
class Outcome:
    """``control``: True when the decoy was found, else what is wrong or who refused."""

    hunt: Hunt
    detail: str
    control: bool | str | None
    control_detail: str = "decoy found"
    extra: dict[str, Any] = field(default_factory=dict)


def own_environment(plan: Plan) -> Outcome:
    hunt = Hunt()
    for search in own_environments():
        hunt.add(search)
    planted = decoy()
    # The kernel's copy of an environment is made at the start, so a new process carries the decoy.
    child = subprocess.run(
        [sys.executable, "-I", sys.argv[0], "--own-environment"],
        env={"DECOY": planted.decode()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )
    found = child.stdout.split() == [planted, planted]  # os.environ and /proc/self/environ
    return Outcome(hunt, f"nothing in {len(os.environ)} variables", found)


def own_environments() -> tuple[Hunt, Hunt]:
    """The environment as this process has it, and as the kernel shows it."""
    mine, kernels = Hunt(), Hunt()
    for name, value in os.environb.items():
        mine.look(f"${name.decode(errors='replace')}", name + b"=" + value)
    read_file(kernels, "/proc/self/environ")
    return mine, kernels


def environments(plan: Plan) -> Outcome:
    return _by_process("environ", plan, "environment")


def command_lines(plan: Plan) -> Outcome:
    return _by_process("cmdline", plan, "argument")


def _by_process(name: str, plan: Plan, planted: str) -> Outcome:
    hunt = Hunt()
    with neighbour() as child:
        pids = processes(plan.only and plan.only | {child.pid})
        for pid in pids:
            read_file(hunt, f"/proc/{pid}/{name}")
        control = hunt.has(getattr(child, planted))
    return Outcome(hunt, _counted("nothing in", len(pids), "process", hunt), control)


def memory(plan: Plan) -> Outcome:
    hunt = Hunt()
    own = bytearray(decoy())  # lives in this process alone
    with neighbour() as child:
        pids = processes(plan.only and plan.only | {child.pid, os.getpid()})
        for pid in pids:
            reach.search_memory(hunt, pid)
        control = hunt.has(bytes(own)) and hunt.has(child.environment)
    size = f"nothing in {hunt.bytes >> 20} MiB of"
    return Outcome(hunt, _counted(size, len(pids), "process", hunt), control)


def descriptors(plan: Plan) -> Outcome:
    hunt = Hunt()
    count = 0
    with neighbour() as child:
        for pid in processes(plan.only and plan.only | {child.pid}):
            for path in _names(hunt, f"/proc/{pid}/fd"):
                count += 1
                try:
                    regular = stat.S_ISREG(os.stat(path).st_mode)
                except OSError as failure:
                    hunt.refuse(failure)
                    continue
                if regular:
                    read_file(hunt, path, 64 << 20)
        control = hunt.has(child.file)
    return Outcome(hunt, _counted("nothing behind", count, "descriptor", hunt), control)


def files(plan: Plan) -> Outcome:
    """Every file that is newer than the secret: an older one can't hold it (inode(7), ctime)."""
    hunt = Hunt()
    planted = decoy()
    path = f"{os.environ.get('TMPDIR', '/tmp')}/decoy-{os.getpid()}"  # noqa: S108
    with open(path, "wb") as file:
        file.write(planted)
    found = _survey(plan.roots, plan.since)
    for new in found.new:
        read_file(hunt, new)
    for name in _names(hunt, "/proc"):
        if name.rpartition("/")[2] not in _SKIPPED and os.path.isfile(name):
            read_file(hunt, name, 1 << 20)
    os.unlink(path)
    with open("/proc/self/mountinfo") as file:
        mounts = sum(1 for _ in file)
    detail = f"nothing in {found.count:,} files on {mounts} mounts"
    return Outcome(hunt, detail, hunt.has(planted))


def host_paths(plan: Plan) -> Outcome:
    """The store, the key, the log and the sockets, by the paths that they really have."""
    hunt = Hunt()
    for path in plan.paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as failure:
            hunt.refuse(failure)
            # A socket can't be opened, so ENXIO says that it is there.
            if failure.errno not in (errno.ENOENT, errno.ENOTDIR):
                hunt.breach(f"{path} is there: {os.strerror(failure.errno or 0)}")
            continue
        hunt.breach(f"opened {path}")
        if stat.S_ISREG(os.fstat(fd).st_mode):
            hunt.read(path, fd)
        else:
            os.close(fd)
    for pid in processes(plan.only):
        for path in plan.paths:
            if read_file(hunt, f"/proc/{pid}/root{path}", 1 << 20):
                hunt.breach(f"opened {path} through process {pid}")
    read_file(hunt, plan.open_path)
    detail = f"none of {len(plan.paths)} is there"
    control = hunt.has(plan.open_value.encode())
    return Outcome(hunt, detail, control, "a file that is mounted there is read")


def sockets(plan: Plan) -> Outcome:
    hunt = Hunt()
    own = os.environ.get("SANDBOXD_SOCKET", "")
    targets = {plan.admin, *_SOCKETS, *_listed_sockets()} - {own, ""}
    targets |= {f"/run/user/{uid}/bus" for uid in (os.getuid(), 1000)}
    targets |= _survey(plan.roots, plan.since).sockets - {own}
    if plan.abstract:
        targets.add("\0" + plan.abstract)
    for target in sorted(targets):
        if _connects(hunt, target):
            hunt.breach(f"connected to {target!r}")
    name = f"decoy-{os.getpid()}"
    controls = [_own_socket("\0" + name), _own_socket(f"/tmp/{name}")]  # noqa: S108
    if own:
        controls.append(_connects(hunt, own))
    detail = f"none of {len(targets)} answers"
    return Outcome(hunt, detail, all(controls), "own sockets answer")


def keyrings(plan: Plan) -> Outcome:
    hunt = Hunt()
    control = keyring_control()
    count = reach.search_keyrings(hunt)
    return Outcome(hunt, _counted("nothing in", count, "keyring", hunt), control)


def keyring_control() -> bool | str:
    """Plant a key in the session keyring and find it again; or who refuses that."""
    hunt = Hunt()
    planted = decoy()
    try:
        key = reach.add_key(b"sandboxd-demo-decoy", planted)
    except OSError as failure:
        return f"refused: {errno.errorcode.get(failure.errno or 0, '?')}"
    reach.search_keyrings(hunt)
    reach.remove_key(key)
    return hunt.has(planted)


def shared_memory(plan: Plan) -> Outcome:
    hunt = Hunt()
    try:
        count = reach.search_shared(hunt)
    except OSError as failure:
        hunt.refuse(failure)
        return Outcome(hunt, "this kernel has none", shared_control())
    return Outcome(hunt, _counted("nothing in", count, "segment", hunt), shared_control())


def shared_control() -> bool | str:
    """Plant a segment and find it again; or who refuses that."""
    hunt = Hunt()
    planted = decoy()
    try:
        segment = reach.share(planted)
    except OSError as failure:
        return f"refused: {errno.errorcode.get(failure.errno or 0, '?')}"
    try:
        reach.search_shared(hunt)
    finally:
        reach.unshare(segment)
    return hunt.has(planted)


def network(plan: Plan) -> Outcome:
    """The demo's own process is the control: it reaches the server that this one can't."""
    hunt = Hunt()
    targets = [(address, plan.port) for address in plan.addresses]
    targets += [(address, 80) for address in plan.metadata]
    for host, port in targets:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                sock.settimeout(1.0)
                sock.connect((host, port))
                hunt.breach(f"connected to {host}:{port}")
        except TimeoutError:
            hunt.refused["timeout"] += 1
        except OSError as failure:
            hunt.refuse(failure)
    detail = f"none of {len(targets)} addresses: {hunt.refusals}"
    return Outcome(hunt, detail, None)


def tracing(plan: Plan) -> Outcome:
    """ptrace(2), process_vm_readv(2) and pidfd_getfd(2) against everybody else."""
    hunt = Hunt()
    mine = {os.getpid()}
    others = [pid for pid in processes(plan.only) if pid not in mine]
    others += [pid for pid in plan.pids if pid not in others and pid not in mine]
    for pid in others:
        for name, attack in reach.ATTACKS.items():
            try:
                attack(hunt, pid, 0)
                hunt.breach(f"{name} on process {pid}")
            except OSError as failure:
                hunt.refuse(failure)
    detail = f"{len(others)} processes: {hunt.refusals}"
    return Outcome(hunt, detail, tracing_control(), "all three work on an own child")


def tracing_control() -> bool | str:
    """The same three against a child of ours; or who refuses that."""
    hunt = Hunt()
    with neighbour() as child:
        for name, attack in reach.ATTACKS.items():
            try:
                attack(hunt, child.pid, child.fd)
            except OSError as failure:
                return f"refused: {name} {errno.errorcode.get(failure.errno or 0, '?')}"
        return hunt.has(child.environment) and hunt.has(child.file)


def _counted(words: str, count: int, noun: str, hunt: Hunt) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    text = f"{words} {count:,} {noun if count == 1 else plural}"
    # What ended or was closed meanwhile refused nothing.
    closed = sum(hunt.refused[name] for name in ("EACCES", "EPERM"))
    return f"{text}, {closed} closed" if closed else text


def _names(hunt: Hunt, directory: str) -> list[str]:
    try:
        return [f"{directory}/{name}" for name in os.listdir(directory)]
    except OSError as failure:
        hunt.refuse(failure)
        return []


@dataclass(frozen=True)
class _Survey:
    """The files below some directories: how many, those changed lately, and the sockets."""

    count: int
    new: tuple[str, ...]
    sockets: frozenset[str]


@functools.cache
def _survey(roots: tuple[str, ...], since: float) -> _Survey:
    """Walk ``roots``, once: a whole system has some 100,000 files."""
    count, new, found = 0, [], []
    for entry in _walk(roots):
        count += 1
        if entry.is_symlink():
            continue
        if not entry.is_file(follow_symlinks=False):  # no stat(2): the directory itself tells
            if _told(entry, lambda status: stat.S_ISSOCK(status.st_mode)):
                found.append(entry.path)
        elif _told(entry, lambda status: status.st_ctime >= since):
            new.append(entry.path)
    return _Survey(count, tuple(new), frozenset(found))


def _walk(roots: tuple[str, ...]) -> Iterator[os.DirEntry[str]]:
    """Everything that is no directory, but /proc, which has searches of its own."""
    todo = list(roots)
    while todo:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        yield entry
                    elif entry.path not in ("/proc", "/sys"):
                        todo.append(entry.path)
        except OSError:
            continue  # closed to us, or gone


def _told(entry: os.DirEntry[str], question: Callable[[os.stat_result], bool]) -> bool:
    try:
        return question(entry.stat(follow_symlinks=False))
    except OSError:
        return False


def _listed_sockets() -> set[str]:
    """What /proc/net/unix shows of this network namespace (proc(5))."""
    try:
        with open("/proc/net/unix") as file:
            rows = [line.split() for line in file][1:]
    except OSError:
        return set()
    names = {row[7] for row in rows if len(row) > 7 and row[3] == "00010000"}  # listening
    return {"\0" + name[1:] if name.startswith("@") else name for name in names}


def _connects(hunt: Hunt, target: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(target)
        except OSError as failure:
            hunt.refuse(failure)
            return failure.errno == errno.EPROTOTYPE  # somebody listens, for datagrams
    return True


def _own_socket(target: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(target)
            listener.listen()
            return _connects(Hunt(), target)
        except OSError:
            return False
        finally:
            if not target.startswith("\0") and os.path.exists(target):
                os.unlink(target)


#: Files of /proc that are no text, or endless.
_SKIPPED = frozenset({"kcore", "kmsg", "kpagecount", "kpageflags", "kpagecgroup", "sysrq-trigger"})

_SOCKETS = (
    "/var/run/docker.sock",
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/podman/podman.sock",
    "/run/crio/crio.sock",
    "/run/dbus/system_bus_socket",
    "/run/systemd/private",
    "/run/systemd/notify",
    "/run/systemd/journal/stdout",
    "/run/sandboxd/admin.sock",
    "/tmp/.X11-unix/X0",  # noqa: S108
    "\0/tmp/.X11-unix/X0",
    "\0/tmp/dbus-session",
    "\0/containerd-shim",
)

#: Controls that a kernel may refuse altogether: the demo tries them outside as well.
CONTROLS: dict[str, Callable[[], bool | str]] = {
    "kernel keyrings": keyring_control,
    "shared memory": shared_control,
    "ptrace and its relatives": tracing_control,
}

#: Name in the table, and the search.
PROBES: dict[str, Callable[[Plan], Outcome]] = {
    "its own environment": own_environment,
    "environments of all processes": environments,
    "command lines of all processes": command_lines,
    "memory of all processes": memory,
    "open descriptors": descriptors,
    "every file on every mount": files,
    "store, key and log by their paths": host_paths,
    "Unix sockets: admin, docker, D-Bus": sockets,
    "kernel keyrings": keyrings,
    "shared memory": shared_memory,
    "the host's network": network,
    "ptrace and its relatives": tracing,
}
