"""Text as a reader of escapes would see it, with the way back to where each byte came from.

Percent-encoding (RFC 3986), the escapes of JSON strings (RFC 8259) and of C-like languages, and
the character references that HTML and XML writers use. Mixed in one text, as tools mix them; what
is no whole escape stays as it is.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

__all__ = ["Escape", "Part", "View", "align", "escapes", "telling", "unfinished"]

_HEX = rb"[0-9A-Fa-f]"
_PERCENT = _HEX + rb"{2}"
_BACKSLASH = (
    rb"u[dD][89abAB]" + _HEX + rb"{2}\\u[dD][c-fC-F]" + _HEX + rb"{2}"
    rb"|u" + _HEX + rb"{4}|u\{" + _HEX + rb"{1,6}\}|U" + _HEX + rb"{8}|x" + _HEX + rb"{2}"
    rb"|[0-7]{1,3}|[\\bfvae]"
)
_REFERENCE = rb"(?:\#[0-9]{1,7}|\#[xX]" + _HEX + rb"{1,6}|amp|lt|gt|quot|apos|nbsp);"
#: By their first byte: the search for one byte is many times as fast as for one of three.
_KINDS = {
    b"%": re.compile(b"%" + _PERCENT),
    b"\\": re.compile(rb"\\(?:" + _BACKSLASH + rb"|[nrt])"),
    b"&": re.compile(b"&" + _REFERENCE),
}
#: Those that stand for more than a blank.
_TELLING = {**_KINDS, b"\\": re.compile(rb"\\(?:" + _BACKSLASH + b")")}
#: No escape begins with another kind's first byte, so the kinds can be searched for one by one.
_ESCAPE = re.compile(b"|".join(pattern.pattern for pattern in _KINDS.values()))
#: What can still become an escape when more follows.
_UNFINISHED = re.compile(
    rb"(?:%" + _HEX + rb"?"
    rb"|\\(?:u[dD][89abAB]" + _HEX + rb"{2}(?:\\(?:u[dD]?[c-fC-F]?" + _HEX + rb"?)?)?"
    rb"|u" + _HEX + rb"{0,3}|u\{" + _HEX + rb"{0,6}|U" + _HEX + rb"{0,7}|x" + _HEX + rb"?"
    rb"|[0-7]{0,2})"
    rb"|&\#?[0-9A-Za-z]{0,7})\Z"
)
_BLANKS = (b"\\n", b"\\r", b"\\t")
_SPARSE = 256
_RARE = 64
#: No escape is longer.
_LONGEST = 12

_KNOWN = {
    b"\\n": b"\n",
    b"\\r": b"\r",
    b"\\t": b"\t",
    b"\\b": b"\b",
    b"\\f": b"\f",
    b"\\v": b"\v",
    b"\\a": b"\a",
    b"\\e": b"\x1b",
    b"\\\\": b"\\",
    b"&amp;": b"&",
    b"&lt;": b"<",
    b"&gt;": b">",
    b"&quot;": b'"',
    b"&apos;": b"'",
    b"&nbsp;": b" ",
}


#: Where an escape is, what it stands for, and by which byte it begins.
Escape = tuple[int, int, bytes, bytes]


class View:
    """A text with some escapes decoded. Positions in ``data`` lead back to the text."""

    __slots__ = ("_decoded", "_escapes", "data")

    def __init__(self, text: bytes, escapes: Sequence[Escape]) -> None:
        parts: list[bytes] = []
        at = 0
        for start, end, meaning, _ in escapes:
            parts += (text[at:start], meaning)
            at = end
        parts.append(text[at:])
        self.data = b"".join(parts)
        self._escapes = escapes
        self._decoded: list[int] = []  # where they are in the data

    def start(self, at: int) -> int:
        """Where in the text the byte at ``at`` begins."""
        return self._source(at)[0]

    def end(self, at: int) -> int:
        """Where in the text the byte before ``at`` ends."""
        return self._source(at - 1)[1]

    def _source(self, at: int) -> tuple[int, int]:
        if not self._decoded:
            shift = 0
            for start, end, meaning, _ in self._escapes:
                self._decoded.append(start - shift)
                shift += end - start - len(meaning)
        place = bisect_right(self._decoded, at) - 1
        if place < 0:
            return at, at + 1
        start, end, meaning, _ = self._escapes[place]
        over = at - self._decoded[place] - len(meaning)
        return (start, end) if over < 0 else (end + over, end + over + 1)


class Part:
    """A part of a text."""

    __slots__ = ("_begin", "data")

    def __init__(self, text: bytes, begin: int, end: int) -> None:
        self.data, self._begin = text[begin:end], begin

    def start(self, at: int) -> int:
        return self._begin + at

    def end(self, at: int) -> int:
        return self._begin + at


def telling(text: bytes) -> tuple[list[int], bytes]:
    """Where escapes are, in order, and the text.

    If they are many, those are left out that stand for an end of line or a tab, as JSON is full of
    them: the text has blanks in their places instead.
    """
    places = _places(text, _KINDS)
    if len(places) <= len(text) // _SPARSE:
        return places, text
    blanked = text
    for escape in _BLANKS:
        blanked = blanked.replace(escape, b"  ")
    return (places, text) if blanked is text else (_places(text, _TELLING), blanked)


def _places(text: bytes, kinds: Mapping[bytes, re.Pattern[bytes]]) -> list[int]:
    found: list[int] = []
    for first, pattern in kinds.items():
        at = text.find(first)
        for _ in range(_RARE):  # finding a byte is faster than a pattern, where it is rare
            if at < 0:
                break
            if match := pattern.match(text, at):
                found.append(at)
            at = text.find(first, match.end() if match else at + 1)
        if at >= 0:
            found += [match.start() for match in pattern.finditer(text, at)]
    found.sort()
    return found


def escapes(text: bytes, begin: int, end: int) -> list[Escape]:
    """Every escape in a part of the text, in order."""
    found: list[Escape] = []
    for kind, pattern in _KINDS.items():
        if text.find(kind, begin, end) >= 0:
            for match in pattern.finditer(text, begin, end):
                first, last = match.span()
                escape = text[first:last]
                meaning = _KNOWN.get(escape)
                found.append((first, last, _decode(escape) if meaning is None else meaning, kind))
    found.sort()
    return found


def unfinished(text: bytes) -> int:
    """Where an escape begins that the end of the text cuts; the text's length when none does."""
    tail = text[-_LONGEST:]
    match = _UNFINISHED.search(tail)
    return len(text) - len(tail) + match.start() if match else len(text)


