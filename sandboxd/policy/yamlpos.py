"""YAML that knows where everything stands, and refuses what a configuration never needs.

The reader walks PyYAML's event stream with an explicit stack, so nesting costs no recursion, and
stops at the first event over a bound. Anchors, aliases, tags and directives are refused: they are
how YAML bombs and object construction work. Plain scalars follow the YAML 1.2 core schema
(section 10.3.2), so ``no``, ``on`` and ``1:30`` stay text instead of turning into something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceStartEvent,
)

from sandboxd.errors import ConfigError
from sandboxd.names import shown
from sandboxd.policy.problems import Position

__all__ = ["MAX_DEPTH", "MAX_NODES", "Document", "Path", "parse"]

MAX_DEPTH = 40
MAX_NODES = 20_000

#: How a place inside a document is named: mapping keys and list indexes, outermost first.
Path = tuple["str | int", ...]

_STAR = 'put a text that starts with * in quotes: "*"; otherwise write the value out'
#: What escapes in double quotes can smuggle in: NUL, and surrogates, which UTF-8 doesn't have.
_UNSAFE = re.compile("[\0\ud800-\udfff]")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]{1,3})?")


@dataclass
class Document:
    """One parsed file: plain values, and the position of each value and key."""

    file: str
    value: Any = None
    values: dict[Path, Position] = field(default_factory=dict)
    keys: dict[Path, Position] = field(default_factory=dict)

    def at(self, path: Path) -> Position:
        """Where the value at ``path`` stands, or the nearest thing around it that exists."""
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, Position(1, 1))

    def key_at(self, path: Path) -> Position:
        """Where the key of ``path`` stands."""
        return self.keys.get(path) or self.at(path)

    def places(self, label: str) -> dict[str, str]:
        """Where each key of the outermost mapping stands: ``LABEL:LINE``."""
        return {
            str(path[0]): f"{label}:{at.line}" for path, at in self.keys.items() if len(path) == 1
        }


def parse(data: bytes, file: str) -> Document:
    """The single document in ``data``. Raises ConfigError with the place of the first problem."""
    text = _decode(data, file)
    try:
        return _build(yaml.parse(text, Loader=yaml.SafeLoader), Document(file))
    except yaml.reader.ReaderError as error:
        place = _place(text, error.position)
        raise ConfigError(
            f"character U+{error.character:04X} is not allowed in YAML",
            file=file,
            line=place.line,
            column=place.column,
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, file) from None


def _decode(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line = before.count(b"\n") + 1
        column = len(before.rpartition(b"\n")[2].decode("utf-8", "replace")) + 1
        raise ConfigError(
            f"expected UTF-8 text, found the byte 0x{error.object[error.start]:02x}",
            file=file,
            line=line,
            column=column,
            hint="save the file as UTF-8",
        ) from None


def _place(text: str, index: int) -> Position:
    before = text[:index]
    return Position(before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1)


def _syntax_error(error: yaml.MarkedYAMLError, text: str, file: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    lines = text.splitlines() or [""]
    here = lines[line - 1] if line <= len(lines) else ""
    hint = ""
    if "\t" in here[: len(here) - len(here.lstrip())] or here[column - 1 : column] == "\t":
        message, hint = "a tab can't indent YAML", "indent with spaces"
    else:
        message = error.problem or "not valid YAML"
        if error.context:
            message = f"{error.context}: {message}"
        if "mapping values are not allowed" in message:
            hint = "a value that holds ': ' needs quotes; or the indentation is off"
        elif "scanning an alias" in message:
            hint = _STAR
        elif "could not find expected ':'" in message:
            hint = "every line of a mapping is 'key: value'"
    return ConfigError(message, file=file, line=line, column=column, hint=hint)


class _Level:
    """One open mapping or list."""

    __slots__ = ("key", "value")

    def __init__(self, value: dict[str, Any] | list[Any]) -> None:
        self.value = value
        self.key: str | None = None  # of a mapping: read already, its value still to come


def _build(events: Iterator[Event], document: Document) -> Document:
    stack: list[_Level] = []
    path: list[str | int] = []
    nodes = documents = 0

    def fail(event: Event, message: str, hint: str = "") -> ConfigError:
        at = _start(event)
        return ConfigError(message, file=document.file, line=at.line, column=at.column, hint=hint)

    for event in events:
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise fail(event, "a second YAML document", "one file holds one document; drop ---")
            if event.version or event.tags:
                raise fail(event, "a YAML directive is not allowed", "drop the line with %")
        if isinstance(event, CollectionEndEvent):
            stack.pop()
            if path and stack:
                _close(stack[-1], path)
            continue
        if not isinstance(event, NodeEvent):
            continue
        nodes += 1
        if isinstance(event, AliasEvent):
            raise fail(event, "a YAML alias (*name) is not allowed", _STAR)
        if getattr(event, "anchor", None) is not None:
            raise fail(event, "a YAML anchor (&name) is not allowed", "write the value out twice")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise fail(event, f"a YAML tag ({shown(tag)}) is not allowed", "drop the tag")
        if nodes > MAX_NODES:
            raise fail(event, f"more than {MAX_NODES:,} values in one file")
        place = _start(event)

        level = stack[-1] if stack else None
        if level is not None and isinstance(level.value, dict) and level.key is None:
            key = _key(event, fail)
            path.append(key)
            if key in level.value:
                first = document.keys[tuple(path)]
                raise fail(
                    event,
                    f"the key {shown(key)} is here twice, first in line {first.line}",
                    "keep one of the two",
                )
            document.keys[tuple(path)] = place
            level.key = key
            continue
        if level is not None and isinstance(level.value, list):
            path.append(len(level.value))
        document.values[tuple(path)] = place

        value: Any
        if isinstance(event, CollectionStartEvent):
            if len(stack) >= MAX_DEPTH:
                raise fail(event, f"nested deeper than {MAX_DEPTH} levels")
            value = {} if isinstance(event, MappingStartEvent) else []
            assert isinstance(event, MappingStartEvent | SequenceStartEvent)
        else:
            assert isinstance(event, ScalarEvent)
            if _UNSAFE.search(event.value):
                raise fail(event, "an escape for NUL or half a character", "write the character")
            value = _scalar(event)
        if level is None:
            document.value = value
        elif isinstance(level.value, dict):
            assert level.key is not None
            level.value[level.key] = value
        else:
            level.value.append(value)
        if isinstance(event, CollectionStartEvent):
            stack.append(_Level(value))
        elif level is not None:
            _close(level, path)
    return document


def _start(event: Event) -> Position:
    mark = event.start_mark
    return Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)


def _close(level: _Level, path: list[str | int]) -> None:
    """A value inside ``level`` is complete: the next event is a key or the next element."""
    path.pop()
    level.key = None


def _key(event: NodeEvent, fail: Any) -> str:
    if not isinstance(event, ScalarEvent):
        raise fail(event, "expected a key, found a list or mapping", "keys are plain words")
    if _UNSAFE.search(event.value):
        raise fail(event, "an escape for NUL or half a character", "write the character")
    key = _scalar(event)
    if not isinstance(key, str):
        raise fail(event, f"expected a key that is text, found {event.value}", "put it in quotes")
    return key


def _scalar(event: ScalarEvent) -> Any:
    text = event.value
    if event.style is not None:  # quoted or a block: always text
        return text
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and not text.lstrip("+-").isdigit():
        number = float(text)
        return number if math.isfinite(number) else text
    return text
