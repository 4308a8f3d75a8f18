"""Servers that live for a session: reused, ended when idle, revoked, stopped, or gone."""

from __future__ import annotations

import os

import psutil
import pytest
import trio
from mcp_support import Servers, text_of, until

pytestmark = pytest.mark.soak

TOKEN = "hunter2-is-the-value"


async def test_a_session_has_one_server_for_its_calls(servers: Servers) -> None:
    servers.server(lifetime="session")
    await servers.accept()
    async with servers.attached() as session:
        counts: list[str] = []

        async def count() -> None:
            counts.append(text_of(await servers.call("count", session=session)))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(count)
        assert sorted(words.split()[0] for words in counts) == ["1", "2", "3", "4"]
        assert len({words.split()[1] for words in counts}) == 1
        (running,) = servers.broker.calls.servers.live(session.id)
        assert (running.total, running.calls) == (4, 0)
        assert psutil.pid_exists(running.pid)
    assert servers.broker.calls.servers.live() == []
    await until(lambda: not psutil.pid_exists(running.pid))
    assert servers.broker.records("server.ended")[-1]["reason"] == "its session ended"


async def test_two_sessions_share_no_server(servers: Servers) -> None:
    servers.server(lifetime="session")
    await servers.accept()
    other = "s-0000000000000002"
    async with servers.attached() as one, servers.attached(other) as two:
        assert text_of(await servers.call("count", session=one)).split()[0] == "1"
        assert text_of(await servers.call("count", session=two)).split()[0] == "1"
        assert len(servers.broker.calls.servers.live()) == 2


async def test_a_server_that_nobody_calls_ends(servers: Servers) -> None:
    servers.server(lifetime="session", idle="300ms")
    await servers.accept()
    async with servers.attached() as session:
        first = text_of(await servers.call("count", session=session))
        await until(lambda: not servers.broker.calls.servers.live(session.id))
        assert servers.broker.records("server.ended")[-1]["reason"] == "it was idle for 0.3 s"
        assert first.split()[0] == "1"
        assert text_of(await servers.call("count", session=session)).split()[0] == "1"


async def test_a_slow_call_is_not_idleness(servers: Servers) -> None:
    servers.server(lifetime="session", idle="100ms")
    await servers.accept()
    async with servers.attached() as session:
        result = await servers.call("slow", {"seconds": 0.6}, session=session)
        assert (result.outcome, text_of(result)) == ("ok", "slow is done")


async def test_a_revoked_secret_ends_the_servers_that_hold_it(servers: Servers) -> None:
    servers.broker.set(TOKEN=TOKEN)
    servers.server(lifetime="session", secrets=["TOKEN"])
    servers.server("other", lifetime="session")
    await servers.accept()
    await servers.accept("other")
    async with servers.attached() as session, trio.open_nursery() as nursery:
        await servers.call("count", session=session)
        await servers.broker.calls.call(session, "other__count", {})
        nursery.start_soon(lambda: servers.call("hang", session=session))
        (running,) = [
            one for one in servers.broker.calls.servers.live() if one.server.name == "kit"
        ]
        await until(lambda: running.calls == 1 and running.total == 2)
        assert running.versions == {"TOKEN": 1}
        assert await servers.broker.calls.cancel_using("default", "worker", "TOKEN", 1) == 1
        assert not psutil.pid_exists(running.pid)
        assert [one.server.name for one in servers.broker.calls.servers.live()] == ["other"]
        ended = servers.broker.records("call.ended")[-1]
        assert (ended["outcome"], ended["reason"]) == (
            "cancelled",
            "the variable TOKEN was revoked",
        )


async def test_a_cancelled_call_leaves_the_servers_other_calls_alone(servers: Servers) -> None:
    servers.server(lifetime="session")
    await servers.accept()
    async with servers.attached() as session:
        first = text_of(await servers.call("count", session=session)).split()[1]
        with trio.move_on_after(0.3) as scope:
            await servers.call("hang", session=session)
        assert scope.cancelled_caught
        assert text_of(await servers.call("count", session=session)).split()[1] == first


async def test_a_server_that_died_is_started_again(servers: Servers) -> None:
    servers.server(lifetime="session")
    await servers.accept()
    async with servers.attached() as session:
        await servers.call("count", session=session)
        assert (await servers.call("die", session=session)).outcome == "failed"
        assert text_of(await servers.call("count", session=session)).split()[0] == "1"


async def test_a_call_that_has_no_answer_ends_a_server_that_nobody_else_uses(
    servers: Servers,
) -> None:
    servers.server(lifetime="session", timeout="2s")
    await servers.accept()
    async with servers.attached() as session:
        await servers.call("count", session=session)
        assert (await servers.call("hang", session=session)).outcome == "timeout"
        await until(lambda: not servers.broker.calls.servers.live(session.id))


async def test_uids_and_descriptors_come_back(servers: Servers) -> None:
    servers.server()
    await servers.accept()
    before = len(os.listdir("/proc/self/fd"))
    for tool in ("count", "die", "count", "refuse"):
        await servers.call(tool)
    assert len(os.listdir("/proc/self/fd")) == before
