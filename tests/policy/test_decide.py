"""Decisions: deny unless a rule allows, never raise, name the rule, never widen."""

from __future__ import annotations

import json
import time
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.policy import Config, decide, session_terms
from sandboxd.policy.decide import matches_glob

SCHEMA = """\
input:
  type: object
  additionalProperties: false
  properties:
    text: {type: string}
    list: {type: array}
    n: {type: number}
    any: {}
"""


@pytest.fixture
def rules(config: Any) -> Any:
    """Loads a policy with the given rules and decides a call of echo by it."""
    text = (config.path / "tools/echo/tool.yaml").read_text()
    config.write("tools/echo/tool.yaml", text[: text.index("input:")] + SCHEMA)
    config.agent("policy: mine\n")

    def judged(text: str, arguments: dict[str, Any]) -> Any:
        config.policy("mine", text)
        loaded = config.load()
        return decide(loaded, loaded.agents["coder"], "echo", arguments)

    return judged


def call(config: Any, arguments: Any, tool: Any = "echo") -> Any:
    loaded = config.load()
    return decide(loaded, loaded.agents["coder"], tool, arguments)


def test_an_allowed_call_says_by_which_rule_and_how_it_runs(config: Any) -> None:
    config.tool("secrets: [TOKEN]\nenvironment: {A: b}\n")
    decision = call(config, {"text": "hello; id"})
    assert decision.allowed
    assert decision.rule.startswith("policies/default.yaml:")
    assert decision.rule.endswith(" allow *")
    assert decision.argv == ("hello; id",)
    assert decision.stdin is None
    assert [s.variable for s in decision.inject] == ["TOKEN"]
    assert (decision.network, decision.workspace, decision.timeout) == ("none", "none", 60.0)
    assert decision.lowered == ()


def test_arguments_and_standard_input_stay_out_of_its_repr(config: Any) -> None:
    config.tool("stdin: json\n")
    assert "hunter2" not in repr(call(config, {"text": "hunter2"}))


@pytest.mark.parametrize("name", ["git", "nope", "Echo", "echo\n", "", "\x1b[2J", None, 3, [], {}])
def test_a_tool_that_is_not_the_agents_is_denied_whether_or_not_it_exists(
    config: Any, name: Any
) -> None:
    decision = call(config, {}, name)
    assert decision.verdict == "deny"
    assert decision.rule == "agents/coder.yaml:4 tools"
    assert decision.reason.startswith("this agent has no tool ")
    assert decision.reason.isprintable()
    assert decision.tool is None


@pytest.mark.parametrize("arguments", [None, [], "x", 3, {"text": 1}, {"txt": "x"}, {"TEXT": "x"}])
def test_arguments_against_the_manifest_are_denied(config: Any, arguments: Any) -> None:
    decision = call(config, arguments)
    assert decision.verdict == "deny"
    assert decision.rule == "tools/echo/tool.yaml:6 input"
    assert not decision.argv
    assert not decision.inject


def test_a_value_that_looks_like_an_option_is_denied(config: Any) -> None:
    decision = call(config, {"text": "--output=/etc/passwd"})
    assert decision.verdict == "deny"
    assert decision.rule == "tools/echo/tool.yaml:5 argv"
    assert "passwd" not in decision.reason


def test_no_rule_is_a_denial(rules: Any) -> None:
    decision = rules("rules: []", {})
    assert (decision.verdict, decision.rule) == ("deny", "policies/mine.yaml:3 rules: none matches")
    decision = rules("rules: [{allow: shell}]", {})
    assert decision.verdict == "deny"


def test_the_first_rule_that_matches_decides(rules: Any) -> None:
    decision = rules("rules:\n  - deny: echo\n    reason: not today\n  - allow: '*'\n", {})
    assert (decision.verdict, decision.reason) == ("deny", "not today")
    assert decision.rule == "policies/mine.yaml:4 deny echo"
    decision = rules("rules:\n  - allow: echo\n  - deny: '*'\n", {})
    assert decision.rule == "policies/mine.yaml:4 allow echo"
    assert decision.allowed


@pytest.mark.parametrize(
    ("agents", "verdict"),
    [("coder", "allow"), ("'c*'", "allow"), ("[other, coder]", "allow"), ("other", "deny")],
)
def test_a_rule_can_be_for_some_agents(config: Any, rules: Any, agents: str, verdict: str) -> None:
    config.agent(slug="other")
    assert rules(f"rules: [{{allow: echo, agents: {agents}}}]", {}).verdict == verdict


