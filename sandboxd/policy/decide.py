"""Whether a tool call may happen, and exactly how. Pure and total: every input gets a decision.

The order: the agent's own list of tools, the arguments against the manifest, the policy's rules
(the first that matches decides, none is a denial), the policy's ceilings, the argument vector.
An allowing rule asks an operator where the manifest wants that, unless it says ``approved``.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from typing import Any

import attrs

from sandboxd.errors import Invalid
from sandboxd.names import shown
from sandboxd.policy.arguments import check_arguments
from sandboxd.policy.egress import NO_EGRESS, EgressTerms
from sandboxd.policy.model import (
    AGENT_LIMITS,
    TOOL_LIMITS,
    Access,
    Agent,
    Condition,
    Config,
    Limits,
    Network,
    Policy,
    Rule,
    SecretSpec,
    Tool,
    Verdict,
    place,
)
from sandboxd.policy.template import Refused, fill, value_text

__all__ = [
    "Decision",
    "SessionTerms",
    "decide",
    "launch_terms",
    "lower_access",
    "matches_glob",
    "over_ceiling",
    "session_terms",
]

#: Seconds that a call waits for an operator where no policy says how long.
DEFAULT_APPROVAL_TIMEOUT = 300.0

_ACCESS: tuple[Access, ...] = typing.get_args(Access)


@attrs.frozen
class Decision:
    """What was decided about one call, and by which rule.

    When allowed, ``tool`` is the tool as it may run now: its network, workspace, timeout and
    output limit already narrowed by the policy. ``argv`` holds the arguments without the program.
    When an operator is to be asked it says the same, of the call as it would run once approved;
    ``approval_timeout`` is how many seconds it may wait for that.
    """

    verdict: Verdict
    rule: str
    reason: str
    hint: str = ""
    tool: Tool | None = None
    argv: tuple[str, ...] = attrs.field(default=(), repr=False)
    stdin: bytes | None = attrs.field(default=None, repr=False)
    inject: tuple[SecretSpec, ...] = ()
    limits: Limits = TOOL_LIMITS
    network: Network = "none"
    egress: EgressTerms = NO_EGRESS
    workspace: Access = "none"
    timeout: float = 0.0
    output_limit: int = 0
    approval_timeout: float = 0.0
    lowered: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        return self.verdict == "allow"


@attrs.frozen
class SessionTerms:
    """What an agent's own process gets under its policy."""

    limits: Limits
    network: Network
    egress: EgressTerms
    workspace: Access
    require: tuple[str, ...]
    lowered: tuple[str, ...]


def decide(config: Config, agent: Agent, tool_name: Any, arguments: Any) -> Decision:
    """Allow, deny or ask about one call. Never raises: what can't be judged is denied."""
    try:
        return _decide(config, agent, tool_name, arguments)
    except Exception:  # noqa: BLE001 - total by promise; a refusal is the only safe answer
        return Decision("deny", "decide", "the call could not be judged")


def launch_terms(config: Config, agent: Agent, tool: Tool) -> Decision:
    """How ``tool`` would run for ``agent`` whatever its arguments: the policy's ceilings alone.

    For what is started before there is a call, such as an MCP server.
    """
    policy = config.policies.get(agent.policy)
    if policy is None:
        return Decision("deny", f"{agent.source} policy", "this agent's policy does not exist")
    at, refused = over_ceiling(policy, agent, tool)
    if refused:
        return Decision("deny", at, refused, tool=tool)
    try:
        argv = fill(tool.argv, {})
    except Refused as problem:
        return Decision("deny", f"{tool.source} argv", str(problem), tool=tool)
    rule = Rule("allow", (), source=tool.source)
    return _runnable(policy, agent, tool, rule, argv, None)


def session_terms(config: Config, agent: Agent) -> SessionTerms:
    """The agent's limits, network and workspace, narrowed by its policy."""
    policy = config.policies[agent.policy]
    network: Network = "host" if agent.network == policy.agent_network == "host" else "none"
    return SessionTerms(
        limits=agent.limits.over(AGENT_LIMITS).narrowed(policy.agent_limits),
        network=network,
        egress=EgressTerms(agent.egress, policy.egress_bounds(agent=True)),
        workspace=lower_access(agent.workspace.mode, policy.workspace),
        require=policy.require,
        lowered=(*(("network",) if network == "host" else ()), *policy.lower),
    )


def lower_access(a: Access, b: Access) -> Access:
    """The lesser of two kinds of access."""
    return min(a, b, key=_ACCESS.index)


