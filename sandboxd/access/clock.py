"""Time for expiry: the wall clock, kept from going back."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["ForwardClock"]


class ForwardClock:
    """Seconds since 1970 that never fall behind what has passed since the start.

    What has expired stays expired when somebody sets the host's clock back. ``floor`` is the newest
    time that is known from before this start: a clock that is behind it was set back meanwhile. A
    clock that was ahead and is set right is followed, unless it was ahead at the start.
    """

    def __init__(
        self,
        floor: float = 0.0,
        *,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall, self._steady = wall, steady
        self._base, self._since = max(wall(), floor), steady()
        #: How many seconds the host's clock was behind the floor at the start.
        self.behind = max(0.0, floor - wall())

    def __call__(self) -> float:
        return max(self._wall(), self._base + self._steady() - self._since)
