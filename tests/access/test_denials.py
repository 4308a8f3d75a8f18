"""Refusals in a loop: recorded up to a bound, then counted."""

from __future__ import annotations

from sandboxd.access.denials import LIMIT, Denials


def test_a_key_s_refusals_are_recorded_up_to_a_bound_in_each_minute() -> None:
    denials = Denials()
    assert [denials.note("a", float(n) / 10) for n in range(LIMIT)] == [0] * LIMIT
    assert [denials.note("a", 30.0) for _ in range(3)] == [None] * 3
    assert denials.note("b", 30.0) == 0  # another key's are its own
    assert denials.note("a", 61.0) == 3  # the next record tells how many were left out
    assert denials.note("a", 61.0) == 0


def test_only_so_many_keys_are_remembered() -> None:
    denials = Denials()
    for number in range(10_000):
        denials.note(f"k{number}", 0.0)
    assert len(denials._minutes) == 4096
