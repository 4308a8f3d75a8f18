"""What an agent wrote, as an operator gets to see it: nothing hides, nothing passes for more."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.visible import MAX_TEXT, json_lines, quoted, reading, wrapped

#: Each of these has fooled somebody: what it is, and how it has to look.
TRICKS = [
    ("right-to-left override", "a\u202egpj.exe", r'"a\u202egpj.exe"'),
    ("isolate", "a\u2066b\u2069", r'"a\u2066b\u2069"'),
    ("zero-width space", "rm\u200b -rf", r'"rm\u200b -rf"'),
    ("zero-width joiner", "a\u200db", r'"a\u200db"'),
    ("byte order mark", "\ufeffa", r'"\ufeffa"'),
    ("soft hyphen", "pass\u00adword", r'"pass\u00adword"'),
    ("no-break space", "a\u00a0b", r'"a\u00a0b"'),
    ("line separator", "a\u2028b", r'"a\u2028b"'),
    ("escape sequence", "\x1b[2Jgone", r'"\u001b[2Jgone"'),
    ("carriage return", "evil\rgood", r'"evil\rgood"'),
    ("backspaces", "evil\b\b\b\bgood", r'"evil\b\b\b\bgood"'),
    ("delete", "a\x7fb", r'"a\u007fb"'),
    ("C1 control", "a\x9b31mb", r'"a\u009b31mb"'),
    ("private use", "a\ue000b", r'"a\ue000b"'),
    ("unassigned", "a\u0378b", r'"a\u0378b"'),
    ("tag characters", "a\U000e0041b", r'"a\udb40\udc41b"'),
    ("variation selector", "a\ufe0fb", r'"a\ufe0fb"'),
    ("hangul filler", "a\u3164b", r'"a\u3164b"'),
    ("braille blank", "a\u2800b", r'"a\u2800b"'),
    ("cyrillic a in paypal", "p\u0430ypal.com", r'"p\u0430ypal.com"'),
    ("fullwidth solidus", "example.com\uff0f.evil", r'"example.com\uff0f.evil"'),
    ("a pile of marks", "z" + "\u0351" * 5, '"z' + r"\u0351" * 5 + '"'),
    ("half of a pair", "a\ud800b", r'"a\ud800b"'),
    ("quote and comma", 'a", "b": "c', r'"a\", \"b\": \"c"'),
    ("a push out of sight", "safe" + " " * 40 + "rm", '"safe' + r"\u0020" * 40 + 'rm"'),
]


@pytest.mark.parametrize(("text", "shown"), [t[1:] for t in TRICKS], ids=[t[0] for t in TRICKS])
def test_a_trick_is_seen(text: str, shown: str) -> None:
    assert quoted(text) == shown
    assert reading(text) == "", "and nothing shows it as it wants to be read"


@pytest.mark.parametrize(
    "text",
    ["Größe", "naïve café", "東京都", "Москва", "Αθήνα", "서울", "1 €", "Москва and Berlin"],
)
def test_ordinary_words_can_be_read_as_well(text: str) -> None:
    assert reading(text) == text
    assert list(json_lines(text)) == [quoted(text), f"<reads: {text}>"]
    assert quoted(text).isascii()


@pytest.mark.parametrize("text", ["שלום", "مرحبا", "a שלום b", "plain", ""])
def test_what_would_change_the_order_of_a_line_has_no_reading(text: str) -> None:
    assert reading(text) == ""


def test_a_long_text_is_cut_with_its_length_and_digest_outside_the_quotes() -> None:
    text = "a" * 5000 + "; rm -rf ~" + "b" * 10
    shown = quoted(text)
    assert len(shown) < 2 * MAX_TEXT
    assert shown.startswith('"' + "a" * 240 + '" <4,660 characters left out> "')
    assert "; rm -rf ~" in shown
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert shown.endswith(f'" <5,020 characters, sha256 {digest}>')
    assert json.loads(quoted(text, None)) == text
    assert quoted("x" * MAX_TEXT) == f'"{"x" * MAX_TEXT}"'


def test_a_text_cannot_pass_for_the_note_about_a_cut() -> None:
    assert quoted('a" <9 characters left out> "b') == r'"a\" <9 characters left out> \"b"'


def test_values_keep_their_structure() -> None:
    value = {"a": [1, 1.0, True, None, "x"], "b": {}, "c": [], 'k"1': {"d": "e"}}
    assert "\n".join(json_lines(value)) == json.dumps(value, indent=2)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(json_values)
def test_uncut_lines_are_the_value_and_printable_ascii(value: Any) -> None:
    lines = [
        line for line in json_lines(value, limit=None) if not line.lstrip().startswith("<reads: ")
    ]
    assert json.loads("\n".join(lines)) == value
    assert all(line.isascii() and line.isprintable() for line in lines)


@given(st.text(st.characters(exclude_categories=[])))
def test_a_reading_is_printable_and_nothing_else_than_the_text(text: str) -> None:
    read = reading(text)
    assert read in ("", text)
    assert read.isprintable()


@given(st.text(), st.integers(20, 200))
def test_every_row_of_a_terminal_begins_with_a_mark_of_ours(text: str, width: int) -> None:
    for line in json_lines({"text": text}):
        rows = list(wrapped(line, width))
        assert rows[0].startswith("| ")
        assert all(row.startswith("> ") for row in rows[1:])
        assert "".join(row[2:] for row in rows) == line
        assert all(len(row) <= width for row in rows)


def test_a_pipe_gets_lines_uncut() -> None:
    assert list(wrapped("x" * 500, 0)) == ["| " + "x" * 500]
    assert list(wrapped("", 0)) == ["| "]


def test_wide_characters_fit_their_row() -> None:
    (row,) = wrapped("東" * 38, 80)
    assert len(row) == 40
    assert len(list(wrapped("東" * 40, 80))) == 2
