"""The whole promise on real processes: an agent that wants a secret, and a tool that uses it.

``sandboxctl demo`` starts a real daemon in a temporary directory, sets a random secret, and runs
a hostile agent in a real session. The agent tries everything it can think of; each attempt has a
positive control. docs/demo.md says what every row means.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from sandboxd.demo import report, show
from sandboxd.demo.stage import open_stage
from sandboxd.trial.stage import until_interrupted

__all__ = ["main"]


def main(args: argparse.Namespace) -> int:
    """Run the demo and print its table, or JSON with ``args.json``.

    Returns 0 when nothing was found and every control passed, else 1. Raises Unavailable when this
    host can't isolate anything, and leaves nothing behind, unless ``args.keep``.
    """
    begun = time.monotonic()
    if not args.json and sys.stderr.isatty():
        print("starting a daemon, and an agent in it ...", file=sys.stderr)
    with until_interrupted(), open_stage(keep=args.keep) as stage:
        result = show.run(stage)
    result.seconds = round(time.monotonic() - begun, 1)
    if args.json:
        kept = str(stage.top) if args.keep else None
        print(json.dumps({**result.as_dict(), "kept": kept}, indent=2))
    else:
        report.show(result)
        if args.keep:
            print(f"kept {stage.top}: configuration, store, audit log, daemon.log", file=sys.stderr)
    return 0 if result.ok else 1
