"""What the figures are held against, and how they are told: on a terminal, as a document.

A goal is met, missed, or not measured with the reason why; nothing is left out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import calls, launching, machine, stages, starts
from bench.peers import NAMES

__all__ = ["GOALS", "Goal", "Verdict", "invalid", "judge", "markdown", "text", "write"]

_MIB = 1 << 20
_PEERS = tuple(name for name in NAMES if not name.startswith("bwrap"))


@dataclass(frozen=True)
class Verdict:
    """``value`` in words; ``met`` is None where nothing was measured, and ``value`` says why."""

    value: str
    met: bool | None


@dataclass(frozen=True)
class Goal:
    part: str
    figure: str
    goal: str
    of: Callable[[Mapping[str, Any]], Verdict]


def judge(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was measured of it."""
    rows = []
    for goal in GOALS:
        if goal.part not in parts:
            verdict = Verdict("not measured in this run", None)
        else:
            verdict = goal.of(parts[goal.part])
        rows.append(
            {"figure": goal.figure, "goal": goal.goal, "here": verdict.value, "met": verdict.met}
        )
    return rows


def invalid(parts: Mapping[str, Any]) -> list[str]:
    """Why these figures count for nothing: what was measured is isolated less than shipped."""
    return [f"{name}: {what}" for name, part in parts.items() for what in part.get("lacking", ())]


def text(result: Mapping[str, Any]) -> str:
    """For a terminal."""
    rows = []
    for title, header, lines in _tables(result["parts"]):
        rows += [title, *_aligned([header, *lines]), ""]
    goals = [("figure", "goal", "here", "")]
    goals += [(g["figure"], g["goal"], g["here"], _WORD[g["met"]]) for g in result["goals"]]
    rows += _aligned(goals)
    rows += ["", machine.in_words(result["machine"])]
    if machine.busy(result["machine"]):
        rows.append("the machine did other work meanwhile: measure again when it is quiet")
    rows += [f"INVALID: {what}" for what in result["invalid"]]
    return "\n".join(rows)


def markdown(result: Mapping[str, Any], plot: str = "") -> str:
    """The same as a section of a document."""
    rows = []
    if result["invalid"]:
        rows += ["**These figures are invalid**, for what was measured is isolated less than what"]
        rows += ["is shipped:", "", *(f"- {what}" for what in result["invalid"]), ""]
    if machine.busy(result["machine"]):
        rows += [
            "**The machine did other work meanwhile**, which makes times longer and ratios worse:"
        ]
        rows += ["take the order of things from this, not their sizes.", ""]
    goals = [(g["figure"], g["goal"], g["here"], _WORD[g["met"]]) for g in result["goals"]]
    rows += _piped(("figure", "goal", "here", ""), goals)
    rows += ["", machine.in_words(result["machine"]) + ".", ""]
    if plot:
        rows += [f"![the same as bars]({plot})", ""]
    for title, header, lines in _tables(result["parts"]):
        rows += [f"**{title}**", "", *_piped(header, lines), ""]
    return "\n".join(rows)


def write(document: Path, user: str, section: str) -> None:
    """Put ``section`` where the document has the results of this kind of user.

    Raises SystemExit when it has no such place.
    """
    begin, end = f"<!-- results: {user} -->", "<!-- end of results -->"
    found = document.read_text()
    place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not place.search(found):
        raise SystemExit(f"{document} has no place for the results: {begin} ... {end}")
    document.write_text(place.sub(lambda _: f"{begin}\n\n{section}\n{end}", found, count=1))


_WORD = {True: "met", False: "**missed**", None: "-"}


def _at_most(ratio: Mapping[str, float], most: float) -> Verdict:
    return Verdict(f"{ratio['value']:.2f}x{_range(ratio)}", ratio["value"] <= most)


def _range(ratio: Mapping[str, float]) -> str:
    return f" ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _launch(part: Mapping[str, Any]) -> Verdict:
    return _at_most(part["ratios"][launching.BARE], 2.0)


