"""Argument vectors: one value is one element, and a value is never an option."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.policy.template import Refused, compile_template, fill
from sandboxd.policy.values import Wrong


def filled(template: list[Any], **arguments: Any) -> tuple[str, ...]:
    return fill(compile_template(template), arguments)


def test_literals_go_in_as_they_stand() -> None:
    assert filled(["-c", "--", "a b", "{{x}}", ""]) == ("-c", "--", "a b", "{x}", "")


def test_a_value_is_one_whole_element() -> None:
    assert filled(["{a}"], a="x; rm -rf / $(id) 'q' \n\t*") == ("x; rm -rf / $(id) 'q' \n\t*",)
    assert filled(["{a}"], a="") == ("",)


def test_braces_in_a_value_are_not_filled_again() -> None:
    assert filled(["{a}", "--b={b}"], a="{b}", b="{a}") == ("{b}", "--b={a}")


def test_a_value_after_a_flag_stays_in_its_element() -> None:
    assert filled(["--out={a}"], a="-x --y") == ("--out=-x --y",)


def test_an_absent_argument_and_null_drop_the_element() -> None:
    assert filled(["a", "{x}", "--y={y}", "b"], y=None) == ("a", "b")


def test_a_list_repeats_its_element() -> None:
    assert filled(["{x}"], x=["a", "b"]) == ("a", "b")
    assert filled(["--x={x}"], x=["a", 1]) == ("--x=a", "--x=1")
    assert filled(["a", "{x}"], x=[]) == ("a",)


def test_a_group_comes_and_goes_as_a_whole() -> None:
    template = [["--header", "{h}"], "{url}"]
    assert filled(template, url="u") == ("u",)
    assert filled(template, url="u", h=["a", "b"]) == ("--header", "a", "--header", "b", "u")


def test_lists_in_one_group_are_walked_together() -> None:
    assert filled([["{a}", "{b}"]], a=["1", "2"], b=["x", "y"]) == ("1", "x", "2", "y")
    with pytest.raises(Refused, match="'a', 'b' differ in length"):
        filled([["{a}", "{b}"]], a=["1", "2"], b=["x"])


def test_operands_come_after_a_double_dash_that_is_only_there_with_them() -> None:
    template = ["-v", {"operands": ["{file}", "{more}"]}]
    assert filled(template, file="a", more=["b", "c"]) == ("-v", "--", "a", "b", "c")
    assert filled(template, more=["b"]) == ("-v", "--", "b")
    assert filled(template, more=[]) == ("-v",)
    assert filled(template) == ("-v",)
    assert filled([{"operands": ["fixed", "{file}"]}]) == ("--", "fixed")


@pytest.mark.parametrize(("value", "out"), [(True, ("-v",)), (False, ()), (None, ()), (1, ())])
def test_a_condition_wants_true_and_nothing_like_it(value: Any, out: tuple[str, ...]) -> None:
    assert filled([{"if": "v", "argv": ["-v"]}], v=value) == out


@pytest.mark.parametrize(
    ("value", "word"),
    [(3, "3"), (0, "0"), (1.5, "1.5"), (True, "true"), ({"a": [1]}, '{"a":[1]}'), ("ü", "ü")],
)
def test_what_is_not_text_becomes_compact_json(value: Any, word: str) -> None:
    assert filled(["{x}"], x=value) == (word,)


@pytest.mark.parametrize("value", ["-x", "--output=/etc/passwd", "-", "--", -5, -0.5, ["a", "-b"]])
@pytest.mark.parametrize(
    "template", [["{x}"], ["--", "{x}"], [["--flag", "{x}"]], [{"operands": ["{x}"]}]]
)
def test_a_value_can_not_become_an_option(template: list[Any], value: Any) -> None:
    with pytest.raises(Refused, match="the argument 'x' starts with '-'"):
        filled(template, x=value)


def test_a_nul_is_refused_and_the_message_holds_no_value() -> None:
    with pytest.raises(Refused) as caught:
        filled(["--x={x}"], x="hunter2\0")
    assert str(caught.value) == "the argument 'x' holds a NUL character"


def test_what_the_kernel_would_refuse_is_refused_with_the_limit() -> None:
    assert filled(["{x}"], x="y" * 131_071)
    with pytest.raises(Refused, match="131,073 bytes; the kernel takes 131,072"):
        filled(["{x}"], x="y" * 131_072)
    with pytest.raises(Refused, match="more than 1,048,576 bytes"):
        filled(["{x}"], x=["y" * 100_000] * 11)


@pytest.mark.parametrize(
    ("template", "path", "message"),
    [
        ("{x}", (), "expected a list of elements"),
        (["a{x}"], (0,), "a placeholder is a whole element"),
        (["{x}b"], (0,), "a placeholder is a whole element"),
        (["{x}{y}"], (0,), "a placeholder is a whole element"),
        (["x={x}"], (0,), "a placeholder is a whole element"),
        (["--x{x}"], (0,), "a placeholder is a whole element"),
        (["--x={x},{y}"], (0,), "a placeholder is a whole element"),
        (["-={x}"], (0,), "a placeholder is a whole element"),
        (["ok", "{x"], (1,), "a brace without its partner"),
        (["x}"], (0,), "a brace without its partner"),
        (["{}"], (0,), "a brace without its partner"),
        (["{{{x}}}"], (0,), "a placeholder is a whole element"),
        ([1], (0,), "expected text"),
        ([None], (0,), "expected text"),
        (["a\0"], (0,), "a NUL character"),
        ([[]], (0,), "expected a list of elements"),
        ([["a", 1]], (0, 1), "expected text"),
        ([[["a"]]], (0, 0), "expected text"),
        ([{"operands": []}], (0, "operands"), "expected a list of elements"),
        ([{"operands": ["a"], "if": "x"}], (0,), "expected the one key 'operands'"),
        ([{"operands": ["a"]}, "-v"], (1,), "an element after the operands would be one"),
        (["--", {"operands": ["a"]}], (1,), "'--' is put before operands by itself"),
        ([{"operands": ["a", "-b"]}], (0, "operands", 1), "an operand that starts with '-'"),
        ([{"operands": ["--b={b}"]}], (0, "operands", 0), "an operand that starts with '-'"),
        ([{"if": "x"}], (0,), "expected the two keys 'if' and 'argv'"),
        ([{"if": 1, "argv": ["a"]}], (0, "if"), "expected an argument's name"),
        ([{"if": "x", "argv": []}], (0, "argv"), "expected a list of elements"),
        ([{"if": "x", "argv": ["a{b}"]}], (0, "argv", 0), "a placeholder is a whole element"),
    ],
)
def test_a_template_that_mixes_value_and_text_is_refused(
    template: Any, path: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(Wrong, match=message) as caught:
        compile_template(template)
    assert caught.value.path == path


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from("abc"), json_values))
def test_no_arguments_make_an_option_or_change_the_literals(arguments: dict[str, Any]) -> None:
    template = compile_template(["first", "{a}", "--b={b}", ["-c", "{c}"], "last"])
    try:
        argv = fill(template, arguments)
    except Refused:
        return
    assert argv[0] == "first"
    assert argv[-1] == "last"
    for word in argv[1:-1]:
        assert not word.startswith("-") or word.startswith("--b=") or word == "-c"
        assert "\0" not in word
