"""Manifests of MCP servers: mistakes are told with their place; what rules can say of them."""

from __future__ import annotations

from typing import Any

import pytest

from sandboxd.policy.definitions import Definition, read_definitions, validator_of
from sandboxd.policy.mcpserver import Pin, with_pins
from sandboxd.policy.patterns import is_cheap

SERVER = """\
version: 1
kind: mcp
name: files
description: files of the team
program: serve
"""
FILE = "tools/files/tool.yaml"


def serve(config: Any, more: str = "", name: str = "files") -> None:
    config.write(f"tools/{name}/tool.yaml", SERVER.replace("files\nd", f"{name}\nd") + more)
    config.program(f"tools/{name}/serve")


def test_an_agent_may_list_a_server_or_one_of_its_tools(config: Any) -> None:
    serve(config, "tools: [read_file, Write.All]\n")
    config.agent(tools="[files, files__read_file, files__Write_All]")
    assert config.load().servers["files"].tools == ("read_file", "Write.All")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("lifetime: forever\n", "6:11: lifetime: expected call or session, found"),
        ("idle: 5\nidel: 5m\n", "7:1: unknown key 'idel'"),
        ("definitions: sha256:12\n", "6:14: definitions: expected sha256: and 64 hex digits"),
        ("tools: [files/read]\n", "6:9: tools[0]: 'files/read' is not the name of an MCP tool"),
        ("input: {type: object}\n", "6:1: unknown key 'input'"),
        (
            "secrets: [{variable: KEY, delivery: stdin}]\n",
            "6:11: a server's standard input is the protocol; it carries no secret",
        ),
        ('argv: ["{KEY}"]\n', "6:7: argv uses {KEY}, which no secret with delivery: env is called"),
        (
            'argv: ["{KEY}"]\nsecrets: [KEY]\n',
            "6:7: a secret in argv needs runtime: node or python",
        ),
        ("environment: {SANDBOXD_X: y}\n", "6:15: SANDBOXD_X is set by sandboxd alone"),
    ],
)
def test_a_mistake_is_told_with_its_place(config: Any, more: str, problem: str) -> None:
    serve(config, more)
    assert any(f"{FILE}:{problem}" in one for one in config.problems())


def test_names_of_servers_and_tools_cannot_be_taken_for_each_other(config: Any) -> None:
    serve(config, name="echo_")
    assert "'echo_' is not a server name" in config.problem()
    serve(config, name="two__under")
    assert any("'two__under' is not a server name" in one for one in config.problems())


def test_a_tool_cannot_have_the_name_of_a_servers(config: Any) -> None:
    config.tool(name="name: files__read")
    config.agent(tools="[files__read]")
    assert "the tool name 'files__read' could be taken for an MCP server's" in config.problem()


def test_a_server_cannot_have_the_name_of_a_tool(config: Any) -> None:
    serve(config, name="shell")
    assert "the tool name 'shell' is taken by" in config.problem()


def test_an_agent_cannot_list_what_a_server_may_not_offer(config: Any) -> None:
    serve(config, "tools: [read_file]\n")
    config.agent(tools="[files__write_file]")
    assert "no tool 'files__write_file'" in config.problem()


def test_rules_can_name_tools_that_only_the_server_knows(config: Any) -> None:
    serve(config)
    config.policy("p", 'rules:\n  - allow: [files__read, "files__*"]\n    when: {path: x}\n')
    assert config.load().warnings == ()
    config.policy("p", "rules:\n  - allow: flies__read\n")
    assert "no tool 'flies__read'" in config.problem()


def test_no_agent_may_write_where_a_servers_packages_are(config: Any, tmp_path: Any) -> None:
    code = tmp_path / "opt"
    code.mkdir(mode=0o755)
    program = code / "serve"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    serve(config, f"mounts: [{{source: {code}, target: {code}}}]\n")
    path = config.path / FILE
    path.write_text(path.read_text().replace("program: serve", f"program: {program}"))
    config.load()
    config.agent(f"mounts: [{{source: {code}, target: /opt/x, mode: rw}}]\n")
    assert "would let an agent change the program of files" in config.problem()
    config.agent()
    path.write_text(path.read_text().replace(f"target: {code}}}", f"target: {code}, mode: rw}}"))
    assert any("the server could change its own program" in one for one in config.problems())


def test_code_that_others_may_write_is_refused(config: Any, tmp_path: Any) -> None:
    code = tmp_path / "opt"
    (code / "lib").mkdir(parents=True, mode=0o755)
    program = code / "serve"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    serve(config, f"mounts: [{{source: {code}, target: {code}}}]\n")
    path = config.path / FILE
    path.write_text(path.read_text().replace("program: serve", f"program: {program}"))
    config.load()
    (code / "lib/helper.js").write_text("")
    (code / "lib/helper.js").chmod(0o666)
    assert f"{code}/lib/helper.js is writable by everybody" in config.problem()


