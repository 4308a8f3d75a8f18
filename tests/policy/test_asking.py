"""When a call is decided to be asked about, and who may be told of it."""

from __future__ import annotations

from typing import Any

import pytest

from sandboxd.policy import decide


def decided(config: Any, arguments: dict[str, Any] | None = None) -> Any:
    loaded = config.load()
    return decide(loaded, loaded.agents["coder"], "echo", arguments or {"text": "hi"})


@pytest.fixture
def under(config: Any) -> Any:
    """Decides a call of echo under a policy of these lines."""
    config.agent("policy: mine\n")

    def judged(text: str, arguments: dict[str, Any] | None = None) -> Any:
        config.policy("mine", text)
        return decided(config, arguments)

    return judged


def test_a_decision_to_ask_holds_what_would_run(config: Any, under: Any) -> None:
    config.tool("secrets: [TOKEN]\ntimeout: 90s\n")
    asked = under("rules: [{ask: echo, reason: it matters}]\ntimeout: 30s\napproval_timeout: 2m\n")
    allowed = under("rules: [{allow: echo}]\ntimeout: 30s\napproval_timeout: 2m\n")
    assert (asked.verdict, asked.reason) == ("ask", "it matters")
    assert asked.rule == "policies/mine.yaml:3 ask echo"
    assert not asked.allowed
    for name in ("tool", "argv", "stdin", "inject", "limits", "network", "workspace", "timeout"):
        assert getattr(asked, name) == getattr(allowed, name), name
    assert asked.argv == ("hi",)
    assert asked.approval_timeout == 120


def test_a_call_that_could_not_run_is_denied_and_not_asked_about(config: Any, under: Any) -> None:
    assert under("rules: [{ask: echo}]", {"text": "--option"}).verdict == "deny"
    config.tool("network: host\n")
    assert under("rules: [{ask: echo}]\nnetwork: none\n").verdict == "deny"


@pytest.mark.parametrize(
    ("manifest", "rules", "verdict"),
    [
        ("none", "[{allow: echo}]", "allow"),
        ("none", "[{ask: echo}]", "ask"),
        ("ask", "[{allow: echo}]", "ask"),
        ("ask", "[{allow: echo, approved: false}]", "ask"),
        ("ask", "[{allow: echo, approved: true}]", "allow"),
        ("ask", "[{deny: echo}]", "deny"),
        ("ask", "[{ask: echo}, {allow: echo, approved: true}]", "ask"),
        ("none", "[{allow: echo, when: {text: no}}, {ask: echo}]", "ask"),
        ("none", "[{ask: echo, when: {text: no}}, {allow: echo}]", "allow"),
        ("ask", "[]", "deny"),
    ],
)
def test_the_strictest_of_manifest_and_rule_counts_unless_a_rule_says_approved(
    config: Any, under: Any, manifest: str, rules: str, verdict: str
) -> None:
    config.tool(f"approval: {manifest}\n")
    assert under(f"rules: {rules}").verdict == verdict


def test_the_manifest_is_named_when_it_is_what_asks(config: Any, under: Any) -> None:
    config.tool("approval: ask\n")
    asked = under("rules: [{allow: echo, reason: fine with me}]")
    assert asked.reason == "tools/echo/tool.yaml:11 approval: it wants an operator's approval"
    assert asked.rule == "policies/mine.yaml:3 allow echo"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [(["/prod/a"], "ask"), (["/test/a", "/prod/a"], "ask"), (["/test/a"], "allow"), ([], "allow")],
)
def test_one_matching_element_of_a_list_is_enough_to_ask(
    config: Any, under: Any, values: list[str], verdict: str
) -> None:
    path = config.path / "tools/echo/tool.yaml"
    kind = "{type: array, items: {type: string}}"
    path.write_text(path.read_text().replace("{type: string}", kind))
    rules = "rules: [{ask: echo, when: {text: {glob: '/prod/*'}}}, {allow: echo}]"
    assert under(rules, {"text": values}).verdict == verdict


