"""The forms in which a value can stand in a text, each ready to be looked for.

A form is compared loosely: blanks, quotes and backslashes count for nothing, so that a value is
found wrapped at any column, spread by a dump of hexadecimal digits, or quoted for a shell. What
escapes replaced is decoded before (see unescape.py). Encodings are base64 (RFC 4648) in its three
alignments, with and without what ends it, hexadecimal, and lists of byte numbers.
"""

from __future__ import annotations

import base64
import contextlib
import json
import urllib.parse
from collections.abc import Iterator
from itertools import compress

from sandboxd.maskable import weakness
from sandboxd.redact.unescape import View, escapes

__all__ = ["ANCHOR", "CANON", "CANON_DROPS", "KEPT", "Form", "forms"]

#: So many first bytes of a form lead to it; a loose form has no fewer.
ANCHOR = 8

#: Shorter values have no encodings: these would be in every text by chance.
_MIN_ENCODED = 4
#: The least of a base64 text whose ends are unknown that tells anything.
_MIN_BASE64 = 6

#: What stands between the bytes of a wrapped, quoted or UTF-16 text.
BLANKS = b" \t\n\r\v\f\0'\"\\"
_SEPARATORS = BLANKS + b":,"

#: The canonical text, in which loose forms are looked for: one case, one base64 alphabet.
CANON = bytes(range(256)).lower().translate(bytes.maketrans(b"-_", b"+/"))
CANON_DROPS = _SEPARATORS

_SAME = bytes(range(256))
_STANDARD = bytes.maketrans(b"-_", b"+/")  # from the URL-safe alphabet (RFC 4648, section 5)
_LOWER = _SAME.lower()


_NUMBERS = [b"%d" % byte for byte in range(256)]

#: By what is dropped: 1 for each byte that is not.
KEPT = {
    drops: bytes(byte not in drops for byte in range(256)) for drops in (b"", BLANKS, CANON_DROPS)
}


class Form:
    """One way to write the value of ``name``.

    ``exact`` is what must stand in the text once ``table`` and ``drops`` are applied to it;
    ``anchor`` is how that begins in canonical text, or verbatim if the form is ``literal``. An
    occurrence spans ``reach`` bytes at most. ``guarded``: its beginning is worth hiding.
    """

    __slots__ = (
        "anchor",
        "drops",
        "exact",
        "guarded",
        "literal",
        "name",
        "reach",
        "table",
        "text",
    )

    def __init__(
        self,
        name: str,
        text: bytes,
        table: bytes = _SAME,
        drops: bytes = BLANKS,
        *,
        literal: bool = False,
        guarded: bool = True,
    ) -> None:
        self.name, self.text, self.table = name, text, table
        self.literal, self.guarded = literal, guarded
        self.drops = b"" if literal else drops
        if literal:
            self.exact, self.anchor = text, text[:ANCHOR]
        else:
            # It is found by its first canonical byte, so nothing before that is compared.
            self.exact = text.translate(table, drops).lstrip(b":,")
            self.anchor = self.exact.translate(CANON, CANON_DROPS)[:ANCHOR]
        self.reach = len(self.exact) if literal else 3 * len(self.exact) + 64

    def __repr__(self) -> str:
        return f"<Form of {self.name}>"

    def told(self, count: int, drops: bytes) -> int:
        """How much of the form its first bytes tell, ``count`` of those that are not dropped."""
        begin = self.text[: count + 1]
        if len(begin.translate(None, drops)) == len(begin):
            return count
        # What is before the first of them was not compared, and may have been shown.
        first = len(self.text) - len(self.text.lstrip(CANON_DROPS))
        behind = range(first, len(self.text))
        places = list(compress(behind, self.text[first:].translate(KEPT[drops])))
        return places[count] if count < len(places) else len(self.text)


