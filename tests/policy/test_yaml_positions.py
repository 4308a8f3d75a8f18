"""YAML with positions: what is refused, where it is said to be, and what plain scalars mean."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sandboxd.errors import ConfigError
from sandboxd.policy.problems import Position
from sandboxd.policy.yamlpos import MAX_DEPTH, parse


def refusal(text: str | bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text.encode() if isinstance(text, str) else text, "f.yaml")
    return caught.value


def test_every_value_and_key_has_its_place() -> None:
    document = parse(b"a: 1\nb:\n  - x: [1, {q: 'z'}]\n  - no\n", "f.yaml")
    assert document.value == {"a": 1, "b": [{"x": [1, {"q": "z"}]}, "no"]}
    assert document.at(("a",)) == Position(1, 4)
    assert document.key_at(("b",)) == Position(2, 1)
    assert document.at(("b", 0, "x", 1, "q")) == Position(3, 16)
    assert document.at(("b", 1)) == Position(4, 5)
    assert document.at(("b", 0, "missing")) == Position(3, 5), "the nearest thing around it"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a: 1\na: 2\n", (2, 1), "the key 'a' is here twice, first in line 1"),
        ("a: &x 1\n", (1, 4), "a YAML anchor (&name) is not allowed"),
        ("a: *x\n", (1, 4), "a YAML alias (*name) is not allowed"),
        ("a: !!python/object/apply:os.system [id]\n", (1, 4), "a YAML tag"),
        ("a: !x 1\n", (1, 4), "a YAML tag"),
        ("a:\n\tb: 1\n", (2, 1), "a tab can't indent YAML"),
        ("a: 1\n---\nb: 2\n", (2, 1), "a second YAML document"),
        ("%YAML 1.1\n---\na: 1\n", (1, 1), "a YAML directive"),
        ("a: b: c\n", (1, 5), "mapping values are not allowed here"),
        ("a: 'x\n", (2, 1), "found unexpected end of stream"),
        ("[a]: 1\n", (1, 1), "expected a key, found a list or mapping"),
        ("true: 1\n", (1, 1), "expected a key that is text"),
        ("1: 2\n", (1, 1), "expected a key that is text"),
        ("a: \x00\n", (1, 4), "character U+0000 is not allowed"),
        ('a: "\\0"\n', (1, 4), "an escape for NUL or half a character"),
        ('a: "\\ud800"\n', (1, 4), "an escape for NUL or half a character"),
        ('"\\0": 1\n', (1, 1), "an escape for NUL or half a character"),
        ("ok: 1\nb: \x1b[2J\n", (2, 4), "character U+001B is not allowed"),
    ],
)
def test_what_a_configuration_never_needs_is_refused_at_its_place(
    text: str, place: tuple[int, int], message: str
) -> None:
    error = refusal(text)
    assert (error.line, error.column) == place
    assert message in error.message
    assert error.file == "f.yaml"


def test_bytes_that_are_not_utf8_are_refused_at_their_place() -> None:
    error = refusal("a: 1\nb: ü".encode() + b"\xff\n")
    assert (error.line, error.column) == (2, 5)
    assert "expected UTF-8 text, found the byte 0xff" in error.message


def test_utf16_is_refused() -> None:
    assert "expected UTF-8" in refusal("a: 1".encode("utf-16")).message


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    assert parse(b"\xef\xbb\xbfa: 1", "f").value == {"a": 1}


def test_an_unquoted_star_is_told_to_be_quoted() -> None:
    assert '"*"' in refusal("allow: *\n").hint


@pytest.mark.parametrize("opening", ["[", "a: [", "{a: ", "- ", "? ", "- - "])
def test_deep_nesting_is_refused_at_once(opening: str) -> None:
    started = time.monotonic()
    error = refusal(opening * 60_000)
    assert time.monotonic() - started < 2
    assert f"nested deeper than {MAX_DEPTH} levels" in error.message or "expected" in error.message


def test_the_deepest_allowed_nesting_is_read() -> None:
    assert parse(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "f").value


def test_too_many_values_are_refused() -> None:
    assert "more than 20,000 values" in refusal("[" + "1," * 25_000 + "]").message


def test_a_billion_laughs_ends_at_the_first_anchor() -> None:
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"
    assert refusal(bomb).line == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("0755", "0755"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        (".inf", ".inf"),
        ("true", True),
        ("12", 12),
        ("-3", -3),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("~", None),
        ("", None),
        ("'12'", "12"),
        ('"true"', "true"),
        ("9" * 5000, "9" * 5000),
        ("1e999", "1e999"),
    ],
)
def test_plain_scalars_follow_the_core_schema(text: str, value: object) -> None:
    got = parse(f"a: {text}".encode(), "f").value["a"]
    assert got == value
    assert type(got) is type(value)


names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_json_is_read_as_what_it_says(value: object) -> None:
    escaped = json.dumps(value, ensure_ascii=True)
    for surrogate in re.findall(r"\\ud[89ab]..\\ud[c-f]..", escaped):
        escaped = escaped.replace(surrogate, json.loads(f'"{surrogate}"'))
    assert parse(escaped.encode(), "f").value == value


def place_of_refusal(data: bytes) -> tuple[int, int]:
    """Where ``data`` is refused; (1, 1) when it is read."""
    try:
        parse(data, "f")
    except ConfigError as error:
        return error.line, error.column
    return 1, 1


@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf")
@example(b"- !<tag:x> &a *b")
@example(b"? ? ?")
@example(b"{,}")
def test_any_bytes_are_read_or_refused_with_a_place(data: bytes) -> None:
    assert min(place_of_refusal(data)) >= 1


@given(st.text(alphabet="ab:-[]{},&*!|>'\"%@`#? \n\t~01", max_size=60))
def test_any_text_of_yaml_characters_is_read_or_refused_with_a_place(text: str) -> None:
    assert min(place_of_refusal(text.encode())) >= 1
