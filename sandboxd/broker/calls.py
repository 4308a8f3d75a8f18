"""The life of a tool call: decide, record, unseal, launch, read, end.

The order is the promise: the decision is durable before anything runs, and a secret is unsealed
only for a call that was allowed and recorded. However a call ends, its whole process tree is dead
before :meth:`Calls.call` returns, and its last record is on its way to the disk.
"""

from __future__ import annotations

import contextlib
import logging
import secrets as random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from sandboxd.audit import JSON, LATEST, AuditLog
from sandboxd.broker.approvals import Approvals
from sandboxd.broker.attend import REAP, Tree, attend
from sandboxd.broker.brief import brief, is_brief
from sandboxd.broker.capture import Capture, Progress
from sandboxd.broker.chosen import Chosen, choose, unseal
from sandboxd.broker.failures import failed_result, first
from sandboxd.broker.gate import Bounds, Busy, Gate, Share
from sandboxd.broker.launch import prepare
from sandboxd.broker.question import Waiting, refused_by
from sandboxd.broker.result import CallResult, Outcome, result_of, with_structure
from sandboxd.broker.servers import Servers, Tally
from sandboxd.broker.session import Session, about, belongs
from sandboxd.egress.outlet import open_outlet
from sandboxd.errors import SandboxdError, StoreError, Unavailable
from sandboxd.isolation.client import Launcher
from sandboxd.isolation.uids import UidPool
from sandboxd.policy.decide import Decision, decide
from sandboxd.policy.mcpserver import McpTool
from sandboxd.policy.model import Tool
from sandboxd.policy.programs import Held, bytes_to_hash, hold_program
from sandboxd.vault.vault import Vault

__all__ = ["Bounds", "CallResult", "Calls", "Outcome", "Session"]

log = logging.getLogger(__name__)

#: No tool has a longer name: what an agent asks for is recorded, and must not fill the disk.
_LONGEST_NAME = 80
#: Denials of one session that are recorded in a minute; whoever goes on asking is put off.
_DENIALS = 120
#: Seconds between two writes of one variable's last use.
_TOUCH_PAUSE = 1.0
#: Of output that is JSON each byte takes as long to judge as so many to hash.
_JSON = 16


@dataclass(eq=False)
class _Live(Tree):
    """A call between its decision and its last record."""

    id: str
    session: Session
    tool: str
    began: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    versions: Mapping[str, int] = field(default_factory=dict)
    held: Held | None = None
    capture: Capture | Tally | None = None
    asking: bool = False


@dataclass(frozen=True)
class _Asked:
    """A call that an operator is to be asked about, with all that it takes to run it."""

    waiting: Waiting
    decision: Decision
    chosen: Chosen
    progress: Progress | None


