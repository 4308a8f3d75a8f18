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
    """Uids of a range, handed out in turn so that one is not reused soon after its release.

    But a ``group`` (a session) gets back what the same ``use`` (a tool) of it had before: sandboxes
    that are kept ready belong to a uid. Nobody else is given that uid until the group is
    forgotten, or no other is left.
    """

    def __init__(
        self, *, privileged: bool, first: int = DEFAULT_FIRST, count: int = DEFAULT_COUNT
    ) -> None:
        self._privileged, self._first, self._count = privileged, first, count
        self._next = 0
        self._taken: set[int] = set()
        #: Free ones by group and use, and the use that each is kept for.
        self._kept: dict[str, dict[str, list[int]]] = {}
        self._kept_for: dict[int, list[int]] = {}

    def acquire(self, group: str = "", use: str = "") -> int:
        """A uid that no living sandbox has. Unavailable when the whole range is taken."""
        if not self._privileged:
            return os.geteuid()
        kept = self._kept.get(group, {}).get(use)
        uid = kept[-1] if kept else self._in_turn()
        if uid in self._kept_for:
            self._kept_for.pop(uid).remove(uid)
        self._taken.add(uid)
        return uid

    def release(self, uid: int, group: str = "", use: str = "") -> None:
        """Give a uid back once nothing runs as it any more."""
        self._taken.discard(uid)
        if group and self._privileged:
            kept = self._kept.setdefault(group, {}).setdefault(use, [])
            kept.append(uid)
            self._kept_for[uid] = kept

    def forget(self, group: str) -> None:
        """Keep nothing for a group any longer."""
        for kept in self._kept.pop(group, {}).values():
            for uid in kept:
                del self._kept_for[uid]

    @contextmanager
    def lease(self) -> Iterator[int]:
        """A uid for the length of a ``with`` block."""
        uid = self.acquire()
        try:
            yield uid
        finally:
            self.release(uid)

    def _in_turn(self) -> int:
        """The next one that is free, rather than one that is kept for another use."""
        spare = None
        for _ in range(self._count):
            uid = self._first + self._next
            self._next = (self._next + 1) % self._count
            if uid in self._taken:
                continue
            if uid not in self._kept_for:
                return uid
            spare = uid if spare is None else spare
        if spare is None:
            raise Unavailable(
                f"all {self._count:,} sandbox uids are in use",
                hint="widen uid_range in sandboxd.yaml, or stop sessions",
            )
        return spare
