"""When API keys were used last: noted in memory, written now and then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import trio

from sandboxd.errors import SandboxdError

__all__ = ["Uses"]

#: Seconds between two writes. What a crash loses of it is nothing that anything rests on.
EVERY = 10.0

_log = logging.getLogger(__name__)


class Uses:
    """No request waits for a disk because of these times."""

    def __init__(self, write: Callable[[Mapping[str, float]], None]) -> None:
        """``write`` keeps times by key id, in a thread of its own."""
        self._write = write
        self._latest: dict[str, float] = {}
        self._unwritten: set[str] = set()
        self._noted = trio.Event()

    def note(self, id: str, at: float) -> None:
        self._latest[id] = at
        self._unwritten.add(id)
        self._noted.set()

    def latest(self, id: str, written: float | None) -> float | None:
        """When the key was used last; ``written`` is what the store knew at the start."""
        return self._latest.get(id, written)

    async def run(self) -> None:
        """Write until cancelled, and then once more."""
        try:
            while True:
                await self._noted.wait()
                await trio.sleep(EVERY)
                self._noted = trio.Event()
                await self.flush()
        finally:
            with trio.CancelScope(shield=True):
                await self.flush()

    async def flush(self) -> None:
        """Write what was noted. What can't be written is tried again with the next."""
        ids, self._unwritten = self._unwritten, set()
        if not ids:
            return
        try:
            await trio.to_thread.run_sync(self._write, {id: self._latest[id] for id in ids})
        except SandboxdError as failure:
            self._unwritten |= ids
            _log.error("when API keys were used last is not recorded: %s", failure.message)
