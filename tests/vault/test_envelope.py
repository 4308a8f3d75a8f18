"""Boxes, digests and the encoding below them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.secret import Secret
from sandboxd.vault.envelope import Box, Digest, new_key, pack

VALUE = Secret(b"hunter2")


def test_a_box_opens_what_it_sealed() -> None:
    box = Box(new_key())
    nonce, sealed = box.seal(VALUE, b"bound")
    assert len(nonce) == 12
    assert len(sealed) == len(VALUE) + 16
    assert b"hunter2" not in sealed
    assert box.open(nonce, sealed, b"bound") == VALUE


def test_an_empty_value_is_sealed_too() -> None:
    box = Box(new_key())
    nonce, sealed = box.seal(Secret(b""), b"")
    assert box.open(nonce, sealed, b"") == Secret(b"")


def test_every_flipped_bit_of_nonce_ciphertext_and_bound_data_is_noticed() -> None:
    box = Box(new_key())
    nonce, sealed = box.seal(VALUE, b"bound")
    whole = [nonce, sealed, b"bound"]
    for part in range(3):
        for bit in range(len(whole[part]) * 8):
            changed = bytearray(whole[part])
            changed[bit // 8] ^= 1 << bit % 8
            assert box.open(*whole[:part], bytes(changed), *whole[part + 1 :]) is None


@pytest.mark.parametrize("nonce", [b"", b"x" * 11, b"x" * 13, "text", None])
def test_a_nonce_of_another_size_or_type_does_not_open(nonce) -> None:
    box = Box(new_key())
    assert box.open(nonce, box.seal(VALUE, b"")[1], b"") is None


@pytest.mark.parametrize("sealed", [b"", b"x" * 15, "text", None, 7])
def test_a_ciphertext_too_short_or_of_another_type_does_not_open(sealed) -> None:
    assert Box(new_key()).open(os.urandom(12), sealed, b"") is None


def test_another_key_does_not_open() -> None:
    nonce, sealed = Box(new_key()).seal(VALUE, b"")
    assert Box(new_key()).open(nonce, sealed, b"") is None


def test_no_nonce_is_used_twice() -> None:
    box = Box(new_key())
    assert len({box.seal(VALUE, b"")[0] for _ in range(1000)}) == 1000


def test_a_digest_depends_on_key_purpose_and_fields() -> None:
    key = new_key()
    digest = Digest(key, "row")
    assert digest.matches(digest.of("a", 1), "a", 1)
    assert not digest.matches(digest.of("a", 1), "a", 2)
    assert not digest.matches(None, "a", 1)
    assert not digest.matches("text", "a", 1)
    assert Digest(key, "use").of("a") != digest.of("a")
    assert Digest(new_key(), "row").of("a") != digest.of("a")


FIELDS = st.lists(
    st.one_of(
        st.none(),
        st.text(max_size=4, alphabet=st.characters(exclude_categories=("Cs",))),
        st.binary(max_size=4),
        st.integers(-300, 300),
        st.floats(allow_nan=False, width=16),
    ),
    max_size=4,
)


def typed(fields: list[object]) -> list[tuple[str, object]]:
    return [(type(f).__name__, str(f) if isinstance(f, float) else f) for f in fields]


@given(FIELDS, FIELDS)
def test_different_fields_are_packed_differently(one, two) -> None:
    assert (pack(*one) == pack(*two)) is (typed(one) == typed(two))


def test_fields_do_not_flow_into_each_other() -> None:
    assert len({pack("ab", "c"), pack("a", "bc"), pack("abc"), pack(b"ab", "c")}) == 4
    assert len({pack(1), pack("1"), pack(b"1"), pack(1.0), pack(None), pack()}) == 6
