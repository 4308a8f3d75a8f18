"""Reading ``.env`` files: the dialect that docker, python-dotenv, Node's dotenv and shells share.

* ``NAME=value``, with or without ``export`` in front and spaces around ``=``;
* a value without quotes ends at the line's end or before a ``#`` that follows a space;
* single quotes and backticks keep everything, double quotes know the backslash escapes of
  n, r, t, f, v, the backslash itself, the double quote, $ and the backtick; every kind may go
  over several lines;
* nothing is expanded: ``$NAME`` stays what it is.

What the others disagree about is refused instead of guessed: a name given twice, text after a
closing quote, a line that is no assignment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sandboxd.errors import Invalid
from sandboxd.names import loader_reason, variable_name, variable_value

__all__ = ["Entry", "Problem", "parse"]

_START = re.compile(r"[ \t]*(?:export[ \t]+)?([^=\s'\"`#]*)[ \t]*(=?)[ \t]*")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
_AS_THEMSELVES = '\\"$`'
_AFTER_QUOTE = re.compile(r"[ \t]*(#[^\n]*)?(?=\n|\Z)")


@dataclass(frozen=True)
class Entry:
    """One assignment. The value stays out of the representation."""

    line: int
    name: str
    value: bytes

    def __repr__(self) -> str:
        return f"Entry(line={self.line}, name={self.name!r})"


@dataclass(frozen=True)
class Problem:
    """Something wrong on a line; ``message`` quotes nothing that might be part of a value."""

    line: int
    message: str


def parse(data: bytes) -> tuple[list[Entry], list[Problem]]:
    """Every assignment and every problem of a file, in order. Never raises for its content."""
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    text = text.replace("\r\n", "\n")
    entries: list[Entry] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    at, line = 0, 1
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        stripped = text[at:end].strip()
        if not stripped or stripped.startswith("#"):
            at, line = end + 1, line + 1
            continue
        name, value, stop, problem = _assignment(text, at, end)
        problem = problem or _check(name, value, seen)
        if problem:
            problems.append(Problem(line, problem))
        else:
            entries.append(Entry(line, name, value))
            seen[name] = line
        line += text.count("\n", at, stop) + 1
        at = stop + 1
    return entries, problems


def _assignment(text: str, at: int, end: int) -> tuple[str, bytes, int, str]:
    """Name, value, where its last line ends, and what is wrong ("" when nothing is)."""
    start = _START.match(text, at, end)
    assert start is not None
    name, equals, begin = start[1], start[2], start.end()
    if not equals:
        return "", b"", end, "not an assignment: expected NAME=value"
    quote = text[begin : begin + 1]
    if begin >= end or quote not in "'\"`":
        return name, _encode(_bare(text[begin:end])), end, ""
    close = _closing(text, begin + 1, quote)
    if close < 0:
        # Where the value was meant to end is anybody's guess, so nothing after it is read.
        return "", b"", len(text), f"the quote {quote} that opens here is never closed"
    after = _AFTER_QUOTE.match(text, close + 1)
    stop = text.find("\n", close)
    stop = len(text) if stop < 0 else stop
    if after is None:
        return "", b"", stop, "text after the closing quote; quote the whole value"
    inner = text[begin + 1 : close]
    return name, _encode(_unescape(inner) if quote == '"' else inner), stop, ""


def _bare(text: str) -> str:
    comment = re.search(r"(?:^|[ \t])#", text)
    return (text[: comment.start()] if comment else text).strip()


def _closing(text: str, at: int, quote: str) -> int:
    if quote != '"':
        return text.find(quote, at)
    while at < len(text):
        if text[at] == "\\":
            at += 2
        elif text[at] == quote:
            return at
        else:
            at += 1
    return -1


def _unescape(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        char = match[1]
        return _ESCAPED.get(char, char if char in _AS_THEMSELVES else match[0])

    return _ESCAPE.sub(one, text)


def _check(name: str, value: bytes, seen: dict[str, int]) -> str:
    try:
        variable_name(name)
    except Invalid:
        # What stands before an "=" may be the rest of a secret that spans lines: don't show it.
        return "what stands before = is not a variable name (letters, digits and _, no digit first)"
    if reason := loader_reason(name):
        return f"{name} is refused: {reason}"
    if name in seen:
        return f"{name} was already given on line {seen[name]}"
    try:
        variable_value(name, value)
    except Invalid as error:
        return error.message
    return ""


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
