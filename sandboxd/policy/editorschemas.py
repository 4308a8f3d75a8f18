"""JSON Schemas of the configuration files, for editors: made from the classes that files become.

``python -m sandboxd.policy.editorschemas schemas docs/configuration.md`` writes one for each kind
of file, with the manual's words for each key; a test compares, so they can't drift apart. A file
that loads is valid by them. Not all that is valid loads: what spans keys or files, and what is on
the host, only sandboxd knows.
"""

from __future__ import annotations

import json
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from sandboxd.durations import WITH_UNIT
from sandboxd.policy import destinations, values
from sandboxd.policy.mcpserver import McpServer
from sandboxd.policy.model import Agent, Concurrency, Condition, SecretSpec, Settings, Stdin, Tool
from sandboxd.policy.policyfile import Globs, PolicyFile, RuleFile
from sandboxd.policy.structure import VERSION, keys_of
from sandboxd.policy.template import Template

__all__ = ["KINDS", "schema_of"]

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"

#: The kinds of file, and what each becomes.
KINDS: dict[str, type[Any]] = {
    "sandboxd": Settings,
    "agent": Agent,
    "tool": Tool,
    "policy": PolicyFile,
}
_TITLES = {
    "sandboxd": "sandboxd: sandboxd.yaml",
    "agent": "sandboxd: agents/NAME.yaml",
    "tool": "sandboxd: tools/NAME/tool.yaml",
    "policy": "sandboxd: policies/NAME.yaml",
}
#: Where docs/configuration.md describes the keys of a class, where not under the class's own name.
_SECTIONS = {
    "Settings": "sandboxd.yaml",
    "Agent": "agents/NAME.yaml",
    "Tool": "tools/NAME/tool.yaml",
    "PolicyFile": "policies/NAME.yaml",
    "RuleFile": "rules",
    "SecretSpec": "secrets",
    "Mount": "mounts",
    "UidRange": "uid_range",
    "Egress": "egress",
    "DestinationRule": "allow in egress",
    "Relay": "relays in egress",
    "Gateway": "gateways in egress",
    "Placeholder": "placeholders in egress",
    "Team": "teams",
    "HttpSettings": "http",
    "HttpLimits": "http limits",
}


def schema_of(kind: str, manual: str = "") -> Schema:
    """The JSON Schema (2020-12) of one kind of file. ``manual`` describes its keys, in Markdown."""
    make = _Maker(manual)
    root = KINDS[kind]
    body = make.of(root)
    if kind == "tool":
        body = {
            "if": {"required": ["kind"], "properties": {"kind": {"const": "mcp"}}},
            "then": make.of(McpServer),
            "else": body,
        }
    return {"$schema": _DIALECT, "title": _TITLES[kind], **body, "$defs": make.definitions}


class _Maker:
    def __init__(self, manual: str) -> None:
        self.manual = manual
        self.definitions: dict[str, Schema] = {}

    def of(self, kind: Any) -> Schema:
        """The schema of a value that becomes a ``kind``."""
        special = _SPECIAL.get(kind)
        if special is not None:
            return special(self)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            (inner,) = (one for one in arguments if one is not type(None))
            return self.of(inner)
        if origin is typing.Literal:
            return {"enum": list(arguments)}
        if origin is tuple:
            return {"type": "array", "items": self.of(arguments[0])}
        if origin is Mapping:
            return {"type": "object", "additionalProperties": self.of(arguments[1])}
        if kind is Any:
            return {}
        if attrs.has(kind):
            return self.object(kind)
        raise TypeError(f"no schema for {kind}")

    def object(self, cls: type[Any]) -> Schema:
        """A reference to the definition of an object whose keys are the fields of ``cls``."""
        name = cls.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # so that a class in itself ends
            self.definitions[name] = self._object(cls)
        return {"$ref": f"#/$defs/{name}"}

    def _object(self, cls: type[Any]) -> Schema:
        hints = typing.get_type_hints(cls)
        fields = attrs.fields_dict(cls)
        words = self._words(_SECTIONS.get(cls.__name__, cls.__name__.lower()))
        properties: dict[str, Schema] = {}
        required: list[str] = []
        if cls in (*KINDS.values(), McpServer):
            properties["version"] = {"const": VERSION}
            required.append("version")
        for key, attribute in keys_of(cls).items():
            schema = self.of(hints[attribute])
            if key in ("input", "output"):
                schema = {
                    "allOf": [{"$ref": _DIALECT}],
                    "type": "object",
                    "properties": {"type": {"const": "object"}},
                    "required": ["type"],
                }
            if key in words:
                schema = {"description": words[key], **schema}
            properties[key] = schema
            if fields[attribute].default is attrs.NOTHING:
                required.append(key)
        found: Schema = {
            "type": "object",
            "additionalProperties": False,
            "properties": properties,
        }
        return {**found, "required": required} if required else found

    def _words(self, title: str) -> dict[str, str]:
        """What the manual's table below a heading says of each key."""
        pattern = rf"^##+ {re.escape(title)}\n(.*?)(?=^##+ |\Z)"
        match = re.search(pattern, self.manual, re.M | re.S)
        found: dict[str, str] = {}
        for row in (match[1] if match else "").splitlines():
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]
            if row.startswith("| `") and len(cells) >= 2:
                text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cells[-1]).replace("\\|", "|")
                default = cells[1] if len(cells) == 3 and cells[1] else ""
                if default and default != "required":
                    text += f" (default: {default})"
                found[cells[0].strip("`")] = text
        return found


