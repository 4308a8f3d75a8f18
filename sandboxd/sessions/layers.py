"""What separates a sandbox from the host, layer by layer, as operators see it."""

from __future__ import annotations

import os
from collections.abc import Collection

from sandboxd.isolation.client import Launcher
from sandboxd.isolation.landlock import SINCE
from sandboxd.isolation.wire import CgroupState

__all__ = ["layers", "provided"]

_ALWAYS = frozenset(
    {
        "user_namespace",
        "mount_namespace",
        "pid_namespace",
        "ipc_namespace",
        "uts_namespace",
        "cgroup_namespace",
    }
)


_ALONE = "loopback alone, with sockets that the broker serves: what egress names"


def provided(network: str, launcher: Launcher) -> frozenset[str]:
    """The features, by the names a policy's ``require`` uses, that a sandbox really gets."""
    depends = {
        "network_namespace": network != "host",
        "time_namespace": launcher.time,
        "landlock": launcher.landlock > 0,
        "seccomp": launcher.seccomp,
        "cgroup": launcher.cgroup.complete,
        "cgroup_io": launcher.cgroup.io,
    }
    return _ALWAYS | {feature for feature, there in depends.items() if there}


def layers(
    network: str, launcher: Launcher, lowered: Collection[str] = (), *, egress: bool = False
) -> list[dict[str, str]]:
    """The layers of one sandbox, the state of each and a remark.

    ``on``; ``missing``, because this host lacks it; or ``lowered``, because a policy allowed it,
    by name (``lowered``) or with the host's network. ``egress``: whether it has a way out.
    """
    found = _layers(network, launcher, egress=egress)
    for layer in found:
        if layer["state"] == "missing" and layer["layer"].replace(" ", "_") in lowered:
            layer["state"] = "lowered"
    return found


def _layers(network: str, launcher: Launcher, *, egress: bool) -> list[dict[str, str]]:
    own_uid = "a host uid of its own" if launcher.mode == "root" else "the operator's uid"
    return [
        _on("user namespace", f"{own_uid}; no user namespace may be made inside"),
        _on("mount namespace", "a read-only root of its own; the host's files are not there"),
        _on("pid namespace", "sees and signals its own processes only"),
        _on("ipc namespace", "no shared memory or queues with others"),
        _on("uts namespace", "a generic host name"),
        _on("cgroup namespace", "the host's cgroup paths are hidden"),
        _on("network namespace", _ALONE if egress else "no interface is up")
        if network == "none"
        else _layer("network namespace", "lowered", "the host's network"),
        _on("time namespace", "the clocks begin with the sandbox, not with the host")
        if launcher.time
        else _layer(
            "time namespace", "missing", "not in this kernel: clocks tell the host's uptime"
        ),
        _on("capabilities", "every set is empty"),
        _on("no new privileges", "setuid and file capabilities give nothing"),
        _landlock(launcher.landlock, network),
        _on("seccomp", "a list of allowed system calls; no other ABI, no clone3")
        if launcher.seccomp
        else _layer("seccomp", "missing", f"no filters in this kernel on {os.uname().machine}"),
        _on("session keyring", "a new, empty one"),
        _on("resource limits", "per process; no core dumps"),
        _cgroup(launcher.cgroup),
        _on("cgroup io", "reading from and writing to disks, where `io` limits them")
        if launcher.cgroup.io
        else _layer("cgroup io", "missing", "no such controller here: `io` limits nothing"),
    ]


def _cgroup(state: CgroupState) -> dict[str, str]:
    if not state.complete:
        return _layer("cgroup", "missing", f"limits hold for single processes: {state.lacking}")
    return _on("cgroup", f"memory, processes and processors of the whole tree ({state.version})")


def _landlock(abi: int, network: str) -> dict[str, str]:
    if abi == 0:
        return _layer("landlock", "missing", "not in this kernel, or not enabled")
    tcp = 4  # the version that brought it; a shared network isn't restricted by ports
    covered = [
        what for since, what in SINCE.items() if since <= abi and (since, network) != (tcp, "host")
    ]
    return _on("landlock", f"ABI {abi}: {', '.join(covered)}")


def _on(layer: str, remark: str) -> dict[str, str]:
    return _layer(layer, "on", remark)


def _layer(layer: str, state: str, remark: str) -> dict[str, str]:
    return {"layer": layer, "state": state, "remark": remark}
