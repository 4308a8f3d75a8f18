"""``python -m bench``: what sandboxd costs, beside bare starts and beside other programs.

Without more it measures everything, as root or as an ordinary user, and prints tables. Parts by
name: launch, calls, stages, throughput, idle, start, network. Runs are interleaved (A B A B ...),
so that whatever else the machine does hits all alike; only the ratios say something.

``python -m bench install`` brings the other programs. ``python -m bench stages`` alone shows in
full where the time of one call goes. ``python -m bench leaks`` counts what many launches leave
behind, ``python -m bench ends`` takes the time in which a tree of processes is gone, and
``python -m bench redact`` measures how fast output is searched for values.

The exit status is 1 when what was measured is isolated less than what is shipped.
docs/performance.md says how it is done and what is compared with what.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from bench import (
    calls,
    ends,
    idle,
    launching,
    leaks,
    machine,
    network,
    plot,
    redact,
    report,
    stages,
    starts,
)
from bench.install import install
from bench.peers import NAMES

__all__ = ["main", "run"]

PARTS = ("launch", "calls", "stages", "throughput", "idle", "start", "network")
_ALONE = ("install", "leaks", "ends", "redact")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    what = options.what or list(PARTS)
    alone = [name for name in what if name in _ALONE]
    if alone and len(what) > 1:
        _parser().error(f"{alone[0]} goes alone")
    if what == ["install"]:
        return install()
    if what == ["stages"]:
        if options.profile:
            figures = trio.run(stages.profile, options.runs)
            return _tell(figures, stages.profile_table(figures), options.json)
        figures = trio.run(stages.measure, options.runs)
        return _tell(figures, stages.table(figures), options.json)
    if what == ["leaks"]:
        figures = trio.run(leaks.count, options.runs)
        return _tell(figures, leaks.table(figures), options.json)
    if what == ["redact"]:
        figures = redact.measure(options.runs)
        return _tell(figures, redact.table(figures), options.json)
    if what == ["ends"]:
        figures = trio.run(ends.measure, options.runs)
        return _tell(figures, ends.table(figures), options.json)
    result = json.loads(options.earlier.read_text()) if options.earlier else run(what, options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        options.plot.write_text(plot.svg(result))
    if options.write:
        _write(options.write, result)
    print(report.text(result))
    return 1 if result["invalid"] else 0


def run(what: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure these parts, one after the other. Everything that is told later is in the result."""
    about = machine.describe()
    peers = [] if options.no_peers else list(NAMES)
    ways: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
        "launch": lambda: launching.measure(options.runs, peers=peers),
        "calls": lambda: calls.measure(options.runs),
        "stages": lambda: stages.measure(max(1, options.runs // 4)),
        "throughput": lambda: calls.throughput(options.runs, options.callers, options.rounds),
        "idle": lambda: idle.measure(2 * options.runs, options.sessions),
        "start": lambda: starts.measure(max(1, options.runs // 4)),
        "network": lambda: network.measure(max(1, options.runs // 4)),
    }
    parts = {}
    for name in PARTS:
        if name in what:
            if sys.stderr.isatty():
                print(f"measuring: {name}", file=sys.stderr)
            parts[name] = trio.run(ways[name])
    return {
        "version": 1,
        "machine": {**about, "load_after": list(os.getloadavg())},
        "parts": parts,
        "goals": report.judge(parts),
        "invalid": report.invalid(parts),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="*", choices=[*PARTS, *_ALONE, []], metavar="PART", help="default: all"
    )
    parser.add_argument("--runs", type=int, default=400, help="of each variant (default: 400)")
    parser.add_argument("--callers", type=int, default=8, help="at once (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="of the throughput (default: 5)")
    parser.add_argument("--sessions", type=int, default=1000, help="idle ones (default: 1000)")
    parser.add_argument("--no-peers", action="store_true", help="of launches, only our own")
    parser.add_argument("--profile", action="store_true", help="stages: with cProfile")
    parser.add_argument(
        "--from", type=Path, dest="earlier", metavar="FILE", help="tell figures that --json wrote"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them here (SVG)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put them into this document")
    return parser


def _tell(figures: dict[str, Any], table: str, file: Path | None) -> int:
    figures["machine"] = machine.describe()
    print(table)
    print(machine.in_words(figures["machine"]))
    for what in figures["lacking"]:
        print(f"INVALID: {what}")
    if file:
        file.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if figures["lacking"] else 0


def _write(document: Path, result: dict[str, Any]) -> None:
    """Results into the document, and the drawing beside it."""
    who = "root" if result["machine"]["user"] == "root" else "user"
    drawing = document.with_name(f"{document.stem}-{who}.svg")
    drawing.write_text(plot.svg(result))
    report.write(document, who, report.markdown(result, drawing.name))


if __name__ == "__main__":
    sys.exit(main())