def forms(name: str, value: bytes) -> list[Form]:
    """Every form of the value, and of its parts that are secret on their own."""
    found: dict[tuple[bytes, bytes, bytes], Form] = {}
    # A value read from a file is printed without its last newline, and a newline hides nothing.
    bare = value.rstrip(b"\r\n") or value
    if not bare:
        return []
    lines = list(_lines(bare))
    for text in (bare, *_spellings(bare)):
        _add(found, name, text, guarded=not lines)
    for text in lines:
        _add(found, name, text)
    if len(bare) >= _MIN_ENCODED:
        for form in _encoded(name, bare):
            _keep(found, form)
    return list(found.values())


def _add(
    found: dict[tuple[bytes, bytes, bytes], Form], name: str, text: bytes, *, guarded: bool = True
) -> None:
    form = Form(name, text, guarded=guarded)
    loose = len(form.anchor) == ANCHOR
    if loose:
        _keep(found, form)
    # What a loose form can't see, or hardly.
    if not loose or text[:1] in CANON_DROPS or 2 * len(form.exact) < len(text):
        for spelled in {text, json.dumps(text.decode("latin-1"))[1:-1].encode("latin-1")}:
            _keep(found, Form(name, spelled, literal=True, guarded=guarded))


def _keep(found: dict[tuple[bytes, bytes, bytes], Form], form: Form) -> None:
    found.setdefault((form.exact, form.table, form.drops), form)


def _lines(text: bytes) -> Iterator[bytes]:
    """The lines that are secret each; not those that any file has, such as ``{`` and armor."""
    lines = text.splitlines()
    if len(lines) > 1:
        for line in lines:
            line = line.strip()
            if not line.startswith(b"-----") and not weakness(line):
                yield line


def _spellings(text: bytes) -> Iterator[bytes]:
    """The value as other programs read or write it, where that is another text."""
    if b" " in text:
        yield text.replace(b" ", b"+")  # application/x-www-form-urlencoded
    if not text.isascii():
        with contextlib.suppress(UnicodeError):
            characters = text.decode("utf-8")
            yield characters.encode("utf-16-le")
            yield characters.encode("utf-16-be")
            yield characters.encode("latin-1")  # as some languages escape it
    if (found := escapes(text, 0, len(text))) and (decoded := View(text, found).data):
        yield decoded
        yield from _lines(decoded)
    password = _password(text)
    if password:
        yield password
        plain = urllib.parse.unquote_to_bytes(password)
        if plain != password:
            yield plain


def _password(text: bytes) -> bytes:
    """The password in a URL (RFC 3986, section 3.2.1), unless it is too common to look for."""
    scheme, _, rest = text.partition(b"://")
    if not rest or not scheme.isascii() or len(scheme) > 40:
        return b""
    login, _, host = rest.partition(b"/")[0].rpartition(b"@")
    password = login.partition(b":")[2]
    return b"" if not host or weakness(password) else password


def _encoded(name: str, value: bytes) -> Iterator[Form]:
    for before in range(3):
        yield from _base64(name, value, before)
    yield Form(name, value.hex().encode(), _LOWER, _SEPARATORS)
    yield Form(name, ("0x" + value.hex(" ").replace(" ", "0x")).encode(), _LOWER, _SEPARATORS)
    numbers = b"".join(map(_NUMBERS.__getitem__, value))
    if len(numbers) > ANCHOR:
        yield Form(name, numbers, _SAME, _SEPARATORS)


def _base64(name: str, value: bytes, before: int) -> Iterator[Form]:
    """The value in base64 after so many bytes of something else (modulo three).

    What of the text depends on the value alone, and that with what ends it where nothing follows
    the value, or a newline.
    """
    filler = b"\0" * before
    first = (before * 8 + 5) // 6
    last = (before + len(value)) * 8 // 6
    whole = base64.b64encode(filler + value)
    ends = {whole[first:last]}
    for text in (whole, base64.b64encode(filler + value + b"\n")):
        ends |= {text[first:], text[first:].rstrip(b"=")}
    for text in ends:
        if len(text) >= ANCHOR:
            yield Form(name, text, _STANDARD)
        elif len(text) >= _MIN_BASE64:
            yield Form(name, text, literal=True)
            yield Form(name, text.translate(bytes.maketrans(b"+/", b"-_")), literal=True)
