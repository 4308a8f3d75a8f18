"""Numbers and texts one after another in bytes, as a launch spec's lasting part is written.

Standard library only.
"""

from __future__ import annotations

import os
import struct

__all__ = ["Reader", "Writer"]

_NUMBER = struct.Struct("!Q")


class Writer:
    def __init__(self) -> None:
        self.data = bytearray()

    def number(self, value: int) -> None:
        self.data += _NUMBER.pack(value)

    def blob(self, value: bytes) -> None:
        self.data += _NUMBER.pack(len(value))
        self.data += value

    def text(self, value: str) -> None:
        self.blob(os.fsencode(value))


class Reader:
    def __init__(self, data: bytes | memoryview) -> None:
        self.data, self.at = data, 0

    def number(self) -> int:
        return int(_NUMBER.unpack_from(self.data, self._skip(8)[0])[0])

    def span(self) -> tuple[int, int]:
        return self._skip(self.number())

    def text(self) -> str:
        return os.fsdecode(bytes(self.data[slice(*self.span())]))

    def end(self) -> None:
        if self.at != len(self.data):
            raise ValueError("bytes left over after the launch spec")

    def _skip(self, count: int) -> tuple[int, int]:
        start, end = self.at, self.at + count
        if end > len(self.data):
            raise ValueError("the launch spec is cut short")
        self.at = end
        return start, end
