"""Decisions and tools as plain data: for operators, and for what compares two configurations.

Pure. Everything here is JSON, and nothing of it holds a secret: of those there are only names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from sandboxd.errors import NotFound
from sandboxd.names import shown
from sandboxd.policy.decide import (
    Decision,
    decide,
    lower_access,
    matches_glob,
    over_ceiling,
    session_terms,
)
from sandboxd.policy.destinations import destination, split_authority
from sandboxd.policy.egress import EgressTerms, decide_egress, egress_lines
from sandboxd.policy.mcpserver import server_of
from sandboxd.policy.model import (
    TOOL_LIMITS,
    Agent,
    Condition,
    Config,
    Limits,
    Policy,
    Rule,
    Tool,
)
from sandboxd.policy.values import nearest

__all__ = [
    "agent_named",
    "describe_tool",
    "differences",
    "explain_call",
    "explain_egress",
    "launched_for",
    "outlook",
    "tool_named",
]

Outlook = Mapping[str, Mapping[str, Mapping[str, Any]]]


def agent_named(config: Config, name: str) -> Agent:
    """The agent of that name. NotFound lists those that there are."""
    if name not in config.agents:
        raise NotFound(
            f"no agent {shown(name)}",
            hint="known agents: "
            + (", ".join(sorted(config.agents)) or "none")
            + "; after adding one: sandboxctl reload",
        )
    return config.agents[name]


def launched_for(config: Config, agent: Agent) -> list[Tool]:
    """What is started for the agent and can be given variables: its tools, its servers."""
    servers = (server_of(config, name) for name in agent.tools)
    own = {server.name: server.launch for server in servers if server is not None}
    return [config.tools[name] for name in agent.tools if name in config.tools] + list(own.values())


def tool_named(config: Config, name: str) -> Tool:
    """The tool of that name. NotFound names the nearest."""
    if name not in config.tools:
        raise NotFound(
            f"no tool {shown(name)}",
            hint=nearest(name, config.tools) + "; after adding one: sandboxctl reload",
        )
    return config.tools[name]


def explain_call(config: Config, agent: Agent, tool_name: Any, arguments: Any) -> dict[str, Any]:
    """The decision about a call: what decided it, how it would run, and who set each bound."""
    decision = decide(config, agent, tool_name, arguments)
    runs = decision.verdict != "deny"
    policy = config.policies.get(agent.policy)
    tool = config.tools.get(decision.tool.name) if decision.tool is not None else None
    return {
        "agent": agent.slug,
        "policy": agent.policy,
        "generation": config.generation,
        "verdict": decision.verdict,
        "rule": decision.rule,
        "reason": decision.reason,
        "hint": decision.hint,
        "program": str(tool.program) if tool is not None and runs else None,
        "argv": list(decision.argv),
        "stdin": _stdin_of(tool) if tool is not None and runs else None,
        "inject": [_secret(spec) for spec in decision.inject],
        "approval_timeout": decision.approval_timeout if decision.verdict == "ask" else None,
        "network": decision.network,
        "egress": egress_lines(decision.egress),
        "workspace": decision.workspace,
        "lowered": list(decision.lowered),
        "limits": attrs.asdict(decision.limits),
        "timeout": decision.timeout if runs else None,
        "output_limit": decision.output_limit if runs else None,
        "set_by": _set_by(decision, tool, policy, agent) if tool and policy and runs else {},
    }


def explain_egress(
    config: Config, agent: Agent, tool: Tool | None, target: str, method: str = ""
) -> dict[str, Any]:
    """What the agent's own process, or one of its tools, may reach; of ``target`` whether it may.

    ``target`` is HOST:PORT, or empty. Of a name only the name is decided: its addresses are when
    it is resolved. Raises Invalid for what is no destination.
    """
    policy = config.policies[agent.policy]
    if tool is None:
        terms = session_terms(config, agent).egress
    else:
        terms = EgressTerms(tool.egress, policy.egress_bounds(agent=False))
    found: dict[str, Any] = {
        "agent": agent.slug,
        "tool": tool.name if tool is not None else None,
        "network": agent.network if tool is None else tool.network,
        "allows": egress_lines(terms),
    }
    if not target:
        return found
    host, port = split_authority(target, 443)
    wanted = destination(host, port)
    verdict = decide_egress(terms, wanted, method)
    allowed = verdict.admission is not None
    return {
        **found,
        "destination": str(wanted),
        "verdict": "allow" if allowed else "deny",
        "rule": verdict.rule,
        "reason": verdict.reason,
    }


def describe_tool(config: Config, tool: Tool) -> dict[str, Any]:
    """All that a manifest says, with what it leaves out filled in."""
    return {
        "name": tool.name,
        "description": tool.description,
        "source": tool.source,
        "shipped": tool.shipped,
        "program": str(tool.program),
        "runtime": tool.runtime,
        "digest": tool.digest,
        "argv": tool.argv.written(),
        "stdin": _stdin_of(tool),
        "input": dict(tool.input_schema),
        "output": None if tool.output_schema is None else dict(tool.output_schema),
        "output_format": tool.output_format,
        "environment": dict(tool.environment),
        "secrets": [_secret(spec) for spec in tool.secrets],
        "workspace": tool.workspace,
        "mounts": [
            {"source": str(m.source), "target": str(m.target), "mode": m.mode} for m in tool.mounts
        ],
        "network": tool.network,
        "egress": egress_lines(EgressTerms(tool.egress)),
        "timeout": float(tool.timeout),
        "grace": None if tool.grace is None else float(tool.grace),
        "output_limit": int(tool.output_limit),
        "on_overflow": tool.on_overflow,
        "limits": attrs.asdict(tool.limits.over(TOOL_LIMITS)),
        "concurrency": attrs.asdict(tool.concurrency),
        "approval": tool.approval,
        "annotations": tool.annotations.as_dict(),
        "agents": sorted(slug for slug, a in config.agents.items() if tool.name in a.tools),
    }


def outlook(config: Config, *, servers: bool = False) -> Outlook:
    """What each agent can do with each of its tools, whatever the arguments: by agent, by tool.

    Under the name "" stands what the agent's own process gets. With ``servers`` an MCP server
    stands for its tools, as it does in files: which tools it has, only a daemon knows.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for slug, agent in config.agents.items():
        rows = found[slug] = {"": _session_outlook(config, agent)}
        for name in agent.tools:
            server = server_of(config, name) if servers else None
            if server is not None:
                row = _tool_outlook(config, agent, server.launch)
                rows[server.name] = {k: v for k, v in row.items() if k not in ("verdict", "rules")}
            elif name in config.tools:
                rows[name] = _tool_outlook(config, agent, config.tools[name])
    return found