class Calls:
    """Every tool call of every session of one daemon."""

    def __init__(
        self,
        *,
        vault: Vault,
        audit: AuditLog,
        launcher: Launcher,
        uids: UidPool,
        bounds: Bounds | None = None,
        approvals: Approvals | None = None,
    ) -> None:
        self._vault, self._audit = vault, audit
        self._launcher, self._uids = launcher, uids
        self.servers = Servers(vault=vault, audit=audit, launcher=launcher, uids=uids)
        self.approvals = approvals or Approvals(audit)
        bounds = bounds or Bounds()
        self._gate = Gate(
            total=bounds.total,
            per_session=bounds.per_session,
            queue=bounds.queue,
            patience=bounds.patience,
        )
        self._live: dict[str, _Live] = {}
        self._denials: dict[str, deque[float]] = {}
        self._touched: dict[tuple[str, str, str, int], float] = {}

    def tools(self, session: Session) -> list[Tool]:
        """The tools that this session may see, in the order of its agent's file."""
        known = session.config.tools
        return [known[name] for name in session.agent.tools if name in known]

    def _share(self, session: Session, name: str) -> Share | None:
        tool = session.config.tools.get(name) if name in session.agent.tools else None
        return None if tool is None else Share.of(tool)

    def running(self, session_id: str | None = None) -> int:
        """How many calls are alive, of one session or of all."""
        return sum(not live.asking for live in self._alive(session_id))

    def in_flight(self, session_id: str) -> list[JSON]:
        """The calls of a session that are alive, the oldest first."""
        alive = self._alive(session_id)
        return [{"call": one.id, "tool": one.tool, "waiting": one.asking} for one in alive]

    def _alive(self, session_id: str | None) -> list[_Live]:
        return [one for one in self._live.values() if session_id in (None, one.session.id)]

    async def call(
        self,
        session: Session,
        tool: str,
        arguments: Mapping[str, Any],
        *,
        progress: Progress | None = None,
    ) -> CallResult:
        """Run one tool for ``session``. Everything that can go wrong is in the result.

        Being cancelled kills the tree and still writes the last record. ``progress`` gets the
        bytes printed so far and the newest text.
        """
        live: _Live | None = None
        try:
            async with self._gate.slot(session.id, self._share(session, tool)):
                live = _Live(_new_id(), session, tool[:_LONGEST_NAME], trio.current_time())
                self._live[live.id] = live
                result = await self._decide(live, arguments, progress)
            return await self._ask(live, result) if isinstance(result, _Asked) else result
        except Busy as busy:
            return CallResult("busy", message=busy.message, hint=busy.hint)
        finally:
            if live is not None:
                if live.held is not None:
                    live.held.close()
                del self._live[live.id]
                live.ended.set()

    async def cancel_using(self, team: str, agent: str, name: str, up_to: int) -> int:
        """End the calls that hold a version of the variable up to ``up_to``; how many there were.

        MCP servers that hold one end as well. Returns when their trees are dead.
        """
        servers = self.servers.end_using(team, agent, name, up_to)
        ended = await self._cancel(
            [
                live
                for live in self._live.values()
                if belongs(live.session, team, agent) and 0 < live.versions.get(name, 0) <= up_to
            ],
            f"the variable {name} was revoked",
        )
        for server in servers:
            await server.ended.wait()
        return ended

    async def cancel_session(self, session_id: str) -> int:
        """End every call of a session; how many there were. Returns when their trees are dead."""
        return await self._cancel(self._alive(session_id), "the session was stopped")

    async def end_session(self, session_id: str) -> None:
        """End what is kept ready for the calls of a session. It makes no more of them."""
        await self._launcher.retire(session_id)
        self._uids.forget(session_id)

    async def _cancel(self, calls: Sequence[_Live], reason: str) -> int:
        for live in calls:
            live.reason = live.reason or reason
            live.scope.cancel()
        for live in calls:
            await live.ended.wait()
        return len(calls)

    async def _ask(self, live: _Live, asked: _Asked) -> CallResult:
        """Wait for an operator, without a slot; what was approved gets one and runs."""
        session, decision, answer = live.session, asked.decision, None
        async with contextlib.AsyncExitStack() as slot:
            live.asking = True
            try:
                with live.scope:
                    answer = await self.approvals.wait(
                        asked.waiting,
                        then=lambda: slot.enter_async_context(
                            self._gate.slot(session.id, self._share(session, live.tool))
                        ),
                        why=lambda: live.reason or "its client took it back or left",
                        progress=asked.progress,
                    )
            except StoreError as error:
                return _unrecorded(live, error)
            live.asking = False
            if answer is None:
                message = f"the call was ended: {live.reason}"
                return CallResult("cancelled", live.id, message=message)
            if not answer.approved:
                return refused_by(answer, live.id, live.tool, decision.rule)
            late, live.scope = live.scope.cancel_called, trio.CancelScope()
            if late:
                live.scope.cancel()
            live.began = trio.current_time()
            return await self._run(live, decision, asked.chosen, asked.progress)

    async def _decide(
        self, live: _Live, arguments: Mapping[str, Any], progress: Progress | None
    ) -> CallResult | _Asked:
        """Decide and record; what was allowed and recorded goes on to run."""
        await trio.lowlevel.checkpoint_if_cancelled()
        session = live.session
        decision = decide(session.config, session.agent, live.tool, arguments)
        chosen, missing, revoked = choose(self._vault, decision, session.snapshot)
        verdict, reason = decision.verdict, decision.reason
        if verdict != "deny" and revoked:
            verdict, reason = "deny", f"the variable {', '.join(revoked)} was revoked"
        elif verdict != "deny" and missing:
            verdict, reason = "deny", f"{session.agent.slug} has no variable {', '.join(missing)}"
        asking = None
        if verdict == "ask":
            asking = self.approvals.begin(live.id, session, decision, arguments, chosen)
            verdict, reason = asking.verdict, asking.reason
        if verdict == "deny" and not self._may_deny(session.id):
            raise Busy(
                f"this session was denied {_DENIALS} calls within a minute",
                hint="see what tools/list offers, and wait",
            )
        live.versions = {sealed.name: sealed.version for _, sealed in chosen}
        injected: list[JSON] = [
            {"name": sealed.name, "version": sealed.version, "delivery": spec.delivery}
            for spec, sealed in chosen
        ]
        try:
            recorded = self._audit.start(
                "call.decided",
                **_who(live),
                decision=verdict,
                rule=decision.rule,
                reason=reason,
                injected=injected if verdict != "deny" else [],
                **({"lowered": list(decision.lowered)} if decision.lowered else {}),
                **(asking.recorded if asking else {}),
            )
            if verdict == "allow":
                _look_ahead(live, decision.tool)
            await self._audit.settle(recorded)
        except StoreError as error:
            self.approvals.release(asking)
            return _unrecorded(live, error)
        except BaseException:
            self.approvals.release(asking)
            raise
        if verdict == "deny":
            hint = decision.hint
            if decision.verdict != "deny" and missing and not revoked:
                hint = f"the operator can: sandboxctl env set {session.agent.slug} {missing[0]}"
            return CallResult("denied", live.id, message=reason, hint=hint, rule=decision.rule)
        if asking and asking.waiting:
            return _Asked(asking.waiting, decision, chosen, progress)
        return await self._run(live, decision, chosen, progress)

    def _may_deny(self, session: str) -> bool:
        """Whether one more denial of the session may be recorded now."""
        times = self._denials.setdefault(session, deque())
        now = trio.current_time()
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) >= _DENIALS:
            return False
        times.append(now)
        return True

    def forget(self, session_id: str) -> None:
        """The session is over: nothing of it is kept."""
        self._denials.pop(session_id, None)
        self.approvals.forget(session_id)

    async def _run(
        self,
        live: _Live,
        decision: Decision,
        chosen: Chosen,
        progress: Progress | None,
    ) -> CallResult:
        """Run what was allowed. Its last record is written whatever happens, cancelled or not."""
        result = CallResult("cancelled", live.id, message="the call was cancelled")
        try:
            with live.scope:
                result = await self._execute(live, decision, chosen, progress)
            if live.scope.cancelled_caught:
                result = replace(result, message=f"the call was ended: {live.reason}")
        except* Exception as group:  # noqa: BLE001 - a call must not end the broker
            result = failed_result(live.id, live.tool, first(group))
        finally:
            self._record_end(live, result)
            await self._touch(live)
        return result

    async def _execute(
        self,
        live: _Live,
        decision: Decision,
        chosen: Chosen,
        progress: Progress | None,
    ) -> CallResult:
        """Unseal, launch, read to the end. The uid is free again once nothing runs as it."""
        tool = decision.tool
        assert tool is not None  # an allowed decision has one
        if isinstance(tool, McpTool):
            live.capture = Tally()
            return await self.servers.call(
                live.session, live.id, decision, chosen, live.capture, progress
            )
        if live.held is None:
            live.held = await brief(bytes_to_hash(tool), hold_program, tool)
        unsealed = await unseal(self._vault, chosen)
        session = live.session
        # overlayfs has no id-mapped mounts: who shares its files has to share its uid.
        shares = session.overlay >= 0 and decision.workspace != "none"
        uid = session.uid if shares else self._uids.acquire(session.id, tool.name)
        ended = trio.CancelScope()

        def capture() -> Capture:
            ended.deadline = trio.current_time() + decision.timeout
            live.capture = made = Capture(
                {spec.variable: secret for spec, secret in unsealed if spec.redact},
                limit=decision.output_limit,
                kill=tool.on_overflow == "kill",
                on_overflow=ended.cancel,
                progress=progress,
            )
            return made

        try:
            prepared = prepare(
                decision,
                unsealed,
                call=live.id,
                uid=uid,
                workspace=session.workspace,
                overlay=shares,
                template=session.id,
                held=live.held,
            )
            captured = await attend(
                self._launcher,
                prepared,
                live,
                capture=capture,
                overlay=session.overlay,
                way_out=open_outlet(
                    prepared.egress, _who(live), self._audit.append, self._vault, session.snapshot
                ),
                started=lambda pid: self._audit.note("call.launched", **_who(live), pid=pid),
                stays=self._settle,
                ended=ended,
                grace=tool.grace or 0.0,
            )
        finally:
            if not live.alive and not shares:  # else something may still run as it
                self._uids.release(uid, session.id, tool.name)
        if live.exit is None:
            raise Unavailable(
                f"its processes would not die in {REAP:g} s",
                hint="one hangs in the kernel (state D in ps); the operator must see to the host",
            )
        timed_out = ended.cancelled_caught
        result = result_of(live.id, live.tool, decision, captured, live.exit, timed_out=timed_out)
        if tool.output_format != "json":
            return result
        return await brief(_JSON * len(result.stdout), with_structure, result, tool)

    async def _settle(self, launched: int) -> None:
        """Have the record of a launch on disk soon, if no other takes it there."""
        await trio.sleep(LATEST)
        await self._audit.settle(launched)

    def _record_end(self, live: _Live, result: CallResult) -> None:
        """The last audit record, which can't change what happened."""
        capture, end = live.capture, live.exit
        redacted = capture.redacted if capture else {}
        try:
            self._audit.note(
                "call.ended",
                **_who(live),
                outcome=result.outcome,
                reason=live.reason or result.message,
                exit_code=end.code if end else None,
                signal=end.signal if end else None,
                duration_ms=round((trio.current_time() - live.began) * 1000),
                cpu_ms=end.cpu_ms if end else 0,
                max_rss_kib=end.max_rss_kib if end else 0,
                peak_kib=end.peak_kib if end else 0,
                out_of_memory=end.oom if end else False,
                output_bytes=capture.received if capture else 0,
                redactions=sum(redacted.values()),
                redacted=redacted,
            )
        except SandboxdError as error:
            log.error("call %s ended, but it can't be recorded: %s", live.id, error.message)

    async def _touch(self, live: _Live) -> None:
        """Remember when the variables were last used, at most once a second for each."""
        now, agent = time.time(), live.session.agent
        held = [(agent.team, agent.slug, *held) for held in live.versions.items()]
        due = [use for use in held if now - self._touched.get(use, 0.0) > _TOUCH_PAUSE]
        if due and live.capture is not None:
            self._touched.update(dict.fromkeys(due, now))
            uses, touch = [use[1:] for use in due], self._vault.of(agent.team).touch
            try:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(touch, uses, now)
            except SandboxdError as error:
                log.error("the last use of a variable can't be noted: %s", error.message)


def _look_ahead(live: _Live, tool: Tool | None) -> None:
    """Do what can be done while the decision goes to the disk."""
    if tool is not None and not isinstance(tool, McpTool) and is_brief(bytes_to_hash(tool)):
        with contextlib.suppress(SandboxdError):  # told when the program is to run
            live.held = hold_program(tool)


def _unrecorded(live: _Live, error: StoreError) -> CallResult:
    log.error("call %s refused: the audit log can't be written", live.id)
    return CallResult(
        "failed",
        live.id,
        message="nothing runs while the audit log can't be written",
        hint=error.hint or "tell the operator; sandboxctl audit verify says more",
    )


def _who(live: _Live) -> dict[str, Any]:
    return {**about(live.session), "tool": live.tool, "call": live.id}


def _new_id() -> str:
    return "c-" + random.token_hex(8)
