"""Rate limits: token buckets in memory, as many as fit, the least used forgotten first."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import trio

__all__ = ["Rates"]


class Rates:
    """``burst`` at once, then ``rate`` a second, for each of up to ``most`` names."""

    def __init__(
        self,
        rate: float,
        burst: float,
        *,
        most: int = 10_000,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._rate, self._burst, self._most, self._clock = rate, burst, most, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, as of

    def take(self, name: str, amount: float = 1.0) -> int:
        """0 when there was enough for ``name``, else the seconds to wait, rounded up."""
        left, now = self._left(name)
        wait = 0
        if left >= amount:
            left -= amount
        else:
            wait = max(1, math.ceil((amount - left) / self._rate))
        self._buckets[name] = (left, now)
        self._buckets.move_to_end(name)
        while len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return wait

    def wait_of(self, name: str) -> int:
        """What :meth:`take` would answer, taking nothing."""
        left, _ = self._left(name)
        return 0 if left >= 1.0 else max(1, math.ceil((1.0 - left) / self._rate))

    def _left(self, name: str) -> tuple[float, float]:
        now = self._clock()
        left, at = self._buckets.get(name, (self._burst, now))
        return min(self._burst, left + (now - at) * self._rate), now
