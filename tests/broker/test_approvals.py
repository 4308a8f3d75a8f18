"""Calls that wait for an operator: what lets them run, and everything that doesn't."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
import trio
from broker_parts import Broker

from sandboxd.broker.calls import Bounds
from sandboxd.broker.question import By, Question
from sandboxd.broker.result import CallResult
from sandboxd.errors import Conflict, NotFound, StoreError

ANNA, BERT = By("anna", 1001), By("bert", 1002)


class Call:
    """A call in the background, and what came of it."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.result: CallResult | None = None

    async def run(
        self, broker: Broker, tool: str, options: dict[str, Any], done: trio.Event
    ) -> None:
        try:
            with self.scope:
                self.result = await broker.call(tool, **options)
        finally:
            done.set()


class Desk:
    """Calls that run in the background of a test."""

    def __init__(self, broker: Broker, nursery: trio.Nursery) -> None:
        self.broker, self.nursery = broker, nursery
        self.done: dict[Call, trio.Event] = {}

    async def ask(self, tool: str = "ask", **options: Any) -> tuple[Call, Question]:
        """Make a call and wait until it is asked about."""
        approvals = self.broker.calls.approvals
        before = {w.question.id for w in approvals.waiting}
        call = self.call(tool, **options)
        with trio.fail_after(20):
            async with aclosing(approvals.events()) as events:
                async for waiting in events:
                    if waiting.answer is None and waiting.question.id not in before:
                        return call, waiting.question
        raise AssertionError("unreachable")

    def call(self, tool: str, **options: Any) -> Call:
        call = Call()
        self.done[call] = trio.Event()
        self.nursery.start_soon(call.run, self.broker, tool, options, self.done[call])
        return call

    async def end(self, call: Call) -> CallResult:
        with trio.fail_after(20):
            await self.done[call].wait()
        assert call.result is not None
        return call.result


@asynccontextmanager
async def desk(broker: Broker) -> AsyncIterator[Desk]:
    async with trio.open_nursery() as nursery:
        yield Desk(broker, nursery)
        nursery.cancel_scope.cancel()


def policy(
    broker: Broker, rules: str = "[{ask: ask, reason: it costs money}, {allow: '*'}]", **keys: Any
) -> None:
    """The policy that the broker's agent is under."""
    lines = [f"{key}: {value}\n" for key, value in keys.items()]
    path = broker.config_dir / "policies/asking.yaml"
    path.write_text(f"version: 1\ndescription: d\nnetwork: none\nrules: {rules}\n" + "".join(lines))
    path.chmod(0o644)
    broker.agent_more["policy"] = "asking"


@pytest.fixture
def asking(broker: Broker) -> Broker:
    """A tool ``ask`` that the policy asks about, and a tool ``free`` that it allows."""
    policy(broker)
    broker.tool("ask", 'echo "ran $1 with $TOKEN"', secrets=[{"variable": "TOKEN"}])
    broker.tool("free", "echo free")
    broker.set(TOKEN="s3cr3t-of-the-tests")
    return broker


def events(broker: Broker) -> list[str]:
    return [record["event"] for record in broker.records()]


async def test_nothing_runs_before_the_approval_is_on_disk(asking: Broker) -> None:
    approvals = asking.calls.approvals
    async with desk(asking) as running:
        call, question = await running.ask(arguments={"word": "one"})
        assert events(asking) == ["call.decided"]
        assert asking.calls.running() == 0
        assert await approvals.approve(question.id, ANNA) == question
        result = await running.end(call)
    assert (result.outcome, result.stdout) == ("ok", b"ran one with [redacted:TOKEN]\n")
    assert events(asking) == ["call.decided", "approval.approved", "call.launched", "call.ended"]
    asked, approved = asking.records()[:2]
    assert (asked["decision"], asked["digest"]) == ("ask", question.digest)
    assert asked["approval_timeout"] == 300
    assert [i["name"] for i in asked["injected"]] == ["TOKEN"]
    assert (approved["by"], approved["uid"], approved["scope"]) == ("anna", 1001, "once")
    assert approved["call"] == asked["call"] == question.id == result.call
    assert approved["digest"] == question.digest
    assert 0 <= approved["waited_ms"] < 60_000
    assert approvals.waiting == []


async def test_a_question_holds_all_that_would_run(asking: Broker) -> None:
    async with desk(asking) as running:
        _, question = await running.ask(arguments={"word": "one"})
    assert question.arguments == {"word": "one"}
    assert question.argv[-1] == "one"
    assert question.program == asking.config.tools["ask"].program.as_posix()
    assert question.reason == "it costs money"
    assert question.rule.startswith("policies/asking.yaml:4 ask ask")
    (secret,) = question.secrets
    assert secret == {"variable": "TOKEN", "version": 1, "as": "TOKEN", "delivery": "env"}
    assert "s3cr3t" not in repr(question)


