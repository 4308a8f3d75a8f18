"""JSON Schema patterns as their standard means them, where Python's ``re`` reads them otherwise.

JSON Schema takes ECMA-262 regular expressions (Core 2020-12, section 6.4). There ``$`` is the very
end and ``\\d`` and ``\\w`` are ASCII; Python's ``$`` also matches before a final newline, so a name
checked with ``^[a-z]+$`` could bring a second line along.
"""

from __future__ import annotations

import re
from typing import Any

from sandboxd.policy.values import Wrong

__all__ = ["LITERALS", "as_written", "is_cheap", "strict_patterns"]

#: Keywords whose values are data, not schemas.
LITERALS = frozenset({"const", "enum", "default", "examples"})
#: Optional parts that a pattern may have, and the longest repetition, to be cheap.
_MAX_OPTIONAL = 4
_MAX_REPEAT = 1000
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def strict_patterns(schema: Any, path: tuple[str | int, ...] = ()) -> Any:
    """A copy of ``schema`` whose patterns Python reads as ECMA-262 does. Raises Wrong."""
    if isinstance(schema, list):
        return [strict_patterns(inner, (*path, index)) for index, inner in enumerate(schema)]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, inner in schema.items():
        place = (*path, key)
        if key in LITERALS:
            out[key] = inner
        elif key == "pattern" and isinstance(inner, str):
            out[key] = _translate(inner, place)
        elif key in _MAPS and isinstance(inner, dict):
            names = {
                name: _translate(name, (*place, name)) if key == "patternProperties" else name
                for name in inner
            }
            out[key] = {
                names[name]: strict_patterns(value, (*place, name)) for name, value in inner.items()
            }
        else:
            out[key] = strict_patterns(inner, place)
    return out


def as_written(pattern: str) -> str:
    """The pattern of the manifest, from a translated one; for messages."""
    return pattern.removeprefix("(?a:").removesuffix(")").replace("\\Z", "$")


def is_cheap(pattern: str) -> bool:
    """Whether judging a text by ``pattern`` takes time proportional to the text's length.

    A cautious guess: at most one part without a bound, and that in a pattern anchored at its
    start; no repeated group and no reference back. What it refuses may be harmless.
    """
    if len(pattern) > 500 or "\0" in pattern:
        return False
    bare = re.sub(r"\\\\", "x", pattern)
    if re.search(r"\\[1-9gk]|\(\?P?[<=(]", bare):  # back references; conditions
        return False
    bare = re.sub(r"\\.", "x", bare)
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "x", bare)
    if re.search(r"\)[*+{]", bare) or len(re.findall(r"(?<!\()\?", bare)) > _MAX_OPTIONAL:
        return False
    varying = len(re.findall(r"[*+]", bare))
    for least, comma, most in re.findall(r"\{(\d*)(,?)(\d*)\}", bare):
        if int(most or least or 0) > _MAX_REPEAT:
            return False
        varying += bool(comma) and least != most
    return not varying or (varying == 1 and bare.startswith("^") and "|" not in bare)


def _translate(pattern: str, path: tuple[str | int, ...]) -> str:
    out = ""
    in_class = False
    characters = iter(pattern)
    for character in characters:
        if character == "\\":
            out += character + next(characters, "")
        elif character == "$" and not in_class:
            out += "\\Z"
        else:
            if character in "[]":
                in_class = character == "["
            out += character
    translated = f"(?a:{out})"
    try:
        re.compile(translated)
    except (re.error, RecursionError, OverflowError) as error:
        raise Wrong(f"not a regular expression: {error}", path=path) from None
    return translated
