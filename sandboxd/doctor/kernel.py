"""What the kernel lets us do: namespaces, mounts, Landlock, seccomp, system calls, cgroups."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandboxd.doctor.check import Check, State, read, sysctl
from sandboxd.isolation.wire import CgroupState

__all__ = ["checks"]


def checks(probed: Mapping[str, Mapping[str, Any]], state: Path) -> Iterator[Check]:
    """Findings from the probes' results; ``state`` is where idmapped mounts were tried."""
    results = {name: _Probe(**result) for name, result in probed.items()}
    yield _kernel()
    yield _sandbox(results["sandbox"])
    yield _user_namespaces(results["user"])
    yield from _namespaces(results)
    yield _mounts(results["mounts"])
    yield _proc(results["proc"], results["proc_user"])
    yield _idmap(results.get("idmap"), state)
    yield _landlock(results["landlock"])
    yield from _system_calls(results)
    yield _cgroups(results["cgroups"])


@dataclass(frozen=True)
class _Probe:
    ok: bool
    detail: str
    call: str = ""
    errno: str = ""

    @property
    def why(self) -> str:
        """``unshare: EPERM (CLONE_NEWUSER)``"""
        text = self.call + (f": {self.errno}" if self.errno else "")
        return text + (f" ({self.detail})" if self.detail else "")


def _kernel() -> Check:
    release = platform.release()
    detail = f"Linux {release} {platform.machine()}"
    if _version(release) >= (5, 14):
        return Check("kernel", "ok", detail)
    return Check(
        "kernel",
        "degraded",
        detail,
        "before 5.14 there is no cgroup.kill, before 5.13 no Landlock, before 5.12 no recursive "
        "read-only mounts",
        "boot a kernel of 5.14 or later (Debian 12, Ubuntu 22.04, RHEL 9 have one)",
    )


def _sandbox(probe: _Probe) -> Check:
    """The whole in one: everything below only explains it."""
    name = "a sandbox"
    if probe.ok:
        return Check(name, "ok", f"built, used and gone in {probe.detail} ms", required=True)
    return Check(
        name,
        "missing",
        f"can't be built: {probe.why}",
        "no agent and no tool can be started",
        "solve what is missing below",
        required=True,
    )


def _user_namespaces(probe: _Probe) -> Check:
    """Root needs them too: the program in a sandbox is root of nothing in one of its own."""
    name, root = "user namespaces", os.geteuid() == 0
    limit = sysctl("user/max_user_namespaces")
    apparmor = sysctl("kernel/apparmor_restrict_unprivileged_userns")
    if probe.ok:
        detail = f"can be made and hold capabilities (limit {limit})"
        if root and apparmor == "1":
            detail += "; AppArmor restricts those of ordinary users"
        return Check(name, "ok", detail, required=True)
    if limit == "0":
        detail = "user.max_user_namespaces is 0"
        fix = "sysctl -w user.max_user_namespaces=15000   # keep it: /etc/sysctl.d/60-sandboxd.conf"
    elif not root and sysctl("kernel/unprivileged_userns_clone") == "0":
        detail = "kernel.unprivileged_userns_clone is 0"
        fix = (
            "run sandboxd as root, or sysctl -w kernel.unprivileged_userns_clone=1   # keep it: "
            "/etc/sysctl.d/60-sandboxd.conf"
        )
    elif not root and apparmor == "1":
        detail = f"AppArmor takes their capabilities: {probe.why}"
        fix = (
            "give this interpreter alone a profile with userns (docs/doctor.md has it), instead of "
            "lifting kernel.apparmor_restrict_unprivileged_userns for every program"
        )
    elif _container():
        detail = f"refused inside a container: {probe.why}"
        fix = (
            "let the container's seccomp profile pass unshare, clone and mount "
            "(docker run --security-opt seccomp=PROFILE), or run sandboxd on the host"
        )
    else:
        detail = f"refused: {probe.why}"
        fix = "boot a kernel with CONFIG_USER_NS=y" + ("" if root else ", or run sandboxd as root")
    return Check(name, "missing", detail, "nothing can be isolated", fix, required=True)


