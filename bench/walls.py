"""Whether what is measured is isolated as it is shipped: a figure without that is worthless.

Two witnesses, neither of which trusts the other: the layers that sandboxd reports, and a program
that looks around inside, in a sandbox made by the same way as those that are measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NAMESPACES", "PROBE", "holes", "own_namespaces", "summary", "weaker"]

NAMESPACES = ("mnt", "pid", "ipc", "uts", "net", "user", "cgroup")
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")

#: Prints one JSON object: what a program sees of the walls around it. Standard library only.
#: A program copied to /dev/shm runs anywhere but behind our Landlock rules; one in /tmp is the
#: control. Address randomisation can be turned off anywhere but behind our system call filter.
PROBE = """
import ctypes, errno, json, os, shutil, sys
def attempt(action):
    try:
        action()
    except OSError as failure:
        return errno.errorcode.get(failure.errno, str(failure.errno))
    return "ok"
def run_from(directory):
    def action():
        path = directory + "/bench-probe"
        try:
            shutil.copyfile("/bin/true", path)
            os.chmod(path, 0o755)
            os.waitpid(os.posix_spawn(path, [path], {}), 0)
        finally:
            if os.path.exists(path):
                os.unlink(path)
    return action
def personality():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.personality(0x0040000) < 0:
        raise OSError(ctypes.get_errno(), "personality")
lines = open("/proc/self/status").read().splitlines()
told = {
    "status": {name: value.strip() for name, _, value in (l.partition(":") for l in lines)},
    "namespaces": {n: os.readlink("/proc/self/ns/" + n) for n in NAMESPACES},
    "from /dev/shm": attempt(run_from("/dev/shm")),
    "from /tmp": attempt(run_from("/tmp")),
    "personality": attempt(personality),
    "write /usr": attempt(lambda: os.open("/usr", os.O_WRONLY | os.O_TMPFILE)),
}
print(json.dumps(told), flush=True)
if "wait" in sys.argv:
    sys.stdin.read()
""".replace("NAMESPACES", repr(NAMESPACES))


def own_namespaces() -> dict[str, str]:
    """Those of this process, which a sandbox must not share."""
    return {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES}


#: What an ordinary user may be given no cgroup for.
_CGROUP = ("cgroup", "cgroup io")


def weaker(layers: Sequence[Mapping[str, str]]) -> list[str]:
    """The reported layers that are not on.

    Only limits of whole trees may be missing where the host gives an ordinary user no cgroup;
    every other layer is there on every host that figures are worth taking on.
    """
    if not layers:
        return ["no layer is reported"]
    return [
        f"{row['layer']} is {row['state']}: {row['remark']}"
        for row in layers
        if row["state"] != "on" and not (row["layer"] in _CGROUP and row["state"] == "missing")
    ]


def holes(
    told: Mapping[str, Any], outside: Mapping[str, str], sibling: Mapping[str, Any] | None = None
) -> list[str]:
    """What the probe found missing. ``outside`` are namespaces that it must not share;
    ``sibling`` is another probe's word that ran at the same time in the same session."""
    found = []
    status, spaces = told["status"], told["namespaces"]
    found += [
        f"the host's {name} namespace" for name in NAMESPACES if spaces[name] == outside[name]
    ]
    for name in _CAPABILITIES:
        if int(status[name], 16):
            found.append(f"capabilities are left ({name} {status[name]})")
    if status["NoNewPrivs"] != "1":
        found.append("no_new_privs is not set")
    if status["Seccomp"] != "2":
        found.append(f"no system call filter (Seccomp: {status['Seccomp']})")
    if told["personality"] != "EPERM":
        found.append(f"the filter allows personality(ADDR_NO_RANDOMIZE): {told['personality']}")
    if told["from /dev/shm"] != "EACCES":
        found.append(f"no Landlock rules: a program runs from /dev/shm: {told['from /dev/shm']}")
    if told["from /tmp"] != "ok":
        found.append(f"the control failed: no program runs from /tmp: {told['from /tmp']}")
    if told["write /usr"] != "EROFS":
        found.append(f"/usr is not read-only: {told['write /usr']}")
    if sibling is not None:
        shared = [n for n in ("mnt", "pid", "ipc") if spaces[n] == sibling["namespaces"][n]]
        found += [f"two calls share one {name} namespace" for name in shared]
    return found


def summary(told: Mapping[str, Any], outside: Mapping[str, str]) -> str:
    """The walls that a probe saw around it, in a few words: of other programs, to compare."""
    status, spaces = told["status"], told["namespaces"]
    own = [name for name in NAMESPACES if spaces[name] != outside[name]]
    left = [name for name in _CAPABILITIES if int(status[name], 16)]
    parts = [f"{len(own)} of {len(NAMESPACES)} namespaces"]
    if missing := [name for name in NAMESPACES if name not in own]:
        parts[0] += f" (not {', '.join(missing)})"
    parts.append(f"capabilities left in {', '.join(left)}" if left else "no capabilities")
    parts.append("no_new_privs" if status["NoNewPrivs"] == "1" else "privileges can be gained")
    parts.append("seccomp" if status["Seccomp"] == "2" else "no seccomp")
    parts.append("Landlock" if told["from /dev/shm"] == "EACCES" else "no Landlock")
    return ", ".join(parts)
