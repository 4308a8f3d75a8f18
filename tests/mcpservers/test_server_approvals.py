"""Tools of an MCP server that an operator is asked about."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import trio
from mcp_support import Servers, text_of

from sandboxd.broker.question import By, Question
from sandboxd.broker.result import CallResult

ANNA = By("anna", 1001)


async def asked(servers: Servers) -> Question:
    with trio.fail_after(20):
        async with aclosing(servers.broker.calls.approvals.events()) as events:
            async for waiting in events:
                if waiting.answer is None:
                    return waiting.question
    raise AssertionError("unreachable")


async def test_a_servers_tool_waits_and_its_server_with_it(servers: Servers) -> None:
    servers.server(approval="ask")
    await servers.accept()
    approvals, results = servers.broker.calls.approvals, list[CallResult]()

    async def call(**options: Any) -> None:
        results.append(await servers.call("echo", {"word": "hello"}, **options))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        question = await asked(servers)
        assert (question.tool, question.arguments) == ("kit__echo", {"word": "hello"})
        assert question.reason.startswith("tools/kit/tool.yaml")
        assert question.reason.endswith("wants an operator's approval")
        assert servers.broker.calls.servers.live() == []
        await approvals.approve(question.id, ANNA, scope="session")
    assert [(result.outcome, text_of(result)) for result in results] == [("ok", "hello")]
    await call()
    assert [(result.outcome, text_of(result)) for result in results] == [("ok", "hello")] * 2
    events = [r["event"] for r in servers.broker.records() if r.get("call") == question.id]
    assert events == ["call.decided", "approval.approved", "call.launched", "call.ended"]


async def test_a_denied_tool_starts_no_server(servers: Servers) -> None:
    servers.server(approval="ask")
    await servers.accept()
    before = len(servers.broker.records("server.started"))
    results = list[CallResult]()

    async def call() -> None:
        results.append(await servers.call("echo", {"word": "hello"}))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        question = await asked(servers)
        await servers.broker.calls.approvals.deny(question.id, ANNA, reason="no")
    assert [result.outcome for result in results] == ["denied"]
    assert len(servers.broker.records("server.started")) == before