_NAMESPACE_COSTS = {
    "mount": "an agent would see the host's files",
    "pid": "an agent would see and could signal the host's processes, and calls could leave some "
    "behind",
    "net": "an agent would have the host's network",
    "ipc": "agents and tools would share System V IPC and POSIX message queues",
    "uts": "a sandbox would show the host's name",
    "cgroup": "a sandbox shows its place in the host's cgroup tree",
    "time": "a sandbox's clocks tell since when this host has been running",
}


def _namespaces(results: Mapping[str, _Probe]) -> Iterator[Check]:
    """One line when all are there, else one for each that isn't."""
    required = ("mount", "pid", "net", "ipc", "uts")
    there = [n for n in _NAMESPACE_COSTS if results[n].ok]
    if there:
        yield Check("namespaces", "ok", " ".join(there), required=True)
    for name, costs in _NAMESPACE_COSTS.items():
        probe = results[name]
        if probe.ok:
            continue
        fix = f"boot a kernel with CONFIG_{name.upper()}_NS=y"
        if not results["user"].ok and os.geteuid() != 0:
            fix = "solve user namespaces first"
        elif probe.errno == "EPERM" and os.geteuid() == 0:
            fix = "give root CAP_SYS_ADMIN (in a container: --cap-add SYS_ADMIN), or run as a user"
        elif probe.errno == "ENOSPC":
            fix = f"raise user.max_{'mnt' if name == 'mount' else name}_namespaces (sysctl)"
        state: State = "missing" if name in required else "degraded"
        yield Check(f"{name} namespace", state, probe.why, costs, fix, name in required)


def _mounts(probe: _Probe) -> Check:
    name = "mounts"
    if probe.ok:
        return Check(name, "ok", "tmpfs, recursive read-only binds, pivot_root", required=True)
    fix = "boot a kernel of 5.12 or later"
    if probe.errno != "ENOSYS":
        fix = "let the container runtime or security module pass mount, mount_setattr, pivot_root"
    costs = "a sandbox can't get a root of its own: nothing can be isolated"
    return Check(name, "missing", probe.why, costs, fix, required=True)


def _proc(probe: _Probe, in_user_namespace: _Probe) -> Check:
    name = "/proc"
    if not probe.ok:
        fix = (
            "something covers parts of this /proc, so the kernel refuses a fresh one "
            "(mount too revealing): docker run --security-opt systempaths=unconfined, "
            "podman run --security-opt unmask=ALL, or run sandboxd on the host"
        )
        costs = "a sandbox can't see its own processes without seeing others': none is built"
        return Check(name, "missing", probe.why, costs, fix, required=True)
    detail = "a fresh one can be mounted in a new pid namespace"
    if not in_user_namespace.ok:
        detail += f"; not inside a user namespace ({in_user_namespace.why})"
    return Check(name, "ok", detail, required=True)


def _idmap(probe: _Probe | None, directory: Path) -> Check:
    name = "idmapped mounts"
    if probe is None:
        return Check(name, "ok", "not used: without root a sandbox has its user's own files")
    if probe.ok:
        return Check(name, "ok", f"on the filesystem of {directory}")
    return Check(
        name,
        "degraded",
        f"on the filesystem of {directory}: {probe.why}",
        "under root, an agent or tool can't be given a workspace that lies there",
        "keep workspaces on ext4, xfs, btrfs or (Linux 6.3) tmpfs, with Linux 5.12 or later",
    )


_LANDLOCK_SINCE = (
    (2, "moving files between directories (5.19)"),
    (3, "truncation (6.2)"),
    (4, "TCP bind and connect (6.7)"),
    (5, "device ioctls (6.10)"),
    (6, "abstract sockets and signals (6.12)"),
)


