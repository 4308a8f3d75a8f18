"""Lines from somebody who may mean harm are bounded, unambiguous, or refused by their id."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from mcp_types import INVALID_REQUEST, PARSE_ERROR, JSONRPCNotification, JSONRPCRequest

from sandboxd.broker.jsonrpc import MAX_DEPTH, MAX_LINE, LineReader, Refused, error_reply, parse


async def read(*chunks: bytes) -> list[bytes | Refused]:
    """The lines of a stream that arrives in these pieces."""
    send, receive = trio.testing.memory_stream_one_way_pair()
    found: list[bytes | Refused] = []

    async def feed() -> None:
        for chunk in chunks:
            await send.send_all(chunk)
        await send.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed)
        reader = LineReader(receive)
        while (line := await reader.receive()) is not None:
            found.append(line)
    return found


def refusal(line: bytes | str) -> Refused:
    with pytest.raises(Refused) as caught:
        parse(line if isinstance(line, bytes) else line.encode())
    return caught.value


async def test_lines_come_out_whole_however_they_arrive() -> None:
    data = b'{"a":1}\n\n  \n{"b":2}\r\nlast'
    expected = [b'{"a":1}', b'{"b":2}\r', b"last"]
    assert await read(data) == expected
    assert await read(*[data[i : i + 1] for i in range(len(data))]) == expected


async def test_a_line_at_the_bound_is_taken_and_one_byte_more_is_not() -> None:
    taken, refused, after = await read(b"x" * MAX_LINE + b"\n" + b"y" * (MAX_LINE + 1) + b"\nz\n")
    assert isinstance(taken, bytes)
    assert isinstance(refused, Refused)
    assert after == b"z"
    assert "4,194,304 bytes" in refused.message


@pytest.mark.parametrize(
    "line",
    [
        b'{"jsonrpc":"2.0","id":7,"method":"m","params":{"x":"%s"}}',
        b'{"method":"m","params":{"id":9,"x":"%s"},"jsonrpc":"2.0","id":7}',
        b'{"id": 7, "method":"m","params":{"x":"%s", "id": 9}}',
        b'{"method":"m","params":{"x":"%s","id":9},"id":7,"jsonrpc":"2.0"}',
    ],
)
async def test_a_line_that_is_too_long_is_refused_by_its_id(line: bytes) -> None:
    long = line % (b"x" * (MAX_LINE + 100_000))
    (refused,) = await read(*[long[i : i + 60_000] for i in range(0, len(long), 60_000)], b"\n")
    assert isinstance(refused, Refused)
    assert refused.id == 7


async def test_a_nested_id_is_not_taken_for_the_request_s() -> None:
    long = b'{"method":"m","params":{"x":"' + b"x" * MAX_LINE + b'","id":9}}'
    (refused,) = await read(long)
    assert isinstance(refused, Refused)
    assert refused.id is None


async def test_memory_stays_bounded_while_a_line_does_not_end() -> None:
    (refused,) = await read(*[b"x" * 100_000] * 100)
    assert isinstance(refused, Refused)


def test_a_request_and_a_notification_are_told_apart() -> None:
    request = parse(b'{"jsonrpc":"2.0","id":"a","method":"ping"}')
    assert isinstance(request, JSONRPCRequest)
    assert request.id == "a"
    assert isinstance(parse(b'{"jsonrpc":"2.0","method":"ping"}'), JSONRPCNotification)


@pytest.mark.parametrize(
    ("line", "code", "word"),
    [
        ('{"jsonrpc":"2.0","id":1,', PARSE_ERROR, "not JSON"),
        (b'{"jsonrpc":"2.0","id":1,"method":"\xff"}', PARSE_ERROR, "UTF-8"),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":{"x":NaN}}', PARSE_ERROR, "NaN"),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":{"x":-Infinity}}', PARSE_ERROR, "Infin"),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":{"x":"\\ud800"}}', PARSE_ERROR, "surrog"),
        (
            '{"jsonrpc":"2.0","id":1,"method":"m","params":{"a":1,"b":2,"a":3}}',
            INVALID_REQUEST,
            "'a' is there twice",
        ),
        ('{"jsonrpc":"2.0","id":1,"id":2,"method":"m"}', INVALID_REQUEST, "'id' is there twice"),
        ('{"jsonrpc":"1.0","id":1,"method":"m"}', INVALID_REQUEST, "JSON-RPC 2.0"),
        ('{"jsonrpc":"2.0","id":1,"method":"m","params":[1]}', INVALID_REQUEST, "JSON-RPC 2.0"),
        ('{"jsonrpc":"2.0","id":1}', INVALID_REQUEST, "JSON-RPC 2.0"),
    ],
)
def test_what_is_wrong_is_said_to_the_request_that_is_wrong(
    line: str | bytes, code: int, word: str
) -> None:
    refused = refusal(line)
    assert (refused.code, refused.id) == (code, 1)
    assert word in refused.message


@pytest.mark.parametrize(
    "line",
    ["[]", "5", '"text"', "null", '[{"jsonrpc":"2.0","id":1,"method":"m"}]'],
)
def test_only_one_object_makes_a_message(line: str) -> None:
    refused = refusal(line)
    assert (refused.code, refused.id) == (INVALID_REQUEST, None)
    assert "one JSON-RPC 2.0 message per line" in refused.hint


@pytest.mark.parametrize("id", ["null", "1.5", "true", "[1]", '{"a":1}'])
def test_an_id_of_another_kind_is_refused(id: str) -> None:
    assert "neither" in refusal(f'{{"jsonrpc":"2.0","id":{id},"method":"m"}}').message


def nested(depth: int, open: str = "[", close: str = "]") -> str:
    inner = open * depth + close * depth
    return f'{{"jsonrpc":"2.0","id":3,"method":"m","params":{{"x":{inner}}}}}'


@pytest.mark.parametrize("depth", [MAX_DEPTH, 500, 2_000, 100_000])
def test_deep_nesting_is_refused_by_its_id(depth: int) -> None:
    refused = refusal(nested(depth))
    assert refused.id == 3
    assert "deeper than 64" in refused.message


def test_nesting_up_to_the_bound_is_taken() -> None:
    assert isinstance(parse(nested(MAX_DEPTH - 2).encode()), JSONRPCRequest)


def test_many_lists_that_are_not_deep_are_taken() -> None:
    many = json.dumps([[]] * 1000)
    line = f'{{"jsonrpc":"2.0","id":3,"method":"m","params":{{"x":{many}}}}}'
    assert isinstance(parse(line.encode()), JSONRPCRequest)


def test_a_refusal_becomes_an_error_reply() -> None:
    reply = error_reply(refusal("[]")).model_dump(by_alias=True, exclude_unset=True)
    assert reply == {
        "jsonrpc": "2.0",
        "id": None,
        "error": {
            "code": INVALID_REQUEST,
            "message": "the line holds a batch",
            "data": {"hint": "send one JSON-RPC 2.0 message per line"},
        },
    }


@given(st.binary(max_size=200))
def test_no_bytes_get_anything_but_a_message_or_a_refusal(data: bytes) -> None:
    _parses_or_refuses(data)


def test_a_message_with_bytes_changed_gets_a_message_or_a_refusal() -> None:
    line = b'{"jsonrpc":"2.0","id":1,"method":"m","params":{"a":[1,{"b":"\\u0041"}],"c":-1.5e3}}'
    dice = random.Random(1)  # the same mutations in every run
    for _ in range(3000):
        changed = bytearray(line)
        for _ in range(dice.randint(1, 4)):
            changed[dice.randrange(len(changed))] = dice.choice(b'{}[]",:\\0019eE.-un\x00\xff')
        _parses_or_refuses(bytes(changed))


def _parses_or_refuses(data: bytes) -> None:
    try:
        message = parse(data)
    except Refused as refused:
        error_reply(refused).model_dump_json()
    else:
        message.model_dump_json()


class Counted(bytearray):
    """Counts the bytes that it is searched through."""

    searched = 0

    def find(self, *args: Any) -> int:
        found = super().find(*args)
        Counted.searched += (found + 1 if found >= 0 else len(self)) - args[1]
        return found


async def test_an_endless_line_is_searched_once() -> None:
    """Byte by byte: work in proportion to what came, not to its square."""
    send, receive = trio.testing.memory_stream_one_way_pair()
    reader = LineReader(receive)
    reader._buffer = Counted()

    async def feed() -> None:
        for _ in range(2_000):
            await send.send_all(b"x")
            await trio.testing.wait_all_tasks_blocked()
        await send.send_all(b"\n" * 2_000 + b"y")
        await send.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed)
        assert await reader.receive() == b"x" * 2_000
        assert await reader.receive() == b"y"
    assert 4_000 < Counted.searched <= 4_001
