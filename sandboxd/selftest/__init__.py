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
    when this host can't isolate anything, Invalid for an unknown threat; leaves nothing behind.
    """
    from functools import partial

    from sandboxd.errors import Invalid
    from sandboxd.names import shown
    from sandboxd.selftest import report, runner
    from sandboxd.selftest.stage import Stage
    from sandboxd.trial.stage import open_stage, until_interrupted

    if unknown := [word for word in args.threat if not runner.probes_for((word,))]:
        raise Invalid(
            f"no probe is for a threat like {shown(unknown[0])}",
            hint="threats: " + ", ".join(runner.THREATS),
        )
    begun = time.monotonic()
    if not args.json and sys.stderr.isatty():
        print("starting a daemon, and a prober in its sandboxes ...", file=sys.stderr)
    with until_interrupted(), open_stage(partial(Stage, patience=args.patience)) as stage:
        result = runner.run(stage, args.threat)
    result.seconds = round(time.monotonic() - begun, 1)
    if args.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        report.show(result, everything=args.verbose)
    return 0 if result.ok else 1
