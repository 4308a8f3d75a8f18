"""Whether a value can be hidden in output: not if any text holds it anyway.

Hiding ``true`` would tear every output apart and still tell the reader what it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sandboxd.errors import Invalid
from sandboxd.secret import Secret

__all__ = ["FEWEST", "review", "weakness"]

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
    if text.lower().decode("latin-1") in _WORDS:
        return "is a word of every output"
    if len(text) < _SHORT:
        return f"has fewer than {_SHORT} characters"
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


def review(
    values: Mapping[str, Secret], *, plain: Collection[str] = (), force: bool = False
) -> tuple[list[str], list[str]]:
    """(warnings, names of what is stored only by force) for values that are about to be stored.

    A warning says why output can't be kept clear of a value safely. ``plain`` are variables that
    output may show anyway, and an empty value hides nothing: neither has any. Raises Invalid for
    values of fewer than :data:`FEWEST` characters, naming all of them, unless ``force``.
    """
    warnings: list[str] = []
    short: list[str] = []
    for name, secret in sorted(values.items()):
        value = secret.reveal()
        if not value or name in plain:
            continue
        if len(value.strip()) < FEWEST:
            short.append(name)
        if reason := weakness(value):
            warnings.append(f"the value of {name} {reason}: it is masked wherever output has it")
    if short and not force:
        raise Invalid(
            f"too short to be masked in output, under {FEWEST} characters: {', '.join(short)}; "
            "nothing was set",
            hint="output that holds them by chance would be torn; if it is a plain setting, say "
            "redact: false beside it in the tool's manifest, and else --force",
        )
    return warnings, short