def differences(old: Outlook, new: Outlook) -> list[dict[str, Any]]:
    """What changes from ``old`` to ``new``: one item for each agent, tool and aspect."""
    found: list[dict[str, Any]] = []
    for agent in sorted({*old, *new}):
        tools = {*old.get(agent, {}), *new.get(agent, {})}
        for tool in sorted(tools):
            before = old.get(agent, {}).get(tool)
            after = new.get(agent, {}).get(tool)
            at = {"agent": agent, "tool": tool or None}
            if before is None or after is None:
                what = "tool" if tool else "agent"
                change = ("added", None, after) if before is None else ("removed", before, None)
                found.append(
                    {**at, "what": what, **dict(zip(("change", "old", "new"), change, strict=True))}
                )
                continue
            for aspect in (*before, *(key for key in after if key not in before)):
                one, other = before.get(aspect), after.get(aspect)
                if one != other:
                    found.append(
                        {**at, "what": aspect, "change": "changed", "old": one, "new": other}
                    )
    return found


def _session_outlook(config: Config, agent: Agent) -> dict[str, Any]:
    policy = config.policies.get(agent.policy)
    found: dict[str, Any] = {
        "command": list(agent.command),
        "policy": agent.policy,
        "environment": sorted(agent.environment),
        "mounts": [f"{m.source} at {m.target} ({m.mode})" for m in agent.mounts],
    }
    if policy is not None:
        terms = session_terms(config, agent)
        found |= {
            "network": terms.network,
            "egress": egress_lines(terms.egress),
            "workspace": terms.workspace,
            "limits": attrs.asdict(terms.limits),
            "lowered": list(terms.lowered),
            "require": list(terms.require),
        }
    return found


