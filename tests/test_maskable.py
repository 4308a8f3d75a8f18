"""Which values output can be kept clear of, and what is said about the others."""

from __future__ import annotations

import pytest

from sandboxd.errors import Invalid
from sandboxd.maskable import review, weakness
from sandboxd.secret import Secret


@pytest.mark.parametrize(
    "value",
    [
        "9vZ4-Qm7x_T2kLw8",
        "hunter2-is-the-value",
        "correct horse battery staple",
        "postgresql://app:pa55word@db.example.com/shop",
        "https://hooks.example.com/services/T0001/B0002/x9Yw8Vu7",
        "20261125-4711-0815-11",
        "ünïcödé-wörds",
        "{\n  secret-line-one\n}\n",
    ],
)
def test_a_value_of_its_own_is_fine(value: str) -> None:
    assert weakness(value.encode()) == ""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("true", "word of every output"),
        ("NULL", "word of every output"),
        ("localhost\n", "word of every output"),
        ("us-east-1", "word of every output"),
        ("pa55wor", "fewer than 8"),
        ("aaaaaaaaaaaa", "repeats"),
        ("47110815", "number"),
        ("127.0.0.10", "number"),
        ("mountain", "looks like a word"),
        ("Monitoring", "looks like a word"),
        ("https://api.example.com", "address without credentials"),
        ("db.internal.example.com:5432", "address without credentials"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "every key file"),
    ],
)
def test_a_value_that_any_output_may_hold_is_told(value: str, reason: str) -> None:
    assert reason in weakness(value.encode())


def test_values_under_four_characters_are_refused_all_at_once_and_without_showing_them() -> None:
    values = {"B": Secret("xyz"), "A": Secret("q\n\n\n"), "FINE": Secret("9vZ4-Qm7x_T2kLw8")}
    with pytest.raises(Invalid, match="under 4 characters: A, B; nothing was set") as refused:
        review(values)
    assert "--force" in refused.value.hint
    assert "xyz" not in refused.value.message + refused.value.hint


def test_force_stores_them_with_a_warning_and_says_which() -> None:
    warnings, forced = review({"B": Secret("xyz"), "C": Secret("1234")}, force=True)
    assert forced == ["B"]
    assert [text.split(" has")[0] for text in warnings] == ["the value of B", "the value of C"]


def test_plain_settings_and_empty_values_are_left_alone() -> None:
    values = {"MODE": Secret("rw"), "EMPTY": Secret("")}
    assert review(values, plain={"MODE"}) == ([], [])
