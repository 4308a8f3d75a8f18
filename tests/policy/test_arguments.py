"""Arguments of a call: bounded, unambiguous, as the manifest says, told without their values."""

from __future__ import annotations

import json
import time
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.errors import Invalid
from sandboxd.policy import Tool, check_arguments, parse_arguments
from sandboxd.policy.arguments import MAX_DEPTH, check_schema
from sandboxd.policy.values import Line, ProgramPath, ToolName, Wrong


def tool(schema: dict[str, Any]) -> Tool:
    from pathlib import Path

    made = Tool(ToolName("t"), Line("d"), ProgramPath(Path("/bin/true")), schema)
    return attrs.evolve(made, validator=check_schema(schema))


def refusal(schema: dict[str, Any], arguments: Any) -> str:
    with pytest.raises(Invalid) as caught:
        check_arguments(tool({"type": "object", **schema}), arguments)
    return caught.value.message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"x": {"a": 1, "a": 1}}', "the key 'a' is there twice"),
        (b'{"\\u0061": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"Path": 1, "path": 2}', "the keys 'Path' and 'path' differ in spelling alone"),
        (b'{"x": [{"K": 1, "\xe2\x84\xaa": 2}]}', "differ in spelling alone"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "a number that is infinite"),
        (b'{"a": 18446744073709551616}', "a number that doesn't fit in 64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "\\u0000"}', "a NUL character"),
        (b'{"\\u0000": 1}', "a NUL character"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested deeper than 32 levels"),
        (b'{"a":' * 100_000, "nested deeper than 32 levels"),
        (b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "nested deeper than 32 levels"),
        (b'{"a": [' + b"1," * 20_000 + b"1]}", "more than 20,000 values"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "more than 1,048,576 bytes"),
        (b"[1]", "expected arguments as an object, found a list"),
        (b"null", "expected arguments as an object, found nothing"),
        (b'"x"', "expected arguments as an object, found text"),
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{}{}", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": \xff}', "not UTF-8"),
    ],
)
def test_json_that_is_ambiguous_or_over_a_bound_is_refused(raw: bytes, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(Invalid) as caught:
        parse_arguments(raw)
    assert message in caught.value.message
    assert time.monotonic() - started < 2


def test_json_within_the_bounds_is_read() -> None:
    deepest = b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert parse_arguments(deepest)
    assert parse_arguments('{"a": "\\ud83d\\ude00", "b": -1.5e3}') == {"a": "😀", "b": -1500.0}


@given(st.binary(max_size=100))
def test_any_bytes_are_an_object_or_refused(raw: bytes) -> None:
    try:
        value = parse_arguments(raw)
    except Invalid:
        return
    assert isinstance(value, dict)


@pytest.mark.parametrize(
    ("schema", "arguments", "message"),
    [
        (
            {"properties": {"url": {"type": "string"}}},
            {"url": 123456},
            "arguments.url: expected string, found a number",
        ),
        (
            {"properties": {"n": {"type": "integer"}}},
            {"n": True},
            "arguments.n: expected integer, found true or false",
        ),
        (
            {"properties": {"l": {"items": {"type": ["string", "null"]}}}},
            {"l": ["x", {}]},
            "arguments.l[1]: expected string or null, found an object",
        ),
        ({"required": ["url", "to"]}, {}, "arguments: missing 'url', 'to'"),
        (
            {"properties": {"url": {}}, "additionalProperties": False},
            {"ulr": 1},
            "arguments: unknown 'ulr' (did you mean 'url'?)",
        ),
        (
            {"properties": {"m": {"enum": ["GET", "PUT"]}}},
            {"m": "hunter2"},
            'arguments.m: expected one of ["GET", "PUT"]',
        ),
        (
            {"properties": {"s": {"type": "string", "maxLength": 3}}},
            {"s": "hunter2"},
            "arguments.s: expected maxLength 3",
        ),
        (
            {"properties": {"s": {"pattern": "^x"}}},
            {"s": "hunter2"},
            'arguments.s: expected pattern "^x"',
        ),
        (
            {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            {"c": "hunter2"},
            "arguments: doesn't match what anyOf asks for",
        ),
        (
            {"properties": {"s": {"not": {"const": "hunter2x"}}}},
            {"s": "hunter2x"},
            "arguments.s: doesn't match what not asks for",
        ),
    ],
)
def test_the_message_names_place_and_expectation_and_no_value(
    schema: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    got = refusal(schema, arguments)
    assert got == message
    assert "hunter2" not in got
    assert "123456" not in got


def test_a_key_that_only_looks_like_a_declared_one_is_refused() -> None:
    schema = {"properties": {"url": {}}}
    assert refusal(schema, {"URL": "x"}) == "unknown argument 'URL'"
    assert refusal(schema, {"\uff55rl": "x"}) == "unknown argument '\uff55rl'"
    assert check_arguments(tool({"type": "object", **schema}), {"url": "x", "other": 1})


def test_a_key_of_an_agent_can_not_write_to_a_terminal() -> None:
    got = refusal({"additionalProperties": False}, {"\x1b[2J\u202e": 1})
    assert got.isprintable()
    got = refusal({"additionalProperties": {"type": "object"}}, {"\x1b[2J\n": 1})
    assert got.isprintable()


def test_a_thousand_unknown_keys_make_a_short_message() -> None:
    arguments = {f"key{i}" * 20: i for i in range(1000)}
    assert len(refusal({"additionalProperties": False}, arguments)) < 600


class Odd:
    pass


@pytest.mark.parametrize(
    "value", [Odd(), {1: 2}, (1, 2), b"x", {"a": {"b": Odd()}}, float("nan"), 1 << 64, "\ud800"]
)
def test_what_json_does_not_have_is_refused(value: Any) -> None:
    assert refusal({}, {"x": value})


@pytest.mark.parametrize(
    ("schema", "path", "message"),
    [
        ({}, ("type",), "expected type: object"),
        ({"type": "string"}, ("type",), "expected type: object"),
        ({"type": "objct"}, ("type",), "not a valid JSON Schema"),
        ({"type": "object", "required": "x"}, ("required",), "not a valid JSON Schema"),
        (
            {"type": "object", "properties": {"x": {"minLength": -1}}},
            ("properties", "x", "minLength"),
            "not a valid JSON Schema: input.properties.x.minLength: expected minimum 0",
        ),
        (
            {"type": "object", "properties": {"x": {"$ref": "http://e/x"}}},
            ("properties", "x", "$ref"),
            "the reference 'http://e/x' leads outside this schema",
        ),
        (
            {"type": "object", "properties": {"x": {"$ref": "file:///etc/passwd"}}},
            ("properties", "x", "$ref"),
            "leads outside this schema",
        ),
        (
            {"type": "object", "properties": {"x": {"$ref": "#/$defs/no"}}},
            ("properties", "x", "$ref"),
            "leads nowhere",
        ),
        ({"type": "object", "$ref": "#"}, (), "a reference that leads to itself"),
        (
            {"type": "object", "$schema": "http://json-schema.org/draft-07/schema#"},
            ("$schema",),
            "expected JSON Schema 2020-12",
        ),
        (
            {"type": "object", "properties": {"x": {"uniqueItems": True}}},
            ("properties", "x", "uniqueItems"),
            "uniqueItems needs maxItems",
        ),
        ({"type": "object", "properties": {"x": {"pattern": "("}}}, None, "pattern"),
    ],
)
def test_a_schema_that_can_not_judge_is_refused_with_its_place(
    schema: dict[str, Any], path: tuple[Any, ...] | None, message: str
) -> None:
    with pytest.raises(Wrong, match=message) as caught:
        check_schema(schema)
    if path is not None:
        assert caught.value.path == path


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("^[a-z]+$", "abc", True),
        ("^[a-z]+$", "abc\n", False),
        ("^[a-z]+$", "abc\n--x", False),
        (r"^\d+$", "12", True),
        (r"^\d+$", "\u0661", False),
        (r"^\w+$", "\u00e9", False),
        (r"^a\$$", "a$", True),
        ("^[$]$", "$", True),
        ("^[$]$", "$\n", False),
        ("^(a|b$)", "b\n", False),
    ],
)
def test_a_pattern_means_what_the_standard_says(pattern: str, text: str, matches: bool) -> None:
    schema = {"type": "object", "properties": {"x": {"pattern": pattern}}}
    if matches:
        assert check_arguments(tool(schema), {"x": text})
    else:
        assert refusal(schema, {"x": text}).startswith("arguments.x: expected pattern")


def test_a_pattern_for_keys_means_what_the_standard_says() -> None:
    schema = {"patternProperties": {"^x-[a-z]+$": {}}, "additionalProperties": False}
    assert check_arguments(tool({"type": "object", **schema}), {"x-a": 1})
    assert refusal(schema, {"x-a\n": 1})


def test_a_property_called_like_a_keyword_with_schemas_stays_itself() -> None:
    schema = {
        "properties": {"patternProperties": {"$ref": "#/$defs/n"}},
        "$defs": {"n": {"type": "number"}},
    }
    assert check_arguments(tool({"type": "object", **schema}), {"patternProperties": 1})
    assert refusal(schema, {"patternProperties": "x"})


def test_local_references_work() -> None:
    schema = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/tree"}},
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    }
    assert check_arguments(tool(schema), {"tree": [[], [[]]]})
    with pytest.raises(Invalid, match=r"arguments.tree\[0\]\[0\]: expected array"):
        check_arguments(tool(schema), {"tree": [["x"]]})


def test_a_property_may_be_called_like_a_keyword() -> None:
    schema = {"type": "object", "properties": {"$ref": {"type": "string"}, "type": {"const": 1}}}
    assert check_arguments(tool(schema), {"$ref": "x", "type": 1})


def test_nothing_is_fetched_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("a schema led to the network")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(Wrong, match="leads outside"):
        check_schema({"type": "object", "allOf": [{"$ref": "https://example.com/s.json"}]})
    check_schema(
        {
            "type": "object",
            "$id": "https://example.com/s.json",
            "allOf": [{"$ref": "#/$defs/x"}],
            "$defs": {"x": {}},
        }
    )


def test_a_list_of_many_values_is_judged_quickly() -> None:
    schema = {"properties": {"l": {"items": {"type": "string", "maxLength": 1}}}}
    started = time.monotonic()
    assert refusal(schema, {"l": ["long"] * 19_000})
    assert time.monotonic() - started < 2


def test_dumped_arguments_are_read_back() -> None:
    value = {"a": [1, 2.5, None, True, "x"], "b": {"c": {}}}
    assert parse_arguments(json.dumps(value)) == value
