"""Policy files and how one extends another: its rules come first, its ceilings only narrow."""

# ruff: noqa: RUF009 - every default is a frozen value
from __future__ import annotations

import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs

from sandboxd.policy.destinations import DestinationRule
from sandboxd.policy.egress import placed_rules
from sandboxd.policy.model import (
    Access,
    Condition,
    Feature,
    Limits,
    Network,
    Policy,
    Rule,
    Verdict,
    least,
)
from sandboxd.policy.problems import Problems
from sandboxd.policy.values import Duration, Glob, Line, Size, Slug, nearest
from sandboxd.policy.yamlpos import Document

__all__ = ["Globs", "PolicyFile", "RuleFile", "Written", "resolve_policies"]


@attrs.frozen
class Globs:
    """One pattern or a list of them."""

    patterns: tuple[Glob, ...]


def _none() -> Mapping[str, Any]:
    return MappingProxyType({})


@attrs.frozen
class RuleFile:
    """One rule as it is written: exactly one of ``allow``, ``deny`` and ``ask``."""

    allow: Globs | None = None
    deny: Globs | None = None
    ask: Globs | None = None
    agents: Globs = Globs((Glob("*"),))
    when: Mapping[str, Condition] = attrs.field(factory=_none)
    reason: Line = Line("")
    approved: bool = False

    @property
    def chosen(self) -> tuple[Verdict, Globs] | None:
        """What it does and to which tools; None unless it says exactly one thing."""
        kinds: tuple[Verdict, ...] = ("allow", "deny", "ask")
        stated = [(kind, globs) for kind in kinds if (globs := getattr(self, kind)) is not None]
        return stated[0] if len(stated) == 1 else None


@attrs.frozen
class PolicyFile:
    """policies/NAME.yaml as it is written; None where it leaves the choice to what it extends."""

    description: Line
    extends: Slug | None = None
    rules: tuple[RuleFile, ...] = ()
    network: Network | None = None
    agent_network: Network | None = None
    egress: tuple[DestinationRule, ...] | None = None
    workspace: Access | None = None
    limits: Limits = Limits()
    agent_limits: Limits = Limits()
    timeout: Duration | None = None
    output_limit: Size | None = None
    approval_timeout: Duration | None = None
    require: tuple[Feature, ...] = ()
    lower: tuple[Feature, ...] = ()


@attrs.frozen
class Written:
    """One policy file with its place."""

    document: Document
    label: str
    shipped: bool
    file: PolicyFile


def resolve_policies(
    files: Mapping[str, Written], broken: frozenset[str], problems: Problems
) -> dict[str, Policy]:
    """Every policy merged with what it extends. ``broken`` names files already reported."""
    return {
        name: policy
        for name in files
        if (policy := _resolve(name, files, broken, (), problems)) is not None
    }