def matches_glob(pattern: str, text: str) -> bool:
    """Whether ``*`` in ``pattern`` can stand for runs of characters so that it equals ``text``.

    Plain substring searches, so an agent can't choose a text that takes long to judge.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == text
    *middle, last = rest
    if len(text) < len(first) + len(last) or not text.startswith(first):
        return False
    if not text.endswith(last):
        return False
    start, end = len(first), len(text) - len(last)
    for part in middle:
        at = text.find(part, start, end)
        if at < 0:
            return False
        start = at + len(part)
    return True


def _decide(config: Config, agent: Agent, tool_name: Any, arguments: Any) -> Decision:
    tool = config.tools.get(tool_name) if isinstance(tool_name, str) else None
    if tool is None or tool.name not in agent.tools:
        name = shown(tool_name) if isinstance(tool_name, str) else "of that name"
        # One answer for "doesn't exist" and "isn't yours": an agent can't list what others have.
        return Decision("deny", place(agent, "tools"), f"this agent has no tool {name}")
    policy = config.policies.get(agent.policy)
    if policy is None:
        return Decision("deny", place(agent, "policy"), "this agent's policy does not exist")
    try:
        given = check_arguments(tool, arguments)
    except Invalid as refused:
        return Decision("deny", place(tool, "input"), refused.message, hint=refused.hint, tool=tool)
    rule = next((r for r in policy.rules if _matches(r, agent, tool, given)), None)
    if rule is None:
        return Decision(
            "deny",
            f"{place(policy, 'rules')}: none matches",
            f"policy {policy.name} has no rule that allows it",
            tool=tool,
        )
    if rule.verdict == "deny":
        reason = rule.reason or f"policy {policy.name} denies it"
        return Decision("deny", rule.title, reason, tool=tool)
    ceiling, refusal = over_ceiling(policy, agent, tool)
    if refusal:
        return Decision("deny", ceiling, refusal, tool=tool)
    try:
        argv, stdin = fill(tool.argv, given), _stdin(tool, given)
    except Refused as refused_value:
        return Decision("deny", place(tool, "argv"), str(refused_value), tool=tool)
    return _runnable(policy, agent, tool, rule, argv, stdin)


def _runnable(
    policy: Policy, agent: Agent, tool: Tool, rule: Rule, argv: tuple[str, ...], stdin: bytes | None
) -> Decision:
    workspace = lower_access(lower_access(tool.workspace, policy.workspace), agent.workspace.mode)
    limits = tool.limits.over(TOOL_LIMITS).narrowed(policy.limits)
    narrowed = attrs.evolve(
        tool,
        workspace="rw" if workspace == "overlay" else workspace,
        limits=limits,
        timeout=min(tool.timeout, policy.timeout or tool.timeout),
        output_limit=min(tool.output_limit, policy.output_limit or tool.output_limit),
    )
    verdict, reason = rule.verdict, rule.reason or f"policy {policy.name} allows it"
    if verdict == "ask":
        reason = rule.reason or f"policy {policy.name} wants an operator's approval"
    elif tool.approval == "ask" and not rule.approved:
        verdict, reason = "ask", f"{place(tool, 'approval')}: it wants an operator's approval"
    return Decision(
        verdict,
        rule.title,
        reason,
        tool=narrowed,
        argv=argv,
        stdin=stdin,
        inject=tool.secrets,
        limits=limits,
        network=tool.network,
        egress=EgressTerms(tool.egress, policy.egress_bounds(agent=False)),
        workspace=workspace,
        timeout=narrowed.timeout,
        output_limit=narrowed.output_limit,
        approval_timeout=policy.approval_timeout or DEFAULT_APPROVAL_TIMEOUT,
        lowered=(*(("network",) if tool.network == "host" else ()), *policy.lower),
    )


def over_ceiling(policy: Policy, agent: Agent, tool: Tool) -> tuple[str, str]:
    """Which line keeps the tool from what it needs, and why; twice "" when nothing does."""
    if tool.network == "host" and policy.network != "host":
        reason = f"{tool.name} needs network: host, and policy {policy.name} allows none"
        return place(policy, "network"), reason
    if tool.network == "host" and "network_namespace" in policy.require:
        reason = f"{tool.name} needs network: host, but {policy.name} requires network_namespace"
        return place(policy, "require"), reason
    if tool.workspace != "none":
        if policy.workspace == "none":
            reason = f"{tool.name} needs the workspace, and policy {policy.name} allows none"
            return place(policy, "workspace"), reason
        if agent.workspace.mode == "none":
            reason = f"{tool.name} needs the workspace, and this agent has none"
            return place(agent, "workspace"), reason
    return "", ""


def _stdin(tool: Tool, arguments: Mapping[str, Any]) -> bytes | None:
    if tool.stdin.kind == "json":
        text = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode() + b"\n"
    if tool.stdin.kind == "text":
        value = arguments.get(tool.stdin.argument)
        return b"" if value is None else value_text(value).encode()
    return None


def _matches(rule: Rule, agent: Agent, tool: Tool, arguments: Mapping[str, Any]) -> bool:
    return (
        any(matches_glob(pattern, tool.name) for pattern in rule.tools)
        and any(matches_glob(pattern, agent.slug) for pattern in rule.agents)
        and all(
            name in arguments and _holds(condition, arguments[name], rule.verdict)
            for name, condition in rule.when.items()
        )
    )


def _holds(condition: Condition, value: Any, verdict: str) -> bool:
    """Of a list, an allowing rule wants every element to match, any other rule any one."""
    if condition.glob is not None and isinstance(value, list):
        results = [_holds(condition, inner, verdict) for inner in value]
        return (bool(results) and all(results)) if verdict == "allow" else any(results)
    if condition.glob is not None:
        if value is None or isinstance(value, dict):  # no text to compare: take the safe side
            return verdict != "allow"
        return matches_glob(condition.glob, value_text(value))
    return any(_same(value, one) for one in condition.any_of)


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON values: true is not 1, but 1 is 1.0 (JSON Schema 2020-12, 4.2.2)."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)
