"""The protocol on the wire: what a client may send, and what it gets back, line by line."""

from __future__ import annotations

import base64
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing
from broker_parts import Broker, StandIn

from sandboxd.broker.jsonrpc import MAX_LINE
from sandboxd.broker.mcp import serve_connection

VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
TOKEN = "hunter2-is-the-value"
SECRET = [{"variable": "TOKEN"}]


class Wire:
    """One end of a connection, speaking raw lines."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = bytearray()
        self.ids = 0

    async def send(self, message: Any) -> None:
        await self.stream.send_all(json.dumps(message).encode() + b"\n")

    async def receive(self) -> dict[str, Any]:
        with trio.fail_after(20):
            while b"\n" not in self.buffer:
                data = await self.stream.receive_some(65536)
                assert data, f"closed, after {bytes(self.buffer)!r}"
                self.buffer += data
        line, _, rest = bytes(self.buffer).partition(b"\n")
        self.buffer[:] = rest
        message: dict[str, Any] = json.loads(line)
        return message

    async def start(self, method: str, params: Any = None) -> int:
        """Send a request; its id."""
        self.ids += 1
        message = {"jsonrpc": "2.0", "id": self.ids, "method": method}
        await self.send(message if params is None else {**message, "params": params})
        return self.ids

    async def ask(self, method: str, params: Any = None) -> dict[str, Any]:
        """Send a request; the reply with its id, other messages dropped."""
        id = await self.start(method, params)
        while True:
            message = await self.receive()
            if message.get("id") == id:
                return message

    async def notify(self, method: str, params: Any = None) -> None:
        await self.send({"jsonrpc": "2.0", "method": method, "params": params or {}})

    async def call(self, tool: str, arguments: Any = None, **meta: Any) -> dict[str, Any]:
        params = {"name": tool, "arguments": arguments or {}}
        return await self.ask("tools/call", {**params, "_meta": meta} if meta else params)

    async def initialize(self, version: str = VERSIONS[-1]) -> dict[str, Any]:
        reply = await self.ask(
            "initialize",
            {
                "protocolVersion": version,
                "capabilities": {},
                "clientInfo": {"name": "test", "version": "1"},
            },
        )
        await self.notify("notifications/initialized")
        result: dict[str, Any] = reply["result"]
        return result


class Connections:
    """Opens connections of one session to a broker."""

    def __init__(self, broker: Broker, nursery: trio.Nursery) -> None:
        self.broker, self.nursery = broker, nursery
        self.session: StandIn | None = None
        self.ended: list[trio.Event] = []
        self.wires: list[Wire] = []

    async def open(self, *, initialized: bool = True) -> Wire:
        self.session = self.session or self.broker.session()
        ours, theirs = socket.socketpair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        ended = trio.Event()
        self.ended.append(ended)

        async def serve() -> None:
            async with stream:
                await serve_connection(stream, self.session, self.broker.calls)
            ended.set()

        self.nursery.start_soon(serve)
        wire = Wire(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        self.wires.append(wire)
        if initialized:
            await wire.initialize()
        return wire


@pytest.fixture
async def connections(broker: Broker, nursery: trio.Nursery) -> AsyncIterator[Connections]:
    opened = Connections(broker, nursery)
    yield opened
    for wire in opened.wires:
        wire.stream.socket.close()
    nursery.cancel_scope.cancel()


def texts(reply: dict[str, Any]) -> list[str]:
    return [block["text"] for block in reply["result"]["content"]]


async def launched(broker: Broker, count: int = 1) -> None:
    with trio.fail_after(20):
        while len(broker.records("call.launched")) < count:  # noqa: ASYNC110 - a log has no event
            await trio.sleep(0.005)


async def outcomes(broker: Broker, count: int = 1) -> list[str]:
    with trio.fail_after(20):
        while len(broker.records("call.ended")) < count:  # noqa: ASYNC110 - a log has no event
            await trio.sleep(0.005)
    return [record["outcome"] for record in broker.records("call.ended")]


# --- the handshake and the list -----------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
async def test_every_handshake_version_negotiates_and_calls(
    version: str, broker: Broker, connections: Connections
) -> None:
    broker.tool("hello", 'echo "hello $1"')
    wire = await connections.open(initialized=False)
    result = await wire.initialize(version)
    assert result["protocolVersion"] == version
    assert result["serverInfo"]["name"] == "sandboxd"
    assert result["capabilities"]["tools"] is not None
    assert "[redacted:NAME]" in result["instructions"]
    assert (await wire.ask("ping"))["result"] == {}
    assert [t["name"] for t in (await wire.ask("tools/list"))["result"]["tools"]] == ["hello"]
    assert texts(await wire.call("hello", {"word": "you"})) == ["hello you\n"]


async def test_the_version_without_a_handshake_works_request_by_request(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("hello", 'echo "hello $1"')
    wire = await connections.open(initialized=False)
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    found = await wire.ask("server/discover", {"_meta": meta})
    assert "2026-07-28" in found["result"]["supportedVersions"]
    listed = await wire.ask("tools/list", {"_meta": meta})
    assert [tool["name"] for tool in listed["result"]["tools"]] == ["hello"]
    reply = await wire.call("hello", {"word": "you"}, **meta)
    assert texts(reply) == ["hello you\n"]
    assert reply["result"]["resultType"] == "complete"


async def test_an_unknown_version_gets_the_newest_that_shakes_hands(
    connections: Connections,
) -> None:
    wire = await connections.open(initialized=False)
    assert (await wire.initialize("2099-01-01"))["protocolVersion"] == VERSIONS[-1]


async def test_a_tool_is_listed_as_its_manifest_describes_it(
    broker: Broker, connections: Connections
) -> None:
    broker.tool(
        "look",
        "true",
        annotations={"title": "Look around", "readOnlyHint": True, "openWorldHint": False},
    )
    wire = await connections.open()
    (tool,) = (await wire.ask("tools/list"))["result"]["tools"]
    assert tool["title"] == "Look around"
    assert tool["description"] == "the tool look"
    assert tool["annotations"] == {
        "title": "Look around",
        "readOnlyHint": True,
        "openWorldHint": False,
    }
    assert tool["inputSchema"] == {
        "type": "object",
        "additionalProperties": False,
        "properties": {"word": {"type": "string"}},
    }


# --- results ------------------------------------------------------------------------------------


async def test_a_secret_is_redacted_in_the_answer(broker: Broker, connections: Connections) -> None:
    broker.set(TOKEN=TOKEN)
    broker.tool("leak", 'echo "a $TOKEN"; echo "b $TOKEN" >&2', secrets=SECRET)
    reply = await (await connections.open()).call("leak")
    assert texts(reply) == ["a [redacted:TOKEN]\n", "b [redacted:TOKEN]\n"]
    assert reply["result"].get("isError", False) is False


async def test_a_failing_tool_is_an_error_result_with_its_output(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("fail", "echo out; echo err >&2; exit 3")
    result = (await (await connections.open()).call("fail"))["result"]
    assert result["isError"] is True
    assert [block["text"] for block in result["content"]] == [
        "out\n",
        "err\n",
        "fail ended with status 3",
    ]
    assert result["_meta"]["sandboxd/exit_code"] == 3
    assert result["_meta"]["sandboxd/outcome"] == "failed"
    assert result["content"][1]["_meta"] == {"sandboxd/stream": "stderr"}


async def test_a_silent_tool_says_so(broker: Broker, connections: Connections) -> None:
    broker.tool("quiet", "true")
    assert texts(await (await connections.open()).call("quiet")) == ["(no output)"]


async def test_bytes_that_are_no_text_come_as_a_resource(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("bytes", "printf '\\377\\376\\001'")
    (block,) = (await (await connections.open()).call("bytes"))["result"]["content"]
    assert block["type"] == "resource"
    assert block["resource"]["mimeType"] == "application/octet-stream"
    assert block["resource"]["uri"].startswith("sandboxd://calls/c-")
    assert base64.b64decode(block["resource"]["blob"]) == b"\xff\xfe\x01"


async def test_a_timeout_is_an_error_result(broker: Broker, connections: Connections) -> None:
    broker.tool("slow", "echo begun; sleep 88101", timeout="300ms")
    reply = await (await connections.open()).call("slow")
    assert reply["result"]["isError"] is True
    assert texts(reply)[0] == "begun\n"
    assert "after 0.3 s" in texts(reply)[1]
    assert "hint: " in texts(reply)[1]


async def test_arguments_against_the_schema_are_an_error_result(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("hello", "echo hi")
    wire = await connections.open()
    for arguments in ({"word": 5}, {"other": "x"}, {"Word": "x"}):
        reply = await wire.call("hello", arguments)
        assert reply["result"]["isError"] is True
        assert "word" in texts(reply)[0]


async def test_a_missing_variable_is_an_error_result_with_a_hint(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("use", "true", secrets=SECRET)
    reply = await (await connections.open()).call("use")
    assert reply["result"]["isError"] is True
    assert "has no variable TOKEN\nhint: " in texts(reply)[0]


@pytest.mark.parametrize("name", ["nothing", "shell", "", "a" * 10_000, "bidi\u202etxt"])
async def test_an_unknown_tool_is_an_error_of_the_protocol(
    name: str, broker: Broker, connections: Connections
) -> None:
    broker.tool("hello", "echo hi")
    wire = await connections.open()
    error = (await wire.call(name))["error"]
    assert error["code"] == -32602
    assert error["message"].startswith("unknown tool '")
    assert len(error["message"]) < 150
    assert "\u202e" not in error["message"]
    assert "tools/list" in error["data"]["hint"]
    assert broker.records("call.decided")[-1]["decision"] == "deny"


async def test_an_unknown_method_is_an_error_of_the_protocol(connections: Connections) -> None:
    wire = await connections.open()
    assert (await wire.ask("resources/list"))["error"]["code"] == -32601
    assert (await wire.ask("no/such", {"a": 1}))["error"]["code"] == -32601


# --- while a call runs --------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2024-11-05", "2025-11-25"])
async def test_progress_is_sent_to_who_asks_for_it(
    version: str, broker: Broker, connections: Connections
) -> None:
    broker.set(TOKEN=TOKEN)
    broker.tool("talk", 'echo "one $TOKEN"; sleep 0.3; echo two; sleep 0.3', secrets=SECRET)
    wire = await connections.open(initialized=False)
    await wire.initialize(version)
    id = await wire.start("tools/call", {"name": "talk", "_meta": {"progressToken": "p1"}})
    seen = []
    while (message := await wire.receive()).get("id") != id:
        assert message["method"] == "notifications/progress"
        assert message["params"]["progressToken"] == "p1"
        seen.append(message["params"])
    assert len(seen) == 2
    assert seen[0]["progress"] < seen[1]["progress"]
    spoken = [step.get("message") for step in seen]
    assert spoken == (
        [None] * 2 if version == "2024-11-05" else ["one [redacted:TOKEN]\n", "two\n"]
    )


async def test_nobody_gets_progress_unasked(broker: Broker, connections: Connections) -> None:
    broker.tool("talk", "echo one; sleep 0.3; echo two")
    wire = await connections.open()
    id = await wire.start("tools/call", {"name": "talk"})
    assert (await wire.receive())["id"] == id


async def test_a_cancelled_request_ends_its_tool_and_gets_no_answer(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("long", "sleep 88102")
    wire = await connections.open()
    id = await wire.start("tools/call", {"name": "long"})
    await launched(broker)
    await wire.notify("notifications/cancelled", {"requestId": id, "reason": "enough"})
    assert await outcomes(broker) == ["cancelled"]
    pinged = await wire.start("ping")
    assert (await wire.receive())["id"] == pinged


async def test_calls_of_one_connection_run_side_by_side(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("wait", "while ! [ -e $1 ]; do sleep 0.02; done; echo saw", workspace="rw")
    broker.tool("make", "touch $1; echo made", workspace="rw")
    broker.make_workspace()
    wire = await connections.open()
    first = await wire.start("tools/call", {"name": "wait", "arguments": {"word": "flag"}})
    second = await wire.start("tools/call", {"name": "make", "arguments": {"word": "flag"}})
    # The first ends only because the second ran meanwhile; either answer may come first.
    assert {(await wire.receive())["id"], (await wire.receive())["id"]} == {first, second}


async def test_several_connections_of_one_session_are_served_at_once(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("wait", "while ! [ -e $1 ]; do sleep 0.02; done; echo saw", workspace="rw")
    broker.tool("make", "touch $1; echo made", workspace="rw")
    broker.make_workspace()
    one, two = await connections.open(), await connections.open()
    first = await one.start("tools/call", {"name": "wait", "arguments": {"word": "flag"}})
    assert texts(await two.call("make", {"word": "flag"})) == ["made\n"]
    assert (await one.receive())["id"] == first


async def test_a_client_that_disconnects_has_its_calls_cancelled(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("long", "sleep 88103")
    wire = await connections.open()
    await wire.start("tools/call", {"name": "long"})
    await launched(broker)
    await wire.stream.aclose()
    assert await outcomes(broker) == ["cancelled"]
    with trio.fail_after(5):
        await connections.ended[0].wait()


async def test_a_client_that_only_ends_its_sending_gets_its_answers(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("late", "sleep 0.3; echo late")
    wire = await connections.open()
    id = await wire.start("tools/call", {"name": "late"})
    await wire.stream.send_eof()
    assert (await wire.receive())["id"] == id
    with trio.fail_after(5):
        assert await wire.stream.receive_some() == b""
        await connections.ended[0].wait()


async def test_a_half_closed_client_that_then_vanishes_has_its_calls_cancelled(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("long", "sleep 88104")
    wire = await connections.open()
    await wire.start("tools/call", {"name": "long"})
    await launched(broker)
    await wire.stream.send_eof()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert broker.records("call.ended") == []
    await wire.stream.aclose()
    assert await outcomes(broker) == ["cancelled"]


# --- harm ---------------------------------------------------------------------------------------


async def test_a_connection_survives_every_kind_of_bad_line(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("hello", "echo hi")
    wire = await connections.open()
    deep = "[" * 100_000 + "]" * 100_000
    bad = [
        (b"not json\n", None),
        (b'{"jsonrpc":"2.0","id":51,"method":"ping","params":{"a":1,"a":2}}\n', 51),
        (f'{{"jsonrpc":"2.0","id":52,"method":"ping","params":{{"a":{deep}}}}}\n'.encode(), 52),
        (b'{"jsonrpc":"2.0","id":53,"method":"' + b"x" * (MAX_LINE + 1) + b'"}\n', 53),
        (b"\xff\xfe\n", None),
        (b"[]\n", None),
    ]
    for line, id in bad:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.stream.send_all, line)
            reply = await wire.receive()
        assert reply["id"] == id
        assert reply["error"]["code"] in (-32700, -32600)
    assert texts(await wire.call("hello")) == ["hi\n"]


async def test_an_id_that_is_open_already_is_refused(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("long", "sleep 88105")
    wire = await connections.open()
    id = await wire.start("tools/call", {"name": "long"})
    await launched(broker)
    for same in (id, str(id)):
        await wire.send({"jsonrpc": "2.0", "id": same, "method": "ping"})
        reply = await wire.receive()
        assert reply["id"] == same
        assert "open already" in reply["error"]["message"]
    await wire.notify("notifications/cancelled", {"requestId": id})
    with trio.fail_after(20):
        reply = {"error": "not yet"}
        while "error" in reply:  # free again once the cancelled call is over
            await wire.send({"jsonrpc": "2.0", "id": id, "method": "ping"})
            reply = await wire.receive()
    assert reply == {"jsonrpc": "2.0", "id": id, "result": {}}


async def test_too_many_open_requests_are_refused_one_by_one(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("long", "sleep 88106")
    wire = await connections.open()
    first = await wire.start("tools/call", {"name": "long"})
    for _ in range(31):
        await wire.start("tools/call", {"name": "long"})
    over = await wire.start("tools/call", {"name": "long"})
    reply = await wire.receive()
    assert (reply["id"], reply["error"]["code"]) == (over, -32000)
    assert "32 requests" in reply["error"]["message"]
    assert (await wire.ask("ping"))["result"] == {}
    await launched(broker)
    await wire.notify("notifications/cancelled", {"requestId": first})
    with trio.fail_after(20):
        while "error" in await wire.ask("tools/list"):  # until the cancelled call is over
            pass


async def test_a_client_that_reads_nothing_is_not_read_from_for_ever(
    broker: Broker, connections: Connections
) -> None:
    broker.tool("big", "head -c 1000000 /dev/zero | tr '\\0' x", output_limit="1M")
    wire = await connections.open()
    for _ in range(12):
        await wire.start("tools/call", {"name": "big"})
    await outcomes(broker, 12)  # more than 8 MiB of answers that nobody takes
    flooded = trio.Event()

    async def flood() -> None:
        for _ in range(3000):
            await wire.notify("notifications/ignored", {"x": "x" * 1000})
        flooded.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert not flooded.is_set()
        results = 0
        while results < 12:
            results += "result" in await wire.receive()
        with trio.fail_after(20):
            await flooded.wait()


async def test_a_client_that_takes_no_answer_for_long_is_given_up(
    broker: Broker, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandboxd.broker.mcp._STALLED", 0.2)
    broker.tool("big", "head -c 1000000 /dev/zero | tr '\\0' x", output_limit="1M")
    wire = await connections.open()
    await wire.start("tools/call", {"name": "big"})
    with trio.fail_after(20):
        await connections.ended[0].wait()


async def test_logs_tell_nothing_of_what_was_said(
    broker: Broker, connections: Connections, caplog: pytest.LogCaptureFixture
) -> None:
    broker.set(TOKEN=TOKEN)
    broker.tool("leak", 'echo "$TOKEN $1"', secrets=SECRET)
    with caplog.at_level(logging.DEBUG):
        wire = await connections.open(initialized=False)
        await wire.notify("notifications/private-words", {"private-words": 1})
        await wire.initialize()
        await wire.call("leak", {"word": "private-words"})
        await wire.ask("private-words", {"private-words": "private-words"})
        await wire.ask("tools/call", {"name": ["private-words"]})
        await wire.notify("notifications/progress", {"progressToken": "private-words"})
        await wire.notify("notifications/cancelled", {"requestId": "private-words"})
        await wire.stream.send_all(b'private-words {"\n')
        await wire.receive()
    assert caplog.records
    assert "private-words" not in caplog.text
    assert TOKEN not in caplog.text
