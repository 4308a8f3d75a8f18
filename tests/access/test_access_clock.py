"""Expiry goes by a clock that never goes back, and durations are written in one way."""

from __future__ import annotations

import pytest

from sandboxd.access.clock import ForwardClock, duration
from sandboxd.errors import Invalid


class Times:
    def __init__(self) -> None:
        self.wall, self.steady = 1_000_000.0, 50.0

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def times() -> Times:
    return Times()


def clock(times: Times, floor: float = 0.0) -> ForwardClock:
    return ForwardClock(floor, wall=lambda: times.wall, steady=lambda: times.steady)


def test_it_follows_the_hosts_clock(times: Times) -> None:
    now = clock(times)
    times.pass_(10)
    assert now() == 1_000_010.0


def test_a_clock_set_back_changes_nothing(times: Times) -> None:
    now = clock(times)
    times.pass_(3600)
    times.wall -= 100_000
    assert now() == 1_003_600.0
    times.pass_(60)
    assert now() == 1_003_660.0


def test_a_clock_set_forward_and_right_again_is_followed(times: Times) -> None:
    now = clock(times)
    times.wall += 86400
    assert now() == 1_086_400.0
    times.wall -= 86400
    times.pass_(1)
    assert now() == 1_000_001.0


def test_a_sleeping_host_has_slept(times: Times) -> None:
    now = clock(times)
    times.wall += 7200  # CLOCK_MONOTONIC stands still while suspended
    assert now() == 1_007_200.0


def test_a_clock_set_back_between_two_starts_is_told_and_not_followed(times: Times) -> None:
    now = clock(times, floor=1_000_500.0)
    assert now.behind == 500.0
    times.pass_(10)
    assert now() == 1_000_510.0
    assert clock(times, floor=900_000.0).behind == 0.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("90s", 90), ("15m", 900), ("1h", 3600), ("24h", 86400), ("90d", 7_776_000)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


def test_a_long_duration_is_cut_to_the_longest() -> None:
    assert duration("48h", most=86400) == 86400
    assert duration("999999999999d") < 1e10


@pytest.mark.parametrize(
    "text",
    ["", "1", "h", "1w", "1H", "-1h", "1.5h", " 1h", "1h ", "1h\n", "0s", "00m", "\u0661h", "1e3s"],
)
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(Invalid, match="is not a duration") as caught:
        duration(text)
    assert "30s, 15m, 12h, 90d" in caught.value.hint
