"""What an operator is asked about a tool call, and what may come of it.

A question is one call exactly as it would run. It has the call's id, and a digest of everything
that would run, so that an answer can't land on anything else.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from sandboxd.audit import JSON
from sandboxd.broker.result import CallResult
from sandboxd.broker.session import Session
from sandboxd.policy.decide import Decision
from sandboxd.policy.mcpserver import McpTool
from sandboxd.policy.model import Access, Limits, Network, SecretSpec, Verdict
from sandboxd.vault.vault import Sealed

__all__ = [
    "Answer",
    "Asking",
    "By",
    "Outcome",
    "Question",
    "Scope",
    "Waiting",
    "denial",
    "question_of",
    "refused_by",
]

Outcome = Literal["approved", "denied", "expired", "withdrawn"]
#: What an answer holds for: this call, or these exact arguments for the rest of the session.
Scope = Literal["once", "session"]


@dataclass(frozen=True)
class By:
    """Who answered: a name for people, and the uid that the kernel told, on the admin socket."""

    name: str
    uid: int | None


@dataclass(frozen=True)
class Question:
    """One call exactly as it would run, with what an operator has to know to decide."""

    id: str
    agent: str
    team: str
    session: str
    tool: str
    description: str
    rule: str
    reason: str
    arguments: Mapping[str, Any] = field(repr=False)
    program: str
    program_digest: str
    argv: tuple[str, ...] = field(repr=False)
    stdin: bytes | None = field(repr=False)
    secrets: tuple[Mapping[str, Any], ...]
    network: Network
    workspace: Access
    lowered: tuple[str, ...]
    limits: Limits
    timeout: float
    generation: str
    #: SHA-256 of what would run: the same for the same call made again, for no other.
    digest: str


@dataclass(frozen=True)
class Answer:
    """What came of a question. ``reason`` is the operator's own words, or why nobody answered."""

    outcome: Outcome
    reason: str = ""
    by: By | None = None
    scope: Scope = "once"
    call: str = ""
    at: float = field(default_factory=time.time)

    @property
    def approved(self) -> bool:
        return self.outcome == "approved"


@dataclass(eq=False)
class Waiting:
    """A question on its way to an answer."""

    question: Question
    limit: float
    asked_at: float = 0.0
    asked: float = 0.0
    answer: Answer | None = None
    answered: trio.Event = field(default_factory=trio.Event)
    #: Somebody's answer is on its way to the disk; no other counts any more.
    taken: By | None = None
    #: The call is gone, whatever the answer.
    gone: bool = False

    @property
    def expires_at(self) -> float:
        return self.asked_at + self.limit


@dataclass(frozen=True)
class Asking:
    """What becomes of a call that is asked about: it waits, or an earlier answer holds for it."""

    question: Question
    verdict: Verdict
    reason: str
    waiting: Waiting | None = None

    @property
    def recorded(self) -> dict[str, JSON]:
        """What the record of the decision says besides."""
        limit = {"approval_timeout": self.waiting.limit} if self.waiting else {}
        return {"digest": self.question.digest, **limit}


def refused_by(answer: Answer, call: str, tool: str, rule: str) -> CallResult:
    """What a client is told about a call that no operator approved."""
    if answer.outcome == "expired":
        message = f"{tool} did not run: {answer.reason}"
        hint = "an operator has to approve it while it waits: sandboxctl approvals watch"
    else:
        message, hint = f"{tool} did not run: {denial(answer)}", ""
    return CallResult("denied", call, message=message, hint=hint, rule=rule)


def question_of(
    id: str,
    session: Session,
    decision: Decision,
    arguments: Mapping[str, Any],
    chosen: Sequence[tuple[SecretSpec, Sealed]],
) -> Question:
    """A call that was decided to be asked about, and the digest of all that would run."""
    tool = decision.tool
    assert tool is not None  # a decision to ask has one
    secrets: tuple[Mapping[str, Any], ...] = tuple(
        {
            "variable": str(sealed.name),
            "version": sealed.version,
            "as": spec.as_name,
            "delivery": spec.delivery,
        }
        for spec, sealed in chosen
    )
    runs: dict[str, JSON] = {
        "agent": session.agent.slug,
        "tool": tool.name,
        "arguments": arguments,
        "program": str(tool.program),
        "program_digest": tool.digest,
        "definition": tool.pin if isinstance(tool, McpTool) else None,
        "argv": list(decision.argv),
        "stdin": None if decision.stdin is None else hashlib.sha256(decision.stdin).hexdigest(),
        "secrets": [dict(secret) for secret in secrets],
        "network": decision.network,
        "workspace": decision.workspace,
    }
    return Question(
        id=id,
        agent=session.agent.slug,
        team=session.agent.team,
        session=session.id,
        tool=tool.name,
        description=tool.description,
        rule=decision.rule,
        reason=decision.reason,
        arguments=arguments,
        program=str(tool.program),
        program_digest=tool.digest,
        argv=decision.argv,
        stdin=decision.stdin,
        secrets=secrets,
        network=decision.network,
        workspace=decision.workspace,
        lowered=decision.lowered,
        limits=decision.limits,
        timeout=decision.timeout,
        generation=session.config.generation,
        digest=_digest(runs),
    )


def _digest(runs: Mapping[str, JSON]) -> str:
    # Sorted and without blanks, so that equal calls have equal text. 1, 1.0 and true stay apart.
    text = json.dumps(runs, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def denial(answer: Answer) -> str:
    """What a client is told when an operator said no."""
    words = f": {answer.reason}" if answer.reason else ""
    return f"an operator denied it{words}"
