"""The hostile agent's own life: read the plan, try everything, print one JSON line per attempt.

``{"attempt", "found", "loot", "detail", "control", "control_detail"}``. ``loot`` holds samples of
what was found; ``control`` is true when the decoy was found, a text when the kernel refuses even
that, and null when only the demo can tell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sandboxd.trial.hunt import know
from sandboxd.trial.mcp import Client

from . import calls, probes
from .probes import Outcome, Plan

__all__ = ["ATTEMPTS", "PAYMENT", "main"]

PAYMENT = "payment"
#: The names of all attempts, in the order of the table.
ATTEMPTS = (*probes.PROBES, *calls.CALLS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every attempt of the plan in the first argument. 0 when all of them were made."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--own-environment"]:
        for hunt in probes.own_environments():
            print(*(value.decode() for value in hunt.seen))
        return 0
    plan = Plan.of(json.loads(argv[0]))
    know(plan.open_value.encode())
    for name, probe in probes.PROBES.items():
        _attempt(name, lambda probe=probe: probe(plan))  # type: ignore[misc]
    try:
        client = Client({"DECOY": plan.open_value})
    except (OSError, ValueError) as failure:
        print(json.dumps({"event": "no broker", "detail": _brief(failure)}), flush=True)
        return 1
    for name, call in calls.CALLS.items():
        _attempt(name, lambda call=call: call(plan, client))  # type: ignore[misc]
    _attempt(PAYMENT, lambda: calls.payment(plan, client))
    client.close()
    print(json.dumps({"event": "done"}), flush=True)
    return 0


def _attempt(name: str, make: Callable[[], Outcome]) -> None:
    line: dict[str, Any] = {"attempt": name, "found": False, "loot": []}
    try:
        outcome = make()
    except Exception as failure:  # noqa: BLE001 - an attempt that breaks has no control, so it fails
        line |= {"detail": f"broke: {_brief(failure)}", "control": False, "control_detail": "broke"}
    else:
        loot = outcome.hunt.loot
        line |= {
            "found": bool(loot),
            "loot": loot[:10],
            "detail": outcome.detail,
            "control": outcome.control,
            "control_detail": outcome.control_detail,
        }
    print(json.dumps(line), flush=True)


def _brief(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {failure}"[:200]