def _resolve(
    name: str,
    files: Mapping[str, Written],
    broken: frozenset[str],
    below: tuple[str, ...],
    problems: Problems,
) -> Policy | None:
    written = files[name]
    document, file = written.document, written.file
    at = document.at(("extends",))
    parent: Policy | None = None
    if file.extends is not None:
        if file.extends == name or file.extends in below:
            if not below:  # told once for each file of the circle
                problems.add(document.file, at, f"'{name}' extends itself, in a circle")
            return None
        if file.extends in broken:
            return None
        if file.extends not in files:
            if not below:
                problems.add(
                    document.file,
                    at,
                    f"no policy '{file.extends}'",
                    nearest(file.extends, files),
                )
            return None
        parent = _resolve(file.extends, files, broken, (*below, name), problems)
        if parent is None:
            if not below and _in_circle(name, files):
                problems.add(document.file, at, f"'{name}' extends itself, in a circle")
            return None
    report = problems if not below else Problems()
    base = parent or Policy(
        name=Slug(name), description=file.description, network="host", agent_network="host"
    )
    network = file.network or (parent.network if parent else "none")
    merged = Policy(
        name=Slug(name),
        description=file.description,
        extends=file.extends,
        rules=_rules(written, report) + base.rules,
        network=network,
        agent_network=file.agent_network or ("none" if network == "none" else base.agent_network),
        egress=(*_egress(written), *base.egress),
        workspace=file.workspace or base.workspace,
        limits=base.limits.narrowed(file.limits),
        agent_limits=base.agent_limits.narrowed(file.agent_limits),
        timeout=least(file.timeout, base.timeout),
        output_limit=least(file.output_limit, base.output_limit),
        approval_timeout=least(file.approval_timeout, base.approval_timeout),
        require=tuple(
            dict.fromkeys(f for f in (*base.require, *file.require) if f not in file.lower)
        ),
        lower=tuple(dict.fromkeys(f for f in (*base.lower, *file.lower) if f not in file.require)),
        source=written.label,
        shipped=written.shipped,
        places=MappingProxyType({**base.places, **document.places(written.label)}),
    )
    _check_lowered(file, base, document, report)
    if parent:
        _check_narrower(merged, parent, document, report)
    if merged.agent_network == "host" and merged.network == "none":
        report.add(
            document.file,
            document.at(("agent_network",)),
            "agent_network: host needs network: host, which this policy doesn't allow",
        )
    return merged


def _in_circle(name: str, files: Mapping[str, Written]) -> bool:
    seen: set[str] = set()
    current: str | None = files[name].file.extends
    while current is not None and current in files and current not in seen:
        if current == name:
            return True
        seen.add(current)
        current = files[current].file.extends
    return False


def _check_narrower(policy: Policy, parent: Policy, document: Document, problems: Problems) -> None:
    for key in ("network", "agent_network", "workspace"):
        order = typing.get_args(Access) if key == "workspace" else typing.get_args(Network)
        mine, theirs = getattr(policy, key), getattr(parent, key)
        if order.index(mine) > order.index(theirs):
            problems.add(
                document.file,
                document.at((key,)),
                f"{key}: {mine} is wider than the {theirs} of '{parent.name}', which it extends",
                "a policy can only narrow what it extends",
            )


def _check_lowered(file: PolicyFile, base: Policy, document: Document, problems: Problems) -> None:
    """What is lowered must have been required, or it means nothing; and it is always told."""
    for index, feature in enumerate(file.lower):
        at = document.at(("lower", index))
        if feature in file.require:
            problems.add(document.file, at, f"{feature} is both required and lowered here")
        elif feature not in base.require:
            whose = f"'{base.name}' does not require" if file.extends else "nothing requires"
            problems.add(
                document.file,
                at,
                f"lower: {whose} {feature}",
                f"required there: {', '.join(base.require) or 'nothing'}",
            )
        else:
            problems.warn(
                document.file,
                at,
                f"lower: sessions under this policy start also where there is no {feature}",
            )


def _egress(written: Written) -> tuple[tuple[DestinationRule, ...], ...]:
    if written.file.egress is None:
        return ()
    return (placed_rules(written.file.egress, written.document, written.label, ("egress",)),)


def _rules(written: Written, problems: Problems) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    document = written.document
    for index, rule in enumerate(written.file.rules):
        at = document.at(("rules", index))
        if rule.chosen is None:
            problems.add(document.file, at, "expected exactly one of allow, deny and ask in a rule")
            continue
        verdict, tools = rule.chosen
        if rule.approved and verdict != "allow":
            problems.add(
                document.file,
                document.at(("rules", index, "approved")),
                f"approved: true in a rule that says {verdict}",
                "it belongs to allow: the tools it names need no operator's approval",
            )
        rules.append(
            Rule(
                verdict,
                tools.patterns,
                rule.agents.patterns,
                rule.when,
                rule.reason,
                f"{written.label}:{at.line}",
                rule.approved,
            )
        )
    return tuple(rules)
