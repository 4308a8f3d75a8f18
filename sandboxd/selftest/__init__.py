"""Every way out of a sandbox that we know of, tried on this host: ``sandboxctl selftest``.

A real daemon in a temporary directory runs a prober as an agent and as a tool. ``prober`` is what
runs in there, ``stage`` the daemon's configuration, ``runner`` the performance, ``judge`` what an
outcome means, ``report`` the table. docs/selftest.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

__all__ = ["main"]


def main(args: argparse.Namespace) -> int:
    """Run every probe and print the deviations, or all rows with ``args.verbose`` or JSON.

    Returns 0 when everything was refused and every control worked, else 1. Raises Unavailable
    when this host can't isolate anything, and leaves nothing behind.
    """
    from sandboxd.selftest import report, runner
    from sandboxd.selftest.stage import Stage
    from sandboxd.trial.stage import open_stage, until_interrupted

    begun = time.monotonic()
    if not args.json and sys.stderr.isatty():
        print("starting a daemon, and a prober in its sandboxes ...", file=sys.stderr)
    with until_interrupted(), open_stage(Stage) as stage:
        result = runner.run(stage)
    result.seconds = round(time.monotonic() - begun, 1)
    if args.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        report.show(result, everything=args.verbose)
    return 0 if result.ok else 1