async def test_a_denial_tells_the_client_the_operators_reason(asking: Broker) -> None:
    async with desk(asking) as running:
        call, question = await running.ask()
        await asking.calls.approvals.deny(question.id, BERT, reason="not on a Friday")
        result = await running.end(call)
    assert (result.outcome, result.rule) == ("denied", question.rule)
    assert result.message == "ask did not run: an operator denied it: not on a Friday"
    assert events(asking) == ["call.decided", "approval.denied"]
    denied = asking.records()[-1]
    assert (denied["reason"], denied["by"], denied["uid"]) == ("not on a Friday", "bert", 1002)


async def test_nobodys_answer_is_a_denial(asking: Broker) -> None:
    policy(asking, approval_timeout="100ms")
    result = await asking.call("ask")
    assert result.outcome == "denied"
    assert result.message == "ask did not run: nobody answered in 0.1 s"
    assert "approvals" in result.hint
    assert events(asking) == ["call.decided", "approval.expired"]
    assert asking.records()[-1]["waited_ms"] >= 100
    assert asking.records()[-1]["by"] is None
    with pytest.raises(Conflict, match="expired"):
        await asking.calls.approvals.approve(result.call, ANNA)


async def test_a_client_that_takes_its_call_back_withdraws_the_question(asking: Broker) -> None:
    async with desk(asking) as running:
        call, question = await running.ask()
        call.scope.cancel()
        await running.done[call].wait()
        with pytest.raises(Conflict, match="withdrawn"):
            await asking.calls.approvals.approve(question.id, ANNA)
    assert events(asking) == ["call.decided", "approval.withdrawn"]
    assert asking.calls.approvals.waiting == []


async def test_a_stopped_session_withdraws_its_questions_only(asking: Broker) -> None:
    one, two = asking.session("s-" + "1" * 16), asking.session("s-" + "2" * 16)
    async with desk(asking) as running:
        call, _ = await running.ask(session=one)
        other, question = await running.ask(session=two)
        assert await asking.calls.cancel_session(one.id) == 1
        result = await running.end(call)
        assert [w.question.id for w in asking.calls.approvals.waiting] == [question.id]
        await asking.calls.approvals.approve(question.id, ANNA)
        assert (await running.end(other)).outcome == "ok"
    assert (result.outcome, result.message) == (
        "cancelled",
        "the call was ended: the session was stopped",
    )
    (withdrawn,) = asking.records("approval.withdrawn")
    assert withdrawn["reason"] == "the session was stopped"


async def test_a_waiting_call_holds_no_slot(open_broker: Callable[..., Any]) -> None:
    async with open_broker(bounds=Bounds(total=1, per_session=1, queue=1, patience=5)) as broker:
        policy(broker)
        broker.tool("ask", "echo asked")
        broker.tool("free", "echo free")
        async with desk(broker) as running:
            call, question = await running.ask()
            another, _ = await running.ask(arguments={"word": "two"})
            assert (await broker.call("free")).outcome == "ok"
            await broker.calls.approvals.approve(question.id, ANNA)
            assert (await running.end(call)).outcome == "ok"
            assert another.result is None


async def test_approved_for_the_session_the_same_arguments_run_unasked(asking: Broker) -> None:
    approvals = asking.calls.approvals
    async with desk(asking) as running:
        call, question = await running.ask(arguments={"word": "one"})
        await approvals.approve(question.id, ANNA, scope="session")
        assert (await running.end(call)).outcome == "ok"
        again = await asking.call("ask", {"word": "one"})
        assert (again.outcome, again.stdout) == ("ok", b"ran one with [redacted:TOKEN]\n")
        decided = asking.records("call.decided")[-1]
        assert (decided["decision"], decided["digest"]) == ("allow", question.digest)
        assert "anna" in decided["reason"]
        assert question.id in decided["reason"]
        _, changed = await running.ask(arguments={"word": "two"})
        assert changed.digest != question.digest
        elsewhere = asking.session("s-" + "2" * 16)
        _, other = await running.ask(arguments={"word": "one"}, session=elsewhere)
        assert other.digest == question.digest
        asking.calls.forget(question.session)  # as its end does
        await running.ask(arguments={"word": "one"})


