"""A value never gets through, however the output is cut, and everything else does."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.redact import Redactor
from sandboxd.secret import Secret


def redact(secrets: dict[str, bytes], *chunks: bytes) -> tuple[bytes, int]:
    redactor = Redactor({name: Secret(value) for name, value in secrets.items()})
    out = b"".join([redactor.feed(chunk) for chunk in chunks] + [redactor.flush()])
    return out, redactor.hits


def test_a_value_becomes_its_name() -> None:
    assert redact({"TOKEN": b"hunter2"}, b"key=hunter2;") == (b"key=[redacted:TOKEN];", 1)


def test_each_occurrence_counts() -> None:
    out, hits = redact({"TOKEN": b"hunter2"}, b"hunter2 hunter2hunter2")
    assert out == b"[redacted:TOKEN] [redacted:TOKEN][redacted:TOKEN]"
    assert hits == 3


def test_output_without_a_value_passes_unchanged() -> None:
    data = bytes(range(256)) * 5
    assert redact({"TOKEN": b"hunter2"}, data) == (data, 0)


def test_no_secrets_means_no_delay() -> None:
    assert Redactor({}).feed(b"abc") == b"abc"


def test_a_beginning_of_a_value_is_held_until_it_is_decided() -> None:
    redactor = Redactor({"TOKEN": Secret("hunter2")})
    assert redactor.feed(b"a hunt") == b"a "
    assert redactor.feed(b"ing hunter") == b"hunting "
    assert redactor.feed(b"2!") == b"[redacted:TOKEN]!"


def test_flush_gives_what_did_not_become_a_value() -> None:
    redactor = Redactor({"TOKEN": Secret("hunter2")})
    assert redactor.feed(b"hunter") == b""
    assert redactor.flush() == b"hunter"
    assert redactor.flush() == b""


@pytest.mark.parametrize("cut", range(1, 15))
def test_a_value_cut_in_two_is_still_found(cut: int) -> None:
    data = b"xx hunter2 yyy"
    assert redact({"T": b"hunter2"}, data[:cut], data[cut:]) == (b"xx [redacted:T] yyy", 1)


def test_the_longer_of_two_values_with_one_beginning_wins() -> None:
    secrets = {"SHORT": b"abcd", "LONG": b"abcdefgh"}
    assert redact(secrets, b"abcdefgh abcdefg") == (b"[redacted:LONG] [redacted:SHORT]efg", 2)


def test_the_longer_value_is_waited_for() -> None:
    redactor = Redactor({"SHORT": Secret("abcd"), "LONG": Secret("abcdefgh")})
    assert redactor.feed(b"abcdef") == b""
    assert redactor.feed(b"gh") == b"[redacted:LONG]"


def test_overlapping_values_leave_no_rest() -> None:
    out, _ = redact({"A": b"abcdef", "B": b"defghi"}, b"<abcdefghi>")
    assert out == b"<[redacted:A][redacted:B]>"


def test_a_value_that_overlaps_itself_leaves_no_rest() -> None:
    assert redact({"A": b"abab"}, b"<ababab>") == (b"<[redacted:A]>", 1)


def test_an_endless_run_of_overlaps_is_not_buffered() -> None:
    redactor = Redactor({"A": Secret("aaaa")})
    for _ in range(1000):
        redactor.feed(b"a" * 100)
    assert len(redactor._lane.rest) < 4
    assert redactor.hits == 1


def test_one_value_under_two_names_takes_the_first_name() -> None:
    assert redact({"B": b"same-value", "A": b"same-value"}, b"same-value")[0] == b"[redacted:A]"


def test_an_empty_value_masks_nothing() -> None:
    assert redact({"EMPTY": b""}, b"abc") == (b"abc", 0)


def test_lines_of_a_multi_line_value_are_masked_and_short_ones_are_not() -> None:
    key = b"{\n  secret-line-one\nsecret-line-two\n}\n"
    out, hits = redact({"KEY": key}, b"{ secret-line-two } \n  secret-line-one")
    assert out == b"{ [redacted:KEY] } \n  [redacted:KEY]"
    assert hits == 2


def test_a_multi_line_value_is_one_hit_as_a_whole() -> None:
    key = b"secret-line-one\nsecret-line-two\n"
    assert redact({"KEY": key}, b"<" + key + b">") == (b"<[redacted:KEY]\n>", 1)


def test_a_value_with_a_final_newline_is_found_without_it() -> None:
    assert redact({"PIN": b"1234\n"}, b"pin 1234.")[0] == b"pin [redacted:PIN]."


def test_a_large_value_written_byte_by_byte_is_found() -> None:
    value = bytes(i * 7 % 251 for i in range(20_000))
    redactor = Redactor({"BIG": Secret(value)})
    out = b"".join(redactor.feed(bytes([byte])) for byte in value + b"!") + redactor.flush()
    assert out == b"[redacted:BIG]!"


def test_its_repr_shows_no_value() -> None:
    redactor = Redactor({"T": Secret("hunter2")})
    redactor.feed(b"hunter")
    assert "hunter" not in repr(redactor)


# A small alphabet makes overlaps, shared beginnings and repetitions likely.
_words = st.binary(min_size=1, max_size=6).map(lambda b: bytes(97 + c % 3 for c in b))
_texts = st.lists(st.one_of(_words, st.binary(max_size=3)), max_size=12)


@settings(max_examples=400)
@given(
    values=st.lists(_words, min_size=1, max_size=4, unique=True),
    words=_texts,
    cuts=st.lists(st.integers(0, 80), max_size=10),
)
def test_any_chunking_gives_the_same_and_no_byte_of_a_value(
    values: list[bytes], words: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(words) + values[0]
    secrets = {f"V{i}": value for i, value in enumerate(values)}
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[a:b] for a, b in itertools.pairwise(edges)]

    out, hits = redact(secrets, *chunks)

    assert (out, hits) == redact(secrets, data)
    assert _unmasked(out, secrets) == _expected_rest(data, values)
    assert hits > 0


def _unmasked(out: bytes, secrets: dict[str, bytes]) -> bytes:
    for name in secrets:
        out = out.replace(b"[redacted:%s]" % name.encode(), b"")
    return out


def _expected_rest(data: bytes, values: list[bytes]) -> bytes:
    """Every byte that lies in no occurrence of any value, by the plainest possible search."""
    covered = [False] * len(data)
    for value in values:
        for start in range(len(data) - len(value) + 1):
            if data[start : start + len(value)] == value:
                covered[start : start + len(value)] = [True] * len(value)
    return bytes(byte for byte, hidden in zip(data, covered, strict=True) if not hidden)
