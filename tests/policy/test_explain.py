"""Explanations: what decided, what would run, and which line each bound comes from."""

from __future__ import annotations

import json
from typing import Any

from sandboxd.policy.explain import describe_tool, differences, explain_call, outlook

MINE = """\
extends: default
workspace: ro
timeout: 30s
limits: {memory: 64M}
rules:
  - ask: echo
    when: {text: {glob: "rm *"}}
  - allow: echo
"""


def explained(config: Any, arguments: Any = None, tool: str = "echo") -> dict[str, Any]:
    loaded = config.load()
    found = explain_call(loaded, loaded.agents["coder"], tool, arguments or {})
    assert json.loads(json.dumps(found)) == found, "it is JSON"
    return found


def test_each_bound_of_an_allowed_call_names_its_line(config: Any) -> None:
    config.tool("limits: {files: 9}\nworkspace: rw\ntimeout: 5m\nsecrets: [TOKEN]\n")
    config.policy("mine", MINE)
    config.agent("policy: mine\n")
    found = explained(config, {"text": "x"})
    assert (found["verdict"], found["rule"]) == ("allow", "policies/mine.yaml:10 allow echo")
    assert found["program"].endswith("/tools/echo/run")
    assert found["argv"] == ["x"]
    assert found["inject"] == [
        {"variable": "TOKEN", "as": "TOKEN", "delivery": "env", "required": True, "redact": True}
    ]
    assert found["set_by"] == {
        "memory": "policies/mine.yaml:6",
        "processes": "default",
        "files": "tools/echo/tool.yaml:11",
        "cpu": "default",
        "file_size": "default",
        "tmp_size": "default",
        "cpus": "policies/mine.yaml:6",
        "timeout": "policies/mine.yaml:5",
        "output_limit": "default",
        "network": "default",
        "workspace": "policies/mine.yaml:4",
    }
    assert (found["limits"]["memory"], found["timeout"]) == (64 << 20, 30.0)
    assert found["workspace"] == "ro"


def test_a_call_that_waits_is_explained_like_one_that_runs(config: Any) -> None:
    config.policy("mine", MINE)
    config.agent("policy: mine\n")
    found = explained(config, {"text": "rm -r x"})
    assert (found["verdict"], found["rule"]) == ("ask", "policies/mine.yaml:8 ask echo")
    assert found["approval_timeout"] > 0
    assert found["argv"] == ["rm -r x"]


def test_every_refusal_names_the_line_to_change(config: Any) -> None:
    config.tool("workspace: rw\n")
    config.policy("mine", "rules: [{allow: shell}]\n")
    config.policy("low", "workspace: none\nrules: [{allow: echo}]\n")
    config.policy("base", "rules: [{allow: '*'}]\nworkspace: none\n")
    config.policy("child", "extends: base\n")
    for policy, arguments, tool, rule in (
        ("default", {}, "nope", "agents/coder.yaml:4 tools"),
        ("default", {"n": 1}, "echo", "tools/echo/tool.yaml:6 input"),
        ("default", {"text": "-x"}, "echo", "tools/echo/tool.yaml:5 argv"),
        ("mine", {}, "echo", "policies/mine.yaml:3 rules: none matches"),
        ("low", {}, "echo", "policies/low.yaml:3 workspace"),
        ("child", {}, "echo", "policies/base.yaml:4 workspace"),
    ):
        config.agent(f"policy: {policy}\n")
        found = explained(config, arguments, tool)
        assert (found["verdict"], found["rule"]) == ("deny", rule)
        assert found["inject"] == found["argv"] == []
        assert found["set_by"] == {}


