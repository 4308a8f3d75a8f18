"""Expiry goes by a clock that never goes back."""

from __future__ import annotations

import pytest

from sandboxd.access.clock import ForwardClock


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
