"""Dumps as ``xxd``, ``hexdump -C`` and ``od`` print them: their bytes, without what is beside them.

A dump is known by the offset of its first line, and by lines that go on like it.
"""

from __future__ import annotations

import re

from sandboxd.redact.unescape import Escape

__all__ = ["BEGIN", "dump_parts", "last_line", "line_end", "line_start"]

#: The offset of the first line, at least.
BEGIN = b"000000"

_LINE = re.compile(
    rb"^(?:"
    rb"[0-9a-f]{8}:[ ]((?:[0-9a-f]{2,16}[ ])*(?:[0-9a-f]{2,16})?)"  # xxd: two blanks end it
    rb"|0[0-9a-f]{5,9}(?:"
    rb"[ ]{1,3}((?:[0-9a-f]{2}[ ]{1,2}){0,15}[0-9a-f]{2})"  # hexdump -C, od -tx1
    rb"|((?:[ ]{3}[ !-~]|[ ]{2}\\[0abfnrtv]|[ ][0-7]{3})+)"  # od -c
    rb"))",
    re.MULTILINE,
)


#: What can still become such a line.
_BEGUN = re.compile(rb"0[0-9a-f]{0,9}:?[ ]{0,3}[0-9a-f\\]?\Z")
_LONGEST = 256


def last_line(text: bytes) -> int:
    """Where a line of a dump begins that the end of the text cuts; its length when there is none.

    Without its offset the rest of the line would be none of a dump.
    """
    start = line_start(text, len(text))
    line = text[start : start + _LONGEST + 1]
    if line[:1] != b"0" or len(line) > _LONGEST:
        return len(text)
    return start if _BEGUN.match(line) or _LINE.match(line) else len(text)


def dump_parts(text: bytes, gap: bytes) -> list[Escape]:
    """What to leave out of a text so that the bytes of its dumps follow each other.

    As escapes without a meaning; what is between two dumps becomes a ``gap``. Empty if there is
    no line of a dump.
    """
    parts: list[Escape] = []
    end = line = 0
    for match in _LINE.finditer(text):
        first, last = match.span(match.lastindex or 0)
        begin = match.start()
        # Only the text column stands between the bytes of a line and the next line.
        follows = bool(parts) and begin <= line
        parts.append((end, first, b"" if follows else gap, b""))
        end = last
        line = line_end(text, last) + 1
    if parts:
        goes_on = line >= len(text) or _BEGUN.match(text, line) is not None
        parts.append((end, len(text), b"" if goes_on else gap, b""))
    return parts


def line_start(text: bytes, at: int) -> int:
    """Where the line of this byte begins: a line without its offset is none of a dump."""
    return text.rfind(b"\n", 0, at) + 1


def line_end(text: bytes, at: int) -> int:
    """Where the line ends: its text column shows the same bytes."""
    end = text.find(b"\n", at)
    return len(text) if end < 0 else end
