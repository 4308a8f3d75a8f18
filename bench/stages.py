"""Where the time of one call goes: every moment between question and answer, put down to a stage.

The daemon is the shipped one with clocks around its functions (``traced``). Calls are made one at
a time. Where two stages run at once the one that began last has the moment; where none runs it
goes to the event loop and what glues stages together, told apart by the stage before.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from bench import stage
from bench.starts import first_word
from bench.traced import Span

__all__ = ["account", "measure", "profile", "profile_table", "shortened", "table"]

_BETWEEN = "between"
_REST = "socket, and the caller"
#: Stages that only hold others.
_HOLDERS = ("call", "session")


async def measure(calls: int) -> dict[str, Any]:
    """So many calls, and the mean of each stage."""
    told, seconds, starting, lacking = _traced(calls, profile=False)
    spans: list[Span] = [tuple(span) for span in told["spans"]]
    per_call = [account(*one) for one in _calls(spans)[-calls:]]
    per_start = [account(*one) for one in _starts(spans)[-len(starting) :]]
    return {
        "calls": len(per_call),
        "median_ms": statistics.median(seconds) * 1e3,
        "mean_ms": statistics.mean(seconds) * 1e3,
        "stages": _merge(per_call, statistics.mean(seconds) * 1e3),
        "starts": len(per_start),
        "start_median_ms": statistics.median(starting) * 1e3,
        "start_stages": _merge(per_start, statistics.mean(starting) * 1e3),
        "missing": told["missing"],
        "lacking": lacking,
    }


async def profile(calls: int) -> dict[str, Any]:
    """So many calls, and the functions and packages that the broker's event loop spends CPU in."""
    told, seconds, _, lacking = _traced(calls, profile=True)
    return {
        "calls": len(seconds),
        "functions": told["functions"],
        "packages": told["packages"],
        "lacking": lacking,
    }


def _traced(
    calls: int, *, profile: bool
) -> tuple[dict[str, Any], list[float], list[float], list[str]]:
    """What a traced daemon noted; seconds of each call and session start; what it lacks."""
    with stage.open_stage("bench.traced", profile=profile) as on:
        caller = stage.Caller(on)
        lacking = caller.lacking()
        caller.order(min(20, calls))
        seconds = caller.order(calls)["seconds"]
        caller.close()
        starting = [first_word(on) for _ in range(0 if profile else calls)]
        on.client.close()
        on.stop()
        return json.loads(on.trace.read_text()), seconds, starting, lacking


def account(spans: Iterable[Span], began: int, ended: int) -> dict[str, int]:
    """Nanoseconds of each stage between two moments, which are shared out completely."""
    inside = sorted(
        (max(first, began), min(last, ended), name)
        for name, first, last in spans
        if last > began and first < ended and name not in _HOLDERS
    )
    edges = sorted({began, ended, *(edge for first, last, _ in inside for edge in (first, last))})
    found: dict[str, int] = defaultdict(int)
    previous = ""
    for first, last in pairwise(edges):
        active = [span for span in inside if span[0] <= first and span[1] >= last]
        if active:
            previous = max(active)[2]
            found[previous] += last - first
        else:
            found[f"{_BETWEEN}: after {previous}" if previous else _BETWEEN] += last - first
    return dict(found)


def shortened(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For a document: the event loop's moments together, and what is below one part in 100."""
    small = [line for line in rows if abs(line["share"]) < 0.01]
    loop = [line for line in rows if line["stage"].startswith(_BETWEEN) and line not in small]
    kept = [line for line in rows if line not in small and line not in loop]
    for name, several in (("event loop, between stages", loop), ("all others", small)):
        kept.append(
            {
                "stage": name,
                "mean_ms": sum(line["mean_ms"] for line in several),
                "share": sum(line["share"] for line in several),
            }
        )
    return kept


def table(figures: dict[str, Any]) -> str:
    """For a terminal."""
    titles = (
        f"{figures['calls']} calls, one at a time: median {figures['median_ms']:.2f} ms",
        f"{figures['starts']} session starts: median {figures['start_median_ms']:.2f} ms",
    )
    rows = []
    for title, lines in zip(titles, (figures["stages"], figures["start_stages"]), strict=True):
        rows += [title, f"{'stage':44}{'mean ms':>9}{'share':>8}"]
        for line in lines:
            rows.append(f"{line['stage']:44}{line['mean_ms']:9.3f}{line['share']:8.1%}")
        rows.append("")
    rows += [f"not traced, for it has moved: {place}" for place in figures["missing"]]
    return "\n".join(rows)


def profile_table(figures: dict[str, Any]) -> str:
    """For a terminal."""
    every = figures["calls"]
    total = sum(line["cpu"] for line in figures["packages"])
    rows = [f"{every} calls, one at a time, under cProfile: CPU of the broker's event loop"]
    for title, lines in (("package", figures["packages"]), ("function", figures["functions"][:40])):
        rows += ["", f"{title:70}{'ms a call':>10}{'share':>8}{'times a call':>14}"]
        for line in lines:
            rows.append(
                f"{line['name'][:69]:70}{line['cpu'] / every * 1e3:10.3f}"
                f"{line['cpu'] / total:8.1%}{line['calls'] / every:14.1f}"
            )
    return "\n".join(rows)


def _starts(spans: Sequence[Span]) -> list[tuple[list[Span], int, int]]:
    """Spans of each start of a session, from the operator's request to its reply."""
    return [
        ([span for span in spans if began <= span[1] < ended], began, ended)
        for name, began, ended in sorted(spans, key=lambda span: span[1])
        if name == "session"
    ]


def _calls(spans: Sequence[Span]) -> list[tuple[list[Span], int, int]]:
    """Spans of each call, and when its line had come and its answer was written."""
    ordered = sorted(spans, key=lambda span: span[1])
    reads = [last for name, _, last in ordered if name == "read"]
    writes = [last for name, _, last in ordered if name == "write"]
    found = []
    for name, first, last in ordered:
        if name != "call":
            continue
        began = max((read for read in reads if read <= first), default=first)
        ended = min((write for write in writes if write >= last), default=last)
        # What began before is not this call's: the wait for the agent's own end, for one.
        own = [span for span in ordered if began <= span[1] < ended and span[0] != "read"]
        found.append((own, began, ended))
    return found


def _merge(accounts: Sequence[dict[str, int]], mean: float) -> list[dict[str, Any]]:
    """Means over all calls in the order of a call's life; the rest is the line and the caller."""
    order: dict[str, None] = {}
    for each in accounts:
        order.update(dict.fromkeys(each))
    rows = [(name, sum(each.get(name, 0) for each in accounts) / len(accounts)) for name in order]
    rows.append((_REST, mean * 1e6 - sum(spent for _, spent in rows)))
    return [
        {"stage": name, "mean_ms": spent / 1e6, "share": spent / 1e6 / mean} for name, spent in rows
    ]
