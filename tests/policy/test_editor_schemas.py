"""The published JSON Schemas: those of the code, and true for every file that loads."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from test_config_fuzz import VALID, change, changes, load, write

from sandboxd.paths import shipped
from sandboxd.policy import ConfigErrors
from sandboxd.policy.editorschemas import KINDS, schema_of

ROOT = Path(__file__).parents[2]
PUBLISHED = {kind: json.loads((shipped("schemas") / f"{kind}.json").read_text()) for kind in KINDS}
VALIDATORS = {kind: Draft202012Validator(schema) for kind, schema in PUBLISHED.items()}


def kind_of(name: str) -> str:
    folders = {"tools/": "tool", "agents/": "agent", "policies/": "policy"}
    return next((kind for start, kind in folders.items() if start in name), "sandboxd")


def without_descriptions(value: Any) -> Any:
    if isinstance(value, dict):
        # A property of that name is a schema, a description is a text.
        return {
            key: without_descriptions(inner)
            for key, inner in value.items()
            if not (key == "description" and isinstance(inner, str))
        }
    return [without_descriptions(one) for one in value] if isinstance(value, list) else value


def files() -> Iterator[tuple[str, Any]]:
    for path in (*shipped("tools").glob("*/tool.yaml"), *shipped("policies").glob("*.yaml")):
        yield str(path.relative_to(shipped("tools").parent)), yaml.safe_load(path.read_text())
    skeleton = ROOT / "sandboxd/cli/skeleton"
    for path in skeleton.rglob("*.yaml"):
        yield str(path.relative_to(skeleton)), yaml.safe_load(path.read_text())
    manual = (ROOT / "docs/configuration.md").read_text()
    for name, text in re.findall(r"<!-- file: (\S+) -->\n```yaml\n(.*?)```", manual, re.S):
        yield f"docs: {name}", yaml.safe_load(text)
    for name, value in VALID.items():
        yield f"valid: {name}", value


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_is_what_the_code_says(kind: str) -> None:
    Draft202012Validator.check_schema(PUBLISHED[kind])
    assert without_descriptions(PUBLISHED[kind]) == without_descriptions(schema_of(kind)), (
        "make them anew: python -m sandboxd.policy.editorschemas schemas docs/configuration.md"
    )


def test_every_key_is_described_by_the_manual() -> None:
    properties = PUBLISHED["tool"]["$defs"]["Tool"]["properties"]
    silent = {key for key, schema in properties.items() if "description" not in schema}
    assert silent <= {"version"}


@pytest.mark.parametrize(("name", "value"), [pytest.param(*f, id=f[0]) for f in files()])
def test_a_file_of_ours_is_valid(name: str, value: Any) -> None:
    errors = [error.message for error in VALIDATORS[kind_of(name)].iter_errors(value)]
    assert errors == []


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("tools/echo/tool.yaml", ("version",), 2),
        ("tools/echo/tool.yaml", ("unknown",), 1),
        ("tools/echo/tool.yaml", ("timeout",), "soon"),
        ("tools/echo/tool.yaml", ("output_limit",), "1.5M"),
        ("tools/echo/tool.yaml", ("argv",), [{"if": "a"}]),
        ("tools/echo/tool.yaml", ("secrets",), ["1X"]),
        ("tools/echo/tool.yaml", ("secrets",), [{"variable": "X", "delivery": "argv"}]),
        ("tools/echo/tool.yaml", ("stdin",), "text"),
        ("tools/echo/tool.yaml", ("input",), {"type": "array"}),
        ("tools/echo/tool.yaml", ("input",), {"type": "object", "required": "a"}),
        ("tools/echo/tool.yaml", ("concurrency",), 0),
        ("tools/echo/tool.yaml", ("kind",), "mcp"),
        ("agents/coder.yaml", ("command",), "sh"),
        ("agents/coder.yaml", ("workspace", "mode"), "rx"),
        ("policies/mine.yaml", ("rules",), [{"allow": "a", "deny": "b"}]),
        ("policies/mine.yaml", ("rules",), [{"reason": "none of them"}]),
        ("policies/mine.yaml", ("rules",), [{"allow": "a", "when": {"x": {"like": "y"}}}]),
        ("sandboxd.yaml", ("max_sessions",), "3"),
    ],
)
def test_a_mistake_is_seen_in_the_editor(name: str, path: tuple[str, ...], value: Any) -> None:
    changed = copy.deepcopy(VALID[name])
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert not VALIDATORS[kind_of(name)].is_valid(changed)
    assert VALIDATORS[kind_of(name)].is_valid(VALID[name])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("schemas")


@settings(max_examples=60)
@given(wanted=st.lists(changes, min_size=1, max_size=2))
def test_what_loads_is_valid(directory: Path, wanted: list[Any]) -> None:
    changed = copy.deepcopy(VALID)
    for where, how, key, value in wanted:
        change(changed, where, how, key, value)
    write(directory, changed)
    try:
        load(directory)
    except ConfigErrors:
        return
    for name, value in changed.items():
        errors = [error.message for error in VALIDATORS[kind_of(name)].iter_errors(value)]
        assert errors == [], name
