"""Decisions for any rules and any call: total, deny by default, and never wider when narrowed."""

from __future__ import annotations

import typing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.policy import Config, Limits, Policy, Rule, decide
from sandboxd.policy.explain import explain_call, outlook
from sandboxd.policy.model import Access, Condition, Network
from sandboxd.policy.policyfile import Globs, PolicyFile, RuleFile, Written, resolve_policies
from sandboxd.policy.problems import Problems
from sandboxd.policy.values import Count, Duration, Glob, Line, Size, Slug
from sandboxd.policy.yamlpos import Document

ORDER = ("deny", "ask", "allow")
WORDS = ("a", "b", "ab", "", "c")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, make_config: Any) -> Config:
    config = make_config(tmp_path_factory.mktemp("config"))
    config.tool(
        argv="argv: [{operands: ['{text}']}]",
        more="workspace: ro\nlimits: {memory: 64M, files: 20}\ntimeout: 20s\n",
    )
    config.agent("workspace: {mode: rw}\n")
    return typing.cast(Config, config.load())


def under(config: Config, policy: Policy) -> Config:
    return attrs.evolve(config, policies=MappingProxyType({"default": policy}))


globs = st.sampled_from(["*", "echo", "e*", "*o", "other", "x*"]).map(Glob)
agents = st.sampled_from(["*", "coder", "c*", "nobody"]).map(Glob)
conditions = st.builds(
    Condition, any_of=st.lists(st.sampled_from(WORDS), min_size=1, max_size=2).map(tuple)
) | st.builds(Condition, glob=st.sampled_from(["*", "a*", "*b", "a"]))
rules = st.builds(
    Rule,
    st.sampled_from(ORDER),
    st.lists(globs, min_size=1, max_size=2).map(tuple),
    st.lists(agents, min_size=1, max_size=2).map(tuple),
    st.dictionaries(st.just("text"), conditions, max_size=1),
    source=st.just("policies/p.yaml:1"),
)
limits = st.builds(
    Limits,
    memory=st.none() | st.integers(1, 1 << 30).map(Size),
    processes=st.none() | st.integers(1, 99).map(Count),
    files=st.none() | st.integers(1, 99).map(Count),
    cpu=st.none() | st.floats(0.1, 99).map(Duration),
)
policies = st.builds(
    Policy,
    name=st.just(Slug("p")),
    description=st.just(Line("d")),
    rules=st.lists(rules, max_size=4).map(tuple),
    network=st.sampled_from(typing.get_args(Network)),
    workspace=st.sampled_from(typing.get_args(Access)),
    limits=limits,
    timeout=st.none() | st.floats(0.1, 99).map(Duration),
    output_limit=st.none() | st.integers(1, 1 << 21).map(Size),
    source=st.just("policies/p.yaml"),
)
calls = st.fixed_dictionaries({}, optional={"text": st.sampled_from(WORDS)})


def narrower(one: Any, other: Any) -> bool:
    """Whether no bound of ``one`` is wider than that of ``other``; None is no bound."""
    pairs = zip(attrs.astuple(one), attrs.astuple(other), strict=True)
    return all(b is None or (a is not None and a <= b) for a, b in pairs)


def first_match(policy: Policy, text: str | None) -> str:
    """The verdict by the manual's words, and by nothing of the code that is tested."""
    import fnmatch

    def holds(condition: Condition) -> bool:
        if text is None:
            return False
        if condition.glob is not None:
            return fnmatch.fnmatchcase(text, condition.glob)
        return text in condition.any_of

    for rule in policy.rules:
        if (
            any(fnmatch.fnmatchcase("echo", glob) for glob in rule.tools)
            and any(fnmatch.fnmatchcase("coder", glob) for glob in rule.agents)
            and all(holds(condition) for condition in rule.when.values())
        ):
            return rule.verdict
    return "deny"


@given(policy=policies, arguments=calls)
def test_the_first_rule_that_matches_decides_and_none_is_a_denial(
    loaded: Config, policy: Policy, arguments: dict[str, Any]
) -> None:
    decision = decide(under(loaded, policy), loaded.agents["coder"], "echo", arguments)
    wanted = first_match(policy, arguments.get("text"))
    if policy.workspace == "none" and wanted != "deny":
        assert (decision.verdict, decision.rule) == ("deny", "policies/p.yaml workspace")
    else:
        assert decision.verdict == wanted


