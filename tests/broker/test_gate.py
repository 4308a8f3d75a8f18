"""Calls take their turn: bounded for the host and for each session, and fair."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from sandboxd.broker.gate import Busy, Gate, Share


def gate(*, total: int = 2, per_session: int = 2, queue: int = 2, patience: float = 60) -> Gate:
    return Gate(total=total, per_session=per_session, queue=queue, patience=patience)


class Callers:
    """Calls that hold their slot until told to end, and write down who started when."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.started: list[str] = []
        self.ends: dict[str, trio.Event] = {}

    async def call(self, session: str, name: str, share: Share | None = None) -> None:
        self.ends[name] = trio.Event()
        async with self.gate.slot(session, share):
            self.started.append(name)
            await self.ends[name].wait()

    async def start(self, nursery: trio.Nursery, *calls: tuple[str, str]) -> None:
        for session, name in calls:
            nursery.start_soon(self.call, session, name)
            await trio.testing.wait_all_tasks_blocked()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await trio.testing.wait_all_tasks_blocked()


async def test_no_more_run_at_once_than_the_host_bound() -> None:
    callers = Callers(gate(total=2))
    async with trio.open_nursery() as nursery:
        await callers.start(nursery, ("a", "a1"), ("b", "b1"), ("c", "c1"))
        assert callers.started == ["a1", "b1"]
        await callers.end("a1")
        assert callers.started == ["a1", "b1", "c1"]
        nursery.cancel_scope.cancel()


async def test_one_session_leaves_room_for_others() -> None:
    callers = Callers(gate(total=3, per_session=2))
    async with trio.open_nursery() as nursery:
        await callers.start(nursery, ("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"))
        assert callers.started == ["a1", "a2", "b1"]
        nursery.cancel_scope.cancel()


async def test_a_session_is_served_in_order_and_sessions_in_turn() -> None:
    callers = Callers(gate(total=1, per_session=1, queue=9))
    async with trio.open_nursery() as nursery:
        await callers.start(
            nursery, ("a", "a1"), ("a", "a2"), ("a", "a3"), ("a", "a4"), ("b", "b1"), ("b", "b2")
        )
        for name in ("a1", "a2", "b1", "a3", "b2"):
            await callers.end(name)
        assert callers.started == ["a1", "a2", "b1", "a3", "b2", "a4"]
        nursery.cancel_scope.cancel()


async def test_a_full_queue_is_busy_at_once() -> None:
    callers = Callers(gate(total=1, per_session=1, queue=1))
    async with trio.open_nursery() as nursery:
        await callers.start(nursery, ("a", "a1"), ("a", "a2"))
        with pytest.raises(Busy, match="1 calls running, 1 waiting") as caught:
            async with callers.gate.slot("a"):
                pytest.fail("no slot was free")
        assert "call again" in caught.value.hint
        nursery.cancel_scope.cancel()


async def test_waiting_ends_with_patience(autojump_clock: trio.testing.MockClock) -> None:
    callers = Callers(gate(total=1, patience=30))
    async with trio.open_nursery() as nursery:
        await callers.start(nursery, ("a", "a1"))
        with pytest.raises(Busy, match="30 s"):
            async with callers.gate.slot("b"):
                pytest.fail("no slot was free")
        await callers.end("a1")
        async with callers.gate.slot("b"):
            assert callers.gate.running == 1


async def test_a_cancelled_wait_leaves_no_trace() -> None:
    callers = Callers(gate(total=1))
    async with trio.open_nursery() as nursery:
        await callers.start(nursery, ("a", "a1"))
        with trio.move_on_after(0):
            await callers.call("a", "a2")
        await callers.start(nursery, ("b", "b1"))
        await callers.end("a1")
        assert callers.started == ["a1", "b1"]
        await callers.end("b1")
    assert callers.gate.running == 0
    assert not callers.gate._sessions


async def test_a_slot_granted_to_a_cancelled_call_goes_to_the_next() -> None:
    callers = Callers(gate(total=1))
    async with trio.open_nursery() as nursery:
        await callers.start(nursery, ("a", "a1"))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                await callers.start(inner, ("b", "b1"))
                await callers.start(nursery, ("c", "c1"))
                callers.ends["a1"].set()
                scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert callers.started[-1] == "c1"
        await callers.end("c1")
    assert callers.gate.running == 0


async def queue(callers: Callers, nursery: trio.Nursery, *calls: tuple[str, str, Share]) -> None:
    for session, name, share in calls:
        nursery.start_soon(callers.call, session, name, share)
        await trio.testing.wait_all_tasks_blocked()


async def test_a_tool_has_a_bound_over_all_sessions() -> None:
    callers, one = Callers(gate(total=9, per_session=9, queue=9)), Share("slow", total=1)
    async with trio.open_nursery() as nursery:
        await queue(callers, nursery, ("a", "a1", one), ("b", "b1", one), ("a", "a2", one))
        assert callers.started == ["a1"]
        for count in (1, 2, 3):
            assert len(callers.started) == count
            await callers.end(callers.started[-1])
    assert sorted(callers.started) == ["a1", "a2", "b1"]
    assert not callers.gate._tools


async def test_a_tool_has_a_bound_in_each_session() -> None:
    callers, one = Callers(gate(total=9, per_session=9)), Share("slow", per_session=1)
    async with trio.open_nursery() as nursery:
        await queue(callers, nursery, ("a", "a1", one), ("a", "a2", one), ("b", "b1", one))
        assert callers.started == ["a1", "b1"]
        await callers.end("a1")
        assert callers.started == ["a1", "b1", "a2"]
        nursery.cancel_scope.cancel()


async def test_who_waits_for_a_tool_holds_no_slot_and_lets_others_pass() -> None:
    callers, slow = Callers(gate(total=2, per_session=2)), Share("slow", total=1)
    async with trio.open_nursery() as nursery:
        await queue(callers, nursery, ("a", "a1", slow), ("a", "a2", slow))
        await queue(callers, nursery, ("a", "quick", Share("quick")))
        assert callers.started == ["a1", "quick"]
        nursery.cancel_scope.cancel()


async def test_a_busy_tool_is_named(autojump_clock: trio.testing.MockClock) -> None:
    callers, slow = Callers(gate(total=9, patience=3)), Share("slow", total=1)
    async with trio.open_nursery() as nursery:
        await queue(callers, nursery, ("a", "a1", slow))
        with pytest.raises(Busy, match=r"no slot became free in 3 s: slow runs 1 at a time$"):
            await callers.call("b", "b1", slow)
        with pytest.raises(Busy, match=r"3 s: slow runs 1 at a time in one session$"):
            await callers.call("a", "a2", Share("slow", total=2, per_session=1))
        nursery.cancel_scope.cancel()
