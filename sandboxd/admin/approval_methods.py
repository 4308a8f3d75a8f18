"""Calls that wait for an operator, over the admin socket: look, approve, deny, watch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import attrs

from sandboxd.admin.params import iso, param
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.broker.approvals import Approvals
from sandboxd.broker.question import By, Question, Scope, Waiting
from sandboxd.errors import Invalid
from sandboxd.running import Daemon

__all__ = ["ApprovalMethods"]

#: Characters of a reason: it goes to an agent, and into the audit log.
MAX_REASON = 500

#: Characters of a command line that is sent: a template may repeat long arguments in it, and the
#: arguments are sent as well.
MAX_ARGV = 1 << 18

_DIGEST = re.compile(r"[0-9a-f]{64}")


class ApprovalMethods:
    """``approvals.*``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {
            "approvals.list": self.list_,
            "approvals.show": self.show,
            "approvals.approve": self.approve,
            "approvals.deny": self.deny,
            "approvals.watch": self.watch,
        }

    @property
    def _approvals(self) -> Approvals:
        return self._daemon.calls.approvals

    async def list_(self, caller: Caller, params: dict[str, Any]) -> Reply:
        seen = [waiting for waiting in self._approvals.waiting if _sees(caller, waiting)]
        return Reply({"approvals": [_row(waiting) for waiting in seen]})

    async def show(self, caller: Caller, params: dict[str, Any]) -> Reply:
        return Reply(_whole(self._approvals.find(param(params, "id", str))))

    async def approve(self, caller: Caller, params: dict[str, Any]) -> Reply:
        question = await self._approvals.approve(
            param(params, "id", str),
            By(caller.name, caller.uid),
            digest=_digest(params),
            scope=_scope(params),
        )
        return Reply({**_names(question), "outcome": "approved", "scope": _scope(params)})

    async def deny(self, caller: Caller, params: dict[str, Any]) -> Reply:
        question = await self._approvals.deny(
            param(params, "id", str),
            By(caller.name, caller.uid),
            reason=_reason(params),
            digest=_digest(params),
            scope=_scope(params),
        )
        return Reply({**_names(question), "outcome": "denied", "scope": _scope(params)})

    async def watch(self, caller: Caller, params: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Each question once, whole, and each end: ``{"event": "asked"|"ended", ...}``."""
        async with aclosing(self._approvals.events()) as events:
            async for waiting in events:
                if _sees(caller, waiting):
                    yield _event(waiting)


def _sees(caller: Caller, waiting: Waiting) -> bool:
    return caller.principal.reaches(waiting.question.team, waiting.question.agent)


def _event(waiting: Waiting) -> dict[str, Any]:
    answer = waiting.answer
    if answer is None:
        return {"event": "asked", **_whole(waiting)}
    return {
        "event": "ended",
        **_names(waiting.question),
        "outcome": answer.outcome,
        "by": answer.by.name if answer.by else None,
        "reason": answer.reason,
    }


def _names(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "agent": question.agent,
        "team": question.team,
        "session": question.session,
        "tool": question.tool,
        "digest": question.digest,
    }


def _row(waiting: Waiting) -> dict[str, Any]:
    return {
        **_names(waiting.question),
        "rule": waiting.question.rule,
        "asked_at": iso(waiting.asked_at),
        "expires_at": iso(waiting.expires_at),
    }


def _whole(waiting: Waiting) -> dict[str, Any]:
    """All that an operator has to know. ``arguments`` are the agent's own, unchanged: escape them
    before they are shown."""
    question, stdin = waiting.question, waiting.question.stdin
    return {
        **_row(waiting),
        "description": question.description,
        "reason": question.reason,
        "arguments": question.arguments,
        "program": question.program,
        "program_digest": question.program_digest,
        "argv": list(question.argv) if _length(question.argv) <= MAX_ARGV else None,
        "argv_length": _length(question.argv),
        "stdin": None
        if stdin is None
        else {"bytes": len(stdin), "sha256": hashlib.sha256(stdin).hexdigest()},
        "secrets": [dict(secret) for secret in question.secrets],
        "network": question.network,
        "workspace": question.workspace,
        "lowered": list(question.lowered),
        "limits": attrs.asdict(question.limits),
        "timeout": question.timeout,
        "generation": question.generation,
    }


def _length(argv: tuple[str, ...]) -> int:
    return sum(map(len, argv))


def _digest(params: dict[str, Any]) -> str | None:
    digest = params.get("digest")
    if digest is None:
        return None
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise Invalid("a digest is 64 hexadecimal digits", hint="as approvals show prints it")
    return digest


def _scope(params: dict[str, Any]) -> Scope:
    scope = params.get("scope", "once")
    if scope == "session":
        return "session"
    if scope != "once":
        raise Invalid("scope is once or session")
    return "once"


def _reason(params: dict[str, Any]) -> str:
    reason = params.get("reason") or ""
    if not isinstance(reason, str) or len(reason) > MAX_REASON or not reason.isprintable():
        raise Invalid(f"a reason is one line of text, at most {MAX_REASON} characters")
    return reason
