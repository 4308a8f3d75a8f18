"""Text that somebody else chose, written so that what is decided on is what it says.

A reviewer of a tool call reads values that an agent made up, and the agent may want to be read
wrongly. So a value is shown as JSON in printable ASCII: control, direction-changing, zero-width,
blank, combining and look-alike characters all stand there as ``\\uXXXX`` (Unicode TR 36 and 39
name the tricks). Where that makes ordinary words of other scripts unreadable, a second line
says how they read, with nothing in it that is invisible or changes the order of the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

__all__ = ["MAX_TEXT", "json_lines", "quoted", "reading", "wrapped"]

#: Characters of one text that are shown whole; of a longer one its beginning and its end are.
MAX_TEXT = 400
_HEAD, _TAIL = 240, 120
#: So many spaces in a row push what follows out of sight.
_SPACES = re.compile(" {8,}")
_WORD = re.compile(r"\w+")
_ALIKE = frozenset(
    {"LATIN", "CYRILLIC", "GREEK", "COPTIC", "ARMENIAN", "CHEROKEE", "LISU", "DESERET"}
)
#: Letters and symbols that have no ink (Default_Ignorable_Code_Point and blanks, Unicode 15).
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")


def quoted(text: str, limit: int | None = MAX_TEXT) -> str:
    """A text as JSON in printable ASCII, cut in its middle when it is longer than ``limit``.

    What was cut is told outside the quotes, where no text can put anything: its length, and the
    SHA-256 of the whole (UTF-8).
    """
    if limit is None or len(text) <= limit:
        return _ascii(text)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    left_out = len(text) - _HEAD - _TAIL
    return (
        f"{_ascii(text[:_HEAD])} <{left_out:,} characters left out> {_ascii(text[-_TAIL:])} "
        f"<{len(text):,} characters, sha256 {digest}>"
    )


def reading(text: str) -> str:
    """How a text with other than ASCII characters reads; "" where that can't be shown safely.

    Only a text that shows every one of its characters, in their order, as what they are has a
    reading: no control or invisible character, no right-to-left script, no pile of combining
    marks, no compatibility form, and no word of two scripts whose letters look alike.
    """
    if text.isascii() or len(text) > MAX_TEXT or unicodedata.normalize("NFKC", text) != text:
        return ""
    if any(len(_scripts(word) & _ALIKE) > 1 for word in _WORD.findall(text)):
        return ""
    marks = 0
    for character in text:
        category = unicodedata.category(character)
        if character in _BLANK or unicodedata.bidirectional(character) in ("R", "AL", "AN"):
            return ""
        marks = marks + 1 if category[0] == "M" else 0
        if marks > 2 or 0xFE00 <= ord(character) <= 0xFE0F or 0xE0100 <= ord(character) <= 0xE01EF:
            return ""
        if character != " " and category[0] in "CZ":
            return ""
    return text


def json_lines(value: Any, *, limit: int | None = MAX_TEXT) -> Iterator[str]:
    """A JSON value as indented lines, one for each value in it, in printable ASCII."""
    yield from _lines(value, "", "", "", limit)


def wrapped(line: str, width: int, *, first: str = "| ", more: str = "> ") -> Iterator[str]:
    """``line`` cut to rows of ``width`` columns, each begun by a mark that no text can fake.

    A terminal that breaks a long line by itself starts the next row at the margin, where a text
    with the right number of characters would look like a line of ours. ``width`` 0: not cut.
    """
    room = max(width - len(first), 16) if width else len(line) or 1
    if width and not line.isascii():  # in a reading, where a character may be two columns wide
        room //= 2
    yield first + line[:room]
    for start in range(room, len(line), room):
        yield more + line[start : start + room]


def _lines(value: Any, indent: str, name: str, comma: str, limit: int | None) -> Iterator[str]:
    head = indent + name
    if isinstance(value, dict) and value:
        yield head + "{"
        last = len(value) - 1
        for place, (key, inner) in enumerate(value.items()):
            key_text = quoted(str(key), limit) + ": "
            yield from _lines(inner, indent + "  ", key_text, "," if place < last else "", limit)
        yield indent + "}" + comma
    elif isinstance(value, list) and value:
        yield head + "["
        for place, inner in enumerate(value):
            yield from _lines(
                inner, indent + "  ", "", "," if place < len(value) - 1 else "", limit
            )
        yield indent + "]" + comma
    elif isinstance(value, str):
        yield head + quoted(value, limit) + comma
        if read := reading(value):
            yield f"{indent}{' ' * len(name)}<reads: {read}>"
    else:
        yield head + json.dumps(value) + comma


def _scripts(word: str) -> set[str]:
    """The scripts of a word's letters, as their names begin."""
    return {unicodedata.name(c, "").partition(" ")[0] for c in word if c.isalpha()}


def _ascii(text: str) -> str:
    # DEL is the one control character that JSON leaves as it is.
    plain = json.dumps(text, ensure_ascii=True).replace("\x7f", "\\u007f")
    return _SPACES.sub(lambda run: "\\u0020" * len(run[0]), plain)
