"""What a tool prints as JSON reaches the client as a structure, as its manifest promises."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from broker_parts import Broker
from test_mcp_wire import Connections

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["n"],
    "properties": {"n": {"type": "integer"}, "text": {"type": "string"}},
}


@pytest.fixture
async def connections(broker: Broker, nursery: trio.Nursery) -> AsyncIterator[Connections]:
    opened = Connections(broker, nursery)
    yield opened
    for wire in opened.wires:
        wire.stream.socket.close()
    nursery.cancel_scope.cancel()


async def test_an_output_schema_is_listed_and_kept(
    broker: Broker, connections: Connections
) -> None:
    broker.set(TOKEN="hunter2-is-the-value")
    broker.tool(
        "count",
        """printf '{"n": 3, "text": "%s"}' "$TOKEN" """,
        output=SCHEMA,
        secrets=[{"variable": "TOKEN"}],
    )
    wire = await connections.open()
    (tool,) = (await wire.ask("tools/list"))["result"]["tools"]
    assert tool["outputSchema"] == SCHEMA
    result = (await wire.call("count"))["result"]
    assert result.get("isError", False) is False
    assert result["structuredContent"] == {"n": 3, "text": "[redacted:TOKEN]"}
    assert json.loads(result["content"][0]["text"]) == result["structuredContent"]


@pytest.mark.parametrize(
    ("printed", "problem"),
    [
        ('{"n": "x"}', "output.n: expected integer, found text"),
        ("{}", "output: missing 'n'"),
        ('{"n": 1, "m": 2}', "output: unknown 'm' (known: n, text)"),
        ("[]", "output: expected object, found a list"),
        ("", "output: expected one JSON value, found nothing"),
        ("n = 1", "output: expected one JSON value, found what is not JSON (line 1)"),
        ('{"n": NaN}', "output: expected one JSON value, found what is not JSON"),
        ("\\377", "output: expected JSON, found what is not UTF-8"),
    ],
)
async def test_output_against_the_schema_fails_the_call_and_says_where(
    printed: str, problem: str, broker: Broker
) -> None:
    result = await broker.run(f"printf '{printed}'", output=SCHEMA)
    assert result.outcome == "failed"
    assert result.message == f"t0 answered with what it must not: {problem}"
    assert result.hint == "the program does not keep what tools/t0/tool.yaml says of its output"
    assert result.structured is None
    assert broker.records("call.ended")[-1]["outcome"] == "failed"


async def test_output_that_is_cut_is_told_as_that(broker: Broker) -> None:
    script = """printf '{"n": 1, "text": "aaaaaaaaaaaaaaaaaaaaaaaa"}'"""
    result = await broker.run(script, output=SCHEMA, output_limit=10)
    assert result.outcome == "failed"
    assert result.message.endswith("output: cut at the limit, so it is no JSON any more")
    assert "output_limit in tools/t0/tool.yaml" in result.hint


async def test_a_program_that_fails_is_not_held_to_the_schema(broker: Broker) -> None:
    result = await broker.run("echo sorry; exit 3", output=SCHEMA)
    assert (result.message, result.stdout) == ("t0 ended with status 3", b"sorry\n")


async def test_json_without_a_schema_is_structured_where_it_is_an_object(broker: Broker) -> None:
    assert (await broker.run("echo '{\"a\": 1}'", output_format="json")).structured == {"a": 1}
    listed = await broker.run("echo '[1]'", output_format="json")
    assert (listed.outcome, listed.structured) == ("ok", None)
    assert (await broker.run("echo no", output_format="json")).outcome == "failed"


@pytest.mark.parametrize(
    ("form", "block"),
    [
        ("auto", {"type": "resource", "blob": "YYAK"}),
        ("text", {"type": "text", "text": "a\ufffd\n"}),
        ("binary", {"type": "resource", "blob": "YYAK"}),
    ],
)
async def test_the_format_says_what_bytes_become(
    form: str, block: dict[str, Any], broker: Broker, connections: Connections
) -> None:
    broker.tool("bytes", "printf 'a\\200\\n'", output_format=form)
    (got,) = (await (await connections.open()).call("bytes"))["result"]["content"]
    assert got["type"] == block["type"]
    assert got.get("text") == block.get("text")
    assert got.get("resource", {}).get("blob") == block.get("blob")


async def test_binary_output_is_never_taken_for_text(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("plain", "echo a", output_format="binary")
    (got,) = (await (await connections.open()).call("plain"))["result"]["content"]
    assert got["resource"]["blob"] == "YQo="


async def test_grace_lets_a_program_end_by_itself_and_no_longer(broker: Broker) -> None:
    kind = {"timeout": "500ms", "grace": "20s"}
    tidy = "trap 'echo tidied; exit 0' TERM; echo begun; while :; do sleep 0.05; done"
    result = await broker.run(tidy, **kind)
    assert (result.outcome, result.stdout) == ("timeout", b"begun\ntidied\n")
    deaf = "trap '' TERM; echo begun; sleep 88011"
    with trio.fail_after(15):
        result = await broker.run(deaf, **{**kind, "grace": "100ms"})
    assert (result.outcome, result.stdout) == ("timeout", b"begun\n")
    assert result.signal == 9


async def test_a_call_that_is_taken_back_has_its_grace_and_its_output_a_reader(
    broker: Broker,
) -> None:
    workspace = broker.make_workspace()
    # SIGPIPE would end the echo, and with it the trap, before the file is there.
    script = (
        "trap 'echo tidying; echo x > tidied; exit 0' TERM; : > begun; while :; do sleep 0.05; done"
    )
    broker.tool("tidy", script, workspace="rw", grace="20s")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.call, "tidy")
        with trio.fail_after(20):
            while not (  # noqa: ASYNC110 - neither a file nor a log has an event
                (workspace / "begun").exists() and broker.records("call.launched")
            ):
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert (workspace / "tidied").exists()
    assert broker.records("call.ended")[-1]["outcome"] == "cancelled"


async def test_an_operator_s_stop_waits_for_no_grace(broker: Broker) -> None:
    broker.tool("deaf", "trap '' TERM; sleep 88012", grace="50s")
    session = broker.session()
    async with trio.open_nursery() as nursery:

        async def call() -> None:
            result = await broker.call("deaf", session=session)
            assert result.outcome == "cancelled"

        nursery.start_soon(call)
        with trio.fail_after(20):
            while not broker.records("call.launched"):  # noqa: ASYNC110 - a log has no event
                await trio.sleep(0.005)
        with trio.fail_after(20):
            assert await broker.calls.cancel_session(session.id) == 1
