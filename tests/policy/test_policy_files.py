"""Policy files: rules, what they name, and how one extends another."""

from __future__ import annotations

from typing import Any

import pytest

from sandboxd.policy.decide import decide, session_terms


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rules: {allow: echo}\n", "3:8: rules: expected a list, found a mapping"),
        ("rules: [{}]\n", "3:9: expected exactly one of allow, deny and ask in a rule"),
        (
            "rules: [{allow: echo, deny: echo}]\n",
            "3:9: expected exactly one of allow, deny and ask",
        ),
        ("rules: [{allow: []}]\n", "3:17: rules[0].allow: expected at least one name or pattern"),
        ("rules: [{allow: Echo}]\n", "3:17: rules[0].allow: expected a name or a pattern with *"),
        ("rules: [{allow: [echo, 3]}]\n", "3:24: rules[0].allow[1]: expected text"),
        ("rules: [{allow: ehco}]\n", "3:17: no tool 'ehco'"),
        ("rules: [{allow: [echo, ehco]}]\n", "3:24: no tool 'ehco'"),
        ("rules: [{allow: echo, agents: nobody}]\n", "3:31: no agent 'nobody'"),
        ("rules: [{allow: echo, agent: coder}]\n", "3:23: unknown key 'agent' in rules[0]"),
        ("rules: [{allow: echo, when: {txt: x}}]\n", "3:30: no tool that this rule matches has"),
        ("rules: [{allow: echo, when: {text: {regex: x}}}]\n", "3:36: rules[0].when.text: expect"),
        ("rules: [{allow: echo, when: {text: {any_of: []}}}]\n", "3:45: rules[0].when.text.any_of"),
        ("rules: [{allow: echo, when: {text: {glob: 3}}}]\n", "3:43: rules[0].when.text.glob: exp"),
        ("rules: [{allow: echo, when: {text: {glob: null}}}]\n", "3:43: rules[0].when.text.glob: "),
        ("rules: [{allow: echo, reason: ''}]\n", "3:31: rules[0].reason: expected some text"),
        ("network: hosts\n", "3:10: network: expected none or host"),
        ("require: [selinux]\n", "3:11: require[0]: expected user_namespace or mount_namespace"),
        ("extends: nope\n", "3:10: no policy 'nope'"),
        ("extends: mine\n", "3:10: 'mine' extends itself, in a circle"),
        ("agent_network: host\n", "3:16: agent_network: host needs network: host"),
        ("extends: strict\nnetwork: host\n", "4:10: network: host is wider than the none of"),
        ("extends: strict\nworkspace: rw\n", "4:12: workspace: rw is wider than the ro of"),
        ("extends: default\nagent_network: host\n", "4:16: agent_network: host is wider than"),
        ("name: mine\n", "3:1: unknown key 'name'"),
        ("lower: [landlock]\n", "3:9: lower: nothing requires landlock"),
        ("extends: strict\nlower: [cgroup]\n", "4:9: lower: 'strict' does not require cgroup"),
        (
            "extends: strict\nrequire: [landlock]\nlower: [landlock]\n",
            "5:9: landlock is both required and lowered here",
        ),
    ],
)
def test_a_mistake_in_a_policy_is_told_with_its_place(config: Any, text: str, problem: str) -> None:
    config.policy("mine", text)
    assert config.problem().startswith(f"policies/mine.yaml:{problem}")


def test_a_circle_is_told_once_in_each_of_its_files(config: Any) -> None:
    config.policy("a", "extends: b\n")
    config.policy("b", "extends: c\n")
    config.policy("c", "extends: a\n")
    config.policy("outside", "extends: a\n")
    assert config.problems() == [
        f"policies/{name}.yaml:3:10: '{name}' extends itself, in a circle" for name in "abc"
    ]


def test_a_pattern_that_matches_nothing_is_a_warning(config: Any) -> None:
    config.policy("mine", "rules: [{allow: 'ehc*'}]")
    (warning,) = [w for w in config.load().warnings if "mine" in w]
    assert warning.endswith("policies/mine.yaml:3:17: 'ehc*' matches no tool")


