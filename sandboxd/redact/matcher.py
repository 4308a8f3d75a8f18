"""Finds the forms of some values in a text: where they are, and where one may have begun.

The search is for the first bytes of every form at once; what they lead to is compared byte by
byte. A text is looked at as it is and once its escapes are decoded, as often as they are nested.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import compress, islice
from typing import Any, NamedTuple

from sandboxd.redact.dump import BEGIN, dump_parts, last_line, line_end, line_start
from sandboxd.redact.encodings import ANCHOR, CANON, CANON_DROPS, KEPT, Form, forms
from sandboxd.redact.unescape import (
    Escape,
    Part,
    View,
    align,
    escapes,
    telling,
    unfinished,
)
from sandboxd.secret import Secret

#: Without it, where no build of it exists, the search is slower and finds the same.
HAS_AUTOMATON = find_spec("ahocorasick_rs") is not None
if HAS_AUTOMATON:
    from ahocorasick_rs import BytesAhoCorasick, Implementation

__all__ = ["GUARD", "HAS_AUTOMATON", "Found", "Matcher", "Open", "Span"]

#: A value's beginning of so many characters is not shown while it may become the value.
GUARD = 8

#: How often escapes in escapes are decoded: JSON in JSON in a log line.
_ROUNDS = 3
#: Text after which building an automaton pays.
_PATIENCE = 48 << 10
#: Forms of which every state still has a table of its own: faster, and larger.
_TABLES = 1200
_BLOCK = 1024
#: Between parts of a text that aren't next to each other. No value holds this.
_GAP = b"\xfe\xff" * 8


class Span(NamedTuple):
    """Bytes of a text that are a value in some form."""

    start: int
    end: int
    name: str


class Open(NamedTuple):
    """The end of a text from ``start``, if it may become a value: its beginning is there.

    ``guarded``: these are not shown before it is known. ``partial``: nor afterwards.
    """

    start: int
    name: str
    guarded: bool
    partial: bool


class Found(NamedTuple):
    """``hold``: the text from there is undecided until more of it is known.

    ``dump``: it holds a dump, which what follows may go on with.
    """

    spans: list[Span]
    opens: list[Open]
    hold: int
    dump: bool = False


class Matcher:
    """Looks for the values of some variables. Holds them as long as it lives; shows none."""

    __slots__ = ("_lenses", "_names", "_widest", "reach")

    def __init__(self, secrets: Mapping[str, Secret]) -> None:
        """Where two values are the same, the first name counts."""
        known = [form for name in sorted(secrets) for form in forms(name, secrets[name].reveal())]
        loose = [form for form in known if not form.literal]
        literal = [form for form in known if form.literal]
        self._lenses = [
            *([_Lens(loose, CANON, CANON_DROPS)] if loose else []),
            *([_Lens(literal, None, b"")] if literal else []),
        ]
        self._names = len(secrets)
        self._widest = max((form.reach for form in known), default=0)
        #: No occurrence is longer than this, with every byte as an escape.
        self.reach = 6 * self._widest

    def __repr__(self) -> str:
        return f"<Matcher of {self._names} values>"

    def __bool__(self) -> bool:
        return bool(self._lenses)

    def search(self, text: bytes, *, dump: bool = False) -> Found:
        """Every occurrence, and every end of the text that may become one.

        ``dump``: a dump began in what was before.
        """
        spans: list[Span] = []
        opens: list[Open] = []
        plain = _Look(text, spans, opens)
        self._look(plain)
        places, blanked = telling(text)
        if blanked is not text:
            self._look(_Look(blanked, spans, opens))
        hold = len(text)
        for look in self._cut(plain):  # as if the escape went on
            hold = look.place(len(look.data), len(look.data))[0]
            hold = min(hold, self._decoded(look, _ROUNDS))
        for view in self._views(text, places) if places else ():
            hold = min(hold, self._nested(plain.through(view), _ROUNDS))
        if dump or BEGIN in text:
            dump = self._dumped(text, spans, opens) or dump
        hold = min(hold, last_line(text), min((entry.start for entry in opens), default=hold))
        if hold < len(text):
            hold = align(text, hold)
        return Found(spans, opens, hold, dump)

    def _dumped(self, text: bytes, spans: list[Span], opens: list[Open]) -> bool:
        """Look at what the lines of dumps hold, each with all that the line shows of it."""
        parts = dump_parts(text, _GAP)
        if parts:
            look = _Look(text, [], []).through(View(text, parts))
            self._look(look)
            for start, end, name in look.spans:
                end = line_end(text, end)
                spans.append(Span(start, end, name))
                if end == len(text):  # its text column is still to come
                    look.opens.append(Open(start, name, guarded=True, partial=True))
            opens += [e._replace(start=line_start(text, e.start)) for e in look.opens]
        return bool(parts)

    def _views(self, text: bytes, places: Sequence[int]) -> Iterator[View]:
        """What is around the escapes at these places, decoded; the rest left out."""
        parts = self._parts(text, places)
        yield View(text, parts)
        kinds = {part[3] for part in parts} - {b""}
        for kind in kinds if len(kinds) > 1 else ():
            # What looks like one kind may begin a text that only another kind hides.
            yield View(text, [part for part in parts if part[3] in (kind, b"")])

    def _parts(self, text: bytes, places: Sequence[int]) -> list[Escape]:
        """The escapes at these places and near them, and the gaps between as escapes of no kind."""
        parts: list[Escape] = []
        begin = end = 0
        for place in (*places, sys.maxsize):
            if place - self._widest > end:
                if end:
                    parts += escapes(text, begin, end)
                begin = min(len(text), place - self._widest)
                if end < begin:
                    parts.append((end, begin, _GAP, b""))
            end = min(len(text), place + self._widest)
        return parts

    def _nested(self, look: _Look, rounds: int) -> int:
        """Look at it, and decode again as often as it is nested; where an escape is cut."""
        self._look(look)
        hold = sys.maxsize
        for part in self._cut(look):
            hold = part.place(len(part.data), len(part.data))[0]
            hold = min(hold, self._decoded(part, rounds))
        return min(hold, self._decoded(look, rounds))

    def _decoded(self, look: _Look, rounds: int) -> int:
        found = escapes(look.data, 0, len(look.data)) if rounds else []
        if not found:
            return sys.maxsize
        return self._nested(look.through(View(look.data, found)), rounds - 1)

    def _cut(self, look: _Look) -> Iterator[_Look]:
        """The end without the escape that it cuts, if it does, looked at."""
        cut = unfinished(look.data)
        if cut < len(look.data):
            begin = align(look.data, max(0, cut - self._widest))
            part = look.through(Part(look.data, begin, cut))
            self._look(part)
            yield part

    def _look(self, look: _Look) -> None:
        for lens in self._lenses:
            for start, end, form, partial in lens.look(look.data):
                first, last = look.place(start, end)
                if partial:
                    most = min(GUARD, max(2, len(form.exact) * 3 // 4))
                    guarded, long = form.guarded and partial >= most, partial >= GUARD
                    look.opens.append(Open(first, form.name, guarded, guarded and long))
                else:
                    look.spans.append(Span(first, last, form.name))


class _Look(NamedTuple):
    """A part of a text, maybe with escapes decoded, and where to put what is found in it."""

    data: bytes
    spans: list[Span]
    opens: list[Open]
    views: tuple[View | Part, ...] = ()

    def through(self, view: View | Part) -> _Look:
        return self._replace(data=view.data, views=(view, *self.views))

    def place(self, start: int, end: int) -> tuple[int, int]:
        for view in self.views:
            start, end = view.start(start), view.end(end)
        return start, end


class _Lens:
    """One way to look at a text: as it is, or canonical."""

    __slots__ = ("_anchors", "_drops", "_forms", "_heads", "_kept", "_table", "_widest")

    def __init__(self, known: Iterable[Form], table: bytes | None, drops: bytes) -> None:
        self._table, self._drops = table, drops
        self._kept = KEPT[drops]
        by_anchor: dict[bytes, list[Form]] = {}
        for form in known:
            by_anchor.setdefault(form.anchor, []).append(form)
        self._forms = list(by_anchor.values())
        self._anchors = _Anchors(list(by_anchor))
        #: Every beginning of an anchor, with the form of which it is most.
        self._heads: dict[bytes, Form] = {}
        for anchor, group in by_anchor.items():
            shortest = min(group, key=lambda form: len(form.exact))
            for length in range(1, len(anchor)):
                other = self._heads.setdefault(anchor[:length], shortest)
                if len(shortest.exact) < len(other.exact):
                    self._heads[anchor[:length]] = shortest
        self._widest = max(form.reach for form in known)

    def look(self, data: bytes) -> Iterator[tuple[int, int, Form, int]]:
        """(start, end, form, 0) of each occurrence; with the length of the beginning if it is
        only that, up to the end of the data."""
        text = data.translate(self._table, self._drops) if self._drops else data
        found = self._anchors.find(text)
        if found:
            places = _Places(data, self._kept, self._drops) if self._drops else None
            for index, at in found:
                start = places[at] if places else at
                for form in self._forms[index]:
                    end, partial = _compare(form, data, start)
                    if end:
                        yield start, end, form, partial
        tail = text[1 - ANCHOR :]
        for at in range(len(tail)):
            head = self._heads.get(tail[at:])
            if head is not None:
                start = self._from_end(data, len(tail) - at)
                if len(data) - start <= self._widest:
                    yield start, len(data), head, head.told(len(tail) - at, self._drops)
                break

    def _from_end(self, data: bytes, count: int) -> int:
        """Where the last ``count`` kept bytes begin."""
        at = len(data)
        while count:
            at -= 1
            count -= self._kept[data[at]]
        return at


def _compare(form: Form, data: bytes, start: int) -> tuple[int, int]:
    """(end, 0) if the form is there, (end of the data, length) if only its beginning is, or 0s."""
    exact = form.exact
    size = len(exact)
    text = data[start : start + size].translate(form.table, form.drops)
    if text == exact:
        return start + size, 0
    if not exact.startswith(text):
        return 0, 0
    # The data end here, or something was dropped and the form goes on behind.
    window = data[start : start + form.reach]
    text = window.translate(form.table, form.drops)
    if text.startswith(exact):
        kept = compress(range(len(window)), window.translate(KEPT[form.drops]))
        return start + next(islice(kept, size - 1, None)) + 1, 0
    if exact.startswith(text) and start + form.reach > len(data):
        return len(data), form.told(len(text), form.drops)
    return 0, 0


class _Places:
    """Where the bytes of a canonical text stand in the text that it was made of."""

    __slots__ = ("_block", "_counts", "_data", "_inside", "_kept")

    def __init__(self, data: bytes, kept: bytes, drops: bytes) -> None:
        self._data, self._kept = data, kept
        self._counts = [0]
        for at in range(0, len(data), _BLOCK):
            count = len(data[at : at + _BLOCK].translate(None, drops))
            self._counts.append(self._counts[-1] + count)
        self._block, self._inside = -1, [0]

    def __getitem__(self, at: int) -> int:
        block = bisect_right(self._counts, at) - 1
        if block != self._block:
            first = block * _BLOCK
            flags = self._data[first : first + _BLOCK].translate(self._kept)
            self._block = block
            self._inside = list(compress(range(first, first + len(flags)), flags))
        return self._inside[at - self._counts[block]]


class _Anchors:
    """The places of some short byte strings in a text, all of them in one pass."""

    __slots__ = ("_anchors", "_automaton", "_patience")

    def __init__(self, anchors: Sequence[bytes]) -> None:
        self._anchors = anchors
        self._automaton: Any = None
        self._patience: float = _PATIENCE if HAS_AUTOMATON else math.inf

    def find(self, text: bytes) -> list[tuple[int, int]]:
        """(which, where) of every occurrence."""
        if self._automaton is None:
            self._patience -= len(text)
            if self._patience >= 0:
                return self._find_each(text)
            many = len(self._anchors) > _TABLES
            kind = Implementation.ContiguousNFA if many else Implementation.DFA
            self._automaton = BytesAhoCorasick(self._anchors, implementation=kind)
        hits = self._automaton.find_matches_as_indexes(text, overlapping=True)
        return [(index, start) for index, start, _ in hits] if hits else []

    def _find_each(self, text: bytes) -> list[tuple[int, int]]:
        found = []
        for index, anchor in enumerate(self._anchors):
            at = text.find(anchor)
            while at >= 0:
                found.append((index, at))
                at = text.find(anchor, at + 1)
        return found