@given(policy=policies, arguments=calls, rule=rules)
def test_a_denying_rule_on_top_never_allows_more(
    loaded: Config, policy: Policy, arguments: dict[str, Any], rule: Rule
) -> None:
    agent = loaded.agents["coder"]
    before = decide(under(loaded, policy), agent, "echo", arguments)
    denying = attrs.evolve(rule, verdict="deny")
    stricter = attrs.evolve(policy, rules=(denying, *policy.rules))
    after = decide(under(loaded, stricter), agent, "echo", arguments)
    assert after.verdict in ("deny", before.verdict)


@given(policy=policies, arguments=calls, more=limits, timeout=st.floats(0.1, 99))
def test_narrower_ceilings_never_give_more(
    loaded: Config, policy: Policy, arguments: dict[str, Any], more: Limits, timeout: float
) -> None:
    agent = loaded.agents["coder"]
    tight = attrs.evolve(
        policy,
        limits=policy.limits.narrowed(more),
        timeout=Duration(min(timeout, policy.timeout or timeout)),
        network="none",
    )
    before = decide(under(loaded, policy), agent, "echo", arguments)
    after = decide(under(loaded, tight), agent, "echo", arguments)
    assert ORDER.index(after.verdict) <= ORDER.index(before.verdict)
    if after.verdict != "deny":
        assert narrower(after.limits, before.limits)
        assert narrower(after.limits, loaded.tools["echo"].limits)
        assert after.timeout <= min(before.timeout, loaded.tools["echo"].timeout)
        assert after.output_limit <= before.output_limit


@given(one=limits, two=limits, three=limits)
def test_narrowing_is_the_meet_of_two_bounds(one: Limits, two: Limits, three: Limits) -> None:
    both = one.narrowed(two)
    assert both == two.narrowed(one)
    assert both.narrowed(three) == one.narrowed(two.narrowed(three))
    assert one.narrowed(one) == one
    assert narrower(both, one)
    assert narrower(both, two)


@given(policy=policies, arguments=calls)
def test_what_is_explained_and_looked_up_is_what_is_decided(
    loaded: Config, policy: Policy, arguments: dict[str, Any]
) -> None:
    config, agent = under(loaded, policy), loaded.agents["coder"]
    decision = decide(config, agent, "echo", arguments)
    told = explain_call(config, agent, "echo", arguments)
    assert (told["verdict"], told["rule"]) == (decision.verdict, decision.rule)
    seen = outlook(config)["coder"]["echo"]
    assert seen["verdict"] in (decision.verdict, "by argument")
    if decision.verdict != "deny":
        assert seen["limits"] == told["limits"]
        assert (seen["timeout"], seen["workspace"]) == (told["timeout"], told["workspace"])


written = st.builds(
    PolicyFile,
    description=st.just(Line("d")),
    rules=st.lists(
        st.builds(RuleFile, allow=st.just(Globs((Glob("*"),))), reason=st.just(Line("r"))),
        max_size=2,
    ).map(tuple),
    network=st.none() | st.sampled_from(typing.get_args(Network)),
    workspace=st.none() | st.sampled_from(typing.get_args(Access)),
    limits=limits,
    agent_limits=limits,
    timeout=st.none() | st.floats(0.1, 99).map(Duration),
    require=st.lists(st.sampled_from(["landlock", "seccomp"]), max_size=2).map(tuple),
)


@given(files=st.lists(written, min_size=3, max_size=3))
def test_a_policy_never_gives_more_than_what_it_extends(files: list[PolicyFile]) -> None:
    chain = {
        name: Written(
            Document(str(Path(f"{name}.yaml"))),
            f"policies/{name}.yaml",
            False,
            attrs.evolve(file, extends=Slug(parent) if parent else None),
        )
        for file, name, parent in zip(files, "abc", ("", "a", "b"), strict=True)
    }
    problems = Problems()
    found = resolve_policies(chain, frozenset(), problems)
    if problems.errors:  # only ever for what would be wider
        assert all("is wider than the" in error.message for error in problems.errors)
        return
    for child, parent in ((found["b"], found["a"]), (found["c"], found["b"])):
        assert narrower(child.limits, parent.limits)
        assert narrower(child.agent_limits, parent.agent_limits)
        assert parent.timeout is None or (child.timeout or 0) <= parent.timeout
        for order, key in ((Network, "network"), (Network, "agent_network"), (Access, "workspace")):
            steps = typing.get_args(order)
            assert steps.index(getattr(child, key)) <= steps.index(getattr(parent, key))
        assert set(parent.require) <= set(child.require)
        assert child.rules[len(child.rules) - len(parent.rules) :] == parent.rules
