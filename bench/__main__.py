"""``python -m bench launch``: what starting a program in a sandbox costs, beside a bare start.

Each variant starts the same program with no output, and waits until it is reaped. The runs are
interleaved (A B C A B C ...), so that whatever else the machine does hits all of them alike;
only the ratios say something. Prints a table; ``--json FILE`` writes the figures too.

``python -m bench leaks``: what many calls leave behind, counted before and after.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import trio

from bench import launch, leaks, machine

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", choices=["launch", "leaks"])
    parser.add_argument("--runs", type=int, default=400, help="of each variant (default: 400)")
    parser.add_argument("--callers", type=int, default=8, help="at once, for the throughput")
    parser.add_argument("--program", default="/usr/bin/true", help="what to start")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    if options.what == "launch":
        figures: dict[str, Any] = trio.run(
            launch.measure, options.program, options.runs, options.callers
        )
        print(launch.table(figures))
    else:
        figures = trio.run(leaks.count, options.program, options.runs)
        print(leaks.table(figures))
    figures["machine"] = machine.describe()
    print(", ".join(str(value) for value in figures["machine"].values()))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(0 if figures["valid"] else 1)


if __name__ == "__main__":
    main()
