"""What an MCP server says its tools are: bounded, made canonical, and pinned by a digest.

A definition is what reaches an agent of a tool: name, title, description, schemas, annotations.
It is kept as the JSON that the server sent, since a model of it would change with the library that
holds it, and the digest with it. Pure functions.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs
from jsonschema import Draft7Validator, Draft201909Validator, Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT7, DRAFT201909, DRAFT202012

from sandboxd.names import shown
from sandboxd.policy.arguments import references
from sandboxd.policy.patterns import LITERALS, is_cheap, strict_patterns
from sandboxd.policy.values import Wrong

__all__ = [
    "MAX_TOOLS",
    "Definition",
    "Validator",
    "canonical",
    "digest_of",
    "exposed",
    "read_definitions",
    "validator_of",
]

Validator = Draft202012Validator | Draft201909Validator | Draft7Validator

#: Tools of one server, and bytes of one definition. Descriptions fill a model's context.
MAX_TOOLS = 256
MAX_DEFINITION = 64 << 10
MAX_DESCRIPTION = 16 << 10
#: What the clients of the large model APIs take as a tool's name.
MAX_EXPOSED = 64

#: MCP 2025-11-25, "Tool Names".
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_KEYS = ("name", "title", "description", "inputSchema", "outputSchema", "annotations")
_DIALECTS: dict[str, tuple[type[Any], Any]] = {
    "https://json-schema.org/draft/2020-12/schema": (Draft202012Validator, DRAFT202012),
    "https://json-schema.org/draft/2019-09/schema": (Draft201909Validator, DRAFT201909),
    "http://json-schema.org/draft-07/schema": (Draft7Validator, DRAFT7),
}
_DEFAULT = "https://json-schema.org/draft/2020-12/schema"


@attrs.frozen
class Definition:
    """One tool as its server defines it, with only the keys that an agent gets to see."""

    name: str
    content: Mapping[str, Any] = attrs.field(repr=False)

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(canonical(dict(self.content))).hexdigest()

    @property
    def description(self) -> str:
        text = self.content.get("description") or self.content.get("title") or self.name
        return str(text)

    @property
    def input_schema(self) -> Mapping[str, Any]:
        schema: Mapping[str, Any] = self.content["inputSchema"]
        return schema


def read_definitions(
    listed: Iterable[Any], server: str
) -> tuple[tuple[Definition, ...], tuple[str, ...]]:
    """The usable definitions among what a server listed, by name, and why others are not.

    Two tools whose names differ only in case or in characters that no client takes are both left
    out: one could be approved and the other called.
    """
    found: dict[str, Definition] = {}
    problems: list[str] = []
    clashing: set[str] = set()
    for item in listed:
        try:
            definition = _read(item, server)
        except Wrong as wrong:
            problems.append(wrong.message)
            continue
        key = exposed(server, definition.name).casefold()
        if key in found or key in clashing:
            problems.append(f"{shown(definition.name)}: another tool has this name as well")
            clashing.add(key)
            found.pop(key, None)
        else:
            found[key] = definition
    usable = sorted(found.values(), key=lambda d: d.name)
    if len(usable) > MAX_TOOLS:
        problems.append(f"only the first {MAX_TOOLS} of {len(usable)} tools can be offered")
    return tuple(usable[:MAX_TOOLS]), tuple(problems)


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no blanks, UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_of(definitions: Iterable[Definition]) -> str:
    """One digest for a whole list of definitions, in whatever order."""
    ordered = sorted(definitions, key=lambda d: d.name)
    whole = canonical([dict(d.content) for d in ordered])
    return "sha256:" + hashlib.sha256(whole).hexdigest()


def exposed(server: str, name: str) -> str:
    """The name under which agents and policies know the tool ``name`` of ``server``."""
    return f"{server}__{re.sub('[^A-Za-z0-9_-]', '_', name)}"


def validator_of(schema: Mapping[str, Any]) -> tuple[Validator, tuple[str, ...]]:
    """What checks arguments against a server's schema, and which of its rules are left to it.

    The dialect is the schema's own. A pattern that an agent could make expensive, and
    ``uniqueItems`` of lists without a bound, are left to the server: its schema must not be able
    to hold up the broker. Raises Wrong for a schema that can't judge anything.
    """
    dialect = schema.get("$schema", _DEFAULT)
    known = _DIALECTS.get(dialect.rstrip("#")) if isinstance(dialect, str) else None
    if known is None:
        raise Wrong("its input schema is of an unknown dialect")
    make, specification = known
    try:
        make.check_schema(schema)
    except (SchemaError, RecursionError):
        raise Wrong("its input schema is not a valid JSON Schema") from None
    if schema.get("type") != "object":
        raise Wrong("its input schema is not of type object")
    for _, reference in references(schema, ()):
        if not reference.startswith("#"):
            raise Wrong("its input schema refers to another document")
    left: list[str] = []
    judged = strict_patterns(_bounded(dict(schema), (), left))
    registry: Registry[Any] = Registry()
    resolver = registry.resolver_with_root(specification.create_resource(judged))
    try:
        for _, reference in references(judged, ()):
            resolver.lookup(reference)
        validator: Validator = make(judged, registry=registry)
        for _ in validator.iter_errors({}):
            pass
    except (Unresolvable, RecursionError):
        raise Wrong("its input schema has a reference that leads nowhere") from None
    return validator, tuple(left)


def _read(item: Any, server: str) -> Definition:
    name = item.get("name") if isinstance(item, dict) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Wrong(
            f"a tool has no usable name: {shown(name) if isinstance(name, str) else 'none'}"
        )
    if len(exposed(server, name)) > MAX_EXPOSED:
        raise Wrong(
            f"{name}: {exposed(server, name)} is longer than {MAX_EXPOSED} characters; "
            "give the server a shorter name"
        )
    content = {key: item[key] for key in _KEYS if item.get(key) is not None}
    for key, kind in (("title", str), ("description", str), ("annotations", dict)):
        if not isinstance(content.get(key, kind()), kind):
            raise Wrong(f"{name}: its {key} is of the wrong type")
    if len(content.get("description", "")) > MAX_DESCRIPTION:
        raise Wrong(f"{name}: its description is longer than {MAX_DESCRIPTION:,} characters")
    for key in ("inputSchema", "outputSchema"):
        if key in content and not isinstance(content[key], dict):
            raise Wrong(f"{name}: its {key} is no JSON Schema")
    if "inputSchema" not in content:
        raise Wrong(f"{name}: it has no input schema")
    if len(canonical(content)) > MAX_DEFINITION:
        raise Wrong(f"{name}: its definition is longer than {MAX_DEFINITION:,} bytes")
    hidden = _hidden(content)
    if hidden:
        raise Wrong(f"{name}: its definition holds {hidden}, which nobody who reviews it can see")
    try:
        validator_of(content["inputSchema"])
    except Wrong as wrong:
        raise Wrong(f"{name}: {wrong.message}") from None
    return Definition(name, MappingProxyType(content))


def _hidden(value: Any) -> str:
    """The first character of any text in ``value`` that shows nothing, or turns text around."""
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.values()
            pending += item
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and not item.isprintable():
            for character in item:
                if _is_hidden(character):
                    return f"U+{ord(character):04X}"
    return ""


def _is_hidden(character: str) -> bool:
    """Controls, formats, private use and unassigned; the joiner of emoji is let through."""
    if character in "\n\r\t\u200d":
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Co", "Cn", "Cs")


def _bounded(schema: Any, path: tuple[str | int, ...], left: list[str]) -> Any:
    """A copy without the rules whose cost an agent or a server could choose."""
    if isinstance(schema, list):
        return [_bounded(inner, (*path, index), left) for index, inner in enumerate(schema)]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, inner in schema.items():
        place = (*path, key)
        named = bool(path) and path[-1] in ("properties", "$defs", "definitions")
        if key in LITERALS and not named:
            out[key] = inner
        elif not named and _is_costly(key, inner, schema):
            left.append(_spell(place))
        else:
            out[key] = _bounded(inner, place, left)
    if "patternProperties" in schema and "patternProperties" not in out:
        # What they would have allowed must not be refused as unknown.
        for key in ("additionalProperties", "unevaluatedProperties"):
            out.pop(key, None)
    return out


def _is_costly(key: str, value: Any, schema: Mapping[str, Any]) -> bool:
    if key == "pattern":
        return isinstance(value, str) and not _is_judged(value)
    if key == "patternProperties":
        return isinstance(value, dict) and not all(map(_is_judged, value))
    bound = schema.get("maxItems")
    return key == "uniqueItems" and not (isinstance(bound, int) and bound <= 1000)


def _is_judged(pattern: str) -> bool:
    """Whether Python can tell what ``pattern`` matches, in short time. ECMA-262 knows more."""
    try:
        strict_patterns({"pattern": pattern})
    except Wrong:
        return False
    return is_cheap(pattern)


def _spell(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))
