"""How a person reads a selftest: what deviates, grouped by threat, and a summary."""

from __future__ import annotations

import os
import sys
from itertools import groupby

from sandboxd.selftest.judge import NO_LAYER, NOT_ENFORCED, OK, Result, Row

__all__ = ["show"]


def show(result: Result, *, everything: bool = False) -> None:
    """Print the deviations, or every row, and the summary. Colour on a terminal that wants it."""
    threats = list(dict.fromkeys(row.threat for row in result.rows))
    rows = [row for row in result.rows if everything or not row.ok]
    rows.sort(key=lambda row: threats.index(row.threat))
    for threat, group in groupby(rows, key=lambda row: row.threat):
        print(_paint(threat, "1"))
        for row in group:
            print(_line(row))
            if everything or not row.control_ok:
                print(f"       control: {_clean(row.control)}")
        print()
    _summary(result)


def _line(row: Row) -> str:
    mark = _paint("ok", "32") if row.ok else _paint("--" if not row.failed else "!!", "31")
    wanted = " or ".join(row.expected) or "a layer that isn't there"
    text = f"{row.where:5}  {row.name}: {row.got or 'nothing came'}"
    if row.state == NO_LAYER:
        text += f"  ({row.state} here)"
    elif not row.ok:
        text += f"  ({row.state}; expected {wanted})"
    if row.detail:
        text += f"  {row.detail}"
    return f"  {mark} {_clean(text)}"


def _summary(result: Result) -> None:
    threats = {row.threat for row in result.rows}
    probes = len({row.name for row in result.rows})
    print(f"{probes} probes for {len(threats)} threats, in {len(result.rows)} rows")
    print(f"kernel {result.kernel}, launcher mode {result.mode}, {result.seconds} s")
    for place, layers in result.layers.items():
        missing = [
            f"{layer['layer']}: {layer['state']}" for layer in layers if layer["state"] != "on"
        ]
        print(f"layers of the {place}: {'all on' if not missing else ', '.join(missing)}")
    for state, count in result.states.most_common():
        print(f"  {count:4}  {state}")
    refused = sum("this host itself refuses it" in row.control for row in result.rows)
    if refused:
        print(f"{refused} controls were refused by this host itself and replaced; -v shows which")
    for problem in result.problems:
        print(_paint(f"problem: {_clean(problem)}", "31"))
    failed = sum(row.failed for row in result.rows)
    if result.ok:
        lacking = result.states[NOT_ENFORCED] + result.states[NO_LAYER]
        more = f", but {lacking} were refused by no layer of ours" if lacking else ""
        done = result.states[OK]
        print(_paint(f"{done} attempts were refused, and every control worked{more}", "32"))
    elif failed:
        print(_paint(f"{failed} of {len(result.rows)} rows failed", "31"))
    else:
        print(_paint("the selftest failed", "31"))


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _paint(text: str, code: str) -> str:
    """Coloured only on a terminal that wants it (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if plain or not sys.stdout.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"
