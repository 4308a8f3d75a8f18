"""How long ending takes: from the decision until the last process of a tree is gone and reaped.

Whatever the program does against it: deaf to signals, in other sessions, stopped, forking on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from bench import proc
from bench.launching import Sandboxes, open_sandboxes
from bench.measure import quantile

__all__ = ["GAMES", "GOAL_MS", "measure", "table"]

GOAL_MS = 100.0
_READY = b"ready\n"
_FORKS = """
import os
print("ready", flush=True)
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
_DEAF = "trap '' TERM HUP INT QUIT; "
GAMES = {
    "does nothing": "echo ready; exec sleep 300",
    "deaf to signals": _DEAF + "echo ready; while :; do sleep 300; done",
    "forked twice, another session": f"({_DEAF} setsid sh -c 'echo ready; sleep 300' &) ; wait; "
    "sleep 300",
    "stopped": "sleep 300 & kill -STOP $!; echo ready; kill -STOP $$",
    "pipes held by grandchildren": "(setsid sleep 300 &) ; (setsid sleep 300 &) ; "
    "echo ready; sleep 300",
    "fifty processes": "i=0; while [ $i -lt 50 ]; do sleep 300 & i=$((i+1)); done; "
    "echo ready; wait",
    "never stops forking": f"exec /usr/bin/python3 -c '{_FORKS}'",
}


async def measure(runs: int) -> dict[str, Any]:
    """Milliseconds of each game; ``lacking`` names trees of which something was left."""
    times: dict[str, list[float]] = {name: [] for name in GAMES}
    lacking: list[str] = []
    async with open_sandboxes() as sandboxes:
        for _ in range(runs):
            for name, script in GAMES.items():
                seconds, left = await _one(sandboxes, script)
                times[name].append(seconds * 1000)
                if left:
                    lacking.append(f"{name}: {left} processes were left")
    return {
        "runs": runs,
        "goal_ms": GOAL_MS,
        "games": {
            name: {"median_ms": quantile(each, 0.5), "p95_ms": quantile(each, 0.95),
                   "most_ms": max(each)}
            for name, each in times.items()
        },
        "lacking": lacking,
    }  # fmt: skip


def table(figures: dict[str, Any]) -> str:
    rows = [f"{'the tool':32}{'median ms':>11}{'p95':>8}{'most':>8}"]
    for name, each in figures["games"].items():
        rows.append(
            f"{name:32}{each['median_ms']:11.1f}{each['p95_ms']:8.1f}{each['most_ms']:8.1f}"
        )
    late = [name for name, each in figures["games"].items() if each["most_ms"] > GOAL_MS]
    rows.append(f"more than {GOAL_MS:.0f} ms at least once: {', '.join(late) or 'none'}")
    return "\n".join(rows)


async def _one(sandboxes: Sandboxes, script: str) -> tuple[float, int]:
    """Seconds that the end of one took, and how many of its processes there were afterwards."""
    spec = replace(sandboxes.spec(), argv=(b"/bin/sh", b"-c", script.encode()), extra_fds=())
    read, write = os.pipe2(os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        process = await sandboxes.launcher.launch(spec, stdin=null, stdout=write, stderr=null)
    finally:
        os.close(write)
        os.close(null)
    async with trio.lowlevel.FdStream(read) as output:
        seen = b""
        while _READY not in seen:
            if not (data := await output.receive_some()):
                break  # it has ended by itself already, and its tree with it
            seen += data
        tree = proc.family([process.pid])
        began = time.perf_counter()
        await process.kill()
        await process.wait()
        seconds = time.perf_counter() - began
    sandboxes.free(spec.uid)
    return seconds, _alive(tree)


def _alive(pids: Sequence[int]) -> int:
    """Zombies that the launcher hasn't reaped count as well."""
    return sum(Path(f"/proc/{pid}").exists() for pid in pids)
