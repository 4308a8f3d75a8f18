"""Time for expiry: the wall clock, kept from going back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from sandboxd.errors import Invalid
from sandboxd.names import shown

__all__ = ["ForwardClock", "duration"]

_DURATION = re.compile(r"([0-9]{1,12})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

#: Longest duration that anything takes: a hundred years is for ever, and years stay four digits.
_MOST = 36500 * 86400


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


def duration(text: str, *, most: float = _MOST) -> float:
    """``30s``, ``15m``, ``12h``, ``90d`` as seconds, at most ``most``. Raises Invalid."""
    found = _DURATION.fullmatch(text)
    seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
    if not found or not seconds:
        raise Invalid(
            f"{shown(text, 24)} is not a duration",
            hint="use a number above 0 and s, m, h or d: 30s, 15m, 12h, 90d",
        )
    return float(min(seconds, most))
