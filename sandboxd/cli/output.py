"""What sandboxctl prints. The rules:

Results go to standard output, everything else to standard error. Messages are lower case without a
full stop, a hint comes on the next line. On a terminal there are columns, a bold heading and local
times; in a pipe the same columns, no colour, nothing cut, times in UTC. Text that came from
elsewhere is made harmless first: no control or direction-changing characters reach a terminal.
"""

from __future__ import annotations

import calendar
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from sandboxd.errors import SandboxdError

__all__ = [
    "amount",
    "bound",
    "clean",
    "colour",
    "columns",
    "fields",
    "first_line",
    "note",
    "print_json",
    "set_up",
    "show_error",
    "size",
    "table",
    "visible",
    "when",
]

_CODES = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "dim": "2"}


def set_up() -> None:
    """Make sure that the standard streams exist and take any text, in whatever locale this runs."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # Started with it closed: the admin socket must not become "standard output".
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is fd
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any, *, line: bool = False, ascii: bool = False) -> None:
    """A value for programs; ``line`` keeps it on one line and sends it off at once.

    ``ascii`` is for what an agent wrote: everything else is ``\\uXXXX``, on a terminal too.
    """
    print(json.dumps(value, indent=None if line else 2, ensure_ascii=ascii), flush=line)


def table(rows: Iterable[Sequence[str]], headings: Sequence[str], *, empty: str) -> None:
    """Aligned columns under their headings; ``empty`` on standard error when there are no rows."""
    cells = [[clean(cell) for cell in row] for row in rows]
    if not cells:
        note(empty)
        return
    widths = [max(len(row[n]) for row in (headings, *cells)) for n in range(len(headings))]
    limit = columns() if sys.stdout.isatty() else 0
    print(colour(_aligned(headings, widths, limit), "bold"))
    for row in cells:
        print(_aligned(row, widths, limit))


def fields(pairs: Sequence[tuple[str, Any]]) -> None:
    """One ``name  value`` line each; a list takes a line per item, an empty one says none."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        items = value if isinstance(value, (list, tuple)) else [value]
        for n, item in enumerate(items or ["none"]):
            label = (name if n == 0 else "").ljust(width)
            print(f"{colour(label, 'bold')}  {clean(str(item))}".rstrip())


def first_line(text: str) -> str:
    """A text's first line, marked where there is more."""
    first, _, more = text.strip().partition("\n")
    return f"{first} …" if more else first


def note(text: str) -> None:
    """Something for the person, not part of the result."""
    print(clean(text), file=sys.stderr)


def show_error(error: SandboxdError, *, as_json: bool = False) -> None:
    """An error on standard error: one ``sandboxctl:`` line, each problem, the hint."""
    parts = [part for part in getattr(error, "errors", ()) if isinstance(part, SandboxdError)]
    sys.stdout.flush()
    if as_json:
        shown = _as_dict(error)
        if parts:
            shown["errors"] = [_as_dict(part) for part in parts]
        print(json.dumps({"error": shown}, ensure_ascii=False), file=sys.stderr)
        return
    lines = [f"sandboxctl: {clean(error.message)}"]
    for part in parts:
        lines.append(f"  {clean(part.message)}")
        if part.hint:
            lines.append(f"    hint: {clean(part.hint)}")
    if rule := getattr(error, "rule", ""):
        lines.append(f"  rule: {clean(rule)}")
    if error.hint:
        lines.append(f"  hint: {clean(error.hint)}")
    print("\n".join(lines), file=sys.stderr)


def clean(text: str) -> str:
    """Text without characters that a terminal obeys or that change how the rest reads."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def colour(text: str, name: str) -> str:
    """Coloured when standard output is a terminal that wants it (no-color.org)."""
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if not wanted or os.environ.get("TERM", "dumb") == "dumb":
        return text
    return f"\x1b[{_CODES[name]}m{text}\x1b[0m"


def when(value: str | None, *, never: str = "never") -> str:
    """An RFC 3339 time in UTC, as it is in a pipe, in local time on a terminal."""
    if value is None:
        return never
    if not sys.stdout.isatty():
        return value
    try:
        seconds = calendar.timegm(time.strptime(value[:19], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return value
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def amount(count: int, one: str, many: str = "") -> str:
    """``1 session``, ``2 sessions``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def size(count: int) -> str:
    """Bytes as configuration files have them: ``64M``, or a plain number where none fits."""
    for power, unit in ((30, "G"), (20, "M"), (10, "K")):
        if count and count % (1 << power) == 0:
            return f"{count >> power}{unit}"
    return str(count)


def bound(name: str, value: float) -> str:
    """One limit as configuration files have it."""
    if name in ("memory", "file_size", "tmp_size", "output_limit"):
        return f"{name}: {size(int(value))}"
    return f"{name}: {value:g}s" if name in ("cpu", "timeout") else f"{name}: {value:g}"


def _as_dict(error: SandboxdError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "hint": error.hint}


def _aligned(row: Sequence[str], widths: Sequence[int], limit: int) -> str:
    line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    return line[: limit - 1] + "…" if limit and len(line) > limit else line


def columns() -> int:
    """The terminal's width; 0 where standard output is none."""
    try:
        return os.get_terminal_size(1).columns
    except OSError:
        return 0


def visible(data: bytes) -> bytes:
    """Line by line as it is, with every other control character spelled out."""
    lines = data.decode("utf-8", "backslashreplace").split("\n")
    shown = (
        "".join(c if c == "\t" else clean(c) for c in line.removesuffix("\r")) for line in lines
    )
    return "\n".join(shown).encode()