@pytest.mark.parametrize(
    ("when", "arguments", "allow", "deny"),
    [
        # (condition, arguments, does an allowing rule match, does a denying rule match)
        ("{text: x}", {"text": "x"}, True, True),
        ("{text: x}", {"text": "y"}, False, False),
        ("{text: x}", {}, False, False),
        ("{text: [x, y]}", {"text": "y"}, True, True),
        ("{text: {any_of: [x, y]}}", {"text": "z"}, False, False),
        ("{text: {glob: 'https://a.example/*'}}", {"text": "https://a.example/x"}, True, True),
        (
            "{text: {glob: 'https://a.example/*'}}",
            {"text": "https://a.example.evil/"},
            False,
            False,
        ),
        ("{text: {glob: '*'}}", {"text": "a\nb"}, True, True),
        ("{n: 1}", {"n": 1.0}, True, True),
        ("{any: 1}", {"any": True}, False, False),
        ("{any: true}", {"any": 1}, False, False),
        ("{any: {equals: null}}", {"any": None}, True, True),
        ("{any: {equals: {a: [1]}}}", {"any": {"a": [1.0]}}, True, True),
        ("{any: {equals: {a: [1]}}}", {"any": {"a": [True]}}, False, False),
        ("{list: {glob: 'a*'}}", {"list": ["ab", "ac"]}, True, True),
        ("{list: {glob: 'a*'}}", {"list": ["ab", "x"]}, False, True),
        ("{list: {glob: 'a*'}}", {"list": []}, False, False),
        ("{list: {glob: 'a*'}}", {"list": [["ab"], ["x"]]}, False, True),
        ("{any: {glob: 'a*'}}", {"any": {"x": 1}}, False, True),
        ("{any: {glob: 'a*'}}", {"any": None}, False, True),
        ("{n: {glob: '1*'}}", {"n": 12}, True, True),
        ("{text: x, n: 1}", {"text": "x", "n": 2}, False, False),
        ("{text: x, n: 1}", {"text": "x", "n": 1}, True, True),
    ],
)
def test_conditions_take_the_safe_side(
    rules: Any, when: str, arguments: dict[str, Any], allow: bool, deny: bool
) -> None:
    allowed = rules(f"rules: [{{allow: echo, when: {when}}}]", arguments).allowed
    denied = rules(f"rules: [{{deny: echo, when: {when}}}, {{allow: echo}}]", arguments).allowed
    assert (allowed, not denied) == (allow, deny)


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("", "", True),
        ("*", "", True),
        ("a*", "a", True),
        ("*a", "ba", True),
        ("a*a", "a", False),
        ("a*b*c", "a-b-c", True),
        ("a*b*c", "abbc", True),
        ("a*bc*bc", "abc", False),
        ("a*b", "a*b", True),
        ("a.c", "abc", False),
        ("[a]", "a", False),
    ],
)
def test_a_star_is_the_only_wildcard(pattern: str, text: str, matches: bool) -> None:
    assert matches_glob(pattern, text) is matches


@given(st.text("ab*", max_size=8), st.text("ab", max_size=12))
def test_globs_agree_with_regular_expressions(pattern: str, text: str) -> None:
    import re

    expression = ".*".join(map(re.escape, pattern.split("*")))
    assert matches_glob(pattern, text) == bool(re.fullmatch(expression, text, re.DOTALL))


def test_an_agent_can_not_choose_a_text_that_takes_long_to_judge() -> None:
    started = time.monotonic()
    assert not matches_glob("*a" * 40 + "*b*c", "a" * 1_000_000)
    assert time.monotonic() - started < 1


# Ceilings


def test_network_host_needs_the_tool_and_the_policy(config: Any) -> None:
    config.tool("network: host\n")
    decision = call(config, {})
    assert (decision.allowed, decision.network, decision.lowered) == (True, "host", ("network",))
    config.agent("policy: strict\n")
    decision = call(config, {})
    assert decision.verdict == "deny"
    assert decision.rule == "policies/strict.yaml:4 network"
    assert decision.reason == "echo needs network: host, and policy strict allows none"
    config.policy("mine", "rules: [{allow: echo}]")
    config.agent("policy: mine\n")
    assert call(config, {}).verdict == "deny", "a policy that says nothing allows no network"


@pytest.mark.parametrize(
    ("tool", "policy", "agent", "expected"),
    [
        ("rw", "rw", "rw", "rw"),
        ("rw", "ro", "rw", "ro"),
        ("rw", "rw", "ro", "ro"),
        ("ro", "rw", "rw", "ro"),
        ("none", "none", "none", "none"),
        ("ro", "none", "rw", None),
        ("ro", "rw", "none", None),
        ("rw", "rw", "overlay", "overlay"),
        ("rw", "overlay", "rw", "overlay"),
        ("rw", "ro", "overlay", "ro"),
        ("ro", "rw", "overlay", "ro"),
    ],
)
def test_the_least_access_to_the_workspace_counts(
    config: Any, tool: str, policy: str, agent: str, expected: str | None
) -> None:
    config.tool(f"workspace: {tool}\n")
    config.policy("mine", f"workspace: {policy}\nrules: [{{allow: echo}}]")
    config.agent(f"policy: mine\nworkspace: {{mode: {agent}}}\n")
    decision = call(config, {})
    assert (decision.workspace if decision.allowed else None) == expected
    if decision.allowed:
        # What a tool does in an overlay is what it would do to the workspace itself.
        assert decision.tool.workspace == {"overlay": "rw"}.get(str(expected), expected)


