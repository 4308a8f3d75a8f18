"""The single values of a configuration: strict, with a reason for each refusal.

A number is never a boolean and never a text, a size has a unit, a path is absolute. Each check
takes what the YAML reader found and returns the typed value or raises :class:`Wrong`.
"""

from __future__ import annotations

import difflib
import ipaddress
import os.path
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NewType
from urllib.parse import urlsplit

from sandboxd import names
from sandboxd.durations import seconds_in
from sandboxd.errors import Invalid

__all__ = [
    "AbsolutePath",
    "Ask",
    "Count",
    "Digest",
    "Duration",
    "Glob",
    "HostName",
    "Line",
    "ListenAddress",
    "Processors",
    "ProgramPath",
    "RemoteName",
    "ServerName",
    "Size",
    "Slug",
    "ToolName",
    "VariableName",
    "WebAddress",
    "Wrong",
    "checked_text",
    "checks",
    "choice",
    "found",
    "nearest",
]

Size = NewType("Size", int)
Duration = NewType("Duration", float)
Count = NewType("Count", int)
Processors = NewType("Processors", float)
Line = NewType("Line", str)
AbsolutePath = NewType("AbsolutePath", Path)
ProgramPath = NewType("ProgramPath", Path)
Slug = NewType("Slug", str)
ToolName = NewType("ToolName", str)
VariableName = NewType("VariableName", str)
Glob = NewType("Glob", str)
Ask = NewType("Ask", bool)
Digest = NewType("Digest", str)
RemoteName = NewType("RemoteName", str)
ServerName = NewType("ServerName", str)
WebAddress = NewType("WebAddress", str)
HostName = NewType("HostName", str)
ListenAddress = NewType("ListenAddress", str)

MAX_SIZE = 1 << 50
MAX_DURATION = 366 * 86_400.0
MAX_COUNT = 1 << 31
MIN_PROCESSORS, MAX_PROCESSORS = 0.01, 4096.0