def test_an_approval_timeout_only_narrows(config: Any, under: Any) -> None:
    assert under("rules: [{ask: echo}]").approval_timeout == 300
    config.policy("base", "approval_timeout: 1m\nrules: [{ask: echo}]\n")
    assert under("extends: base").approval_timeout == 60
    assert under("extends: base\napproval_timeout: 30s").approval_timeout == 30
    assert under("extends: base\napproval_timeout: 1h").approval_timeout == 60


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rules: [{ask: ehco}]\n", "3:15: no tool 'ehco'"),
        ("rules: [{ask: echo, allow: echo}]\n", "3:9: expected exactly one of allow, deny and ask"),
        ("rules: [{ask: echo, when: {txt: x}}]\n", "3:28: no tool that this rule matches has"),
        ("rules: [{ask: echo, approved: true}]\n", "3:31: approved: true in a rule that says ask"),
        ("rules: [{deny: echo, approved: true}]\n", "3:32: approved: true in a rule that says de"),
        ("rules: [{allow: echo, approved: yes}]\n", "3:33: rules[0].approved: expected true or f"),
        ("approval_timeout: 0\n", "3:19: approval_timeout: expected a duration over zero"),
        ("approval_timeout: soon\n", "3:19: approval_timeout: expected a duration"),
    ],
)
def test_a_mistake_about_asking_is_told_with_its_place(
    config: Any, text: str, problem: str
) -> None:
    config.policy("mine", text)
    assert config.problem().startswith(f"policies/mine.yaml:{problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("webhook: {}", "2:22: missing key 'url' in approvals.webhook"),
        ("webhook: {url: ftp://a/}", "2:28: approvals.webhook.url: expected the URL of a web serv"),
        ("webhook: {url: 'https://'}", "2:28: approvals.webhook.url: expected the URL of a web s"),
        ("webhook: {url: 'https://me:pw@a/'}", "2:28: approvals.webhook.url: a URL with a user n"),
        ('webhook: {url: "https://a/\\u202e"}', "2:28: approvals.webhook.url: expected the URL"),
        ("webhook: {url: 'https://a/', secret_file: /k, credential: k}", "2:22: expected at most"),
        ("webhook: {url: 'https://a/', credential: ../k}", "2:54: expected a credential's name"),
        ("command: {argv: [notify-send]}", "2:29: expected a program by its absolute path"),
        ("command: {argv: []}", "2:29: expected a program by its absolute path"),
        ("command: {argv: [/no/such/program]}", "2:29: /no/such/program is not a program"),
        ("command: {argv: [/etc]}", "2:29: /etc is not a program"),
        ("command: {argv: [/bin/true], environment: {A=B: c}}", "2:56: 'A…' is not a variable"),
        ("max_waiting: 0", "2:26: approvals.max_waiting: expected a whole number from 1"),
        ("max_wait: 3", "2:13: unknown key 'max_wait' in approvals"),
    ],
)
def test_a_mistake_about_hooks_is_told_with_its_place(config: Any, text: str, problem: str) -> None:
    config.write("sandboxd.yaml", f"version: 1\napprovals: {{{text}}}\n")
    assert config.problem().startswith(f"sandboxd.yaml:{problem}")


def test_a_hooks_program_that_others_can_change_is_refused(config: Any) -> None:
    program = config.program("hook")
    config.write("sandboxd.yaml", f"version: 1\napprovals: {{command: {{argv: [{program}]}}}}\n")
    assert config.load().settings.approvals.command.argv == (str(program),)
    program.chmod(0o777)
    assert "can't be trusted" in config.problem()


def test_a_hooks_program_that_an_agent_can_write_is_refused(config: Any, tmp_path: Any) -> None:
    directory = tmp_path / "work"
    directory.mkdir(mode=0o755)
    program = directory / "hook"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    config.write("sandboxd.yaml", f"version: 1\napprovals: {{command: {{argv: [{program}]}}}}\n")
    config.agent(f"workspace: {{path: {directory}, mode: ro}}\n")
    config.load()
    config.agent(f"workspace: {{path: {directory}}}\n")
    assert "would let an agent change the program that operators are told by" in config.problem()


@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_the_webhooks_secret_is_shown_in_no_sandbox(config: Any, tmp_path: Any, mode: str) -> None:
    directory = tmp_path / "work"
    directory.mkdir(mode=0o755)
    hook = f"{{webhook: {{url: 'https://a.example/', secret_file: {directory}/key}}}}"
    config.write("sandboxd.yaml", f"version: 1\napprovals: {hook}\n")
    config.agent(f"workspace: {{path: {directory}, mode: {mode}}}\n")
    assert "would show the webhook's secret" in config.problem()


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://hooks.example/", True),
        ("https://hooks.example/", False),
        ("http://127.0.0.1:8080/", False),
    ],
)
def test_a_webhook_in_the_clear_is_warned_about(config: Any, url: str, warned: bool) -> None:
    config.write("sandboxd.yaml", f"version: 1\napprovals: {{webhook: {{url: '{url}'}}}}\n")
    assert any("use https" in warning for warning in config.load().warnings) is warned
