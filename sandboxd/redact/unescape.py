"""Text as a reader of escapes would see it, with the way back to where each byte came from.

Percent-encoding (RFC 3986), the escapes of JSON strings (RFC 8259) and of C-like languages, and
the character references that HTML and XML writers use. Mixed in one text, as tools mix them; what
is no whole escape stays as it is.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable

__all__ = ["View", "align", "escapes", "unescape", "unescape_apart", "unfinished"]

_HEX = rb"[0-9A-Fa-f]"
_PERCENT = _HEX + rb"{2}"
_BACKSLASH = (
    rb"(?:u[dD][89abAB]" + _HEX + rb"{2}\\u[dD][c-fC-F]" + _HEX + rb"{2}"
    rb"|u" + _HEX + rb"{4}|u\{" + _HEX + rb"{1,6}\}|U" + _HEX + rb"{8}|x" + _HEX + rb"{2}"
    rb"|[0-7]{1,3}|[\\nrtbfvae])"
)
_REFERENCE = rb"(?:\#[0-9]{1,7}|\#[xX]" + _HEX + rb"{1,6}|amp|lt|gt|quot|apos|nbsp);"
_ESCAPE = re.compile(
    rb"[%%\\&](?:(?<=%%)%b|(?<=\\)%b|(?<=&)%b)" % (_PERCENT, _BACKSLASH, _REFERENCE)
)
#: The same by their first byte: the search for one byte is many times as fast.
_BY_FIRST = {
    b"%": re.compile(b"%" + _PERCENT),
    b"\\": re.compile(rb"\\" + _BACKSLASH),
    b"&": re.compile(b"&" + _REFERENCE),
}
#: What can still become an escape when more follows.
_UNFINISHED = re.compile(
    rb"(?:%" + _HEX + rb"?"
    rb"|\\(?:u[dD][89abAB]" + _HEX + rb"{2}(?:\\(?:u[dD]?[c-fC-F]?" + _HEX + rb"?)?)?"
    rb"|u" + _HEX + rb"{0,3}|u\{" + _HEX + rb"{0,6}|U" + _HEX + rb"{0,7}|x" + _HEX + rb"?"
    rb"|[0-7]{0,2})"
    rb"|&\#?[0-9A-Za-z]{0,7})\Z"
)
#: No escape is longer.
_LONGEST = 12

_LETTERS = {
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


class View:
    """Bytes that were decoded from others; positions in them lead back to the others."""

    __slots__ = ("_decoded", "_lengths", "_pattern", "_source", "_starts", "_widths", "data")

    def __init__(self, data: bytes, source: bytes, pattern: re.Pattern[bytes]) -> None:
        self.data, self._source, self._pattern = data, source, pattern
        self._starts: list[int] | None = None  # of the escapes, in the source
        self._widths: list[int] = []
        self._decoded: list[int] = []  # and in the data
        self._lengths: list[int] = []

    def start(self, at: int) -> int:
        """Where the byte at ``at`` begins in the source."""
        return self._source_of(at)[0]

    def end(self, at: int) -> int:
        """Where the byte before ``at`` ends in the source."""
        return self._source_of(at - 1)[1]

    def _source_of(self, at: int) -> tuple[int, int]:
        starts = self._starts
        if starts is None:
            starts = self._index()
        place = bisect_right(self._decoded, at) - 1
        if place < 0:
            return at, at + 1
        over = at - self._decoded[place] - self._lengths[place]
        begin, end = starts[place], starts[place] + self._widths[place]
        return (begin, end) if over < 0 else (end + over, end + over + 1)

    def _index(self) -> list[int]:
        starts: list[int] = []
        shift = 0
        for match in self._pattern.finditer(self._source):
            begin, width, length = match.start(), match.end() - match.start(), len(_decode(match))
            starts.append(begin)
            self._widths.append(width)
            self._decoded.append(begin - shift)
            self._lengths.append(length)
            shift += width - length
        self._starts = starts
        return starts


def escapes(text: bytes) -> list[int]:
    """Where escapes are, in order."""
    found: list[int] = []
    for first, pattern in _BY_FIRST.items():
        if first in text:
            found += [match.start() for match in pattern.finditer(text)]
    found.sort()
    return found


def unescape(source: bytes) -> View | None:
    """The text with its escapes decoded, or None when it has none."""
    if b"\\" in source or b"%" in source or b"&" in source:
        return _unescape(source, _ESCAPE)
    return None


def unescape_apart(source: bytes) -> list[View]:
    """The text with one kind of escapes decoded, for each kind, if it has several.

    What looks like an escape of one kind may be the beginning of a text that another kind hides.
    """
    views = [_unescape(source, kind) for first, kind in _BY_FIRST.items() if first in source]
    found = [view for view in views if view is not None]
    return found if len(found) > 1 else []


def _unescape(source: bytes, pattern: re.Pattern[bytes]) -> View | None:
    data, count = pattern.subn(_decode, source)
    return View(data, source, pattern) if count else None


def unfinished(text: bytes) -> int:
    """Where an escape begins that the end of the text cuts; the text's length when none does."""
    tail = text[-_LONGEST:]
    match = _UNFINISHED.search(tail)
    return len(text) - len(tail) + match.start() if match else len(text)


def align(text: bytes, at: int) -> int:
    """``at``, or the beginning of the escape that it would cut."""
    first = max(0, at - _LONGEST)
    while first and text[first - 1] == 0x5C:  # a run of backslashes is read from its beginning
        first -= 1
    for match in _ESCAPE.finditer(text, first, at + _LONGEST):
        if match.start() >= at:
            break
        if match.end() > at:
            return match.start()
    return at


def _decode(match: re.Match[bytes]) -> bytes:
    escape = match[0]
    letter = _LETTERS.get(escape)
    if letter is not None:
        return letter
    if escape[:1] == b"%":
        return bytes((int(escape[1:], 16),))
    if escape[:1] == b"&":
        return _character(int(escape[3:-1], 16) if escape[2:3] in b"xX" else int(escape[2:-1]))
    return _KINDS.get(escape[1:2], _octal)(escape)


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


_KINDS: dict[bytes, Callable[[bytes], bytes]] = {b"x": _byte, b"u": _unicode, b"U": _unicode}
