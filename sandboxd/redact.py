"""Keep secret values out of a stream of bytes, however the stream is cut into chunks.

Every byte that belongs to an occurrence of a value is dropped, also where occurrences overlap,
and ``[redacted:NAME]`` stands in its place. What could still become a value is held back until
the next bytes decide, so no part of one is ever given out early.
"""

from __future__ import annotations

from collections.abc import Mapping

from sandboxd.secret import Secret

__all__ = ["MIN_LINE", "Redactor"]

#: Lines of a multi-line value shorter than this are not masked on their own: ``{`` or ``fi`` in
#: a key file would otherwise tear every output apart.
MIN_LINE = 8

#: How much of a pattern is compared first when looking for the start of a held-back tail.
_PROBE = 8


class Redactor:
    """Masks whole values, their lines of :data:`MIN_LINE` bytes or more, and nothing else.

    The result depends on the bytes alone, not on how ``feed`` was called: concatenating what
    ``feed`` and ``flush`` return is the same for every chunking. Where several values start at
    one place, the longest counts. Empty values are ignored.
    """

    __slots__ = ("_buffer", "_covered", "_last", "_patterns", "hits")

    def __init__(self, secrets: Mapping[str, Secret]) -> None:
        self._patterns = _patterns(secrets)
        self._buffer = b""
        #: Bytes at the start of the buffer that an occurrence already given a marker covers.
        self._covered = 0
        self._last = b""
        self.hits = 0

    def __repr__(self) -> str:
        return f"<Redactor of {len(self._patterns)} patterns, {self.hits} hits>"

    def feed(self, data: bytes) -> bytes:
        """What is safe to give out now that ``data`` followed."""
        if not self._patterns:
            return data
        self._buffer += data
        return self._give(self._undecided())

    def flush(self) -> bytes:
        """What was held back: the stream is over, so it can't become a value any more."""
        return self._give(len(self._buffer))

    def _undecided(self) -> int:
        """The first position where a longer value may still begin: an end that starts a pattern."""
        buffer = self._buffer
        first = len(buffer)
        for pattern, _ in self._patterns:
            at = max(0, len(buffer) - len(pattern) + 1)
            probe = pattern[:_PROBE]
            while at < first:
                at = _next_start(buffer, probe, at)
                if at >= first:
                    break
                if pattern.startswith(buffer[at:]):
                    first = at
                    break
                at += 1
        return first

    def _give(self, end: int) -> bytes:
        """Mask and release the buffer up to ``end``; occurrences that start before it are known."""
        buffer, at = self._buffer, self._covered
        out: list[bytes] = []
        for start, length, marker in self._occurrences(end):
            if start >= at:
                out += (buffer[at:start], marker)
                self.hits += 1
                self._last = marker
            elif start + length > at and marker != self._last:
                out.append(marker)
                self.hits += 1
                self._last = marker
            at = max(at, start + length)
        out.append(buffer[at:end])
        self._buffer = buffer[end:]
        self._covered = max(0, at - end)
        return b"".join(out)

    def _occurrences(self, end: int) -> list[tuple[int, int, bytes]]:
        """Every occurrence that starts before ``end``, by start, of one start the longest only."""
        found: dict[int, tuple[int, bytes]] = {}
        for pattern, marker in self._patterns:  # longest first, so the first one found stays
            limit = end + len(pattern) - 1
            at = self._buffer.find(pattern, 0, limit)
            while at >= 0:
                found.setdefault(at, (len(pattern), marker))
                at = self._buffer.find(pattern, at + 1, limit)
        return [(start, *found[start]) for start in sorted(found)]


def _next_start(buffer: bytes, probe: bytes, at: int) -> int:
    """The next position from ``at`` where ``probe`` starts, also cut short by the end."""
    found = buffer.find(probe, at)
    if found >= 0:
        return found
    for start in range(max(at, len(buffer) - len(probe) + 1), len(buffer)):
        if probe.startswith(buffer[start:]):
            return start
    return len(buffer)


def _patterns(secrets: Mapping[str, Secret]) -> list[tuple[bytes, bytes]]:
    """(bytes to look for, marker), longest first; a value of two names keeps the first name."""
    chosen: dict[bytes, bytes] = {}
    for name in sorted(secrets):
        value = secrets[name].reveal()
        if value:
            chosen.setdefault(value, b"[redacted:%s]" % name.encode())
    for name in sorted(secrets):
        value = secrets[name].reveal()
        marker = b"[redacted:%s]" % name.encode()
        bare = value.rstrip(b"\r\n")  # a value read from a file: printed without its last newline
        if bare:
            chosen.setdefault(bare, marker)
        for line in value.splitlines():
            if len(line) >= MIN_LINE:
                chosen.setdefault(line, marker)
    return sorted(chosen.items(), key=lambda item: (-len(item[0]), item[0]))
