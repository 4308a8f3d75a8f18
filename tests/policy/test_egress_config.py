"""``egress`` in files: what it comes to under a policy, and what can't be meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sandboxd.paths import shipped
from sandboxd.policy import Config, ConfigErrors, load_config
from sandboxd.policy.decide import decide, session_terms
from sandboxd.policy.destinations import destination
from sandboxd.policy.egress import decide_egress, egress_lines
from sandboxd.policy.explain import explain_egress

NETWORK = Path(__file__).parents[2] / "docs/network.md"

AGENT = """
version: 1
description: an agent
command: [/bin/true]
policy: POLICY
tools: [TOOLS]
egress: EGRESS
"""
POLICY = """
version: 1
description: a policy
rules: [{allow: "*"}]
"""


def load(tmp_path: Path, **files: str) -> Config:
    for name, text in files.items():
        kind, _, stem = name.partition("_")
        path = tmp_path / kind / f"{stem}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return load_config(
        tmp_path, shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )


def agent(egress: str, policy: str = "mine", tools: str = "") -> str:
    return AGENT.replace("EGRESS", egress).replace("POLICY", policy).replace("TOOLS", tools)


def may(config: Config, host: str, port: int = 443, method: str = "") -> str:
    """The rule that allows the agent ``one`` a destination, or why not, after a dash."""
    terms = session_terms(config, config.agents["one"]).egress
    verdict = decide_egress(terms, destination(host, port), method)
    return verdict.rule if verdict.admission is not None else f"- {verdict.reason}"


def test_the_manuals_example_does_what_it_says(tmp_path: Path) -> None:
    for name, text in re.findall(r"```yaml\n# (\S+)\n(.*?)```", NETWORK.read_text(), re.S):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    config = load(tmp_path)
    found = explain_egress(config, config.agents["reporter"], None, "api.example.com:443")
    assert (found["verdict"], found["rule"]) == (
        "allow",
        "agents/reporter.yaml:7 allow api.example.com:443",
    )
    assert found["allows"] == [
        "api.example.com:443",
        "relay db.internal:5432",
        "within: *.example.com:443, db.internal:5432 (at 10.1.0.0/16)",
    ]
    relay = explain_egress(config, config.agents["reporter"], None, "db.internal:5432")
    assert relay["verdict"] == "allow"


def test_file_and_policy_both_have_to_name_a_destination(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        agents_one=agent("{allow: [{host: '*.example.com', ports: [443, 22]}, {host: x.org}]}"),
        policies_mine=POLICY + "egress: [{host: '*.example.com'}, {host: y.org}]",
    )
    assert may(config, "api.example.com").startswith("agents/one.yaml:7 allow *.example.com")
    assert may(config, "api.example.com", 22) == "- no rule allows port 22 of api.example.com"
    assert may(config, "x.org") == "- no rule names the host x.org"
    assert may(config, "y.org") == "- no rule names the host y.org"


def test_a_policy_that_extends_another_can_only_narrow(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        agents_one=agent("{allow: [{host: a.example.com}, {host: b.example.com}, {host: c.org}]}"),
        policies_base=POLICY + "egress: [{host: '*.example.com'}]",
        policies_mine=POLICY + "extends: base\negress: [{host: a.example.com}, {host: c.org}]",
    )
    assert may(config, "a.example.com").startswith("agents/one.yaml")
    assert may(config, "b.example.com") == "- no rule names the host b.example.com"
    assert may(config, "c.org") == "- no rule names the host c.org"


def test_where_a_policy_allows_the_hosts_network_it_bounds_nothing(tmp_path: Path) -> None:
    config = load(tmp_path, agents_one=agent("{allow: [{host: a.org}]}", policy="agent"))
    assert may(config, "a.org").startswith("agents/one.yaml")
    assert may(config, "b.org") == "- no rule names the host b.org"


def test_egress_that_no_policy_bounds_is_an_error_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as raised:
        load(tmp_path, agents_one=agent("{allow: [{host: a.org}]}"), policies_mine=POLICY)
    (error,) = raised.value.errors
    assert "one.yaml:7" in str(error)
    assert "policy 'mine' allows its agents none" in str(error)


@pytest.mark.parametrize(
    ("egress", "message"),
    [
        ("{allow: [{host: '*.com'}]}", "would allow a whole top-level domain"),
        ("{allow: [{host: 127.1}]}", "text"),
        ("{allow: [{host: '127.1'}]}", "neither a host name nor an address"),
        ("{allow: [{host: a.org, ports: [0]}]}", "expected a port from 1 to 65535"),
        ("{allow: [{host: a.org, methods: [get]}]}", "expected a method of HTTP"),
        ("{allow: [{host: a.org, methods: [CONNECT]}]}", "expected a method of HTTP"),
        ("{allow: [{host: a.org, addresses: [10.0.0.1/8]}]}", "not an address or a network"),
        ("{allow: [{hosts: a.org}]}", "unknown key 'hosts'"),
        ("{relays: [{to: db.internal}]}", "is not a host and a port"),
        ("{relays: [{to: '10.0.0.1:5432'}]}", "a relay appears under a name"),
        ("{relays: [{to: 'a.b:1'}, {to: 'a.b:1'}]}", "is relayed twice"),
        ("{allow: [{host: a.org}]}\nnetwork: host", "egress beside network: host"),
        ("{gateways: [{port: 4000, secret: K}]}", "expected a preset or an upstream"),
        (
            "{gateways: [{port: 4000, secret: K, upstream: 'http://a.org'}]}",
            "would travel in the clear",
        ),
        ("{gateways: [{port: 3128, secret: K, preset: openai}]}", "port 3128 is the proxy's"),
        (
            "{gateways: [{port: 1, secret: K, preset: openai}, "
            "{port: 1, secret: K, preset: github}]}",
            "port 1 is another gateway's",
        ),
        ("{gateways: [{port: 1, secret: K, preset: openai, scheme: basic}]}", "belong together"),
        ("{gateways: [{port: 1, secret: K, preset: openai, paths: [v1]}]}", "expected a path"),
        ("{placeholders: [{secret: K, hosts: []}]}", "expected at least one host"),
        ("{placeholders: [{secret: K, hosts: ['*.a.org']}]}", "is not the name of one host"),
        ("{placeholders: [{secret: K, hosts: ['93.184.216.34']}]}", "is not the name of one host"),
        (
            "{placeholders: [{secret: K, hosts: [a.org]}, {secret: L, as: K, hosts: [b.org]}]}",
            "K is another placeholder's",
        ),
        ("{gateways: [{port: 1, secret: K, preset: opnai}]}", "expected anthropic or openai"),
    ],
)
def test_what_can_not_be_meant_is_told_with_its_place(
    tmp_path: Path, egress: str, message: str
) -> None:
    with pytest.raises(ConfigErrors) as raised:
        load(
            tmp_path,
            agents_one=agent(egress, policy="agent"),
        )
    assert any(message in str(error) and "one.yaml:" in str(error) for error in raised.value.errors)


def test_a_tool_has_its_own_and_its_agents_policy_bounds_it(tmp_path: Path) -> None:
    folder = tmp_path / "tools/fetch"
    folder.mkdir(parents=True)
    (folder / "fetch").write_text("#!/bin/sh\n")
    (folder / "fetch").chmod(0o755)
    (folder / "tool.yaml").write_text(
        "version: 1\nname: fetch\ndescription: fetches\nprogram: fetch\n"
        "input: {type: object}\negress: {allow: [{host: a.example.com}, {host: b.org}]}\n"
    )
    config = load(
        tmp_path,
        agents_one=agent("{}", tools="fetch"),
        policies_mine=POLICY + "egress: [{host: '*.example.com'}]",
    )
    decision = decide(config, config.agents["one"], "fetch", {})
    assert decision.allowed
    assert egress_lines(decision.egress) == [
        "a.example.com:443",
        "b.org:443",
        "within: *.example.com:443",
    ]
    for host, verdict in (("a.example.com", "allow"), ("b.org", "deny")):
        found = explain_egress(config, config.agents["one"], config.tools["fetch"], host)
        assert found["verdict"] == verdict
    assert may(config, "a.example.com") == "- no rule names the host a.example.com"
