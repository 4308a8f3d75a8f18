"""What is left of many launches: nothing that grows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import trio

from bench import proc
from bench.launching import open_sandboxes

__all__ = ["count", "table"]

#: Seconds in which what a launch leaves for later (the next thread, a cgroup) gets done.
_SETTLE = 0.5


async def count(launches: int) -> dict[str, Any]:
    """Counts before and after so many launches; ``lacking`` names what grew."""
    async with open_sandboxes() as sandboxes:
        for _ in range(min(50, launches)):
            await sandboxes.one()
        await trio.sleep(_SETTLE)
        before = _holdings(sandboxes.launcher.pid)
        for _ in range(launches):
            await sandboxes.one()
        await trio.sleep(_SETTLE)
        after = _holdings(sandboxes.launcher.pid)
    grown = [name for name in before if name != "KiB" and after[name] > before[name]]
    return {
        "runs": launches,
        "before": before,
        "after": after,
        "lacking": [f"{name} grew from {before[name]} to {after[name]}" for name in grown],
    }


def table(figures: dict[str, Any]) -> str:
    rows = [f"{'':24}{'before':>9}{'after ' + str(figures['runs']):>14}"]
    for name, value in figures["before"].items():
        rows.append(f"{name:24}{value:9}{figures['after'][name]:14}")
    return "\n".join(rows)


def _holdings(launcher: int) -> dict[str, int]:
    """Of this process, the launcher and all below it."""
    members = proc.family([launcher])
    states = [proc.status(pid) for pid in members]
    held = {
        "processes": len(members),
        "zombies": sum(state.get("State", "").startswith("Z") for state in states),
        "threads": sum(int(state.get("Threads", "0")) for state in states),
        "descriptors of ours": len(list(Path("/proc/self/fd").iterdir())),
        "cgroups": _cgroups(),
        "KiB": sum(int(state.get("VmRSS", "0").split()[0]) for state in states),
    }
    if os.geteuid() == 0:
        held["descriptors"] = sum(len(list(Path(f"/proc/{p}/fd").iterdir())) for p in members)
        held["mounts"] = sum(
            len(Path(f"/proc/{p}/mountinfo").read_bytes().splitlines()) for p in members
        )
    return held


def _cgroups() -> int:
    """The kernel's count of all cgroups (cgroups(7), /proc/cgroups); the largest hierarchy's."""
    lines = Path("/proc/cgroups").read_text().splitlines()
    return max((int(line.split()[2]) for line in lines if not line.startswith("#")), default=0)
