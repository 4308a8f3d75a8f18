"""The shipped policies and tools: they load, and say what their names promise."""

from __future__ import annotations

import os
from typing import Any

import attrs
import pytest

from sandboxd.policy import Config, decide, session_terms


@pytest.fixture
def loaded(config: Any) -> Config:
    for policy in ("default", "strict", "agent"):
        config.agent(
            f"policy: {policy}\n", slug=policy, tools="[shell, git, http_request, sql_query]"
        )
    got: Config = config.load()
    return got


def test_no_shipped_file_makes_a_warning_of_its_own(config: Any) -> None:
    assert [w for w in config.load().warnings if not w.startswith(os.fspath(config.path))] == []


@pytest.mark.parametrize("name", ["default", "strict", "agent"])
def test_a_shipped_policy_allows_only_what_the_agent_lists(loaded: Config, name: str) -> None:
    agent = loaded.agents[name]
    assert decide(loaded, agent, "shell", {"command": "id"}).allowed
    bare = attrs.evolve(agent, tools=())
    assert not decide(loaded, bare, "shell", {"command": "id"}).allowed


@pytest.mark.parametrize(
    ("name", "allowed"), [("default", True), ("strict", False), ("agent", True)]
)
def test_only_strict_denies_tools_that_need_the_network(
    loaded: Config, name: str, allowed: bool
) -> None:
    call = decide(loaded, loaded.agents[name], "http_request", {"url": "https://example.com/"})
    assert call.allowed is allowed
    assert decide(loaded, loaded.agents[name], "shell", {"command": "id"}).network == "none"


def test_strict_has_no_network_and_writes_nothing(loaded: Config) -> None:
    policy = loaded.policies["strict"]
    assert (policy.network, policy.agent_network, policy.workspace) == ("none", "none", "ro")
    assert policy.lowered == ()
    assert decide(loaded, loaded.agents["strict"], "shell", {"command": "id"}).workspace == "ro"


def test_an_agent_has_no_network_unless_its_file_and_the_agent_policy_say_so(
    loaded: Config,
) -> None:
    assert loaded.policies["default"].agent_network == "none"
    agent = loaded.agents["agent"]
    assert session_terms(loaded, agent).network == "none"
    asking = attrs.evolve(agent, network="host")
    assert session_terms(loaded, asking).lowered == ("network",)
    assert session_terms(loaded, attrs.evolve(asking, policy="default")).network == "none"


def test_the_limits_grow_from_strict_over_default_to_agent(loaded: Config) -> None:
    strict, default, agent = (loaded.policies[n] for n in ("strict", "default", "agent"))
    for smaller, larger in ((strict, default), (default, agent)):
        for field in ("limits", "agent_limits"):
            for name, bound in attrs.asdict(getattr(larger, field)).items():
                assert bound is None or getattr(getattr(smaller, field), name) < bound
        assert smaller.timeout < larger.timeout
        assert smaller.output_limit < larger.output_limit


def test_every_policy_bounds_every_limit_of_a_tool(loaded: Config) -> None:
    for policy in loaded.policies.values():
        # Disk traffic is left out: what is much depends on the disk.
        bounded = {k: v for k, v in attrs.asdict(policy.limits).items() if k != "io"}
        assert None not in bounded.values()
