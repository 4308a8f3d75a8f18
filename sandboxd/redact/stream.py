"""Keeps values out of streams of bytes, however they are cut into chunks and spread over streams.

Every byte that belongs to an occurrence of a value is dropped, also where occurrences overlap,
and ``[redacted:NAME]`` stands in its place. What could still become a value is held back until
the next bytes decide, so no part of one is given out early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sandboxd.redact.matcher import Found, Matcher, Span
from sandboxd.secret import Secret

__all__ = ["Redactor", "Streams"]

#: A held-back beginning longer than this is not searched again for every few bytes.
_LONG = 256
_NOTHING = Found([], [], 0)


class Redactor:
    """Masks the values of some variables, in every form that the matcher knows, in one stream.

    What ``feed`` and ``flush`` return, concatenated, depends on the bytes alone and not on how
    they were cut. ``counts`` tells how often which variable was masked.
    """

    __slots__ = ("_lane", "_matcher")

    def __init__(self, secrets: Mapping[str, Secret] | Matcher) -> None:
        self._matcher = secrets if isinstance(secrets, Matcher) else Matcher(secrets)
        self._lane = _Lane(self._matcher)

    def __repr__(self) -> str:
        return f"<Redactor, {self.hits} hits>"

    @property
    def matcher(self) -> Matcher:
        """What it searches by, for another stream with the same values."""
        return self._matcher

    @property
    def counts(self) -> Counter[str]:
        return self._lane.counts

    @property
    def hits(self) -> int:
        return self._lane.counts.total()

    def feed(self, data: bytes) -> bytes:
        """What is safe to give out now that ``data`` followed."""
        if not self._matcher:
            return data
        self._lane.push(data)
        return self._lane.take()

    def relax(self) -> bytes:
        """What was held back and tells too little to matter, for a reader who waits."""
        return self._lane.relax()

    def flush(self) -> bytes:
        """What was held back: the stream is over, so it can't become a value any more.

        A beginning of 8 characters or more is masked, as the rest may have been cut off.
        """
        return self._lane.flush()


class Streams:
    """The streams of one call, each masked, and all of them together in the order they came.

    A value whose pieces come on several streams is masked in each.
    """

    def __init__(self, matcher: Matcher, names: Sequence[str]) -> None:
        self._matcher = matcher
        self._lanes = {name: _Lane(matcher, name) for name in names}
        self._joint = _Joint(matcher)

    def __repr__(self) -> str:
        return f"<Streams {', '.join(self._lanes)}>"

    @property
    def counts(self) -> Counter[str]:
        return sum((lane.counts for lane in self._lanes.values()), Counter())

    @property
    def waiting(self) -> bool:
        """Whether something is held back."""
        return any(lane.waiting for lane in self._lanes.values())

    def feed(self, name: str, data: bytes) -> list[tuple[str, bytes]]:
        """What is safe to give out, by stream, now that ``data`` came on one of them."""
        if not self._matcher:
            return [(name, data)]
        lane = self._lanes[name]
        lane.push(data)
        waited = self._joint.names()
        self._joint.push(lane, data)
        # What comes may decide about what other streams hold back.
        names = [*sorted(waited - {name}), name]
        return self._outputs({each: self._lanes[each].take() for each in names})

    def relax(self) -> list[tuple[str, bytes]]:
        """What was held back and tells too little to matter, for a reader who waits."""
        limits = self._joint.limits()
        return self._outputs(
            {name: lane.relax(limits.get(name)) for name, lane in self._lanes.items()}
        )

    def flush(self, name: str, followed_by: bytes = b"") -> tuple[bytes, int]:
        """What was held back on a stream that is over.

        ``followed_by`` is what a reader sees behind it. So many of its first bytes as the second
        result says are the end of a value, and must not be shown.
        """
        lane = self._lanes[name]
        rest = lane.rest
        covered = 0
        if rest and followed_by:
            for span in self._matcher.search(rest + followed_by[: self._matcher.reach]).spans:
                if span.start < len(rest) < span.end:
                    lane.mark(lane.base + span.start, lane.base + len(rest), span.name)
                    covered = max(covered, span.end - len(rest))
        self._joint.finish()
        return lane.flush(), covered

    def _outputs(self, outputs: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
        return [(name, data) for name, data in outputs.items() if data]


class _Lane:
    """One stream. Positions are counted from its beginning."""

    __slots__ = (
        "_buffer",
        "_fresh",
        "_given",
        "_last",
        "_marks",
        "_matcher",
        "_seen",
        "base",
        "counts",
        "name",
        "until",
    )

    def __init__(self, matcher: Matcher, name: str = "") -> None:
        self._matcher, self.name = matcher, name
        self._buffer = b""
        #: Bytes at the end of the buffer that were not searched yet.
        self._fresh = 0
        self._seen = _NOTHING
        #: Where the buffer begins: what is before can't be part of a value any more.
        self.base = 0
        #: What is before was given out or masked. Behind ``base`` where a reader didn't wait.
        self._given = 0
        self._last = ""
        #: Pieces of values that go on in another stream.
        self._marks: list[Span] = []
        #: Nothing from here on is given out: it may be such a piece.
        self.until: int | None = None
        self.counts: Counter[str] = Counter()

    @property
    def end(self) -> int:
        return self.base + len(self._buffer)

    @property
    def hold(self) -> int:
        """From here on it may be the beginning of a value."""
        return self.base if self._fresh else self.base + self._seen.hold

    @property
    def rest(self) -> bytes:
        """What is kept: some of it may have been given out."""
        return self._buffer

    @property
    def waiting(self) -> bool:
        return self._given < self.end

    def mark(self, start: int, end: int, name: str) -> None:
        self._marks.append(Span(start, end, name))

    def push(self, data: bytes) -> None:
        held = len(self._buffer) - self._fresh
        self._buffer += data
        self._fresh += len(data)
        if held <= _LONG or self._fresh * 4 > held:
            self._search()

    def take(self) -> bytes:
        """What is decided."""
        hold = self.hold if self.until is None else min(self.hold, self.until)
        out = self._give(hold)
        if hold > self.base:
            self._buffer = self._buffer[hold - self.base :]
            moved = hold - self.base
            self._seen = Found(
                [Span(s - moved, e - moved, name) for s, e, name in self._seen.spans if e > moved],
                [entry._replace(start=entry.start - moved) for entry in self._seen.opens],
                self._seen.hold - moved,
                self._seen.dump,
            )
            self._marks = [span for span in self._marks if span.end > hold]
            self.base = hold
        return out

    def relax(self, limit: int | None = None) -> bytes:
        """What is not worth guarding, up to ``limit``. It stays known as a beginning."""
        self._search()
        end = self.end if limit is None else min(limit, self.end)
        for entry in self._seen.opens:
            if entry.guarded:
                end = min(end, self.base + entry.start)
        for span in self._spans():  # what is masked anyway may be told
            if span.start <= end < span.end:
                end = span.end
        return self._give(end)

    def flush(self) -> bytes:
        self._search()
        for entry in self._seen.opens:
            if entry.partial:
                self.mark(self.base + entry.start, self.end, entry.name)
        out = self._give(self.end)
        self.base = self.end
        self._buffer, self._seen, self._marks, self.until = b"", _NOTHING, [], None
        return out

    def _search(self) -> None:
        if self._fresh:
            self._seen = self._matcher.search(self._buffer, dump=self._seen.dump)
            self._fresh = 0

    def _spans(self) -> list[Span]:
        """By start, the longest of one start first."""
        own = [Span(self.base + s, self.base + e, name) for s, e, name in self._seen.spans]
        return sorted(own + self._marks, key=lambda span: (span.start, -span.end))

    def _give(self, end: int) -> bytes:
        """Mask and give out what comes before ``end``, except what was given out before."""
        buffer, base, at = self._buffer, self.base, self._given
        if end <= at:
            return b""
        out: list[bytes] = []
        for start, stop, name in self._spans() if self._seen.spans or self._marks else ():
            if start >= end:
                break
            if stop <= at:
                continue
            if start > at:
                out.append(buffer[at - base : start - base])
                self._last = ""
            if start >= at or name != self._last:
                out.append(b"[redacted:%s]" % name.encode())
                self.counts[name] += 1
                self._last = name
            at = stop
        if at < end:
            out.append(buffer[at - base : end - base])
            self._last = ""
            at = end
        self._given = at
        return b"".join(out)


class _Joint:
    """What came on all streams, in order, as far as it may be a value that isn't over."""

    __slots__ = ("_matcher", "_opens", "_pieces")

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        #: (stream, where it starts there, bytes)
        self._pieces: list[tuple[_Lane, int, bytes]] = []
        self._opens: list[tuple[int, str, bool, bool]] = []

    def names(self) -> set[str]:
        """The streams that a value which isn't over may be on."""
        return {lane.name for lane, _, _ in self._pieces}

    def push(self, lane: _Lane, data: bytes) -> None:
        """``data`` are the newest bytes of the stream, and searched for there already."""
        pieces = self._pieces
        if all(piece[0] is lane for piece in pieces):
            self._alone(lane)
            return
        before = sum(len(piece[2]) for piece in pieces)
        new = (lane, lane.end - len(data), data[: self._matcher.reach])
        pieces.append(new)
        found = self._matcher.search(b"".join(piece[2] for piece in pieces))
        for start, end, name in found.spans:
            self._mark(start, end, name)
        if found.hold >= before or len(data) > self._matcher.reach:
            self._alone(lane)
            return
        self._opens = [(e.start - found.hold, *e[1:]) for e in found.opens]
        self._cut(found.hold)
        starts: dict[int, int] = {}
        for each, start, _ in self._pieces:
            starts.setdefault(id(each), start)
            each.until = starts[id(each)]

    def limits(self) -> dict[str, int]:
        """By stream, what must not be given out although a reader waits."""
        limits: dict[str, int] = {}
        for start, _, guarded, _ in self._opens:
            if guarded:
                for lane, first, _ in self._covered(start, None):
                    limits[lane.name] = min(first, limits.get(lane.name, first))
        return limits

    def finish(self) -> None:
        """The streams are over: what is most of a value across them is one."""
        for start, name, _, partial in self._opens:
            if partial:
                self._mark(start, sum(len(piece[2]) for piece in self._pieces), name)
        self._release()

    def _alone(self, lane: _Lane) -> None:
        """Only what the stream itself holds back is undecided."""
        self._release()
        rest = lane.rest[lane.hold - lane.base :]
        self._pieces = [(lane, lane.hold, rest)] if rest else []

    def _release(self) -> None:
        for lane, _, _ in self._pieces:
            lane.until = None
        self._pieces, self._opens = [], []

    def _cut(self, at: int) -> None:
        kept = []
        for lane, start, data in self._pieces:
            if len(data) > at:
                kept.append((lane, start + max(0, at), data[max(0, at) :]))
            else:
                lane.until = None
            at -= len(data)
        self._pieces = kept

    def _mark(self, start: int, end: int, name: str) -> None:
        covered = self._covered(start, end)
        pieces: dict[str, list[tuple[_Lane, int, int]]] = {}
        for lane, first, last in covered:
            same = pieces.setdefault(lane.name, [])
            if same and same[-1][2] == first:  # on its own stream they are next to each other
                same[-1] = (lane, same[-1][1], last)
            else:
                same.append((lane, first, last))
        for same in pieces.values() if len(pieces) > 1 else ():
            for lane, first, last in same:
                lane.mark(first, last, name)

    def _covered(self, start: int, end: int | None) -> list[tuple[_Lane, int, int]]:
        """The pieces from ``start`` to ``end``, in their streams' positions."""
        covered = []
        at = 0
        for lane, first, data in self._pieces:
            begin, stop = max(start, at), at + len(data)
            stop = stop if end is None else min(end, stop)
            if begin < stop:
                covered.append((lane, first + begin - at, first + stop - at))
            at += len(data)
        return covered
