"""What an outcome means: refused as it must be, got through, or proves nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sandboxd.selftest.prober.probe import BOTH, HOST, SCRATCH, Layers, Probe

__all__ = ["Outcomes", "Result", "Row", "judge"]

#: States of a row. What isn't ``ok`` is told. ``NO_LAYER``: the daemon itself says, here and to
#: every policy, that this host has not what refuses it; that is for the operator to judge. A row
#: that is ``NOT_ENFORCED`` fails if it got through; any other fails.
OK = "ok"
THROUGH = "got through"
UNEXPECTED = "unexpected"
UNPROVEN = "control failed"
NOT_ENFORCED = "not enforced"
NO_LAYER = "no such layer"
NOT_TRIED = "not tried"

#: Lines of the probers: place -> probe -> line.
Outcomes = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Row:
    """One probe in one place, with the denials that are right here and what came of it."""

    name: str
    threat: str
    where: str
    expected: tuple[str, ...]
    got: str
    detail: str
    state: str
    control: str
    control_ok: bool

    @property
    def ok(self) -> bool:
        return self.state == OK

    @property
    def failed(self) -> bool:
        """Whether it counts against this host. What no layer here refuses, but the kernel does
        for a reason of its own, is told and counted by itself."""
        return self.state not in (OK, NOT_ENFORCED, NO_LAYER) or (
            self.state == NOT_ENFORCED and self.got == "ok"
        )


@dataclass
class Result:
    """The whole selftest. ``layers`` are what the daemon says that each place has."""

    rows: list[Row]
    mode: str = ""
    kernel: str = ""
    layers: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems and not any(row.failed for row in self.rows)

    @property
    def states(self) -> Counter[str]:
        return Counter(row.state for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "seconds": self.seconds,
            "mode": self.mode,
            "kernel": self.kernel,
            "layers": self.layers,
            "states": dict(self.states),
            "problems": self.problems,
            "rows": [{**asdict(row), "ok": row.ok} for row in self.rows],
        }


def judge(probe: Probe, where: str, outcomes: Outcomes, layers: Layers) -> Row:
    """The row of ``probe`` in one of its places, which has these layers."""
    line = outcomes.get(where, {}).get(probe.name)
    expected = probe.expected(layers)
    control_ok, control = _control(probe, line, outcomes)
    got = str(line["got"]) if line else ""
    if line is None:
        state = NOT_TRIED
    elif not probe.applies(layers):
        state = NO_LAYER
    elif not expected:
        state = NOT_ENFORCED
    elif got not in expected:
        state = THROUGH if got == "ok" or got in probe.allowed else UNEXPECTED
    elif not control_ok:
        state = UNPROVEN
    else:
        state = OK
    return Row(
        name=probe.name,
        threat=probe.threat,
        where=where,
        expected=expected,
        got=got,
        detail=str(line["detail"]) if line else "",
        state=state,
        control=control,
        control_ok=control_ok,
    )


def _control(probe: Probe, line: Mapping[str, Any] | None, outcomes: Outcomes) -> tuple[bool, str]:
    """Whether the probe was shown to work where it is allowed, and how."""
    if line is None:
        return False, "was not tried"
    if probe.inside is not None:
        worked = line.get("control") == "ok"
        return worked, f"{probe.says}: {'works' if worked else line.get('control')}"
    outside = outcomes.get(probe.outside, {}).get(probe.name)
    got = str(outside["got"]) if outside else "not tried"
    if got in probe.allowed:
        return True, f"{probe.says}: {'works' if got == 'ok' else got}"
    told = f"this host itself refuses it, {got}"
    if probe.fallback is None:
        return False, told
    worked = line.get("fallback") == "ok"
    return worked, f"{told}; in the sandbox the like of it {'works' if worked else 'fails too'}"


def places_of(probe: Probe) -> tuple[str, ...]:
    return tuple(place for place in BOTH if place in probe.places)


OUTSIDE = (HOST, SCRATCH)