def test_a_tool_is_described_with_what_its_manifest_leaves_out(config: Any) -> None:
    argv = """argv: [-v, "{{x}}", [--n, "{text}"], {if: b, argv: [-b]}, {operands: ["{text}"]}]"""
    config.tool(argv=argv, input="input: {type: object, properties: {text: {}, b: {}}}")
    text = (config.path / "tools/echo/tool.yaml").read_text()
    config.write(
        "tools/echo/tool.yaml",
        "\n".join(line for line in text.splitlines() if not line.startswith(" ")) + "\n",
    )
    loaded = config.load()
    found = describe_tool(loaded, loaded.tools["echo"])
    assert json.loads(json.dumps(found)) == found
    assert found["argv"] == [
        "-v",
        "{{x}}",
        ["--n", "{text}"],
        {"if": "b", "argv": ["-b"]},
        {"operands": ["{text}"]},
    ]
    assert found["limits"]["memory"] == 1 << 30
    assert found["agents"] == ["coder"]


def seen(config: Any) -> Any:
    return json.loads(json.dumps(outlook(config.load())))


def test_the_same_configuration_differs_in_nothing(config: Any) -> None:
    before = seen(config)
    config.write("policies/unused.yaml", "version: 1\ndescription: for nobody\n")
    assert differences(before, seen(config)) == []


def test_a_rule_that_only_moved_is_no_change(config: Any) -> None:
    config.agent("policy: mine\n")
    config.policy("mine", "rules: [{allow: echo}]\n")
    before = seen(config)
    config.policy("mine", "\n# a comment\nrules: [{allow: '*'}]\n")
    assert differences(before, seen(config)) == []


def test_what_a_change_means_is_told_for_each_agent_and_tool(config: Any) -> None:
    config.agent(slug="other", tools="[echo]")
    before = seen(config)
    config.tool("secrets: [TOKEN]\nlimits: {memory: 1M}\n")
    config.agent("policy: mine\n", tools="[echo, shell]")
    config.policy("mine", MINE)
    changes = {
        (c["agent"], c["tool"], c["what"]): (c["old"], c["new"])
        for c in differences(before, seen(config))
    }
    assert changes["other", "echo", "inject"] == ([], ["TOKEN as TOKEN (env)"])
    assert changes["other", "echo", "limits"][1]["memory"] == 1 << 20
    assert ("other", "echo", "verdict") not in changes
    assert changes["coder", "echo", "verdict"] == ("allow", "by argument")
    assert changes["coder", "echo", "rules"] == (["allow"], ["ask when text is like rm *", "allow"])
    assert changes["coder", "echo", "timeout"] == (60.0, 30.0)
    assert changes["coder", None, "policy"] == ("default", "mine")
    old, new = changes["coder", "shell", "tool"]
    assert old is None
    assert (new["verdict"], new["workspace"]) == ("allow", "ro")
    assert set(changes) & {("other", None, "policy")} == set()


def test_a_program_that_changed_is_a_change(config: Any) -> None:
    before = seen(config)
    config.program("tools/echo/run", "#!/bin/sh\necho other\n")
    (change,) = differences(before, seen(config))
    assert (change["agent"], change["tool"], change["what"]) == ("coder", "echo", "program")


def test_a_ceiling_makes_a_tool_denied_whatever_the_rules(config: Any) -> None:
    config.tool("network: host\n")
    before = seen(config)
    config.agent("policy: strict\n")
    changes = {c["what"]: c["new"] for c in differences(before, seen(config)) if c["tool"]}
    assert changes["verdict"] == "deny"
    assert changes["rules"] == ["echo needs network: host, and policy strict allows none"]


def test_a_removed_agent_is_told(config: Any) -> None:
    before = seen(config)
    (config.path / "agents/coder.yaml").unlink()
    found = differences(before, seen(config))
    assert {(c["tool"], c["change"]) for c in found} == {(None, "removed"), ("echo", "removed")}


def test_in_files_a_server_stands_for_its_tools(config: Any) -> None:
    config.write(
        "tools/notes/tool.yaml",
        """\
        version: 1
        kind: mcp
        name: notes
        description: notes
        program: /bin/sh
        secrets: [NOTES_KEY]
        """,
    )
    config.agent(tools="[echo, notes]")
    loaded = config.load()
    found = outlook(loaded, servers=True)["coder"]["notes"]
    assert found["inject"] == ["NOTES_KEY as NOTES_KEY (env)"]
    assert "verdict" not in found
    assert "notes" not in outlook(loaded)["coder"], "nothing was accepted of it"
