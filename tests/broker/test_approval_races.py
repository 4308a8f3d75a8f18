"""Answers, clients, clocks and disks that come in between each other: one end for each question."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from sandboxd.audit import AuditLog
from sandboxd.broker.approvals import Approvals
from sandboxd.broker.gate import Busy
from sandboxd.broker.question import By, Waiting
from sandboxd.errors import Conflict, NotFound
from sandboxd.policy.decide import Decision
from sandboxd.policy.model import ApprovalSettings, Tool
from sandboxd.policy.values import Count, Line, ProgramPath, ToolName

ANNA, BERT = By("anna", 1001), By("bert", 1002)
TOOL = Tool(ToolName("t"), Line("a tool"), ProgramPath(Path("/bin/true")), {})


class Held(AuditLog):
    """An audit log whose next record of an event waits until it is let go."""

    held = ""
    reached: trio.Event
    go: trio.Event

    def hold(self, event: str) -> None:
        self.held, self.reached, self.go = event, trio.Event(), trio.Event()

    async def append(self, event: str, **fields: Any) -> int:
        if event == self.held:
            self.held = ""
            self.reached.set()
            with trio.fail_after(20):  # a test that fails lets nothing go
                await self.go.wait()
        return await super().append(event, **fields)


@pytest.fixture
def audit(tmp_path: Path) -> Iterator[Held]:
    log = Held.open(tmp_path / "audit", b"k" * 32)
    yield log
    assert log.verify().ok
    log.close()


@pytest.fixture
def approvals(audit: Held) -> Approvals:
    return Approvals(audit)


class Asked:
    """A call without a tool: whether it ran, and how its waiting ended."""

    def __init__(self, approvals: Approvals, limit: float = 30.0, **facts: Any) -> None:
        self.approvals, self.limit, self.facts = approvals, limit, facts
        self.ran = False
        self.outcome = ""
        self.scope = trio.CancelScope()

    @property
    def id(self) -> str:
        return str(self.facts.get("id", "c-1"))

    async def __call__(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        session: Any = SimpleNamespace(
            id=self.facts.get("session", "s-1"),
            agent=SimpleNamespace(slug="a", team="default"),
            config=SimpleNamespace(generation="g"),
        )
        decision = Decision("ask", "rule", "why", tool=TOOL, approval_timeout=self.limit)
        asking = self.approvals.begin(self.id, session, decision, {}, ())
        assert asking.waiting is not None
        task_status.started(asking.waiting)
        self.outcome = "cancelled"
        with self.scope:
            answer = await self.approvals.wait(
                asking.waiting,
                then=self.facts.get("then", trio.lowlevel.checkpoint),
                why=lambda: "?",
            )
            self.outcome, self.ran = answer.outcome, answer.approved


def ends(audit: AuditLog, id: str = "c-1") -> list[str]:
    return [r["event"].partition(".")[2] for r in audit.tail(10_000) if r.get("call") == id]


async def test_a_client_that_leaves_while_it_is_approved_runs_nothing(
    approvals: Approvals, audit: Held
) -> None:
    call = Asked(approvals)
    audit.hold("approval.approved")

    async def approve() -> None:
        with pytest.raises(Conflict, match="withdrawn while it was being answered"):
            await approvals.approve("c-1", ANNA, scope="session")

    async with trio.open_nursery() as nursery:
        waiting: Waiting = await nursery.start(call)
        nursery.start_soon(approve)
        await audit.reached.wait()
        call.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        audit.go.set()
    assert (call.ran, ends(audit)) == (False, ["approved", "withdrawn"])
    with pytest.raises(Conflict, match="withdrawn"):
        approvals.get("c-1")
    assert waiting.question.digest not in approvals._kept.get("s-1", {})
    assert approvals._places == {}


async def test_an_answer_given_in_time_counts_though_the_disk_is_slow(
    approvals: Approvals, audit: Held
) -> None:
    call = Asked(approvals, limit=0.5)
    audit.hold("approval.approved")
    async with trio.open_nursery() as nursery:
        await nursery.start(call)
        nursery.start_soon(approvals.approve, "c-1", ANNA)
        await audit.reached.wait()
        await trio.sleep(0.6)  # past the limit
        with pytest.raises(Conflict, match="is being answered by anna"):
            await approvals.deny("c-1", BERT)
        audit.go.set()
    assert (call.ran, ends(audit)) == (True, ["approved"])


async def test_an_answer_counts_though_its_operator_leaves(
    approvals: Approvals, audit: Held
) -> None:
    call = Asked(approvals)
    audit.hold("approval.denied")
    async with trio.open_nursery() as nursery:
        await nursery.start(call)
        async with trio.open_nursery() as operator:
            operator.start_soon(approvals.deny, "c-1", ANNA)
            await audit.reached.wait()
            operator.cancel_scope.cancel()
            audit.go.set()
    assert (call.outcome, ends(audit)) == ("denied", ["denied"])


async def test_an_answer_that_comes_while_the_end_of_time_is_recorded_is_too_late(
    approvals: Approvals, audit: Held
) -> None:
    call = Asked(approvals, limit=0.01)
    audit.hold("approval.expired")
    async with trio.open_nursery() as nursery:
        await nursery.start(call)
        await audit.reached.wait()
        with pytest.raises((NotFound, Conflict)):
            await approvals.approve("c-1", ANNA)
        audit.go.set()
    assert (call.outcome, ends(audit)) == ("expired", ["expired"])


async def test_an_approved_call_that_gets_no_slot_is_withdrawn(
    approvals: Approvals, audit: Held
) -> None:
    async def full() -> None:
        raise Busy("no slot became free")

    call = Asked(approvals, then=full)

    async def called(*, task_status: Any) -> None:
        with pytest.raises(Busy):
            await call(task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(called)
        await approvals.approve("c-1", ANNA)
    assert ends(audit) == ["approved", "withdrawn"]
    assert audit.tail(1)[0]["reason"] == "no slot became free"


async def test_all_sessions_together_have_a_bound_too(audit: Held) -> None:
    approvals = Approvals(audit, settings=lambda: ApprovalSettings(max_waiting=Count(2)))
    async with trio.open_nursery() as nursery:
        for number in range(2):
            await nursery.start(Asked(approvals, id=f"c-{number}", session=f"s-{number}"))
        with pytest.raises(Busy, match="2 calls wait for an operator"):
            await Asked(approvals, id="c-3", session="s-3")()
        await approvals.deny("c-0", ANNA)
        await trio.testing.wait_all_tasks_blocked()
        await nursery.start(Asked(approvals, id="c-4", session="s-4"))
        nursery.cancel_scope.cancel()
    assert approvals._places == {}


async def test_whatever_comes_in_between_a_question_has_one_end(
    approvals: Approvals, audit: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandboxd.broker.approvals._ASKS", 10_000)
    chance = random.Random(20260302)

    def limit(number: int) -> float:  # past at once, soon, or never in this test
        return (0.0, chance.uniform(0.0, 0.06), 30.0)[number % 3]

    calls = [Asked(approvals, limit(n), id=f"c-{n}", session=f"s-{n % 40}") for n in range(240)]
    operators: Counter[str] = Counter()
    seen: Counter[tuple[str, bool]] = Counter()

    async def called(call: Asked) -> None:
        await trio.sleep(chance.uniform(0.0, 0.3))
        try:
            await call()
        except Busy:
            call.outcome = "busy"

    async def leave(call: Asked) -> None:
        await trio.sleep(chance.choice((0.0, chance.uniform(0.05, 0.4))))
        call.scope.cancel()

    async def operator(by: By) -> None:
        while True:
            for waiting in approvals.waiting:
                act = chance.choice((approvals.approve, approvals.deny))
                try:
                    await act(waiting.question.id, by)
                    operators[waiting.question.id] += 1
                except (Conflict, NotFound):
                    pass
                if chance.random() < 0.7:
                    break
            await trio.sleep(chance.uniform(0.0, 0.01))

    async def watch() -> None:
        events = approvals.events()
        try:
            async for waiting in events:
                seen[waiting.question.id, waiting.answer is not None] += 1
        finally:
            with trio.CancelScope(shield=True):
                await events.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        for by in (ANNA, BERT):
            nursery.start_soon(operator, by)
        async with trio.open_nursery() as calling:
            for number, call in enumerate(calls):
                calling.start_soon(called, call)
                if number % 4 == 0:
                    calling.start_soon(leave, call)
        nursery.cancel_scope.cancel()
    outcomes = Counter(call.outcome for call in calls)
    assert all(outcomes[o] for o in ("approved", "denied", "expired", "cancelled")), outcomes
    for call in calls:
        recorded = ends(audit, call.id)
        expected = {
            "approved": [["approved"]],
            "denied": [["denied"]],
            "expired": [["expired"]],
            "cancelled": [["withdrawn"], ["approved", "withdrawn"], ["denied"], ["expired"]],
            "busy": [[]],
        }[call.outcome]
        assert recorded in expected, (call.id, call.outcome, recorded)
        assert call.ran == (call.outcome == "approved")
        assert operators[call.id] <= 1
    assert approvals.waiting == []
    assert approvals._places == {}
    assert max(seen.values()) == 1
    assert all((id, False) in seen for id, ended in seen if ended)