def _tool_outlook(config: Config, agent: Agent, tool: Tool) -> dict[str, Any]:
    policy = config.policies.get(agent.policy)
    common = {
        "program": f"{tool.program} ({tool.digest[:12]})",
        "argv": tool.argv.written(),
        "inject": [_injection(spec) for spec in tool.secrets],
        "mounts": [f"{m.source} at {m.target} ({m.mode})" for m in tool.mounts],
    }
    if policy is None:
        return {"verdict": "deny", "rules": [], **common}
    rules = _rules_for(policy, agent, tool)
    refusal = over_ceiling(policy, agent, tool)[1]
    verdicts = {_effective(rule, tool) for rule in rules}
    if not rules or not _always(rules[-1]):
        verdicts.add("deny")  # no rule may match
    verdict = "deny" if refusal else verdicts.pop() if len(verdicts) == 1 else "by argument"
    workspace = lower_access(lower_access(tool.workspace, policy.workspace), agent.workspace.mode)
    return {
        "verdict": verdict,
        "rules": [refusal] if refusal else [_rule_text(rule, tool) for rule in rules],
        "network": tool.network,
        "egress": egress_lines(EgressTerms(tool.egress, policy.egress_bounds(agent=False))),
        "workspace": workspace,
        "limits": attrs.asdict(tool.limits.over(TOOL_LIMITS).narrowed(policy.limits)),
        "timeout": min(tool.timeout, policy.timeout or tool.timeout),
        "output_limit": min(tool.output_limit, policy.output_limit or tool.output_limit),
        "lowered": [*(["network"] if tool.network == "host" else []), *policy.lower],
        **common,
    }


def _rules_for(policy: Policy, agent: Agent, tool: Tool) -> list[Rule]:
    """The rules that can decide about the tool, up to the first that always does."""
    found: list[Rule] = []
    for rule in policy.rules:
        if any(matches_glob(p, tool.name) for p in rule.tools) and any(
            matches_glob(p, agent.slug) for p in rule.agents
        ):
            found.append(rule)
            if _always(rule):
                break
    return found


def _always(rule: Rule) -> bool:
    return not rule.when


def _effective(rule: Rule, tool: Tool) -> str:
    if rule.verdict == "allow" and tool.approval == "ask" and not rule.approved:
        return "ask"
    return rule.verdict


def _rule_text(rule: Rule, tool: Tool) -> str:
    """Without its line: a rule that only moved is no change."""
    conditions = ", ".join(f"{name} {_condition(c)}" for name, c in rule.when.items())
    return _effective(rule, tool) + (f" when {conditions}" if conditions else "")


def _condition(condition: Condition) -> str:
    if condition.glob is not None:
        return f"is like {condition.glob}"
    return f"is one of {list(condition.any_of)}"


def _set_by(decision: Decision, tool: Tool, policy: Policy, agent: Agent) -> dict[str, str]:
    """For each bound of an allowed call, the line that it comes from."""
    found: dict[str, str] = {}
    for field in attrs.fields(Limits):
        stated = getattr(tool.limits, field.name)
        own = stated if stated is not None else getattr(TOOL_LIMITS, field.name)
        value = getattr(decision.limits, field.name)
        if value is None:
            continue
        if own is not None and value == own:
            found[field.name] = _from(tool, "limits") if stated is not None else "default"
        else:
            found[field.name] = _from(policy, "limits")
    for name in ("timeout", "output_limit"):
        narrowed = getattr(decision, name) != getattr(tool, name)
        found[name] = _from(policy if narrowed else tool, name)
    found["network"] = _from(tool, "network")
    owners: list[tuple[Tool | Policy | Agent, Any]] = [
        (tool, tool.workspace),
        (policy, policy.workspace),
        (agent, agent.workspace.mode),
    ]
    owner = next((o for o, access in owners if access == decision.workspace), tool)
    found["workspace"] = _from(owner, "workspace")
    return found


def _from(stated: Agent | Tool | Policy, key: str) -> str:
    return stated.places.get(key, "default")


def _stdin_of(tool: Tool) -> str:
    if any(spec.delivery == "stdin" for spec in tool.secrets):
        return "a secret"
    return f"text of {tool.stdin.argument}" if tool.stdin.kind == "text" else tool.stdin.kind


def _secret(spec: Any) -> dict[str, Any]:
    return {
        "variable": spec.variable,
        "as": spec.as_name,
        "delivery": spec.delivery,
        "required": spec.required,
        "redact": spec.redact,
    }


def _injection(spec: Any) -> str:
    optional = "" if spec.required else ", optional"
    shown = "" if spec.redact else ", shown in output"
    return f"{spec.variable} as {spec.as_name} ({spec.delivery}{optional}{shown})"
