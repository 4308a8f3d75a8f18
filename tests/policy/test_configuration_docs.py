"""docs/configuration.md: its examples load, and it names exactly the keys that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sandboxd.paths import shipped
from sandboxd.policy import (
    Config,
    decide,
    destinations,
    egress,
    gateways,
    load_config,
    model,
    placeholders,
)
from sandboxd.policy.policyfile import PolicyFile, RuleFile
from sandboxd.policy.structure import keys_of

DOCUMENT = Path(__file__).parents[2] / "docs/configuration.md"


def section(title: str) -> str:
    """The text below a heading, down to the next one."""
    text = DOCUMENT.read_text()
    match = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##+ |\Z)", text, re.M | re.S)
    assert match, title
    return match[1]


@pytest.fixture
def loaded(tmp_path: Path) -> Config:
    examples = re.findall(r"<!-- file: (\S+) -->\n```yaml\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert len(examples) == 5
    for name, text in examples:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    program = tmp_path / "tools/issues/search"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return load_config(
        tmp_path, shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )


def test_every_yaml_block_is_an_example_that_a_test_loads() -> None:
    text = DOCUMENT.read_text()
    assert text.count("```yaml") == text.count("<!-- file: ")


def test_the_examples_load_without_a_warning(loaded: Config) -> None:
    assert loaded.warnings == ()


def test_the_example_call_becomes_what_the_text_says(loaded: Config) -> None:
    agent = loaded.agents["researcher"]
    arguments = {"query": "crash", "labels": ["bug", "p1"], "closed": True}
    decision = decide(loaded, agent, "issues", arguments)
    assert decision.allowed
    assert f"`{' '.join(decision.argv)}`" in DOCUMENT.read_text()


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"url": "https://tracker.example/1"}, True),
        ({"url": "https://tracker.example/1", "method": "GET"}, True),
        ({"url": "https://tracker.example/1", "method": "POST"}, False),
        ({"url": "https://tracker.example.evil/1"}, False),
    ],
)
def test_the_example_policy_does_what_it_says(
    loaded: Config, arguments: dict[str, Any], allowed: bool
) -> None:
    decision = decide(loaded, loaded.agents["researcher"], "http_request", arguments)
    assert decision.allowed is allowed


@pytest.mark.parametrize(
    ("title", "cls"),
    [
        ("sandboxd.yaml", model.Settings),
        ("key", model.Key),
        ("teams", model.Team),
        ("uid_range", model.UidRange),
        ("approvals", model.ApprovalSettings),
        ("webhook", model.Webhook),
        ("command", model.CommandHook),
        ("http", model.HttpSettings),
        ("tls", model.Tls),
        ("http limits", model.HttpLimits),
        ("agents/NAME.yaml", model.Agent),
        ("workspace", model.Workspace),
        ("mounts", model.Mount),
        ("tools/NAME/tool.yaml", model.Tool),
        ("secrets", model.SecretSpec),
        ("concurrency", model.Concurrency),
        ("limits", model.Limits),
        ("egress", egress.Egress),
        ("allow in egress", destinations.DestinationRule),
        ("relays in egress", egress.Relay),
        ("gateways in egress", gateways.Gateway),
        ("placeholders in egress", placeholders.Placeholder),
        ("policies/NAME.yaml", PolicyFile),
        ("rules", RuleFile),
    ],
)
def test_a_section_names_exactly_the_keys_that_there_are(title: str, cls: type) -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \|", section(title), re.M)
    assert sorted(rows) == sorted(keys_of(cls))


def test_the_table_of_shipped_policies_is_true(loaded: Config) -> None:
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:4]]
        for line in section("The shipped policies").splitlines()
        if line.startswith("|") and len(cells := line.strip("|").split("|")) == 4
    }
    for index, name in enumerate(("default", "strict", "agent")):
        policy = loaded.policies[name]
        assert rows["workspace"][index] == policy.workspace
        assert (rows["network of tools"][index] == "none") == (policy.network == "none")
        assert (rows["network of the agent"][index] == "none") == (policy.agent_network == "none")
        for row, limits in (
            ("a call, at most", policy.limits),
            ("an agent, at most", policy.agent_limits),
        ):
            assert limits.memory is not None
            memory = limits.memory
            text = f"{memory >> 30}G" if memory >= 1 << 30 else f"{memory >> 20}M"
            assert text in rows[row][index]
        assert f"{policy.agent_limits.processes} processes" in rows["an agent, at most"][index]