def _text(pattern: str = "", **more: Any) -> Callable[[_Maker], Schema]:
    schema = {"type": "string", **({"pattern": f"^(?:{pattern})$"} if pattern else {}), **more}
    return lambda make: dict(schema)


def _plain(**schema: Any) -> Callable[[_Maker], Schema]:
    return lambda make: dict(schema)


def _number_or_text(pattern: str) -> Callable[[_Maker], Schema]:
    words = {"type": "string", "pattern": f"^(?:{pattern})$"}
    return _plain(anyOf=[{"type": "integer", "minimum": 1}, words])


def _globs(make: _Maker) -> Schema:
    one = make.of(values.Glob)
    return {"anyOf": [one, {"type": "array", "minItems": 1, "items": one}]}


def _secret(make: _Maker) -> Schema:
    return {"anyOf": [make.of(values.VariableName), make.object(SecretSpec)]}


def _concurrency(make: _Maker) -> Schema:
    return {"anyOf": [make.of(values.Count), make.object(Concurrency)]}


def _stdin(make: _Maker) -> Schema:
    text = {"type": "string", "minLength": 1}
    return {
        "anyOf": [
            {"enum": ["none", "json"]},
            {
                "type": "object",
                "additionalProperties": False,
                "required": ["text"],
                "properties": {"text": text},
            },
        ]
    }


def _condition(make: _Maker) -> Schema:
    """Any value but an object, which says how it compares."""
    return {
        "if": {"type": "object"},
        "then": {
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
            "properties": {
                "equals": {},
                "any_of": {"type": "array", "minItems": 1},
                "glob": {"type": "string", "minLength": 1, "maxLength": 1000},
            },
        },
    }


def _template(make: _Maker) -> Schema:
    words = {"type": "array", "minItems": 1, "items": {"type": "string"}}
    conditional = {
        "type": "object",
        "additionalProperties": False,
        "required": ["if", "argv"],
        "properties": {"if": {"type": "string", "minLength": 1}, "argv": words},
    }
    operands = {
        "type": "object",
        "additionalProperties": False,
        "required": ["operands"],
        "properties": {"operands": words},
    }
    return {
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, words, conditional, operands]},
    }


def _rule(make: _Maker) -> Schema:
    one = [{"required": [verdict]} for verdict in ("allow", "deny", "ask")]
    return {**make.object(RuleFile), "oneOf": one}


_SPECIAL: dict[Any, Callable[[_Maker], Schema]] = {
    str: _text(),
    bool: _plain(type="boolean"),
    int: _plain(type="integer"),
    values.Ask: _plain(const=True),
    values.Count: _plain(type="integer", minimum=1),
    values.Processors: _plain(type="number", exclusiveMinimum=0),
    values.Line: _text(minLength=1),
    values.Size: _number_or_text(r"[0-9]{1,12}[KMGT]?(?:i?B)?"),
    values.Duration: _number_or_text(WITH_UNIT),
    values.AbsolutePath: _text("/.*"),
    values.ProgramPath: _text(minLength=1),
    values.Glob: _text(r"[a-z0-9*][A-Za-z0-9_*-]*", maxLength=100),
    values.Digest: _text("sha256:[0-9a-f]{64}"),
    values.RemoteName: _text(minLength=1),
    values.ServerName: _text(r"[a-z][a-z0-9]*(?:[_-][a-z0-9]+)*", maxLength=32),
    values.WebAddress: _text("https?://.+"),
    values.HostName: _text(r"[a-z0-9_.-]+", maxLength=253),
    values.ListenAddress: _text(r"unix:/.+|[0-9.]+:[0-9]{1,5}|\[[0-9a-f:.]+\]:[0-9]{1,5}"),
    values.Slug: _text(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"),
    values.ToolName: _text(r"[a-z][A-Za-z0-9_-]{0,63}"),
    values.VariableName: _text(r"[A-Za-z_][A-Za-z0-9_]{0,127}"),
    destinations.HostPattern: _text(minLength=1),
    destinations.HostPort: _text(".+:[0-9]{1,5}"),
    destinations.AddressRange: _text("[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?"),
    destinations.HostAddress: _text("[0-9A-Fa-f:.]+"),
    destinations.HttpMethod: _text("[A-Z]{1,20}"),
    destinations.Port: _plain(type="integer", minimum=1, maximum=65535),
    Globs: _globs,
    SecretSpec: _secret,
    Concurrency: _concurrency,
    Stdin: _stdin,
    Condition: _condition,
    Template: _template,
    RuleFile: _rule,
}


if __name__ == "__main__":
    target, words = Path(sys.argv[1]), Path(sys.argv[2]).read_text()
    target.mkdir(exist_ok=True)
    for name in KINDS:
        text = json.dumps(schema_of(name, words), indent=2, ensure_ascii=False)
        (target / f"{name}.json").write_text(text + "\n")
