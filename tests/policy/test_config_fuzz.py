"""A valid configuration with anything put anywhere in it: loaded or refused, never a crash."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.policy import Config, ConfigErrors, load_config

VALID: dict[str, Any] = {
    "sandboxd.yaml": {
        "version": 1,
        "key": {"file": "/etc/key"},
        "uid_range": {"first": 100000, "count": 10},
        "max_sessions": 1,
    },
    "agents/coder.yaml": {
        "version": 1,
        "description": "d",
        "command": ["sh"],
        "policy": "mine",
        "tools": ["echo"],
        "environment": {"A": "b", "PATH": "/bin"},
        "allow_environment": {"PATH": "why"},
        "workspace": {"path": "/srv/w", "mode": "rw"},
        "mounts": [{"source": "/srv/x", "target": "/x"}],
        "limits": {"memory": "1M", "cpu": "1s"},
    },
    "tools/echo/tool.yaml": {
        "version": 1,
        "name": "echo",
        "description": "d",
        "program": "run",
        "argv": ["--a={a}", ["-b", "{b}"], {"if": "c", "argv": ["x"]}, {"operands": ["{a}"]}],
        "stdin": {"text": "a"},
        "input": {
            "type": "object",
            "properties": {
                "a": {"type": "string", "pattern": "^x$"},
                "b": {"$ref": "#/$defs/b"},
                "c": {"enum": [True]},
            },
            "$defs": {"b": {"type": "array", "items": {"type": "integer"}}},
            "required": ["a"],
            "additionalProperties": False,
        },
        "secrets": ["T", {"variable": "U", "as": "u", "delivery": "file", "required": False}],
        "environment": {"B": "c"},
        "mounts": [{"source": "/srv/x", "target": "/x", "mode": "rw"}],
        "timeout": "1s",
        "output_limit": 3,
        "output_format": "json",
        "output": {"type": "object", "properties": {"n": {"type": "integer"}}},
        "grace": "1s",
        "concurrency": {"total": 2, "per_session": 1},
        "annotations": {"title": "t", "readOnlyHint": True},
    },
    "policies/mine.yaml": {
        "version": 1,
        "description": "d",
        "extends": "base",
        "rules": [
            {"allow": ["echo"], "agents": "c*", "when": {"a": {"glob": "x*"}, "b": [1]}},
            {"deny": "*", "reason": "r"},
        ],
        "limits": {"files": 3},
        "timeout": "1m",
    },
    "policies/base.yaml": {
        "version": 1,
        "description": "d",
        "network": "host",
        "rules": [{"allow": "*"}],
        "require": ["landlock"],
    },
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


PLACES = [path for path in places(VALID) if len(path) > 1]

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6) | st.sampled_from(
    [
        "host",
        "rw",
        "mine",
        "echo",
        "*",
        "{a}",
        "--x={b}",
        "/",
        "/etc",
        "1M",
        "5s",
        "#/",
        "#",
        "object",
    ]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            texts | st.sampled_from(["properties", "$ref", "items", "if", "argv", "type", "as"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
changes = st.tuples(
    st.sampled_from(PLACES), st.sampled_from(["set", "drop", "add"]), texts, anything
)


def write(directory: Path, files: dict[str, Any]) -> None:
    for name, value in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, ensure_ascii=False))
    program = directory / "tools/echo/run"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)


def change(files: dict[str, Any], where: tuple[Any, ...], how: str, key: str, value: Any) -> None:
    container: Any = files
    for step in where[:-1]:
        try:
            container = container[step]
        except (KeyError, IndexError, TypeError):  # an earlier change removed it
            return
    if not isinstance(container, dict | list):
        return
    if how == "add" and isinstance(container, dict):
        container[key] = value
    elif how == "add":
        container.append(value)
    elif isinstance(container, list) and not (
        isinstance(where[-1], int) and where[-1] < len(container)
    ):
        return
    elif how == "drop" and (isinstance(container, list) or where[-1] in container):
        del container[where[-1]]
    else:
        container[where[-1]] = value


def load(directory: Path) -> Config:
    return load_config(
        directory, shipped_policies=directory / "none", shipped_tools=directory / "none"
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


def test_the_configuration_that_is_changed_is_valid(directory: Path) -> None:
    write(directory, VALID)
    assert load(directory).policies["mine"].timeout == 60.0


@settings(max_examples=60)
@given(wanted=st.lists(changes, min_size=1, max_size=3))
def test_anything_anywhere_is_loaded_or_refused_with_its_place(
    directory: Path, wanted: list[Any]
) -> None:
    files = copy.deepcopy(VALID)
    for where, how, key, value in wanted:
        change(files, where, how, key, value)
    write(directory, files)
    try:
        assert load(directory).agents["coder"]
    except ConfigErrors as refused:
        for error in refused.errors:
            assert error.line >= 1, error
            assert "not valid here" not in error.message, error
