"""Durations are written in one way, wherever they are written."""

from __future__ import annotations

import argparse

import pytest

from sandboxd.cli import sessions
from sandboxd.durations import duration, seconds_in
from sandboxd.errors import Invalid
from sandboxd.policy.values import Wrong
from sandboxd.policy.values import duration as in_yaml

WRITTEN = [
    ("500ms", 0.5), ("1s", 1), ("90s", 90), ("15m", 900), ("1h", 3600), ("1.5h", 5400),
    ("24h", 86400), ("90d", 7_776_000),
]  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), [*WRITTEN, ("90", 90), ("0.3", 0.3)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds
    got = sessions.options(argparse.Namespace(env=[], lifetime=text))
    assert got == {"lifetime": seconds}


def test_configuration_has_the_same_but_for_a_number_in_quotes() -> None:
    assert [in_yaml(text) for text, _ in WRITTEN] == [seconds for _, seconds in WRITTEN]
    assert in_yaml(90) == duration("90") == 90
    with pytest.raises(Wrong, match="expected a duration"):
        in_yaml("90")


def test_a_long_duration_is_cut_to_the_longest() -> None:
    assert duration("48h", most=86400) == 86400
    assert duration("999999999d") < 1e10


def test_none_at_all_is_one_only_where_it_may_be() -> None:
    assert [duration(text, zero=True) for text in ("0", "0s", "0.0m", "1s")] == [0, 0, 0, 1]
    for text in ("0", "0s", "00m", "0.0"):
        assert seconds_in(text) == 0
        with pytest.raises(Invalid, match="is not a duration") as caught:
            duration(text)
        assert "above 0" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["", "h", "1w", "1H", "-1h", "-1", "1.h", ".5", " 1h", "1h ", "1h\n", "1\n", "\u0661h", "1e3s",
     "1e3", "nan", "inf", "1_000", "1h30m", "0x10"],
)  # fmt: skip
def test_anything_else_is_no_duration(text: str) -> None:
    assert seconds_in(text) is None
    with pytest.raises(Invalid, match=r"^--grace: .* is not a duration") as caught:
        duration(text, zero=True, name="--grace")
    assert "30s, 15m, 12h, 90d" in caught.value.hint