def test_pins_make_tools_and_keep_the_digest_apart(config: Any) -> None:
    serve(config)
    config.agent(tools="[files]")
    loaded = config.load()
    schema = {"type": "object", "properties": {"p": {"type": "string"}}}
    listed = [{"name": "Read.It", "inputSchema": schema, "annotations": {"readOnlyHint": 1}}]
    definitions, problems = read_definitions(listed, "files")
    assert not problems
    accepted = with_pins(loaded, {"files": Pin("files", definitions, "me", 0.0)})
    tool = accepted.tools["files__Read_It"]
    assert accepted.agents["coder"].tools == ("files", "files__Read_It")
    assert tool.annotations.as_dict() == {}  # a hint that is no boolean is none
    assert accepted.generation != loaded.generation


def test_schemas_of_servers_are_judged_in_their_dialect_and_without_what_is_costly() -> None:
    validator, left = validator_of(
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {
                "pair": {"type": "array", "items": [{"type": "string"}, {"type": "integer"}]},
                "evil": {"type": "string", "pattern": "(a+)+$"},
                "set": {"type": "array", "uniqueItems": True},
                "pattern": {"type": "string", "pattern": "^[a-z]+$"},
            },
        }
    )
    assert left == ("properties.evil.pattern", "properties.set.uniqueItems")
    assert validator.is_valid({"pair": ["x", 1], "evil": "a" * 50 + "b", "set": [1, 1]})
    assert not validator.is_valid({"pair": [1, 1]})
    assert not validator.is_valid({"pattern": "A"})
    assert not validator.is_valid({"pattern": "a\n"})


@pytest.mark.parametrize(
    ("definition", "problem"),
    [
        ({"name": "x"}, "x: it has no input schema"),
        ({"name": "x", "inputSchema": {"type": "string"}}, "x: its input schema is not of type"),
        ({"name": "x", "inputSchema": {"type": "object", "$schema": "y"}}, "unknown dialect"),
        ({"name": "x", "inputSchema": {"type": "object", "$ref": "http://x"}}, "another document"),
        ({"name": "x", "inputSchema": {"type": 7}}, "not a valid JSON Schema"),
        ({"name": "x" * 60, "inputSchema": {"type": "object"}}, "longer than 64 characters"),
        ({"name": "a b", "inputSchema": {"type": "object"}}, "no usable name: 'a b'"),
        ({"name": "x", "inputSchema": {"type": "object"}, "title": 7}, "title is of the wrong"),
        (
            {"name": "x", "inputSchema": {"type": "object"}, "description": "y" * 20_000},
            "description is longer than 16,384",
        ),
        ({"name": "x", "inputSchema": {"type": "object", "title": "\u202e"}}, "holds U+202E"),
        (7, "no usable name: none"),
    ],
)
def test_definitions_that_nobody_could_review_are_left_out(definition: Any, problem: str) -> None:
    found, problems = read_definitions([definition], "files")
    assert found == ()
    assert problem in problems[0]


def test_only_so_many_tools_are_offered() -> None:
    listed = [{"name": f"t{n}", "inputSchema": {"type": "object"}} for n in range(300)]
    found, problems = read_definitions(listed, "files")
    assert len(found) == 256
    assert problems == ("only the first 256 of 300 tools can be offered",)


def test_a_digest_depends_on_what_is_said_and_not_on_how() -> None:
    one = Definition("x", {"name": "x", "description": "é", "inputSchema": {"a": 1, "b": 2}})
    two = Definition("x", {"inputSchema": {"b": 2, "a": 1}, "name": "x", "description": "é"})
    three = Definition("x", {"name": "x", "description": "e", "inputSchema": {"a": 1, "b": 2}})
    assert one.digest == two.digest != three.digest


@pytest.mark.parametrize(
    ("pattern", "cheap"),
    [
        ("^[a-z0-9-]+$", True),
        ("^[0-9]{4}-[0-9]{2}$", True),
        ("^(https?)://", True),
        ("[A-Z]{3}", True),
        ("(a+)+$", False),
        ("a+b", False),
        ("^a*a*$", False),
        ("^(a|b)+$", False),
        (r"^(.)\1$", False),
        ("^a?a?a?a?a?a$", False),
        ("^a{0,9999}$", False),
        ("^a|b+c", False),
    ],
)
def test_patterns_that_take_long_are_known(pattern: str, cheap: bool) -> None:
    assert is_cheap(pattern) is cheap
