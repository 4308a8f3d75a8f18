"""However a value is encoded and cut, no 8 of its characters in a row get through.

The values are any text; the encodings are those of spellings.py; the cuts fall anywhere, the
pieces come on both streams in any order, and a reader may have lost patience at any moment.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spellings import ALL, Spelling, dump

from sandboxd.maskable import weakness
from sandboxd.redact import Mask, Matcher, Redactor, Streams
from sandboxd.secret import Secret

_token = st.text(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_/+=.", min_size=12
)
_printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=12)
_unicode = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=12)
_line = st.text("ABCDEFabcdef0123/+", min_size=12, max_size=20).filter(
    lambda line: not weakness(line.encode())
)
_lines = st.lists(_line, min_size=2, max_size=4).map("\n".join)
values = (
    st.one_of(_token, _printable, _unicode, _lines)
    .map(lambda value: value[:84])
    .filter(
        lambda value: len(set(value)) > 5 and value[:3].strip("'\"\\:, ") and value == value.strip()
    )
)
spellings = st.sampled_from(sorted(ALL))
#: What stands around a value; none of it can be a part of one by chance.
_around = st.sampled_from(
    [b"", b" ", b"\n", b"~~", b'{"k": "', b"\xff\x00\xfe", b"~ ~\n~", b"\\", b"%", b"&#"]
)


def shown(
    spelling: Spelling,
    cuts: Sequence[int],
    streams: Sequence[bool],
    relaxes: Sequence[bool],
    around: tuple[bytes, bytes],
    value: str,
) -> tuple[bytes, bytes, bytes, int]:
    """(standard output, standard error, both as a watcher saw them, hits)."""
    data = around[0] + spelling.text + around[1]
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    both = Streams(Matcher({"V": Secret(value)}), ("stdout", "stderr"))
    kept = {"stdout": b"", "stderr": b""}
    watched = b""
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        name = "stderr" if streams[number % len(streams)] else "stdout"
        outputs = both.feed(name, data[a:b])
        if relaxes[number % len(relaxes)]:
            outputs += both.relax()
        for each, safe in outputs:
            kept[each] += safe
            watched += safe
    rest, _ = both.flush("stderr")
    kept["stderr"] += rest
    last, covered = both.flush("stdout", kept["stderr"])
    kept["stdout"] += last
    kept["stderr"] = kept["stderr"][covered:]
    return kept["stdout"], kept["stderr"], watched + rest + last, both.counts.total()


@settings(max_examples=250)
@given(
    value=values,
    name=spellings,
    cuts=st.lists(st.integers(0, 2000), max_size=8),
    streams=st.lists(st.booleans(), min_size=1, max_size=5),
    relaxes=st.lists(st.booleans(), min_size=1, max_size=5),
    around=st.tuples(_around, _around),
)
def test_no_split_of_any_encoding_leaks_eight_characters(
    value: str,
    name: str,
    cuts: list[int],
    streams: list[bool],
    relaxes: list[bool],
    around: tuple[bytes, bytes],
) -> None:
    spelling = ALL[name](value)
    # What stands before it makes another character of the value's first, for every reader.
    assume(around[0] != b"\\" or value[0] not in "nrtbfvaeuUx01234567\\")
    assume(around[0] != b"%" or not set(value[:2]) <= set(string.hexdigits))
    stdout, stderr, watched, hits = shown(spelling, cuts, streams, relaxes, around, value)
    assert hits
    for window in spelling.windows(value):
        for seen in (stdout, stderr, watched, stdout + stderr):
            assert window not in seen


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_encoding_becomes_the_name_and_nothing_around_it_changes(name: str) -> None:
    value = "pässw0rd/'n\"m+re & <t%41>\\o=k"
    data = b"~before~" + ALL[name](value).text + b"~behind~"
    redactor = Redactor({"V": Secret(value)})
    out = redactor.feed(data) + redactor.flush()
    assert out.startswith(b"~before~")
    assert out.endswith(b"~behind~")
    assert out.count(b"[redacted:V]") == redactor.hits == 1
    left = len(out) - len(b"~before~[redacted:V]~behind~")
    assert left <= 4, out  # what base64 shares with its neighbours, a separator, a padding


@settings(max_examples=100)
@given(
    value=values,
    name=spellings,
    noise=st.lists(st.one_of(st.binary(max_size=20), st.sampled_from([b"\n", b" "]))),
    at=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 2000), max_size=12),
)
def test_what_comes_out_does_not_depend_on_the_cuts(
    value: str, name: str, noise: list[bytes], at: int, cuts: list[int]
) -> None:
    place = at % (len(noise) + 1)
    data = b"".join([*noise[:place], ALL[name](value).text, *noise[place:]])
    # What stands before may make another escape of a value's first bytes, if it is seen with them.
    assume(not any(byte in b"".join(noise) for byte in b"\\%&"))
    matcher = Matcher({"V": Secret(value)})
    whole = Redactor(matcher)
    expected = whole.feed(data) + whole.flush()
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    cut = Redactor(matcher)
    out = b"".join(cut.feed(data[a:b]) for a, b in itertools.pairwise(edges)) + cut.flush()
    assert out == expected


@settings(max_examples=100)
@given(
    data=st.one_of(st.binary(max_size=400), st.text(max_size=300).map(str.encode)),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_text_without_a_value_passes_byte_for_byte(data: bytes, cuts: list[int]) -> None:
    secrets = {
        "ONE": Secret("9vZ4-Qm7x_T2kLw8/Rb3+Yc6="),
        "TWO": Secret("correct horse battery staple"),
        "KEY": Secret(
            "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\nAgEGCCqGSM49AwEHBG0wawIB\n"
        ),
    }
    both = Streams(Matcher(secrets), ("stdout", "stderr"))
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    out = {"stdout": b"", "stderr": b""}
    sent = {"stdout": b"", "stderr": b""}
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        name = ("stdout", "stderr")[number % 2]
        sent[name] += data[a:b]
        for each, safe in both.feed(name, data[a:b]):
            out[each] += safe
    for name in ("stderr", "stdout"):
        out[name] += both.flush(name)[0]
    assert out == sent
    assert not both.counts


@settings(max_examples=80)
@given(value=values, name=spellings, cuts=st.lists(st.integers(0, 500), max_size=4))
def test_texts_in_a_row_leak_no_eight_characters(value: str, name: str, cuts: list[int]) -> None:
    spelling = ALL[name](value)
    try:
        text = spelling.text.decode()
    except UnicodeDecodeError:
        assume(False)
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    masked = Mask({"V": Secret(value)}).texts([text[a:b] for a, b in itertools.pairwise(edges)])
    joined = "".join(masked).encode()
    assert not any(window in joined for window in spelling.windows(value))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 900), max_size=8), before=st.integers(0, 40))
@pytest.mark.parametrize("kind", ["xxd", "hexdump -C", "od -tx1", "od -Ax -tx1z", "od -c"])
def test_no_split_of_a_dump_leaks_eight_characters(kind: str, cuts: list[int], before: int) -> None:
    value = b"9vZ4/Qm7x_T2kLw8.Rb3+Yc6=fade0123cafe"
    data = b"first line\n" + dump(b"e0 " * 14 + b"." * before + value + b"." * 30, kind)
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    redactor = Redactor({"V": Secret(value)})
    out = b"".join(redactor.feed(data[a:b]) for a, b in itertools.pairwise(edges))
    out += redactor.flush()
    assert redactor.hits
    text = out.translate(None, b" \n")
    for at in range(len(value) - 7):
        assert value[at : at + 8] not in text
        assert value[at : at + 8].hex().encode() not in text
    assert out.startswith(b"first line\n000")
    assert dump(b"e0 " * 14, kind)[:40] in out  # the lines before it are as they were
