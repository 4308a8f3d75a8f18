"""What this kernel and host offer, what each missing piece costs in isolation, and the fix.

``checks()`` looks and decides nothing; ``run()`` prints and gives the exit status. What can be
tried is tried (:mod:`sandboxd.doctor.probes`), because what a kernel has and what it lets a process
do are two things.
"""

from __future__ import annotations

import json as _json
from dataclasses import asdict

from sandboxd.doctor import host, kernel, probes
from sandboxd.doctor.check import Check, existing
from sandboxd.paths import Paths

__all__ = ["Check", "checks", "run"]


def run(json: bool, paths: Paths | None = None) -> int:
    """Print every check; 0 when all the required ones are there, else 6."""
    found = checks(paths)
    blocking = [c for c in found if c.required and c.state == "missing"]
    if json:
        print(_json.dumps({"ready": not blocking, "checks": [asdict(c) for c in found]}, indent=2))
    else:
        _print(found, blocking)
    return 6 if blocking else 0


def checks(paths: Paths | None = None) -> list[Check]:
    """Look at everything. Never raises for what a host lacks: that is a finding."""
    paths = paths or Paths.resolve()
    state = existing(paths.state)
    return [*kernel.checks(probes.run_probes(state), state), *host.checks(paths)]


def _print(found: list[Check], blocking: list[Check]) -> None:
    width = max(len(c.name) for c in found)
    for check in found:
        print(f"{check.state:<8}  {check.name:<{width}}  {check.detail}")
        if check.costs:
            print(f"{'':<8}  {'':<{width}}  costs: {check.costs}")
        if check.fix:
            print(f"{'':<8}  {'':<{width}}  fix:   {check.fix}")
    print()
    if blocking:
        print(f"not ready: {', '.join(c.name for c in blocking)}")
        return
    weaker = sum(c.state != "ok" for c in found)
    print("ready" + (f", {weaker} weaker than it could be" if weaker else ""))
