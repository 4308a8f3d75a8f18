"""Interleaved runs of variants, and what is made of their times.

A B C A B C ... in one process: whatever else the machine does hits all variants alike, so that
their ratio says something where the times alone would not.
"""

from __future__ import annotations

import random
import resource
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Timed", "Variant", "interleave", "own_cpu", "quantile", "ratio", "row", "timed"]

#: One run: the seconds that it took.
Timed = Callable[[], Awaitable[float]]

_WARM_UP = 3
_RESAMPLES = 400


@dataclass
class Variant:
    """One way to do it. ``every``: only each so-manieth round, for what takes long."""

    name: str
    run: Timed
    #: CPU seconds spent so far by processes that are no children of this one.
    elsewhere: Callable[[], float] | None = None
    every: int = 1
    #: Whether this process's own CPU time during a run is the variant's.
    ours: bool = True
    about: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    cpu: float = 0.0

    async def once(self) -> None:
        before = own_cpu()
        self.times.append(await self.run())
        if self.ours:
            self.cpu += own_cpu() - before


async def interleave(variants: Sequence[Variant], rounds: int) -> None:
    """``rounds`` of all variants, after a few that aren't counted."""
    for variant in variants:
        for _ in range(min(_WARM_UP, rounds)):
            await variant.run()
    before = [variant.elsewhere() if variant.elsewhere else 0.0 for variant in variants]
    for number in range(rounds):
        for variant in variants:
            if number % variant.every == 0:
                await variant.once()
    for variant, spent in zip(variants, before, strict=True):
        more = variant.elsewhere() - spent if variant.elsewhere else 0.0
        variant.cpu = (variant.cpu + more) / len(variant.times)


def timed(one: Callable[[], Awaitable[object]]) -> Timed:
    """Take the time of ``one``."""

    async def run() -> float:
        began = time.perf_counter()
        await one()
        return time.perf_counter() - began

    return run


def quantile(times: Sequence[float], part: float) -> float:
    """The smallest time that at least ``part`` of all don't exceed."""
    ordered = sorted(times)
    return ordered[max(0, min(len(ordered) - 1, -int(-part * len(ordered) // 1) - 1))]


def row(variant: Variant) -> dict[str, Any]:
    """A variant's figures, in milliseconds."""
    times = variant.times
    return {
        "name": variant.name,
        "runs": len(times),
        "median_ms": statistics.median(times) * 1e3,
        "p95_ms": quantile(times, 0.95) * 1e3,
        "p99_ms": quantile(times, 0.99) * 1e3,
        "min_ms": min(times) * 1e3,
        "cpu_ms": variant.cpu * 1e3 if variant.ours or variant.elsewhere else None,
        **variant.about,
    }


def ratio(
    ours: Sequence[float],
    theirs: Sequence[float],
    figure: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, float]:
    """The ratio of two figures, and the range that holds 95 of 100 resampled ones (bootstrap)."""
    chance = random.Random(1)  # noqa: S311 - the same runs give the same range
    resampled = sorted(
        figure(chance.choices(ours, k=len(ours))) / figure(chance.choices(theirs, k=len(theirs)))
        for _ in range(_RESAMPLES)
    )
    return {
        "value": figure(ours) / figure(theirs),
        "low": resampled[round(_RESAMPLES * 0.025)],
        "high": resampled[round(_RESAMPLES * 0.975) - 1],
    }


def own_cpu() -> float:
    """User and system time of this process and of the children that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
