"""How a length of time is written: the same in configuration, requests and command lines."""

from __future__ import annotations

import re

from sandboxd.errors import Invalid
from sandboxd.names import shown

__all__ = ["LONGEST", "WITH_UNIT", "duration", "seconds_in"]

#: A regular expression of it, for schemas that editors read.
WITH_UNIT = r"[0-9]{1,9}(?:\.[0-9]{1,3})?(?:ms|s|m|h|d)"

_GRAMMAR = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, None: 1.0}

#: Longest duration that anything takes: a hundred years is for ever, and years stay four digits.
LONGEST = 36500 * 86400


def seconds_in(text: str, *, bare: bool = True) -> float | None:
    """``500ms``, ``30s``, ``15m``, ``1.5h``, ``90d`` as seconds; None when it is none of them.

    A number alone is seconds, unless not ``bare``.
    """
    found = _GRAMMAR.fullmatch(text)
    if found is None or not (bare or found[2]):
        return None
    return float(found[1]) * _SECONDS[found[2]]


def duration(text: str, *, most: float = LONGEST, zero: bool = False, name: str = "") -> float:
    """Seconds, cut to ``most``; 0 only if ``zero`` may be. Raises Invalid, which begins with
    ``name``, an option's."""
    seconds = seconds_in(text)
    if seconds is None or not (seconds or zero):
        raise Invalid(
            f"{name}{': ' if name else ''}{shown(text, 24)} is not a duration",
            hint=f"use a number {'' if zero else 'above 0 '}of seconds, or one with s, m, h or d: "
            "30s, 15m, 12h, 90d",
        )
    return min(seconds, most)