def test_limits_only_narrow(config: Any) -> None:
    config.tool("timeout: 5m\noutput_limit: 8M\nlimits: {memory: 4G, processes: 2}\n")
    config.policy(
        "mine",
        """\
        timeout: 10s
        output_limit: 1K
        limits: {memory: 1M, processes: 100, cpu: 1s}
        rules: [{allow: echo}]
        """,
    )
    config.agent("policy: mine\n")
    decision = call(config, {})
    assert (decision.timeout, decision.output_limit) == (10.0, 1024)
    assert (decision.limits.memory, decision.limits.processes, decision.limits.cpu) == (
        1 << 20,
        2,
        1.0,
    )
    assert decision.tool.timeout == 10.0
    assert decision.tool.limits == decision.limits
    assert [k for k, v in attrs.asdict(decision.limits).items() if v is None] == ["cpus", "io"]


def test_a_session_gets_the_agents_terms_under_its_policy(config: Any) -> None:
    config.agent("limits: {memory: 64G, files: 10}\npolicy: strict\n")
    loaded = config.load()
    terms = session_terms(loaded, loaded.agents["coder"])
    assert (terms.limits.memory, terms.limits.files, terms.network) == (1 << 30, 10, "none")
    assert terms.workspace == "ro"
    assert "network_namespace" in terms.require
    assert terms.lowered == ()
    config.agent("network: host\npolicy: agent\n")
    loaded = config.load()
    terms = session_terms(loaded, loaded.agents["coder"])
    assert (terms.network, terms.lowered) == ("host", ("network",))


# Standard input


def test_the_arguments_go_to_standard_input_as_json(config: Any) -> None:
    config.tool("stdin: json\n", argv="argv: []")
    decision = call(config, {"text": "ü\n\"'-x"})
    assert decision.argv == ()
    assert json.loads(decision.stdin) == {"text": "ü\n\"'-x"}
    assert decision.stdin.endswith(b"}\n")
    assert decision.stdin.count(b"\n") == 1


def test_one_argument_goes_to_standard_input_as_it_is(config: Any) -> None:
    config.tool("stdin: {text: text}\n", argv="argv: []")
    assert call(config, {"text": "-a\nü"}).stdin == "-a\nü".encode()
    assert call(config, {}).stdin == b""


# Totality


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, make_config: Any) -> Config:
    directory = make_config(tmp_path_factory.mktemp("config"))
    directory.tool("stdin: json\n")
    directory.agent(tools="[echo, http_request, sql_query, git, shell]")
    got: Config = directory.load()
    return got


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=10,
)
likely = st.dictionaries(
    st.sampled_from(["text", "url", "command", "sql", "operation", "headers", "Text"]),
    json_values | st.sampled_from(["clone", "GET", "-x", "a\0b", "\ud800"]),
)


@given(
    name=st.sampled_from(["echo", "http_request", "sql_query", "git", "shell"]) | json_values,
    arguments=json_values | likely,
)
def test_any_call_gets_a_decision_and_only_a_fitting_one_is_allowed(
    loaded: Config, name: Any, arguments: Any
) -> None:
    agent = loaded.agents["coder"]
    decision = decide(loaded, agent, name, arguments)
    assert decision.verdict in ("allow", "deny")
    assert decision.rule
    assert decision.reason
    assert decision == decide(loaded, agent, name, arguments), "pure: the same again"
    if decision.allowed:
        assert name in agent.tools
        assert isinstance(arguments, dict)
        assert not any("\0" in word or word.startswith("-") for word in decision.argv[2:])
    else:
        assert not decision.argv
        assert decision.stdin is None
        assert not decision.inject


@given(arguments=json_values | likely)
def test_under_a_policy_without_rules_nothing_is_allowed(loaded: Config, arguments: Any) -> None:
    policy = attrs.evolve(loaded.policies["default"], rules=())
    silent = attrs.evolve(loaded, policies={"default": policy})
    for name in silent.agents["coder"].tools:
        assert not decide(silent, silent.agents["coder"], name, arguments).allowed


@pytest.mark.parametrize("broken", [None, 3, object()])
def test_what_can_not_be_judged_is_denied(loaded: Config, broken: Any) -> None:
    assert decide(broken, broken, "echo", {}).verdict == "deny"
    agent = attrs.evolve(loaded.agents["coder"], policy="gone")
    assert decide(loaded, agent, "echo", {}).verdict == "deny"


def test_arguments_that_refer_to_themselves_are_denied(loaded: Config) -> None:
    knot: dict[str, Any] = {}
    knot["text"] = knot
    assert decide(loaded, loaded.agents["coder"], "echo", knot).verdict == "deny"
