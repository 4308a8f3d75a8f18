"""Tool calls that wait for an operator: asked, answered once, withdrawn when nobody needs it.

The core knows nothing of who asks and how it is shown: the admin socket is one front, others may
follow. Whatever comes of a question is durable in the audit log before the call goes on, and
nothing but an approval lets it.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import trio

from sandboxd.audit import JSON, AuditLog
from sandboxd.broker.gate import Busy
from sandboxd.broker.question import (
    Answer,
    Asking,
    By,
    Question,
    Scope,
    Waiting,
    denial,
    question_of,
)
from sandboxd.broker.session import Session
from sandboxd.errors import Conflict, NotFound, SandboxdError, StoreError
from sandboxd.names import shown
from sandboxd.policy.decide import Decision
from sandboxd.policy.model import ApprovalSettings, SecretSpec
from sandboxd.vault.vault import Sealed

__all__ = ["Approvals"]

log = logging.getLogger(__name__)

Progress = Callable[[float, str], Awaitable[None]]

#: Questions of one session in a minute. Whoever asks more wears operators out, or the disk.
_ASKS = 30
#: Answers that are kept for the rest of a session, and endings that are remembered for messages.
_REMEMBERED, _SETTLED = 256, 256
#: Seconds between two reports to a client that watches.
_REPORT = 5.0
#: Seconds that the record of a question that nobody needs any more may take.
_RECORD = 10.0


class Approvals:
    """Every question of one daemon, and the answers that hold for the rest of a session."""

    def __init__(
        self,
        audit: AuditLog,
        *,
        settings: Callable[[], ApprovalSettings] = ApprovalSettings,
    ) -> None:
        self._audit, self._settings = audit, settings
        self._places: dict[str, int] = {}
        self._waiting: dict[str, Waiting] = {}
        self._kept: dict[str, OrderedDict[str, Answer]] = {}
        self._asks: dict[str, deque[float]] = {}
        self._settled: OrderedDict[str, tuple[Answer, str, str]] = OrderedDict()
        self._changed = trio.Event()
        #: Told of each question and of what came of it. Must neither wait nor raise.
        self.listeners: list[Callable[[Waiting], None]] = []

    # -- what fronts use -------------------------------------------------------------------------

    @property
    def waiting(self) -> list[Waiting]:
        """The open questions, oldest first."""
        return list(self._waiting.values())

    def asked(self) -> dict[str, tuple[str, str]]:
        """Team and agent of every question that waits or is remembered, by its whole id."""
        settled = {id: (team, agent) for id, (_, team, agent) in self._settled.items()}
        open_ = {id: (w.question.team, w.question.agent) for id, w in self._waiting.items()}
        return settled | open_

    def count(self, session: str) -> int:
        """How many calls of a session wait."""
        return sum(waiting.question.session == session for waiting in self._waiting.values())

    def get(self, id: str) -> Waiting:
        """An open question by its whole id. Conflict when it was answered, NotFound otherwise."""
        if id in self._waiting:
            return self._waiting[id]
        if id in self._settled:
            raise Conflict(f"{id} does not wait any more: {_told(self._settled[id][0])}")
        raise NotFound(f"no call {shown(id)} waits for approval", hint="sandboxctl approvals list")

    def find(self, id: str) -> Waiting:
        """As :meth:`get`, also by an unambiguous beginning of the id: for looking only."""
        found = [w for key, w in self._waiting.items() if id and key.startswith(id)]
        if len(found) > 1:
            raise NotFound(f"{shown(id)} is ambiguous", hint="sandboxctl approvals list")
        return found[0] if found else self.get(id)

    async def approve(
        self, id: str, by: By, *, digest: str | None = None, scope: Scope = "once"
    ) -> Question:
        """Let the call run. With ``digest`` only if that is what it would run.

        Raises Conflict when it was answered before, is withdrawn or another than ``digest`` says,
        and StoreError when the approval can't be recorded: then nothing runs.
        """
        return await self._decide(id, Answer("approved", by=by, scope=scope, call=id), by, digest)

    async def deny(
        self,
        id: str,
        by: By,
        *,
        reason: str = "",
        digest: str | None = None,
        scope: Scope = "once",
    ) -> Question:
        """Refuse the call; its client is told ``reason``. Raises as :meth:`approve` does."""
        answer = Answer("denied", reason=reason, by=by, scope=scope, call=id)
        return await self._decide(id, answer, by, digest)

    async def events(self) -> AsyncGenerator[Waiting, None]:
        """Every open question, then each new one and each end, as it happens. Never ends.

        An end comes as the question with its ``answer``. A slow reader loses questions that
        came and went meanwhile, nothing else.
        """
        seen: dict[str, Waiting] = {}
        while True:
            changed = self._changed
            for id in [id for id, waiting in seen.items() if waiting.answer is not None]:
                yield seen.pop(id)
            for waiting in self.waiting:
                if waiting.question.id not in seen:
                    seen[waiting.question.id] = waiting
                    yield waiting
            await changed.wait()

    # -- what a call uses ------------------------------------------------------------------------

    def begin(
        self,
        id: str,
        session: Session,
        decision: Decision,
        arguments: Mapping[str, Any],
        chosen: Sequence[tuple[SecretSpec, Sealed]],
    ) -> Asking:
        """What becomes of a call that was decided to be asked about.

        An answer that holds for it already is used; else it gets a place among those that wait,
        and whoever has one must come to :meth:`wait` or :meth:`release`. Raises Busy when there is
        none, or when its session asks too much.
        """
        question = question_of(id, session, decision, arguments, chosen)
        kept = self._kept.get(session.id, OrderedDict()).get(question.digest)
        if kept is None:
            return Asking(question, "ask", decision.reason, self._reserve(question, decision))
        if kept.approved:
            reason = f"{_name(kept)} approved these arguments for this session ({kept.call})"
            return Asking(question, "allow", reason)
        return Asking(question, "deny", denial(kept))

    def release(self, asking: Asking | None) -> None:
        """Give up a place that :meth:`wait` was never called for."""
        if asking is not None and asking.waiting is not None:
            self._leave(asking.waiting)

    async def wait(
        self,
        waiting: Waiting,
        *,
        then: Callable[[], Awaitable[object]],
        why: Callable[[], str],
        progress: Progress | None = None,
    ) -> Answer:
        """Wait for the answer; after an approval for ``then`` too, which gets what running takes.

        No answer in time is an answer: expired. A call that is cancelled meanwhile withdraws the
        question, with the reason that ``why`` tells; so does ``then`` when it raises. Raises
        StoreError when the end can't be recorded.
        """
        question, ready, reason = waiting.question, False, ""
        waiting.asked_at, waiting.asked = time.time(), trio.current_time()
        self._waiting[question.id] = waiting
        self._publish(waiting)
        try:
            answer = await self._answer(waiting, progress)
            if answer.approved:
                await then()
            ready = True
            return answer
        except Busy as busy:
            reason = busy.message
            raise
        finally:
            waiting.gone = True
            self._leave(waiting)
            if not ready and (waiting.answer is None or waiting.answer.approved):
                with trio.move_on_after(_RECORD, shield=True):
                    await self._withdraw(waiting, reason or why())

    def forget(self, session: str) -> None:
        """The session is over: nothing of it is kept."""
        self._kept.pop(session, None)
        self._asks.pop(session, None)

    def _reserve(self, question: Question, decision: Decision) -> Waiting:
        settings, session = self._settings(), question.session
        mine = self._places.get(session, 0)
        if mine >= settings.max_waiting_per_session:
            raise _busy(f"{mine} calls of this session wait for an operator")
        if sum(self._places.values()) >= settings.max_waiting:
            raise _busy(f"{settings.max_waiting} calls wait for an operator")
        asks, now = self._asks.setdefault(session, deque()), trio.current_time()
        while asks and asks[0] < now - 60:
            asks.popleft()
        if len(asks) >= _ASKS:
            raise _busy(f"this session asked operators {_ASKS} times within a minute")
        asks.append(now)
        self._places[session] = mine + 1
        return Waiting(question, decision.approval_timeout)

    # -- within ----------------------------------------------------------------------------------

    async def _answer(self, waiting: Waiting, progress: Progress | None) -> Answer:
        async with trio.open_nursery() as nursery:
            if progress is not None:
                nursery.start_soon(_report, waiting, progress)
            with trio.move_on_after(waiting.limit):
                await waiting.answered.wait()
            nursery.cancel_scope.cancel()
        if waiting.taken is not None:  # in time, if only just: it is being written down
            await waiting.answered.wait()
        if waiting.answer is None:
            self._waiting.pop(waiting.question.id, None)
            await self._settle(
                waiting, Answer("expired", f"nobody answered in {waiting.limit:g} s")
            )
        if waiting.answer is None:
            raise StoreError("the answer could not be recorded, so nothing runs")
        return waiting.answer

    async def _decide(self, id: str, answer: Answer, by: By, digest: str | None) -> Question:
        waiting = self.get(id)
        if digest is not None and digest != waiting.question.digest:
            raise Conflict(
                f"{id} is not the call that was shown: its digest is {waiting.question.digest}",
                hint=f"look again: sandboxctl approvals show {id}",
            )
        if waiting.taken is not None or waiting.answer is not None:
            who = waiting.taken.name if waiting.taken else "somebody"
            raise Conflict(f"{id} is being answered by {who}")
        waiting.taken = by
        try:
            with trio.CancelScope(shield=True):  # a leaving operator changes no answer half-way
                await self._settle(waiting, answer)
        finally:
            waiting.answered.set()
        if waiting.gone:
            raise Conflict(f"{id} was withdrawn while it was being answered: nothing runs")
        if answer.scope == "session":
            self._keep(waiting.question, answer)
        return waiting.question

    async def _settle(self, waiting: Waiting, answer: Answer) -> None:
        """Record the answer; it counts from the moment that it is durable."""
        await self._audit.append(
            f"approval.{answer.outcome}",
            **_about(waiting),
            reason=answer.reason,
            by=answer.by.name if answer.by else None,
            uid=answer.by.uid if answer.by else None,
            scope=answer.scope,
        )
        self._remember_end(waiting, answer)

    async def _withdraw(self, waiting: Waiting, reason: str) -> None:
        if waiting.taken is not None:
            await waiting.answered.wait()
        if waiting.answer is not None and not waiting.answer.approved:
            return
        answer, id = Answer("withdrawn", reason), waiting.question.id
        try:
            await self._settle(waiting, answer)
        except SandboxdError as error:
            log.error("call %s was withdrawn, but it can't be recorded: %s", id, error.message)
        finally:
            if waiting.answer is not answer:
                self._remember_end(waiting, answer)

    def _keep(self, question: Question, answer: Answer) -> None:
        kept = self._kept.setdefault(question.session, OrderedDict())
        kept[question.digest] = answer
        while len(kept) > _REMEMBERED:
            kept.popitem(last=False)

    def _remember_end(self, waiting: Waiting, answer: Answer) -> None:
        waiting.answer = answer
        self._waiting.pop(waiting.question.id, None)
        question = waiting.question
        self._settled[question.id] = (answer, question.team, question.agent)
        while len(self._settled) > _SETTLED:
            self._settled.popitem(last=False)
        self._publish(waiting)

    def _leave(self, waiting: Waiting) -> None:
        session = waiting.question.session
        self._waiting.pop(waiting.question.id, None)
        self._places[session] -= 1
        if not self._places[session]:
            del self._places[session]

    def _publish(self, waiting: Waiting) -> None:
        self._changed.set()
        self._changed = trio.Event()
        for listener in self.listeners:
            listener(waiting)


async def _report(waiting: Waiting, progress: Progress) -> None:
    """Tell a client that watches that its call waits, for as long as it does.

    The numbers rise and stay below 1, so that those of a running call go on rising.
    """
    question = waiting.question
    try:
        while True:
            waited = trio.current_time() - waiting.asked
            await progress(
                min(0.99, waited / waiting.limit * 0.99),
                f"{question.tool} waits for an operator's approval ({question.id}), "
                f"for {max(0.0, waiting.limit - waited):.0f} s more at most",
            )
            await trio.sleep(_REPORT)
    except Exception as error:  # noqa: BLE001  # a client that can't be told still waits
        log.debug("call %s: no progress (%s)", question.id, type(error).__name__)


def _about(waiting: Waiting) -> dict[str, JSON]:
    question = waiting.question
    return {
        "agent": question.agent,
        "team": question.team,
        "session": question.session,
        "tool": question.tool,
        "call": question.id,
        "digest": question.digest,
        "waited_ms": round((trio.current_time() - waiting.asked) * 1000),
    }


def _told(answer: Answer) -> str:
    by = f" by {answer.by.name}" if answer.by else ""
    return f"{answer.outcome}{by}" + (f" ({answer.reason})" if answer.reason else "")


def _name(answer: Answer) -> str:
    return answer.by.name if answer.by else "an operator"


def _busy(message: str) -> Busy:
    return Busy(message, hint="wait for an answer to those, then call again")
