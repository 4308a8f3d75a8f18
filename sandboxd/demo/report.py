"""What the demo found out, and how a person reads it in ten seconds."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Result", "Row", "show"]


@dataclass(frozen=True)
class Row:
    """One attempt: what it turned up, whether its positive control passed, and how."""

    attempt: str
    found: bool
    result: str
    control: bool
    how: str

    @property
    def ok(self) -> bool:
        return self.control and not self.found


@dataclass
class Result:
    """The whole demo. ``leaks`` names what held the secret, ``problems`` what went wrong."""

    rows: list[Row]
    used: bool = False
    payments: int = 0
    audit_ok: bool = False
    records: int = 0
    searched: int = 0
    leaks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return (
            all(row.ok for row in self.rows)
            and self.used
            and self.audit_ok
            and not self.leaks
            and not self.problems
        )

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        return {
            "ok": self.ok,
            "seconds": self.seconds,
            "attempts": rows,
            "tool_used_secret": self.used,
            "payments": self.payments,
            "searched_files": self.searched,
            "leaks": self.leaks,
            "audit": {"ok": self.audit_ok, "records": self.records},
            "problems": self.problems,
        }


def show(result: Result) -> None:
    """Print the table and what follows from it. Colour on a terminal that wants it."""
    widths = [
        max(len(text) for text in column)
        for column in zip(*((row.attempt, _cut(row.result)) for row in result.rows), strict=True)
    ]
    print(_bold(f"   {'the agent tried':{widths[0]}}  {'and got':{widths[1]}}  control"))
    for row in result.rows:
        mark = _paint("ok", "32") if row.ok else _paint("!!", "31")
        control = row.how if row.control else f"FAILED: {row.how}"
        text = f"{row.attempt:{widths[0]}}  {_cut(row.result):{widths[1]}}  {control}"
        print(f"{mark} {text if row.ok else _paint(text, '31')}".rstrip())
    print()
    _line("the tool used the secret", result.used, f", for {result.payments} payments")
    _line(
        "every log, file and output is free of the secret",
        not result.leaks,
        ": " + ", ".join(result.leaks) if result.leaks else f", {result.searched} files searched",
    )
    _line("audit chain verified", result.audit_ok, f", {result.records} records")
    for problem in result.problems:
        print(_paint(f"problem: {problem}", "31"))
    print()
    bad = [row for row in result.rows if not row.ok]
    if result.ok:
        verdict = f"{len(result.rows)} attempts found nothing, and every control passed"
        print(f"{_paint(verdict, '32')} ({result.seconds} s)")
    elif bad:
        print(_paint(f"{len(bad)} of {len(result.rows)} attempts failed the demo", "31"))
    else:
        print(_paint("the demo failed", "31"))


def _line(what: str, passed: bool, more: str = "") -> None:
    print(f"{what}: {_paint('yes', '32') if passed else _paint('no', '31')}{more}")


def _cut(text: str, most: int = 60) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= most else clean[: most - 3] + "..."


def _bold(text: str) -> str:
    return _paint(text, "1")


def _paint(text: str, code: str) -> str:
    """Coloured only on a terminal that wants it (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if plain or not sys.stdout.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"
