"""Ways to write a value, each as the pieces that stand for its characters, in order."""

from __future__ import annotations

import base64
import html
import json
import shlex
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ALL", "Spelling", "base64_of", "dump", "each", "wrapped"]


@dataclass(frozen=True)
class Spelling:
    """``window`` pieces tell at least 8 characters, so no output may have so many in a row."""

    pieces: list[bytes]
    window: int = 8

    @property
    def text(self) -> bytes:
        return b"".join(self.pieces)

    def windows(self, value: str) -> set[bytes]:
        """The ends of lines don't count: each line of a value is a secret of its own."""
        starts = range(max(1, len(self.pieces) - self.window + 1))
        by_character = len(self.pieces) == len(value)
        return {
            b"".join(self.pieces[at : at + self.window])
            for at in starts
            if not (by_character and "\n" in value[at : at + self.window])
        }


def each(encode: Callable[[str], str], *, between: str = "") -> Callable[[str], Spelling]:
    """Character by character."""

    def spell(value: str) -> Spelling:
        pieces = [encode(character) + between for character in value]
        return Spelling([piece.encode() for piece in pieces])

    return spell


def by_byte(form: str, *, between: str = "") -> Callable[[str], Spelling]:
    def spell(value: str) -> Spelling:
        return Spelling([(form % byte + between).encode() for byte in value.encode()])

    return spell


def base64_of(
    before: bytes = b"", after: bytes = b"", *, url: bool = False, column: int = 0
) -> Callable[[str], Spelling]:
    """In base64 of a larger text, wrapped where ``column`` says."""

    def spell(value: str) -> Spelling:
        encode = base64.urlsafe_b64encode if url else base64.b64encode
        text = encode(before + value.encode() + after)
        first, last = -(-len(before) * 8 // 6), (len(before + value.encode()) * 8) // 6
        pieces = [bytes((byte,)) for byte in text[first:last]]
        if column:
            pieces = [
                piece + b"\n" if (first + at + 1) % column == 0 else piece
                for at, piece in enumerate(pieces)
            ]
        return Spelling(pieces, window=12)

    return spell


def wrapped(
    spell: Callable[[str], Spelling], column: int, mark: bytes
) -> Callable[[str], Spelling]:
    """Another spelling, broken after every so many pieces."""

    def broken(value: str) -> Spelling:
        inner = spell(value)
        pieces = [
            piece + mark if (at + 1) % column == 0 else piece
            for at, piece in enumerate(inner.pieces)
        ]
        return Spelling(pieces, inner.window)

    return broken


def _json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _surrogates(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[at]:02X}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _shell_word(character: str) -> str:
    return character if character.isalnum() else "\\" + character


_plain = each(str)

ALL: dict[str, Callable[[str], Spelling]] = {
    "as it is": _plain,
    "wrapped": wrapped(_plain, 10, b"\n"),
    "wrapped and indented": wrapped(_plain, 9, b"\r\n    "),
    "UTF-16": lambda value: Spelling([c.encode("utf-16-le") for c in value]),
    "base64": base64_of(),
    "base64 with a newline": base64_of(after=b"\n"),
    "base64 one behind": base64_of(b"x", b"yz"),
    "base64 two behind": base64_of(b"xx", b"y"),
    "base64 of user and value": base64_of(b"x-access-token:"),
    "URL-safe base64": base64_of(b"\xff", b"\xfe", url=True),
    "MIME base64": base64_of(b"q" * 50, b"q" * 80, column=76),
    "PEM base64": base64_of(b"q" * 43, b"q" * 80, column=64),
    "base64 in JSON": wrapped(base64_of(b"q"), 64, b"\\n"),
    "hexadecimal": by_byte("%02x"),
    "upper hexadecimal": by_byte("%02X"),
    "bytes apart": by_byte("%02x", between=" "),
    "bytes with colons": by_byte("%02X", between=":"),
    "xxd -p": wrapped(by_byte("%02x"), 30, b"\n"),
    "xxd -i": wrapped(by_byte("0x%02x", between=", "), 12, b"\n  "),
    "list of bytes": by_byte("%d", between=", "),
    "percent": each(lambda c: urllib.parse.quote(c, safe="")),
    "percent but slashes": each(urllib.parse.quote),
    "form": each(urllib.parse.quote_plus),
    "percent for all": by_byte("%%%02X"),
    "lower percent for all": by_byte("%%%02x"),
    "percent twice": each(lambda c: urllib.parse.quote(urllib.parse.quote(c, safe=""), safe="")),
    "JSON": each(_json),
    "JSON without ASCII": each(lambda c: json.dumps(c, ensure_ascii=False)[1:-1]),
    "JSON of PHP": each(lambda c: _json(c).replace("/", "\\/")),
    "JSON in JSON": each(lambda c: _json(_json(c))),
    "JSON for HTML": each(lambda c: f"\\u{ord(c):04x}" if c in "<>&'" else _json(c)),
    "\\u for all": each(_surrogates),
    "\\u{} for all": each(lambda c: f"\\u{{{ord(c):x}}}"),
    "\\x for all": by_byte("\\x%02x"),
    "octal for all": by_byte("\\%03o"),
    "C string": each(lambda c: {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}.get(c, c)),
    "shell quotes": each(lambda c: "'\\''" if c == "'" else c),
    "shell quotes of Python": each(lambda c: shlex.quote(f"x{c}")[2:-1] if c == "'" else c),
    "shell backslashes": each(_shell_word),
    "HTML": each(html.escape),
    "decimal references": each(lambda c: f"&#{ord(c)};"),
    "hexadecimal references": each(lambda c: f"&#x{ord(c):X};"),
}


def dump(data: bytes, kind: str) -> bytes:
    """As the program of that name prints it."""
    offset, pair, column = {
        "xxd": ("%08x: ", "%02x%02x ", " %s"),
        "hexdump -C": ("%08x  ", "%02x %02x ", " |%s|"),
        "od -tx1": ("%07o ", "%02x %02x ", ""),
        "od -Ax -tx1z": ("%06x ", "%02x %02x ", " >%s<"),
        "od -c": ("%07o", "   %c   %c", ""),
    }[kind]
    lines = []
    for at in range(0, len(data), 16):
        line = data[at : at + 16]
        even = line + b" " * (len(line) % 2)
        shown = "".join(pair % (even[n], even[n + 1]) for n in range(0, len(even), 2))
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
        lines.append(offset % at + shown + (column and column % text) + "\n")
    return "".join(lines).encode()
