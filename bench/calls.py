"""Whole tool calls: from an agent's line on its socket to the answer, one at a time and many.

Beside the same program without any isolation (trio.run_process), and beside the same broker that
launches through bwrap. The agent in its sandbox takes the times: what it sees is what is measured.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from bench import stage
from bench.measure import Variant, interleave, own_cpu, ratio, row, timed

__all__ = ["BWRAP", "OURS", "PLAIN", "measure", "throughput"]

OURS, PLAIN = "sandboxd", "trio.run_process, no isolation"
BWRAP = "the same broker with bwrap + seccomp"
LINE, RECORD = "the line alone (MCP ping)", "one record made durable"
_NO_BWRAP = "bwrap is not installed: python -m bench install"
_ENVIRONMENT = {**stage.ENVIRONMENT, "TOKEN": "x" * 40}


@asynccontextmanager
async def _both() -> AsyncIterator[tuple[stage.Caller, stage.Caller | None, str]]:
    """An agent of the shipped daemon, one of the daemon with bwrap, and why there is none."""
    with ExitStack() as undo:
        ours = stage.Caller(undo.enter_context(stage.open_stage()))
        undo.callback(ours.close)
        theirs, why = None, "" if shutil.which("bwrap") else _NO_BWRAP
        if not why:
            theirs = stage.Caller(undo.enter_context(stage.open_stage("bench.bwrap_daemon")))
            undo.callback(theirs.close)
            answer = theirs.order(1, replies=True, holds="")["replies"][0]
            if '"isError":true' in answer:
                theirs, why = None, f"no call through bwrap succeeds here: {answer[:300]}"
        yield ours, theirs, why


async def measure(rounds: int) -> dict[str, Any]:
    """One call at a time, all variants interleaved."""
    async with _both() as (ours, theirs, why):
        variants = [
            Variant(PLAIN, timed(_plain)),
            Variant(OURS, ours.one, ours.cpu, ours=False),
            Variant(LINE, lambda: _ping(ours), ours=False),
            Variant(RECORD, timed(partial(_durable, ours.stage.top / "record"))),
        ]
        if theirs is not None:
            variants.append(Variant(BWRAP, theirs.one, theirs.cpu, ours=False))
        lacking = ours.lacking()
        await interleave(variants, rounds)
        # No ways to make a call, but what one can't do without. (The line's CPU time is in ours.)
        pings, records = variants.pop(2), variants.pop(2)
        lacking += [f"afterwards: {what}" for what in ours.lacking()]
        layers = ours.layers()
    by_name = {variant.name: variant.times for variant in variants}
    return {
        "program": stage.PROGRAM,
        "variants": [row(variant) for variant in variants],
        "line_ms": statistics.median(pings.times) * 1e3,
        "record_ms": statistics.median(records.times) * 1e3,
        "absent": {BWRAP: why} if why else {},
        "ratios": {name: ratio(by_name[OURS], times) for name, times in by_name.items()},
        "lacking": lacking,
        "layers": layers,
    }


async def throughput(calls: int, callers: int, rounds: int) -> dict[str, Any]:
    """Calls per second with so many callers at once: ``rounds`` of ``calls``, interleaved."""
    async with _both() as (ours, theirs, why):
        variants = {PLAIN: _plain_rate, OURS: _rate_of(ours)}
        spending: dict[str, Callable[[], float]] = {PLAIN: own_cpu, OURS: ours.cpu}
        if theirs is not None:
            variants[BWRAP], spending[BWRAP] = _rate_of(theirs), theirs.cpu
        spent = dict.fromkeys(variants, 0.0)
        lacking = ours.lacking()
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for rate in variants.values():
            await rate(2 * callers, callers)  # warm: what is kept ready is made now
        for _ in range(rounds):
            for name, rate in variants.items():
                before = spending[name]()
                rates[name].append(await rate(calls, callers))
                spent[name] += spending[name]() - before
        lacking += [f"afterwards: {what}" for what in ours.lacking()]
        layers = ours.layers()
    return {
        "program": stage.PROGRAM,
        "callers": callers,
        "calls": calls,
        "rounds": rounds,
        "variants": [
            {
                "name": name,
                "calls_per_second": statistics.median(found),
                "lowest": min(found),
                "highest": max(found),
                "cpu_ms": spent[name] / calls / rounds * 1e3,
            }
            for name, found in rates.items()
        ],
        "absent": {BWRAP: why} if why else {},
        "ratios": {name: ratio(rates[OURS], found) for name, found in rates.items()},
        "lacking": lacking,
        "layers": layers,
    }


async def _plain() -> None:
    done = await trio.run_process(
        [stage.PROGRAM],
        env=_ENVIRONMENT,
        capture_stdout=True,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    if b"TOKEN=" not in done.stdout:
        raise SystemExit(f"{stage.PROGRAM} printed something else")


async def _durable(path: Path) -> None:
    """What an audit record costs at the least: a line appended and synchronised."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.write(fd, b"x" * 399 + b"\n")
    os.fdatasync(fd)
    os.close(fd)


async def _ping(caller: stage.Caller) -> float:
    return float(caller.order(1, ping=True)["seconds"][0])


async def _plain_rate(calls: int, callers: int) -> float:
    left = calls

    async def call() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await _plain()

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(call)
    return calls / (time.perf_counter() - began)


def _rate_of(caller: stage.Caller) -> Any:
    async def rate(calls: int, callers: int) -> float:
        return calls / float(caller.order(calls, callers)["elapsed"])

    return rate
