"""Whether a value can be hidden in output: not if any text holds it anyway.

Hiding ``true`` would tear every output apart and still tell the reader what it is.
"""

from __future__ import annotations

import re

from sandboxd.errors import Invalid

__all__ = ["FEWEST", "check_maskable", "weakness"]

#: Shorter values are refused: they stand in every output by chance.
FEWEST = 4
_SHORT = 8

#: Values of settings, and words of every output. Compared without case.
_COMMON = """
    true false null none yes no on off nil undefined default auto enabled disabled
    localhost 127.0.0.1 example.com root admin administrator user username guest anonymous nobody
    test testing debug info warning error development staging production sandbox
    password password1 password123 changeme letmein qwerty secret hunter2 administrator1
    read-only read-write readonly readwrite postgres postgresql mysql sqlite redis main master
    utf-8 application/json text/plain us-east-1 us-west-1 us-west-2 eu-west-1 eu-central-1
    configuration authorization authentication
"""
_WORDS = frozenset(_COMMON.split())

_DIGITS = re.compile(rb"[0-9.,:/+ -]*")
_WORD = re.compile(rb"[a-z]+|[A-Z]+|[A-Z][a-z]+")
_ADDRESS = re.compile(rb"(?:[a-z][a-z0-9+.-]*://)?(?:[a-z0-9-]+\.)+[a-z]{2,}(?::[0-9]+)?/?")
_ARMOR = re.compile(rb"-{5}(?:BEGIN|END) [A-Z0-9 ]+-{5}")


def weakness(value: bytes) -> str:
    """Why the value can't be hidden safely, as a clause about it; "" when it can."""
    text = value.strip()
    if len(text) < _SHORT:
        return f"has fewer than {_SHORT} characters"
    if text.lower().decode("latin-1") in _WORDS:
        return "is a word of every output"
    if len(set(text)) < 4:
        return "repeats a few characters"
    if _DIGITS.fullmatch(text) and len(text) < 12:
        return "is a number as any output has them"
    if _WORD.fullmatch(text) and len(text) < 12:
        return "looks like a word"
    if _ADDRESS.fullmatch(text):
        return "looks like an address without credentials"
    if _ARMOR.fullmatch(text):
        return "is a line that every key file has"
    return ""


def check_maskable(name: str, value: bytes, *, force: bool = False) -> str:
    """A warning about a value that output can't be kept clear of, or "".

    Raises Invalid for one under :data:`FEWEST` characters unless ``force``. An empty one hides
    nothing, so nothing is said about it.
    """
    if not value:
        return ""
    if len(value.strip()) < FEWEST and not force:
        del value  # a traceback that shows locals must not show it
        raise Invalid(
            f"the value of {name} has fewer than {FEWEST} characters: "
            "it would be masked wherever it stands by chance",
            hint="for a plain setting, say redact: false beside it in the tool's manifest; "
            "if it must be: --force",
        )
    reason = weakness(value)
    return (
        f"the value of {name} {reason}: output can't be kept clear of it safely" if reason else ""
    )
