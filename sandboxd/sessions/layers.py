"""What separates a sandbox from the host, layer by layer, as operators see it."""

from __future__ import annotations

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


def provided(network: str) -> frozenset[str]:
    """The features, by the names a policy's ``require`` uses, that a sandbox really gets."""
    return _ALWAYS if network == "host" else _ALWAYS | {"network_namespace"}


def layers(network: str, mode: str) -> list[dict[str, str]]:
    """The layers of one sandbox and the state of each: ``on`` or ``lowered``, with a remark.

    ``mode`` is the launcher's: ``root`` gives each sandbox a host uid of its own, ``user`` runs
    all of them as the operator's.
    """
    own_uid = "a host uid of its own" if mode == "root" else "the operator's uid"
    return [
        _on("user namespace", f"{own_uid}; no user namespace may be made inside"),
        _on("mount namespace", "a read-only root of its own; the host's files are not there"),
        _on("pid namespace", "sees and signals its own processes only"),
        _on("ipc namespace", "no shared memory or queues with others"),
        _on("uts namespace", "a generic host name"),
        _on("cgroup namespace", "the host's cgroup paths are hidden"),
        _on("network namespace", "no interface is up")
        if network == "none"
        else {"layer": "network namespace", "state": "lowered", "remark": "the host's network"},
        _on("capabilities", "every set is empty"),
        _on("no new privileges", "setuid and file capabilities give nothing"),
        _on("session keyring", "a new, empty one"),
        _on("resource limits", "per process; no core dumps"),
    ]


def _on(layer: str, remark: str) -> dict[str, str]:
    return {"layer": layer, "state": "on", "remark": remark}
