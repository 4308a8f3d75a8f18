"""Host user ids for sandboxes: one each, never shared by two that are alive.

With a privileged launcher every session and every tool call runs as a uid of its own, so that the
kernel's same-uid rules (signals, ptrace, per-user limits) can't join two of them. Without
privileges there is one uid only, the operator's, and the namespaces alone keep sandboxes apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sandboxd.errors import Unavailable

__all__ = ["DEFAULT_COUNT", "DEFAULT_FIRST", "UidPool"]

#: 1,879,048,192 to 2,147,483,647 is used by nobody (systemd's UIDS-GIDS document).
DEFAULT_FIRST = 1_879_048_192
DEFAULT_COUNT = 65_536


class UidPool:
    """Uids of a range, handed out in turn so that one is not reused soon after its release."""

    def __init__(
        self, *, privileged: bool, first: int = DEFAULT_FIRST, count: int = DEFAULT_COUNT
    ) -> None:
        self._privileged, self._first, self._count = privileged, first, count
        self._next = 0
        self._taken: set[int] = set()

    def acquire(self) -> int:
        """A uid that no living sandbox has. Unavailable when the whole range is taken."""
        if not self._privileged:
            return os.geteuid()
        for _ in range(self._count):
            uid = self._first + self._next
            self._next = (self._next + 1) % self._count
            if uid not in self._taken:
                self._taken.add(uid)
                return uid
        raise Unavailable(
            f"all {self._count:,} sandbox uids are in use",
            hint="widen uid_range in sandboxd.yaml, or stop sessions",
        )

    def release(self, uid: int) -> None:
        """Give a uid back once nothing runs as it any more."""
        self._taken.discard(uid)

    @contextmanager
    def lease(self) -> Iterator[int]:
        """A uid for the length of a ``with`` block."""
        uid = self.acquire()
        try:
            yield uid
        finally:
            self.release(uid)
