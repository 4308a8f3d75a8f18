"""What an agent sends as a tool's arguments: bounded, unambiguous, and as the manifest says.

Pure functions. They raise :class:`~sandboxd.errors.Invalid` with a message that names the place
inside the arguments and what was expected there, and never holds a value.
"""

from __future__ import annotations

import itertools
import json
import math
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from sandboxd.errors import Invalid
from sandboxd.names import shown
from sandboxd.policy.patterns import LITERALS, as_written, strict_patterns
from sandboxd.policy.values import Wrong, found, nearest

if TYPE_CHECKING:
    from sandboxd.policy.model import Tool

__all__ = [
    "MAX_ARGUMENTS",
    "MAX_DEPTH",
    "MAX_VALUES",
    "check_arguments",
    "check_schema",
    "explain",
    "parse_arguments",
    "references",
]

#: Bytes of one call's arguments as JSON.
MAX_ARGUMENTS = 1 << 20
#: Lists and objects inside each other.
MAX_DEPTH = 32
#: Values and keys together.
MAX_VALUES = 20_000

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def parse_arguments(raw: bytes | str) -> dict[str, Any]:
    """The JSON object in ``raw``. Refuses duplicate keys, NaN, and whatever is over a bound."""
    if len(raw) > MAX_ARGUMENTS:
        raise Invalid(f"arguments of more than {MAX_ARGUMENTS:,} bytes")
    try:
        value = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise Invalid(f"arguments nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError:
        raise Invalid("arguments that are not UTF-8") from None
    except ValueError:
        raise Invalid("arguments that are not valid JSON (RFC 8259)") from None
    _check_bounds(value)
    if not isinstance(value, dict):
        raise Invalid(f"expected arguments as an object, found {_kind(value)}")
    return value


def check_arguments(tool: Tool, arguments: Any) -> Mapping[str, Any]:
    """``arguments`` if this tool takes them: within bounds, no look-alike keys, by its schema."""
    if not isinstance(arguments, dict):
        raise Invalid(f"expected arguments as an object, found {_kind(arguments)}")
    _check_bounds(arguments)
    _check_variants(arguments, tool.input_schema.get("properties", {}))
    try:
        errors = list(itertools.islice(tool.validator.iter_errors(arguments), 50))
    except (RecursionError, Unresolvable):
        raise Invalid("the tool's input schema can't judge these arguments") from None
    error = best_match(errors)
    if error is not None:
        raise Invalid(explain(error))
    return arguments


def check_schema(schema: Any, key: str = "input") -> Draft202012Validator:
    """A validator for a manifest's ``input`` or ``output``. Raises Wrong with the path inside."""
    if not isinstance(schema, Mapping):
        raise Wrong(f"expected a JSON Schema, found {found(schema)}")
    schema = dict(schema)
    if schema.get("$schema", _DIALECT) != _DIALECT:
        raise Wrong("expected JSON Schema 2020-12", f"drop it or write {_DIALECT}", ("$schema",))
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = tuple(error.absolute_path)
        raise Wrong(f"not a valid JSON Schema: {explain(error, root=key)}", path=place) from None
    if schema.get("type") != "object":
        what = "tool arguments" if key == "input" else "structured results (MCP)"
        raise Wrong(f"expected type: object, as {what} are", path=("type",))
    _check_unique(schema, ())
    schema = strict_patterns(schema)
    registry: Registry[Any] = Registry()
    resolver = registry.resolver_with_root(DRAFT202012.create_resource(schema))
    for path, reference in references(schema, ()):
        if not reference.startswith("#"):
            raise Wrong(
                f"the reference {shown(reference)} leads outside this schema",
                "copy what it names under $defs and write #/$defs/NAME",
                path,
            )
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise Wrong(f"the reference {shown(reference)} leads nowhere", path=path) from None
    validator = Draft202012Validator(schema, registry=registry)
    try:
        for _ in validator.iter_errors({}):
            pass
    except RecursionError:
        raise Wrong("a reference that leads to itself without an end") from None
    return validator


def _check_unique(value: Any, path: tuple[str | int, ...]) -> None:
    """uniqueItems compares every pair, so an agent's list must not be long."""
    if isinstance(value, dict):
        bound = value.get("maxItems")
        if value.get("uniqueItems") is True and not (isinstance(bound, int) and bound <= 1000):
            raise Wrong(
                "uniqueItems needs maxItems of at most 1000",
                "comparing every pair of a long list would hold up the broker",
                (*path, "uniqueItems"),
            )
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        if isinstance(item, dict | list) and key not in LITERALS:
            _check_unique(item, (*path, key))


def references(value: Any, path: tuple[str | int, ...]) -> Any:
    """Every ``$ref`` and ``$dynamicRef`` of a schema, with the path that leads to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("$ref", "$dynamicRef") and isinstance(inner, str):
                yield (*path, key), inner
            elif key not in LITERALS or isinstance(inner, dict):
                yield from references(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from references(inner, (*path, index))


def _check_bounds(value: Any) -> None:
    """Depth, number of values, size of text, range of numbers, characters; without recursion."""
    pending: list[tuple[Any, int]] = [(value, 0)]
    values = characters = 0
    while pending:
        item, depth = pending.pop()
        values += 1
        if values > MAX_VALUES:
            raise Invalid(f"arguments of more than {MAX_VALUES:,} values")
        if isinstance(item, str):
            characters += len(item)
            _check_text(item)
        elif isinstance(item, bool) or item is None:
            continue
        elif isinstance(item, int):
            if not -(1 << 63) <= item < 1 << 64:
                raise Invalid("a number that doesn't fit in 64 bits")
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise Invalid("a number that is infinite or not a number (RFC 8259, section 6)")
        elif isinstance(item, dict | list):
            if depth >= MAX_DEPTH:
                raise Invalid(f"arguments nested deeper than {MAX_DEPTH} levels")
            if isinstance(item, dict):
                _check_keys(item)
                characters += sum(map(len, item))
                values += len(item)
                pending.extend((inner, depth + 1) for inner in item.values())
            else:
                pending.extend((inner, depth + 1) for inner in item)
        else:
            raise Invalid("a value that JSON doesn't have")
        if characters > MAX_ARGUMENTS:
            raise Invalid(f"arguments of more than {MAX_ARGUMENTS:,} characters")
        if len(pending) > MAX_VALUES:
            raise Invalid(f"arguments of more than {MAX_VALUES:,} values")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise Invalid("a NUL character, which no program can be given")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise Invalid("half of a surrogate pair, which is no character (RFC 8259, section 8.2)")


def _check_keys(item: dict[Any, Any]) -> None:
    seen: dict[str, str] = {}
    for key in item:
        if not isinstance(key, str):
            raise Invalid("a key that is not text")
        _check_text(key)
        other = seen.setdefault(_folded(key), key)
        if other != key:
            raise Invalid(f"the keys {shown(other)} and {shown(key)} differ in spelling alone")


def _check_variants(arguments: dict[str, Any], properties: Any) -> None:
    """A key that only looks like a declared one would be read by one program and not by another."""
    declared = {_folded(name): name for name in properties if isinstance(name, str)}
    for key in arguments:
        name = declared.get(_folded(key), key)
        if name != key and key not in properties:
            raise Invalid(f"unknown argument {shown(key)}", hint=f"it is spelt {shown(name)}")


def _folded(key: str) -> str:
    return unicodedata.normalize("NFKC", key).casefold()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Invalid(f"the key {shown(key)} is there twice")
            seen.add(key)
    return out


def _no_constant(name: str) -> Any:
    raise Invalid(f"{name} is not JSON (RFC 8259, section 6)")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "nothing" if value is None else "a number")


def explain(error: ValidationError | SchemaError, root: str = "arguments") -> str:
    """One line: where, and what was expected; from the schema's side, so without values."""
    place = root
    for step in itertools.islice(error.absolute_path, 12):
        place += f"[{step}]" if isinstance(step, int) else f".{shown(str(step), 40)[1:-1]}"
    keyword, wanted, instance = error.validator, error.validator_value, error.instance
    if keyword == "type":
        kinds = wanted if isinstance(wanted, list) else [wanted]
        return f"{place}: expected {' or '.join(map(str, kinds))}, found {_kind(instance)}"
    if keyword == "required" and isinstance(instance, dict) and isinstance(wanted, list):
        missing = [name for name in wanted if name not in instance]
        return f"{place}: missing {', '.join(shown(str(name)) for name in missing[:5])}"
    if keyword in ("additionalProperties", "unevaluatedProperties") and isinstance(instance, dict):
        known = error.schema.get("properties", {}) if isinstance(error.schema, Mapping) else {}
        extra = [key for key in instance if key not in known]
        hint = nearest(str(extra[0]), map(str, known)) if extra and known else ""
        return f"{place}: unknown {', '.join(shown(key, 40) for key in extra[:5])}" + (
            f" ({hint})" if hint else ""
        )
    if keyword in ("enum", "const"):
        allowed = wanted if keyword == "enum" else [wanted]
        text = json.dumps(allowed, ensure_ascii=True, default=str)
        return f"{place}: expected one of {text if len(text) < 300 else 'a fixed list'}"
    if keyword == "pattern":
        wanted = as_written(str(wanted))
    if keyword in ("anyOf", "oneOf", "allOf", "not", "if"):
        return f"{place}: doesn't match what {keyword} asks for"
    text = json.dumps(wanted, ensure_ascii=True, default=str)
    return f"{place}: expected {keyword} {text if len(text) < 200 else '(see the schema)'}"
