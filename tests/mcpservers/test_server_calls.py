"""Calls of an MCP server's tools: decided, sandboxed, bounded, redacted, ended."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import pytest
import trio
from mcp_support import Servers, text_of, until

from sandboxd.broker import serverrun

TOKEN = "hunter2-is-the-value"
SECRET = {"secrets": ["TOKEN"]}


async def accepted(servers: Servers, **manifest: Any) -> None:
    servers.broker.set(TOKEN=TOKEN)
    servers.server(**{**SECRET, **manifest})
    await servers.accept()


async def test_a_tool_of_a_server_lives_the_life_of_any_call(servers: Servers) -> None:
    await accepted(servers)
    result = await servers.call("echo", {"word": "grüße"})
    assert (result.outcome, text_of(result)) == ("ok", "grüße"), result
    decided, launched, ended = (
        servers.broker.records(f"call.{what}")[0] for what in ("decided", "launched", "ended")
    )
    assert decided["tool"] == "kit__echo"
    assert decided["injected"] == [{"name": "TOKEN", "version": 1, "delivery": "env"}]
    started, stopped = (
        servers.broker.records(f"server.{what}")[-1] for what in ("started", "ended")
    )
    assert launched["server"] == started["id"] == stopped["id"]
    assert decided["seq"] < started["seq"] < launched["seq"] < stopped["seq"] < ended["seq"]
    assert (ended["outcome"], stopped["reason"]) == ("ok", "its call is over")
    assert servers.broker.calls.servers.live() == []


async def test_a_server_that_ends_with_its_call_is_waited_for_no_longer_than_it_takes(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serverrun, "_DRAIN", 30.0)  # for last words, which are there at once
    with trio.fail_after(25):
        await accepted(servers)
        result = await servers.call("echo", {"word": "yes"})
    assert result.outcome == "ok", result


async def test_arguments_are_checked_against_the_accepted_schema(servers: Servers) -> None:
    await accepted(servers)
    result = await servers.call("echo", {"word": 7})
    assert result.outcome == "denied"
    assert result.message == "arguments.word: expected string, found a number"
    assert not servers.broker.records("call.launched")


async def test_a_policy_sees_the_prefixed_name_and_the_arguments(servers: Servers) -> None:
    policy = {
        "version": 1,
        "description": "echo, but not everything",
        "rules": [
            {"deny": "kit__echo", "when": {"word": {"glob": "*secret*"}}, "reason": "no secrets"},
            {"allow": "kit__*"},
        ],
    }
    (servers.broker.config_dir / "policies" / "narrow.yaml").write_text(json.dumps(policy))
    servers.broker.agent_more["policy"] = "narrow"
    await accepted(servers)
    assert (await servers.call("echo", {"word": "open"})).outcome == "ok"
    refused = await servers.call("echo", {"word": "a secret word"})
    assert (refused.outcome, refused.message) == ("denied", "no secrets")


async def test_no_block_of_a_result_brings_a_secret(servers: Servers) -> None:
    await accepted(servers)
    result = await servers.call("tell")
    whole = json.dumps([result.content, result.structured])
    masked = "[redacted:TOKEN]"
    assert TOKEN not in whole
    assert base64.b64encode(TOKEN.encode()).decode()[:-3] not in whole
    assert result.content is not None
    text, encoded, image, link, memo, blob = result.content
    assert text == {"type": "text", "text": f"it is {masked}"}
    assert encoded["text"] == masked
    assert base64.b64decode(image["data"]) == f"data {masked}".encode()
    assert link["uri"] == f"https://example.com/{masked}"
    assert memo["resource"]["text"] == f"memo {masked}"
    assert base64.b64decode(blob["resource"]["blob"]) == f"data {masked}".encode()
    assert result.structured == {"token": masked, masked: [masked]}
    assert "a block of an unknown form" in result.message
    ended = servers.broker.records("call.ended")[-1]
    assert ended["redactions"] >= 8
    assert TOKEN not in json.dumps(servers.broker.records())


async def test_structure_and_errors_keep_their_form(servers: Servers) -> None:
    await accepted(servers)
    added = await servers.call("add", {"a": 2, "b": 3})
    assert (added.outcome, added.structured, text_of(added)) == ("ok", {"sum": 5}, "5")
    failed = await servers.call("fail")
    assert (failed.outcome, text_of(failed)) == ("failed", "no: [redacted:TOKEN]")
    refused = await servers.call("refuse")
    assert refused.outcome == "failed"
    assert "(error -32042): refused with [redacted:TOKEN]" in refused.message


async def test_the_sandbox_of_a_server_is_that_of_a_tool(servers: Servers) -> None:
    await accepted(servers)
    environment, uid, descriptors = json.loads(text_of(await servers.call("environment")))
    assert set(environment) == {"HOME", "LANG", "PATH", "TMPDIR", "TOKEN"} | (
        {"LC_CTYPE"} & set(environment)  # Python's own (PEP 538)
    )
    if os.geteuid() == 0:
        assert uid not in (0, os.geteuid())
    assert len(descriptors) == 4  # 0 to 2, and the one that lists them


async def test_a_secret_among_the_arguments_is_on_no_command_line(servers: Servers) -> None:
    await accepted(servers, argv=["--token={TOKEN}", "{{x}}"])
    among_arguments, on_command_line = json.loads(text_of(await servers.call("arguments")))
    assert (among_arguments, on_command_line) == (True, False)


async def test_a_server_gets_none_of_what_it_asks_for(servers: Servers) -> None:
    await accepted(servers)
    answers = json.loads(text_of(await servers.call("ask")))
    refused = -32601
    assert answers == [
        [9000, refused, False],
        [9001, refused, False],
        [9002, refused, False],
        [9003, None, True],  # a ping: the control
    ]


async def test_what_is_no_message_is_passed_over(servers: Servers) -> None:
    await accepted(servers)
    assert text_of(await servers.call("stray")) == "still here"


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        ("endless", "it sent a line of more than 4,194,304 bytes"),
        ("flood", "it sent a flood of messages that nobody asked for"),
        ("die", "it ended with status 3"),
    ],
)
async def test_a_server_that_breaks_a_bound_ends_with_its_tree(
    servers: Servers, tool: str, reason: str
) -> None:
    await accepted(servers)
    result = await servers.call(tool)
    assert result.outcome == "failed"
    if tool == "die":
        assert result.stderr == b"fatal: lost [redacted:TOKEN]\n"
    else:
        assert result.message == f"the server kit ended: {reason}"
    assert servers.broker.calls.servers.live() == []
    assert (await servers.call("echo", {"word": "next"})).outcome == "ok"


async def test_an_answer_over_the_limit_is_cut_and_says_so(servers: Servers) -> None:
    await accepted(servers, output_limit="4K")
    whole = await servers.call("huge", {"size": 3000})
    assert (whole.outcome, whole.truncated, len(text_of(whole))) == ("ok", False, 3000)
    cut = await servers.call("huge", {"size": 100_000})
    assert (cut.outcome, cut.truncated, len(text_of(cut))) == ("ok", True, 4096)
    assert "left out (the limit is 4,096 bytes): the end of a text" in cut.message


async def test_a_call_without_an_answer_ends_in_time(servers: Servers) -> None:
    await accepted(servers, timeout="5s")
    result = await servers.call("hang")
    assert result.outcome == "timeout"
    assert result.message == "kit__hang gave no answer within 5 s"
    assert servers.broker.calls.servers.live() == []


async def test_progress_is_passed_on_without_secrets(servers: Servers) -> None:
    await accepted(servers)
    seen: list[tuple[float, str]] = []

    async def progress(value: float, text: str) -> None:
        seen.append((value, text))

    result = await servers.call("slow", {"seconds": 0.6}, progress=progress)
    assert text_of(result) == "slow is done"
    assert [text for _, text in seen] == [f"{step} [redacted:TOKEN]" for step in range(3)]
    assert [value for value, _ in seen] == [0.0, 1.0, 2.0]


async def test_a_cancelled_call_takes_its_server_along(servers: Servers) -> None:
    await accepted(servers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(servers.call, "hang")
        await until(lambda: bool(servers.broker.records("call.launched")))
        nursery.cancel_scope.cancel()
    assert servers.broker.records("call.ended")[-1]["outcome"] == "cancelled"
    assert servers.broker.calls.servers.live() == []


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("broken", "it ended with status 1"),
        ("old", "it speaks no version of MCP that sandboxd knows"),
        ("circle", "its list of tools goes round in a circle"),
        ("endless", "its list of tools has more than 64 pages"),
        ("silent", "it was not ready within 2 s"),
    ],
)
async def test_a_server_that_does_not_start_says_why(
    servers: Servers, mode: str, reason: str
) -> None:
    await accepted(servers)
    servers.server(
        **SECRET, environment={"MODE": mode}, startup="2s" if mode == "silent" else "30s"
    )
    result = await servers.call("echo")
    assert result.outcome == "failed"
    if mode == "broken":
        assert "it said: no database at postgres://app:[redacted:TOKEN]@db" in result.message
    else:
        assert f"the server kit did not start: {reason}" in result.message
    assert servers.broker.calls.servers.live() == []