def align(text: bytes, at: int) -> int:
    """``at``, or the beginning of the escape that it would cut."""
    first = max(0, at - _LONGEST)
    if text[first - 1 : first] == b"\\":  # a run of backslashes is read in pairs
        first -= (first - len(text[:first].rstrip(b"\\"))) % 2
    for match in _ESCAPE.finditer(text, first, at + _LONGEST):
        if match.start() >= at:
            break
        if match.end() > at:
            return match.start()
    return at


def _decode(escape: bytes) -> bytes:
    if escape[:1] == b"%":
        return bytes((int(escape[1:], 16),))
    if escape[:1] == b"&":
        return _character(int(escape[3:-1], 16) if escape[2:3] in b"xX" else int(escape[2:-1]))
    return _LETTERS.get(escape[1:2], _octal)(escape)


def _octal(escape: bytes) -> bytes:
    return bytes((int(escape[1:], 8) & 0xFF,))


def _byte(escape: bytes) -> bytes:
    return bytes((int(escape[2:], 16),))


def _unicode(escape: bytes) -> bytes:
    if len(escape) == 12:  # a surrogate pair (RFC 8259, section 7)
        high, low = int(escape[2:6], 16), int(escape[8:], 16)
        return _character(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))
    return _character(int(escape[2:].strip(b"{}"), 16))


def _character(number: int) -> bytes:
    return chr(number).encode("utf-8", "surrogatepass") if number < 0x110000 else b""


_LETTERS: dict[bytes, Callable[[bytes], bytes]] = {b"x": _byte, b"u": _unicode, b"U": _unicode}
