"""Which refusals are recorded: who asks in a loop for what it may not must not fill the disk."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

__all__ = ["Denials"]

#: Refusals of one key that are recorded in a minute.
LIMIT = 120
_MINUTE = 60.0

#: Keys that are remembered.
_KEPT = 4096


@dataclass
class _Minute:
    began: float
    recorded: int = 0
    left_out: int = 0


class Denials:
    """Counts refusals by who got them."""

    def __init__(self) -> None:
        self._minutes: OrderedDict[str, _Minute] = OrderedDict()

    def note(self, who: str, now: float) -> int | None:
        """How many of ``who`` were left out of the log since the last record of one.

        None: this one is to be left out, too.
        """
        minute = self._minutes.setdefault(who, _Minute(now))
        self._minutes.move_to_end(who)
        while len(self._minutes) > _KEPT:
            self._minutes.popitem(last=False)
        if now - minute.began >= _MINUTE:
            minute.began, minute.recorded = now, 0
        if minute.recorded >= LIMIT:
            minute.left_out += 1
            return None
        minute.recorded += 1
        left_out, minute.left_out = minute.left_out, 0
        return left_out