def _landlock(probe: _Probe) -> Check:
    name = "Landlock"
    if not probe.ok:
        fix = "boot a kernel of 5.13 or later with CONFIG_SECURITY_LANDLOCK=y"
        if probe.errno in ("EOPNOTSUPP", "ENOTSUP"):  # one number, two names
            fix = "add landlock to the kernel's lsm= boot parameter (see /sys/kernel/security/lsm)"
        elif probe.errno == "EPERM":
            fix = "let the container's seccomp profile pass landlock_create_ruleset"
        costs = "file access rests on mounts alone: no second wall if one of them is wrong"
        return Check(name, "missing", probe.why, costs, fix)
    abi = int(probe.detail)
    lacking = [what for since, what in _LANDLOCK_SINCE if abi < since]
    if lacking:
        return Check(
            name,
            "degraded",
            f"ABI {abi}",
            f"it can't restrict: {', '.join(lacking)}",
            "boot a newer kernel (the version is in brackets)",
        )
    return Check(name, "ok", f"ABI {abi}")


@dataclass(frozen=True)
class _Feature:
    key: str
    name: str
    costs: str
    fix: str
    required: bool = False


_FEATURES = (
    _Feature(
        "seccomp",
        "seccomp filters",
        "a sandbox could use every system call: io_uring, bpf, keyctl",
        "boot a kernel with CONFIG_SECCOMP_FILTER=y",
    ),
    _Feature(
        "openat2",
        "openat2",
        "paths that an agent can change can't be opened safely: no sandbox is built",
        "Linux 5.6 or later; in a container or unit, let seccomp pass it (not RestrictSUIDSGID=)",
        required=True,
    ),
    _Feature(
        "pidfd",
        "pidfd",
        "a signal could hit a process that reuses a pid: no sandbox is built",
        "Linux 5.3 or later; in a container, let seccomp pass pidfd_open and pidfd_send_signal",
        required=True,
    ),
    _Feature(
        "peerpidfd",
        "SO_PEERPIDFD",
        "a socket's peer is known by uid and pid alone, and pids are reused",
        "Linux 6.5 or later",
    ),
    _Feature(
        "clone3",
        "clone3",
        "a process can't be born inside its cgroup and is moved there afterwards",
        "Linux 5.3 or later; in a container, let seccomp pass it",
    ),
)


def _system_calls(results: Mapping[str, _Probe]) -> Iterator[Check]:
    for feature in _FEATURES:
        probe = results[feature.key]
        if probe.ok:
            yield Check(feature.name, "ok", "works", required=feature.required)
            continue
        state: State = "missing" if feature.required else "degraded"
        yield Check(feature.name, state, probe.why, feature.costs, feature.fix, feature.required)


def _cgroups(probe: _Probe) -> Check:
    name = "cgroups"
    state = CgroupState.unpack(probe.detail) if probe.ok else CgroupState(lacking=probe.why)
    has = f"{state.version}: {' '.join(sorted(state.controllers))}" if state.version else "none"
    if state.complete and state.io:
        return Check(name, "ok", has)
    if state.complete:
        return Check(
            name,
            "degraded",
            has,
            "limits of disk traffic (`io`) limit nothing",
            "a cgroup with the io controller: run it as a service with Delegate=yes, or start it "
            "where cgroup.subtree_control of the cgroup above has io",
        )
    absent = [name for name in ("memory", "pids", "cpu") if name not in state.controllers]
    fix = "run it as a service with Delegate=yes (sandboxctl install), on a host with cgroup v2"
    if os.geteuid() != 0:
        fix = (
            "start it with delegation: systemd-run --user --scope -p Delegate=yes sandboxd, on a "
            "host with cgroup v2"
        )
    return Check(
        name,
        "degraded",
        f"{has}; {state.lacking}",
        f"no {', '.join(absent)} limit for a whole sandbox: limits hold per process (rlimits)",
        fix,
    )


def _container() -> str:
    """The container runtime around us, "" for none."""
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    return read("/run/systemd/container").strip()


def _version(release: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)
