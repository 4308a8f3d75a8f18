"""What is left of many calls: nothing that grows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import trio

from bench.launch import Sandboxes
from sandboxd.isolation.client import open_launcher
from sandboxd.isolation.launcher import fork_launcher

__all__ = ["count", "table"]


async def count(program: str, runs: int) -> dict[str, Any]:
    """Counts before and after so many calls in one template, and after its end."""
    async with open_launcher(fork_launcher()) as launcher:
        sandboxes = Sandboxes(launcher, program, "bench")
        for _ in range(50):
            await sandboxes.one()
        await trio.sleep(0.2)  # its next thread gets ready
        before = _holdings(launcher.pid)
        for _ in range(runs):
            await sandboxes.one()
        await trio.sleep(0.2)
        after = _holdings(launcher.pid)
        await launcher.retire("bench")
        await trio.sleep(0.2)
        ended = _holdings(launcher.pid)
    grown = {n: after[n] - before[n] for n in before if n != "KiB"}
    return {
        "runs": runs,
        "before": before,
        "after": after,
        "ended": ended,
        "valid": not any(value > 0 for value in grown.values()),
    }


def table(figures: dict[str, Any]) -> str:
    rows = [f"{'':24}{'before':>9}{'after ' + str(figures['runs']):>12}{'at the end':>12}"]
    for name in figures["before"]:
        values = (figures[column].get(name, 0) for column in ("before", "after", "ended"))
        rows.append("{:24}{:9}{:12}{:12}".format(name, *values))
    return "\n".join(rows)


def _holdings(launcher: int) -> dict[str, int]:
    family = [launcher, *_below(launcher)]
    states = [_status(pid) for pid in family]
    held = {
        "processes": len(family),
        "zombies": sum(state.get("State", "").startswith("Z") for state in states),
        "threads": sum(int(state.get("Threads", "0")) for state in states),
        "descriptors of ours": len(os.listdir("/proc/self/fd")),
        "KiB": sum(int(state.get("VmRSS", "0").split()[0]) for state in states),
    }
    if os.geteuid() == 0:
        held["descriptors"] = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family)
        held["mounts"] = sum(
            len(Path(f"/proc/{p}/mountinfo").read_bytes().splitlines()) for p in family
        )
    return held


def _below(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            found += [int(child), *_below(int(child))]
    return found


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