def test_a_policy_puts_its_rules_before_those_of_what_it_extends(config: Any) -> None:
    config.policy("mine", "extends: default\nrules: [{deny: echo}]")
    rules = config.load().policies["mine"].rules
    assert [rule.title.split(" ", 1)[1] for rule in rules] == ["deny echo", "allow *"]
    assert rules[0].source == "policies/mine.yaml:4"
    assert rules[1].source.startswith("policies/default.yaml:")


def test_ceilings_and_limits_come_from_what_is_extended_and_narrow(config: Any) -> None:
    config.policy(
        "mine",
        "extends: default\nnetwork: none\ntimeout: 1h\nlimits: {memory: 1G, cpu: 1h}\n"
        "require: [landlock]\n",
    )
    loaded = config.load()
    mine, default = loaded.policies["mine"], loaded.policies["default"]
    assert (mine.network, mine.agent_network, mine.workspace) == ("none", "none", "rw")
    assert mine.timeout == default.timeout
    assert (mine.limits.memory, mine.limits.cpu) == (1 << 30, default.limits.cpu)
    assert mine.limits.files == default.limits.files
    assert mine.require == ("landlock",)
    assert mine.lowered == ()


def test_a_requirement_is_lowered_by_name_and_that_is_told(config: Any) -> None:
    config.policy("mine", "extends: strict\nlower: [landlock, seccomp]\n")
    config.policy("below", "extends: mine\nrequire: [seccomp]\n")
    config.agent("policy: mine\n")
    loaded = config.load()
    mine, below, strict = (loaded.policies[name] for name in ("mine", "below", "strict"))
    assert {*strict.require} - {*mine.require} == {"landlock", "seccomp"}
    assert mine.lowered == ("landlock", "seccomp")
    assert (below.lowered, "seccomp" in below.require) == (("landlock",), True)
    assert session_terms(loaded, loaded.agents["coder"]).lowered == ("landlock", "seccomp")
    call = decide(loaded, loaded.agents["coder"], "echo", {"text": "x"})
    assert (call.verdict, call.lowered) == ("allow", ("landlock", "seccomp"))
    told = [w.replace(f"{config.path}/", "") for w in loaded.warnings if "mine.yaml" in w]
    assert told == [
        f"policies/mine.yaml:4:{column}: lower: sessions under this policy start also where there "
        f"is no {feature}"
        for column, feature in ((9, "landlock"), (19, "seccomp"))
    ]


def test_a_tool_on_the_hosts_network_is_denied_where_a_namespace_is_required(config: Any) -> None:
    config.policy("mine", "network: host\nrequire: [network_namespace]\nrules: [{allow: '*'}]")
    config.tool("network: host\n")
    config.agent("policy: mine\n")
    loaded = config.load()
    denied = decide(loaded, loaded.agents["coder"], "echo", {"text": "x"})
    assert (denied.verdict, denied.rule) == ("deny", "policies/mine.yaml:4 require")
    assert "requires network_namespace" in denied.reason
    config.tool()
    assert decide(config.load(), loaded.agents["coder"], "echo", {"text": "x"}).allowed


def test_a_policy_three_deep_keeps_every_bound(config: Any) -> None:
    config.policy("a", "timeout: 10s\nnetwork: host\nrules: [{allow: echo}]")
    config.policy("b", "extends: a\nlimits: {memory: 1M}\nrules: []")
    config.policy("c", "extends: b\nnetwork: none\n")
    c = config.load().policies["c"]
    assert (c.timeout, c.limits.memory, c.network) == (10.0, 1 << 20, "none")
    assert [rule.title for rule in c.rules] == ["policies/a.yaml:5 allow echo"]


def test_a_policy_of_ones_own_takes_the_place_of_a_shipped_one(config: Any) -> None:
    config.policy("default", "rules: [{deny: '*'}]")
    policy = config.load().policies["default"]
    assert not policy.shipped
    assert policy.rules[0].verdict == "deny"


def test_a_broken_policy_does_not_fall_back_to_the_shipped_one(config: Any) -> None:
    config.policy("default", "rules: nonsense")
    assert config.problem().startswith("policies/default.yaml:3:8")