async def test_approved_once_the_same_arguments_ask_again(asking: Broker) -> None:
    async with desk(asking) as running:
        call, question = await running.ask(arguments={"word": "one"})
        await asking.calls.approvals.approve(question.id, ANNA)
        await running.end(call)
        _, again = await running.ask(arguments={"word": "one"})
    assert (again.digest, again.id != question.id) == (question.digest, True)


async def test_denied_for_the_session_the_same_arguments_are_denied_unasked(
    asking: Broker,
) -> None:
    async with desk(asking) as running:
        call, question = await running.ask(arguments={"word": "one"})
        await asking.calls.approvals.deny(question.id, ANNA, scope="session", reason="never")
        await running.end(call)
        again = await asking.call("ask", {"word": "one"})
    assert (again.outcome, again.message) == ("denied", "an operator denied it: never")
    assert asking.records("call.decided")[-1]["decision"] == "deny"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('{"n": 1}', '{"n": 1.0}'),
        ('{"n": 1}', '{"n": true}'),
        ('{"n": 1, "m": 2}', '{"m": 2, "n": 1}'),
    ],
)
async def test_arguments_are_the_same_only_if_the_tool_would_see_the_same(
    broker: Broker, first: str, second: str
) -> None:
    import json

    policy(broker)
    broker.tool("ask", "cat", stdin="json", argv=["-c", "cat"], input={"type": "object"})
    async with desk(broker) as running:
        _, one = await running.ask(arguments=json.loads(first))
        _, two = await running.ask(arguments=json.loads(second))
        _, same = await running.ask(arguments=json.loads(first))
    assert one.digest == same.digest
    assert one.digest != two.digest


async def test_of_two_operators_one_decides(asking: Broker) -> None:
    outcomes: list[str] = []

    async def decide(act: Callable[..., Any], by: By, id: str) -> None:
        try:
            await act(id, by)
            outcomes.append("decided")
        except Conflict as refused:
            outcomes.append(refused.message)

    approvals = asking.calls.approvals
    async with desk(asking) as running:
        call, question = await running.ask()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(decide, approvals.approve, ANNA, question.id)
            nursery.start_soon(decide, approvals.deny, BERT, question.id)
        result = await running.end(call)
        with pytest.raises(Conflict, match=r"does not wait any more: (approved|denied) by"):
            await approvals.deny(question.id, BERT)
    outcomes.remove("decided")
    (lost,) = outcomes
    assert "is being answered by" in lost
    (settled,) = [r for r in asking.records() if r["event"].startswith("approval.")]
    assert settled["by"] in lost
    assert (result.outcome == "ok") == (settled["event"] == "approval.approved")


async def test_an_answer_to_another_digest_does_not_count(asking: Broker) -> None:
    approvals = asking.calls.approvals
    async with desk(asking) as running:
        call, question = await running.ask()
        with pytest.raises(Conflict, match="not the call that was shown"):
            await approvals.approve(question.id, ANNA, digest="0" * 64)
        assert call.result is None
        await approvals.approve(question.id, ANNA, digest=question.digest)
        assert (await running.end(call)).outcome == "ok"


async def test_the_beginning_of_an_id_is_enough_to_look_and_not_to_answer(asking: Broker) -> None:
    approvals = asking.calls.approvals
    async with desk(asking) as running:
        _, question = await running.ask()
        assert approvals.find(question.id[:6]).question == question
        with pytest.raises(NotFound):
            await approvals.approve(question.id[:6], ANNA)
        with pytest.raises(NotFound):
            approvals.find("")


async def test_too_many_questions_are_refused_unrecorded(asking: Broker) -> None:
    (asking.config_dir / "sandboxd.yaml").write_text("version: 1\n")
    bound = asking.calls.approvals._settings().max_waiting_per_session
    one, two = asking.session("s-" + "1" * 16), asking.session("s-" + "2" * 16)
    async with desk(asking) as running:
        asked = [await running.ask(session=one, arguments={"word": str(n)}) for n in range(bound)]
        recorded = len(asking.records())
        flood = [await asking.call("ask", {"word": "more"}, session=one) for _ in range(20)]
        assert {result.outcome for result in flood} == {"busy"}
        assert len(asking.records()) == recorded
        await running.ask(session=two)
        assert (await asking.call("free", session=one)).outcome == "ok"
        call, question = asked[0]
        await asking.calls.approvals.deny(question.id, ANNA)
        await running.end(call)
        await running.ask(session=one, arguments={"word": "now there is room"})


async def test_a_session_that_asks_and_asks_is_put_off(asking: Broker) -> None:
    asking.calls.approvals.listeners.append(lambda waiting: told.append(waiting.question.id))
    told: list[str] = []
    async with desk(asking) as running:
        for n in range(30):
            call, _ = await running.ask(arguments={"word": str(n)})
            call.scope.cancel()
            await running.done[call].wait()
        result = await asking.call("ask", {"word": "once more"})
    assert result.outcome == "busy"
    assert "30 times within a minute" in result.message
    assert len(set(told)) == 30


