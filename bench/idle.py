"""What sessions cost that do nothing: the time of other sessions' calls, and memory."""

from __future__ import annotations

import os
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from bench import proc, stage
from bench.measure import Variant, interleave, quantile, ratio, row
from sandboxd.errors import SandboxdError

__all__ = ["measure"]

#: Sessions whose memory is looked at; they are all alike.
_LOOKED_AT = 50
#: Sessions that make room again where the host gives no more.
_ROOM = 16


async def measure(rounds: int, sessions: int) -> dict[str, Any]:
    """Calls with so many idle sessions alive and with none beside the caller's, interleaved."""
    with stage.open_stage() as alone, stage.open_stage(sessions=sessions) as crowded:
        one = stage.Caller(alone)
        many = stage.Caller(crowded)
        small = proc.rss(crowded.pid)
        before = _available()
        inits, why = _start(crowded, sessions)
        if not inits:
            raise SystemExit(f"no session starts: {why}")
        after = _available()
        each = [_memory(init) for init in inits[:: max(1, len(inits) // _LOOKED_AT)]]
        variants = [
            Variant("one session", one.one, ours=False),
            Variant(f"{len(inits)} more, idle", many.one, ours=False),
        ]
        lacking = many.lacking()
        await interleave(variants, rounds)
        daemon = {"broker": proc.rss(crowded.pid), "launcher": proc.rss(crowded.launcher(many.id))}
        alive = sum(bool(proc.status(init)) for init in inits)
        layers = many.layers()
        one.close()
        many.close()
    if alive != len(inits):
        lacking.append(f"only {alive} of {len(inits)} idle sessions were alive at the end")
    shared = [total for total, _ in each if total is not None]
    p99 = partial(quantile, part=0.99)
    return {
        "sessions": len(inits),
        "asked": sessions,
        "why": why,
        "variants": [row(variant) for variant in variants],
        "p99": ratio(variants[1].times, variants[0].times, p99),
        "median": ratio(variants[1].times, variants[0].times),
        "daemon_bytes": daemon,
        "daemon_bytes_without": small,
        "session_pss_bytes": statistics.median(shared) if shared else None,
        "session_rss_bytes": statistics.median(resident for _, resident in each),
        "session_host_bytes": (before - after) / len(inits),
        "lacking": lacking,
        "layers": layers,
    }


def _start(on: stage.Stage, sessions: int) -> tuple[list[int], str]:
    """Idle sessions: the pids of their inits; and why there are less than asked for."""
    inits: list[int] = []
    ids: list[str] = []
    while len(inits) < sessions:
        try:
            started = on.client.call(
                "session.start", agent="idle", args=[], tty=False, attach=False
            )
        except SandboxdError as failure:
            for id in ids[-_ROOM:]:  # what ran out is needed for calls too
                on.client.call("session.stop", id=id, grace=0)
            return inits[:-_ROOM], failure.message
        ids.append(started["id"])
        inits.append(int(started["pid"]))
    return inits, ""


def _memory(init: int) -> tuple[int | None, int]:
    """Of a session's init and its program: shared in parts (None where it can't be seen), and
    resident with all that is shared."""
    family = proc.family([init])
    parts = [proc.pss(pid) for pid in family]
    known = [part for part in parts if part is not None]
    total = sum(known) if len(known) == len(parts) else None
    return total, sum(proc.rss(pid) for pid in family)


def _available() -> int:
    """Memory of the host that a new program could have (proc(5), meminfo)."""
    os.sync()
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
