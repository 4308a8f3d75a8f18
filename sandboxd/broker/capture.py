"""What a tool prints: read in pieces, redacted, and kept only up to a bound."""

from __future__ import annotations

import codecs
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

import trio

from sandboxd.redact import Matcher, Streams
from sandboxd.secret import Secret

__all__ = ["Capture", "Progress", "Stream"]

Stream = Literal["stdout", "stderr"]
Progress = Callable[[float, str], Awaitable[None]]

_CHUNK = 65536
#: Chunks that are taken without a pause from a program that has ended: more than a pipe holds.
_AT_ONCE = 32
#: A tool may print this much more than is kept before it is ended even when its manifest says
#: ``truncate``: reading on costs the broker, and nobody sees it.
_PATIENCE = 64 << 20
#: Seconds between two progress reports, and the characters of output that one carries at most.
_PROGRESS_PAUSE = 0.1
_PROGRESS_TEXT = 4096
#: Seconds of silence after which what may become a secret is shown, if it is a few characters.
_PATIENT = 0.2


class Capture:
    """The output of one call: both streams together keep at most ``limit`` redacted bytes.

    What is over the bound is read and dropped (``truncated``). ``on_overflow`` is called once
    when the call has to end for it: at the bound with ``kill``, else far behind it.
    """

    def __init__(
        self,
        secrets: Mapping[str, Secret],
        *,
        limit: int,
        kill: bool,
        on_overflow: Callable[[], None],
        progress: Progress | None = None,
    ) -> None:
        self._matcher = Matcher(secrets)
        self._streams = Streams(self._matcher, ("stdout", "stderr"))
        self._kept = {"stdout": bytearray(), "stderr": bytearray()}
        self._room = limit
        self._most = limit if kill else limit + _PATIENCE
        self._on_overflow = on_overflow
        self._reports = _Reports(progress) if progress is not None else None
        self._fed = trio.Event()
        self.received = 0
        self.truncated = False
        self.overflowed = False

    @property
    def stdout(self) -> bytes:
        return bytes(self._kept["stdout"])

    @property
    def stderr(self) -> bytes:
        return bytes(self._kept["stderr"])

    @property
    def redacted(self) -> dict[str, int]:
        """How often which variable was masked."""
        return dict(self._streams.counts)

    def take(self, stream: Stream, pipe: int, chunks: int = _AT_ONCE) -> bool:
        """Take what is in ``pipe``, which does not block; whether it is at its end."""
        for _ in range(chunks):  # somebody may write as fast as this reads
            try:
                data = os.read(pipe, _CHUNK)
            except BlockingIOError:
                return False
            if not data:
                return True
            self._take(stream, data)
        return False

    async def read(self, stream: Stream, pipe: int) -> None:
        """Take ``pipe`` to its end."""
        await trio.lowlevel.wait_readable(pipe)
        while not self.take(stream, pipe, chunks=1):
            await trio.lowlevel.wait_readable(pipe)

    async def report(self) -> None:
        """Pass progress on until cancelled; a slow listener loses text, never holds the tool up."""
        if self._reports is not None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._relax)
                await self._reports.run()

    def finish(self) -> None:
        """The streams are over: give out what was held back, end cut text at a character.

        Whoever reads the result sees the beginning of stderr behind the end of stdout.
        """
        self._keep("stderr", self._streams.flush("stderr")[0])
        behind = self._kept["stderr"]
        rest, covered = self._streams.flush("stdout", bytes(behind[: self._matcher.reach]))
        del behind[:covered]
        self._keep("stdout", rest)
        if self.truncated:
            for kept in self._kept.values():
                _trim(kept)

    def _take(self, stream: Stream, data: bytes) -> None:
        self.received += len(data)
        if self._room > 0:
            self._keep_all(self._streams.feed(stream, data))
            if self._reports is not None and data.endswith(b"\n"):
                self._keep_all(self._streams.relax())  # whoever watches waits for the line
            self._fed.set()
        else:
            self.truncated = True
        if self.received > self._most and not self.overflowed:
            self.overflowed = self.truncated = True
            self._on_overflow()

    async def _relax(self) -> None:
        """While the tool is silent, show what is held back if it tells too little to matter."""
        while True:
            await self._fed.wait()
            while self._fed.is_set():
                self._fed = trio.Event()
                await trio.sleep(_PATIENT)
            self._keep_all(self._streams.relax())

    def _keep_all(self, outputs: list[tuple[str, bytes]]) -> None:
        for stream, data in outputs:
            self._keep(stream, data)

    def _keep(self, stream: str, data: bytes) -> None:
        if len(data) > self._room:
            self.truncated = True
            data = data[: self._room]
        self._room -= len(data)
        self._kept[stream] += data
        if self._reports is not None and data:
            self._reports.add(stream, data, self.received)


class _Reports:
    """Output on its way to somebody who watches: the latest text, in his own time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._decoders = {
            stream: codecs.getincrementaldecoder("utf-8")("replace")
            for stream in ("stdout", "stderr")
        }
        self._news = trio.Event()
        self._text = ""
        self._total = 0

    def add(self, stream: str, data: bytes, total: int) -> None:
        self._text = (self._text + self._decoders[stream].decode(data))[-_PROGRESS_TEXT:]
        self._total = total
        self._news.set()

    async def run(self) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            text, self._text = self._text, ""
            await self._progress(float(self._total), text)
            await trio.sleep(_PROGRESS_PAUSE)


def _trim(data: bytearray) -> None:
    """Drop a character that the bound cut in two, so that text stays text (UTF-8, RFC 3629)."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # not a continuation byte: the last character starts here
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            if length > back:
                del data[-back:]
            return