def _call(part: Mapping[str, Any]) -> Verdict:
    return _at_most(part["ratios"][calls.PLAIN], 1.5)


def _faster(part: Mapping[str, Any]) -> Verdict:
    if calls.BWRAP not in part["ratios"]:
        return Verdict(part["absent"][calls.BWRAP], None)
    ratio = part["ratios"][calls.BWRAP]
    turned = {"value": 1 / ratio["value"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}
    return Verdict(f"{turned['value']:.2f}x{_range(turned)}", turned["value"] >= 4)


def _peers(part: Mapping[str, Any]) -> Verdict:
    found = {name: part["ratios"][name]["value"] for name in _PEERS if name in part["ratios"]}
    words = [f"{1 / ratio:.1f}x {name}" for name, ratio in found.items()]
    words += [f"{name}: {part['absent'][name]}" for name in _PEERS if name in part["absent"]]
    met = all(ratio < 1 for ratio in found.values()) if found else None
    return Verdict(", ".join(words) or "none was asked for", met)


def _rate(name: str, least: float) -> Callable[[Mapping[str, Any]], Verdict]:
    def of(part: Mapping[str, Any]) -> Verdict:
        if name not in part["ratios"]:
            return Verdict(part["absent"][name], None)
        value = part["ratios"][name]["value"]
        return Verdict(f"{value:.2f}x", value >= least)

    return of


def _crowd(part: Mapping[str, Any]) -> Verdict:
    verdict = _at_most(part["p99"], 1.2)
    words = f"{verdict.value} with {part['sessions']}"
    if part["why"]:
        return Verdict(f"{words}; this host gives no more: {part['why']}", None)
    return Verdict(words, verdict.met)


def _start(part: Mapping[str, Any]) -> Verdict:
    if starts.BWRAP not in part["ratios"]:
        return Verdict(part["absent"][starts.BWRAP], None)
    return _at_most(part["ratios"][starts.BWRAP], 1.0)


def _daemon(part: Mapping[str, Any]) -> Verdict:
    with_one, crowded = part["daemon_bytes_without"], sum(part["daemon_bytes"].values())
    words = f"{with_one / _MIB:.0f} MiB; {crowded / _MIB:.0f} MiB with {part['sessions']} sessions"
    return Verdict(words, with_one < 100 * _MIB)


def _session(part: Mapping[str, Any]) -> Verdict:
    """Nothing is judged where PSS can't be read: the host's memory holds the kernel's part too."""
    if part["session_pss_bytes"] is not None:
        size = part["session_pss_bytes"]
        return Verdict(f"{size / _MIB:.2f} MiB", size < 2 * _MIB)
    size = part["session_host_bytes"]
    words = f"PSS can't be read here; {size / _MIB:.2f} MiB of the host, the kernel's included"
    return Verdict(words, None)


def _download(part: Mapping[str, Any]) -> Verdict:
    value = part["throughput"]["value"]
    return Verdict(f"{value:.2f}x", value >= 0.6)


GOALS = (
    Goal("launch", "launch only, full isolation, beside `posix_spawn`", "at most 2.0x", _launch),
    Goal("calls", "whole tool call, beside `trio.run_process` unisolated", "at most 1.5x", _call),
    Goal("calls", "faster than the same broker launching with bwrap + seccomp", "4x", _faster),
    Goal("launch", "launch only, faster than each other program", "more than 1x each", _peers),
    Goal(
        "throughput",
        "calls per second of 8 callers, beside the same broker with bwrap + seccomp",
        "at least 3.5x",
        _rate(calls.BWRAP, 3.5),
    ),
    Goal(
        "throughput",
        "calls per second of 8 callers, beside `trio.run_process` unisolated",
        "at least 0.70x",
        _rate(calls.PLAIN, 0.7),
    ),
    Goal("idle", "p99 of a call with 1,000 idle sessions, beside one", "at most 1.2x", _crowd),
    Goal("start", "session start to the agent's first word, beside bwrap", "at most 1.0x", _start),
    Goal("idle", "daemon, broker and launcher, resident", "under 100 MiB", _daemon),
    Goal("idle", "each idle session with its init, PSS", "under 2 MiB", _session),
    Goal("network", "large download through the proxy, beside direct", "at least 0.60x", _download),
)

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def _tables(parts: Mapping[str, Any]) -> Iterable[Table]:
    header: tuple[str, ...]
    if part := parts.get("launch"):
        header = ("launch only", "runs", "median ms", "p95 ms", "CPU ms", "x bare", "walls")
        bare = part["variants"][0]["median_ms"]
        lines = [
            (*_times(each), f"{each['median_ms'] / bare:.1f}", str(each.get("walls", "none")))
            for each in part["variants"]
        ]
        lines += [(name, "-", "-", "-", "-", "-", why) for name, why in part["absent"].items()]
        yield f"Launch only: {part['program']}, from the order until it is reaped", header, lines
    if part := parts.get("calls"):
        header = ("whole tool call", "runs", "median ms", "p95 ms", "CPU ms", "x unisolated")
        base = part["variants"][0]["median_ms"]
        lines = [(*_times(each), f"{each['median_ms'] / base:.2f}") for each in part["variants"]]
        lines += [(name, why, "-", "-", "-", "-") for name, why in part["absent"].items()]
        yield (
            f"Whole tool call: {part['program']} with one secret; the line alone (MCP ping) takes "
            f"{part['line_ms']:.2f} ms, one record made durable {part['record_ms']:.2f} ms",
            header,
            lines,
        )
    if part := parts.get("stages"):
        header = ("where the time of a call goes", "mean ms", "share")
        yield (
            f"Stages: {part['calls']} calls, one at a time, with clocks in them",
            header,
            [
                (line["stage"], f"{line['mean_ms']:.3f}", f"{line['share']:.1%}")
                for line in stages.shortened(part["stages"])
            ],
        )
        header = ("where the time of a session's start goes", "mean ms", "share")
        yield (
            f"Session start: {part['starts']} of them, with clocks in them",
            header,
            [
                (line["stage"], f"{line['mean_ms']:.3f}", f"{line['share']:.1%}")
                for line in stages.shortened(part["start_stages"])
            ],
        )
    if part := parts.get("throughput"):
        header = ("calls per second", "median", "lowest", "highest", "CPU ms a call")
        lines = [
            (
                each["name"],
                *(f"{each[key]:.0f}" for key in ("calls_per_second", "lowest", "highest")),
                f"{each['cpu_ms']:.2f}",
            )
            for each in part["variants"]
        ]
        lines += [(name, why, "-", "-", "-") for name, why in part["absent"].items()]
        what = f"{part['callers']} callers, {part['rounds']} rounds of {part['calls']} calls"
        yield f"Calls per second: {what}", header, lines
    if part := parts.get("idle"):
        header = ("a call beside idle sessions", "runs", "median ms", "p95 ms", "p99 ms")
        lines = [(*_times(each)[:4], f"{each['p99_ms']:.2f}") for each in part["variants"]]
        yield "Idle sessions", header, lines
    if part := parts.get("start"):
        header = ("until the first word", "runs", "median ms", "p95 ms")
        lines = [_times(each)[:4] for each in part["variants"]]
        lines += [(name, why, "-", "-") for name, why in part["absent"].items()]
        yield "Session start", header, lines
    if part := parts.get("network"):
        header = ("through a sandbox's proxy", "runs", "median ms", "p95 ms")
        lines = [
            (f"{each['name']}: {what}", *_times(each)[1:4])
            for what, rows in (
                ("a new connection and one byte", part["small"]),
                (f"a download of {part['size'] >> 20} MiB", part["large"]),
            )
            for each in rows
        ]
        yield "Network", header, lines


def _times(each: Mapping[str, Any]) -> tuple[str, ...]:
    cpu = "-" if each["cpu_ms"] is None else f"{each['cpu_ms']:.2f}"
    times = (f"{each['median_ms']:.2f}", f"{each['p95_ms']:.2f}")
    return (each["name"], str(each["runs"]), *times, cpu)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _piped(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
