"""Templates to HTML: everything is escaped, and what others wrote shows all of its characters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sandboxd import visible

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["STATIC", "asset", "content", "count", "digest", "render", "sparkline"]

#: The package's files that browsers load, by name, with their media types.
STATIC: Mapping[str, str] = {
    "dashboard.css": "text/css; charset=utf-8",
    "dashboard.js": "text/javascript; charset=utf-8",
    "htmx.min.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

#: Width and height of a sparkline in its own units.
_WIDTH, _HEIGHT = 120, 28


def render(template: str, /, **values: Any) -> str:
    """The page or fragment. A name that a template uses and nobody gives is an error."""
    return _environment().get_template(template).render(values)


def asset(name: str) -> str:
    """Where a static file is, with its digest, so that browsers can keep it for ever."""
    return f"/static/{name}?v={digest(name)[:16]}"


@cache
def content(name: str) -> bytes:
    """A static file. KeyError for one that there isn't."""
    if name not in STATIC:
        raise KeyError(name)
    return files("sandboxd.http.dashboard").joinpath("static", name).read_bytes()


@cache
def digest(name: str) -> str:
    return hashlib.sha256(content(name)).hexdigest()


def sparkline(values: Sequence[float], *, least_top: float) -> str:
    """The points of a polyline, newest at the right; its top is the greatest value.

    ``least_top`` keeps noise near zero from looking like load.
    """
    if not values:
        return ""
    top = max(least_top, *values)
    step = _WIDTH / max(1, len(values) - 1)
    first = _WIDTH - step * (len(values) - 1)
    return " ".join(
        f"{first + step * n:.1f},{_HEIGHT - 1.5 - (_HEIGHT - 3) * value / top:.1f}"
        for n, value in enumerate(values)
    )


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # with the first page

    environment = Environment(
        loader=PackageLoader("sandboxd.http.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters.update(
        clean=_clean,
        when=_when,
        ago=_ago,
        until=_until,
        size=_size,
        short=_short,
        lines=_lines,
        compact=_compact,
        count=count,
    )
    environment.globals.update(asset=asset, sparkline=sparkline)
    return environment


def _clean(value: Any) -> str:
    """Text without characters that are invisible or change how the rest reads."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _when(value: str | None, never: str = "never") -> str:
    """An RFC 3339 time as people read it, in UTC."""
    return never if value is None else value[:19].replace("T", " ")


def _ago(value: str | None, never: str = "never") -> str:
    """How long ago that was."""
    return never if value is None else f"{_span(_seconds_since(value))} ago"


def _until(value: str | None, never: str = "never") -> str:
    if value is None:
        return never
    left = -_seconds_since(value)
    return "over" if left <= 0 else f"in {_span(left)}"


def _seconds_since(value: str) -> float:
    at = datetime.fromisoformat(value)
    return (datetime.now(UTC) - (at if at.tzinfo else at.replace(tzinfo=UTC))).total_seconds()


def _span(seconds: float) -> str:
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * length:
            return count(int(seconds // length), unit)
    return count(max(0, int(seconds)), "second")


def _size(count: float | None) -> str:
    """Bytes, to three figures."""
    value = float(count or 0)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1024 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def _short(id: str, length: int = 10) -> str:
    """The beginning of an id, which stands whole beside it."""
    return id if len(id) <= length else id[:length] + "…"


def _lines(value: Any, limit: int | None = visible.MAX_TEXT) -> Iterator[str]:
    return visible.json_lines(value, limit=limit)


def _compact(value: Any) -> str:
    """A record's value on one line."""
    if isinstance(value, str):
        return _clean(value)
    return json.dumps(value, ensure_ascii=True, separators=(", ", ": "))


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