_SIZE = re.compile(r"([0-9]{1,12})([KMGT])?(?:i?B)?")
_SIZE_UNITS = {None: 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_GLOB = re.compile(r"[a-z0-9*][A-Za-z0-9_*-]*")
_HOST = re.compile(r"(?=.{1,253}$)(?:(?!-)[a-z0-9_-]{1,63}(?<!-)\.)*(?!-)[a-z0-9_-]{1,63}(?<!-)")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Wrong(Exception):
    """A value that breaks its rule. ``path`` leads to it from where the check started."""

    def __init__(self, message: str, hint: str = "", path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.message, self.hint, self.path = message, hint, path


def found(value: Any) -> str:
    """What was found instead, for a message: its kind, and the value where it is short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {names.shown(value, 40)}"
    return "a list" if isinstance(value, list) else "a mapping"


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the known word nearest to ``word``, or the known ones, or ""."""
    known = sorted(known)
    close = difflib.get_close_matches(word.lower(), known, 1, 0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(known)}" if known else ""


def choice(value: Any, allowed: Iterable[str]) -> str:
    """One of the words in ``allowed``."""
    allowed = tuple(allowed)
    if isinstance(value, str) and value in allowed:
        return value
    hint = nearest(value, allowed) if isinstance(value, str) else ""
    raise Wrong(
        f"expected {' or '.join(allowed)}, found {found(value)}",
        "" if hint.startswith("known") else hint,
    )


def text(value: Any) -> str:
    """Any text without NUL."""
    if not isinstance(value, str):
        scalar = isinstance(value, bool | int | float)
        # Not the number itself: it may be a PIN that somebody put in the wrong place.
        what = "a number or a truth value" if scalar else found(value)
        raise Wrong(f"expected text, found {what}", "put it in quotes" if scalar else "")
    if "\0" in value:
        raise Wrong("a NUL character, which no program can be given")
    return value


def line(value: Any) -> Line:
    """Text for people: not empty, no control characters but line ends."""
    words = text(value)
    if not words.strip():
        raise Wrong("expected some text, found an empty one")
    if any(not c.isprintable() and c != "\n" for c in words):
        raise Wrong("a control or invisible character in a text that people read")
    return Line(words)


def boolean(value: Any) -> bool:
    """true or false, nothing that looks like it."""
    if not isinstance(value, bool):
        raise Wrong(f"expected true or false, found {found(value)}")
    return value


def ask(value: Any) -> Ask:
    """true. What else stands here may be the passphrase itself, so it is not shown."""
    if value is not True:
        raise Wrong(
            "expected true, which asks for the passphrase at start",
            "name the file that holds it instead: passphrase_file: PATH",
        )
    return Ask(value)


def integer(value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        hint = "drop the quotes" if isinstance(value, str) and value.isdecimal() else ""
        raise Wrong(f"expected a whole number, found {found(value)}", hint)
    return value


def count(value: Any) -> Count:
    """A whole number from 1 on."""
    number = integer(value)
    if not 1 <= number < MAX_COUNT:
        raise Wrong(f"expected a whole number from 1 to {MAX_COUNT - 1:,}, found {number:,}")
    return Count(number)


def size(value: Any) -> Size:
    """Bytes: ``512K``, ``64M``, ``2G`` (powers of 1024) or a bare number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise Wrong(f"expected a size, found {found(value)}", "write 512K, 64M or 2G")
        number = int(match[1]) * _SIZE_UNITS[match[2]]
    if not 1 <= number <= MAX_SIZE:
        raise Wrong(f"expected a size from 1 to {MAX_SIZE:,} bytes, found {number:,}")
    return Size(number)


def duration(value: Any) -> Duration:
    """Seconds: ``500ms``, ``30s``, ``5m``, ``2h``, ``1d``, or a bare whole number of seconds."""
    if isinstance(value, int) and not isinstance(value, bool):
        seconds = float(min(value, 1 << 53))
    else:
        given = seconds_in(value, bare=False) if isinstance(value, str) else None
        if given is None:
            raise Wrong(f"expected a duration, found {found(value)}", "write 500ms, 30s, 5m or 2h")
        seconds = given
    if not 0 < seconds <= MAX_DURATION:
        raise Wrong(f"expected a duration over zero and at most 366d, found {found(value)}")
    return Duration(seconds)


def processors(value: Any) -> Processors:
    """How many processors' worth of time: ``2``, ``0.5``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = "drop the quotes" if isinstance(value, str) else ""
        raise Wrong(f"expected a number of processors, found {found(value)}", hint)
    if not MIN_PROCESSORS <= value <= MAX_PROCESSORS:  # which NaN is not, either
        raise Wrong(
            f"expected a number of processors from {MIN_PROCESSORS} to {MAX_PROCESSORS:,.0f}, "
            f"found {value}"
        )
    return Processors(float(value))


def absolute_path(value: Any) -> AbsolutePath:
    """An absolute path as it stands: no ``..``, no doubled or trailing slash."""
    words = text(value)
    if not words.startswith("/"):
        raise Wrong(
            f"expected an absolute path, found {found(value)}",
            "~ is not expanded; write the whole path" if words.startswith("~") else "",
        )
    if os.path.normpath(words) != words or words.startswith("//"):
        raise Wrong(
            f"the path {names.shown(words)} is not in its plain form",
            f"write {names.shown('/' + os.path.normpath(words).lstrip('/'))}",
        )
    return AbsolutePath(Path(words))


def program_path(value: Any) -> ProgramPath:
    """An absolute path, or one inside the tool's folder."""
    words = text(value)
    if words.startswith("/"):
        return ProgramPath(absolute_path(value))
    if not words or os.path.normpath(words) != words or words.split("/")[0] in ("..", ".", "~"):
        raise Wrong(
            f"expected an absolute path or one inside the tool's folder, found {found(value)}"
        )
    return ProgramPath(Path(words))


def web_address(value: Any) -> WebAddress:
    """An http or https URL of a host, without a user name: what is in it is shown and logged."""
    words = text(value)
    try:
        url = urlsplit(words)
        port = url.port
    except ValueError:
        raise Wrong("expected the URL of a web server", "write https://host/path") from None
    plain = words.isascii() and words.isprintable() and " " not in words
    if url.scheme not in ("http", "https") or not url.hostname or port == 0 or not plain:
        raise Wrong("expected the URL of a web server", "write https://host/path")
    if url.username is not None or url.fragment:
        raise Wrong("a URL with a user name or a fragment", "sign the requests with secret_file")
    return WebAddress(words)


def host_name(value: Any) -> HostName:
    """The name of a host as clients write it, in lower case, without a port."""
    words = text(value)
    if not _HOST.fullmatch(words):
        raise Wrong(
            f"expected the name of a host, found {found(value)}",
            "write it in lower case without a port: sandboxd.example.com",
        )
    return HostName(words)


def listen_address(value: Any) -> ListenAddress:
    """``ADDRESS:PORT`` with an IP address (``[::1]:PORT`` for IPv6), or ``unix:/PATH``."""
    words = text(value)
    if words.startswith("unix:"):
        absolute_path(words.removeprefix("unix:"))
        return ListenAddress(words)
    host, _, port = words.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port) if port.isascii() and port.isdigit() else -1
        plain = (f"[{address}]" if address.version == 6 else str(address)) == host
    except ValueError:
        number, plain = -1, False
    if not plain or not 0 <= number <= 65535:
        raise Wrong(
            f"expected an address to listen on, found {found(value)}",
            "write 127.0.0.1:7621, [::1]:7621 or unix:/run/sandboxd/http.sock",
        )
    return ListenAddress(words)


def glob(value: Any) -> Glob:
    """A tool or agent name in which ``*`` stands for any run of characters."""
    words = text(value)
    if not _GLOB.fullmatch(words) or len(words) > 100:
        raise Wrong(f"expected a name or a pattern with *, found {found(value)}")
    return Glob(words)


def digest(value: Any) -> Digest:
    """``sha256:`` and 64 hex digits."""
    words = text(value)
    if not _DIGEST.fullmatch(words):
        raise Wrong(f"expected sha256: and 64 hex digits, found {found(value)}")
    return Digest(words)


def checked_text(check: Callable[[str], Any]) -> Callable[[Any], Any]:
    """``check`` of a text, whose Invalid becomes Wrong."""

    def checked(value: Any) -> Any:
        try:
            return check(text(value))
        except Invalid as refused:
            raise Wrong(refused.message, refused.hint) from None

    return checked


checks: dict[Any, Callable[[Any], Any]] = {
    str: text,
    bool: boolean,
    Ask: ask,
    int: integer,
    Count: count,
    Processors: processors,
    Line: line,
    Size: size,
    Duration: duration,
    AbsolutePath: absolute_path,
    ProgramPath: program_path,
    Glob: glob,
    Digest: digest,
    RemoteName: checked_text(names.mcp_tool_name),
    ServerName: checked_text(names.server_name),
    WebAddress: web_address,
    HostName: host_name,
    ListenAddress: listen_address,
    Slug: checked_text(names.agent_slug),
    ToolName: checked_text(names.tool_name),
    VariableName: checked_text(names.variable_name),
}