async def test_a_value_revoked_meanwhile_withdraws_the_question(asking: Broker) -> None:
    async with desk(asking) as running:
        call, _ = await running.ask()
        asking.vault.of("default").revoke("worker", "TOKEN", up_to=1)
        assert await asking.calls.cancel_using("default", "worker", "TOKEN", 1) == 1
        result = await running.end(call)
    assert result.outcome == "cancelled"
    assert "TOKEN was revoked" in result.message


async def test_a_value_revoked_meanwhile_is_not_unsealed_after_an_approval(asking: Broker) -> None:
    async with desk(asking) as running:
        call, question = await running.ask()
        asking.vault.of("default").revoke("worker", "TOKEN", up_to=1)
        await asking.calls.approvals.approve(question.id, ANNA)
        result = await running.end(call)
    assert result.outcome == "denied"
    assert "call.launched" not in events(asking)


async def test_a_program_changed_meanwhile_does_not_run(broker: Broker) -> None:
    policy(broker)
    beside = {"program": "#!/bin/sh\necho honest\n"}
    broker.tool("ask", beside=beside, program="program", argv=[])
    async with desk(broker) as running:
        call, question = await running.ask()
        (broker.config_dir / "tools/ask/program").write_text("#!/bin/sh\necho swapped\n")
        await broker.calls.approvals.approve(question.id, ANNA)
        result = await running.end(call)
    assert result.outcome == "denied"
    assert "changed after the configuration was loaded" in result.message


async def test_an_approval_that_cannot_be_recorded_lets_nothing_run(asking: Broker) -> None:
    async with desk(asking) as running:
        call, question = await running.ask()
        asking.audit.close()
        with pytest.raises(StoreError):
            await asking.calls.approvals.approve(question.id, ANNA)
        result = await running.end(call)
    assert (result.outcome, result.stdout) == ("failed", b"")
    assert "audit log" in result.message


async def test_a_question_that_cannot_be_recorded_is_not_asked(asking: Broker) -> None:
    session = asking.session()
    asking.audit.close()
    result = await asking.call("ask", session=session)
    assert result.outcome == "failed"
    assert asking.calls.approvals.waiting == []
    assert asking.calls.approvals._places == {}


async def test_progress_rises_while_a_call_waits_and_runs(asking: Broker) -> None:
    reports: list[tuple[float, str]] = []
    told = trio.Event()

    async def progress(amount: float, text: str) -> None:
        reports.append((amount, text))
        told.set()

    async with desk(asking) as running:
        call, question = await running.ask(progress=progress)
        await told.wait()
        await asking.calls.approvals.approve(question.id, ANNA)
        await running.end(call)
    assert "waits for an operator's approval" in reports[0][1]
    assert question.id in reports[0][1]
    assert reports[0][0] < 1
    amounts = [amount for amount, _ in reports]
    assert amounts == sorted(set(amounts))


async def test_a_client_that_takes_no_progress_holds_nothing_up(asking: Broker) -> None:
    async def stuck(amount: float, text: str) -> None:
        await trio.sleep_forever()

    async with desk(asking) as running:
        call, question = await running.ask(progress=stuck)
        await asking.calls.approvals.deny(question.id, ANNA)
        assert (await running.end(call)).outcome == "denied"


@pytest.mark.parametrize(
    ("rules", "outcome"),
    [
        ("[{allow: careful}]", "denied"),
        ("[{allow: careful, approved: true}]", "ok"),
        ("[{ask: careful}]", "denied"),
        ("[{deny: careful}, {allow: careful, approved: true}]", "denied"),
    ],
)
async def test_a_manifest_that_asks_is_overridden_only_on_purpose(
    broker: Broker, rules: str, outcome: str
) -> None:
    policy(broker, rules, approval_timeout="50ms")
    broker.tool("careful", "echo ran", approval="ask")
    assert (await broker.call("careful")).outcome == outcome
    asked = [r for r in broker.records("call.decided") if r["decision"] == "ask"]
    assert bool(asked) == (outcome == "denied" and "deny" not in rules)


async def test_a_missing_variable_is_no_question(asking: Broker) -> None:
    asking.vault.of("default").remove("worker", ["TOKEN"], by="test")
    result = await asking.call("ask")
    assert result.outcome == "denied"
    assert "TOKEN" in result.message
    assert events(asking) == ["call.decided"]
