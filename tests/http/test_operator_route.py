"""How the operator route answers: one document or lines, errors, silence, clients that leave."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from sandboxd.access.roles import Principal
from sandboxd.admin.protocol import BEAT_SECONDS
from sandboxd.admin.server import Caller, Reply
from sandboxd.errors import Conflict, NotFound, Unauthenticated
from sandboxd.http.routes_operator import _Lines, _One

ANN = Principal("key", "ann", "operator", "default", key="key_1")


async def slow(caller: Caller, params: dict[str, Any]) -> Reply:
    await trio.sleep(2.5 * BEAT_SECONDS)
    return Reply({"waited": True})


async def missing(caller: Caller, params: dict[str, Any]) -> Reply:
    raise NotFound("no such thing", hint="look elsewhere")


async def broken(caller: Caller, params: dict[str, Any]) -> Reply:
    raise ValueError("holds a-secret-value")


async def begun(caller: Caller, params: dict[str, Any]) -> AsyncGenerator[Any, None]:
    yield {"n": 1}
    raise Conflict("not now")


async def endless(caller: Caller, params: dict[str, Any]) -> AsyncGenerator[Any, None]:
    try:
        yield {"n": 1}
        await trio.sleep_forever()
    finally:
        params["ended"]()


METHODS = {f.__name__: f for f in (slow, missing, broken, begun, endless)}


def valid(principal: Principal) -> None:
    """As for a key that holds."""


def ended_key(principal: Principal) -> None:
    raise Unauthenticated


async def answered(
    kind: type[_Lines | _One],
    method: str,
    *,
    leave_after: float = float("inf"),
    check: Callable[[Principal], None] = valid,
    into: list[tuple[float, bytes]] | None = None,
    **params: Any,
) -> tuple[int, list[tuple[float, bytes]]]:
    """Status, and each piece of the body with the time at which it came."""
    daemon: Any = SimpleNamespace(methods=METHODS, access=SimpleNamespace(check=check))
    status, begin = 0, trio.current_time()
    pieces = [] if into is None else into

    async def receive() -> dict[str, Any]:
        await trio.sleep(leave_after)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            pieces.append((trio.current_time() - begin, bytes(message["body"])))

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await kind(daemon, ANN, method, params)(scope, receive, send)
    return status, pieces


def lines(pieces: list[tuple[float, bytes]]) -> list[Any]:
    return [json.loads(line) for line in b"".join(p for _, p in pieces).splitlines() if line]


async def test_silence_is_broken_by_empty_lines(autojump_clock: trio.testing.MockClock) -> None:
    status, pieces = await answered(_Lines, "slow")
    assert status == 200
    assert [(round(at / BEAT_SECONDS, 1), piece) for at, piece in pieces] == [
        (1.0, b"\n"),
        (2.0, b"\n"),
        (2.5, b'{"result":{"waited":true}}\n'),
    ]


async def test_one_answer_is_one_document(autojump_clock: trio.testing.MockClock) -> None:
    status, pieces = await answered(_One, "slow")
    assert (status, b"".join(p for _, p in pieces)) == (200, b'{"waited":true}')


@pytest.mark.parametrize("kind", [_Lines, _One])
async def test_an_error_before_the_first_line_has_a_status(kind: type[_Lines | _One]) -> None:
    status, pieces = await answered(kind, "missing")
    assert status == 404
    (told,) = lines(pieces)
    assert told == {
        "error": "not_found",
        "message": "no such thing: look elsewhere",
        "status": 404,
        "data": {
            "code": "not_found",
            "message": "no such thing",
            "hint": "look elsewhere",
            "exit_code": 3,
        },
    }


@pytest.mark.parametrize("kind", [_Lines, _One])
async def test_an_unexpected_failure_is_told_by_its_class_alone(
    kind: type[_Lines | _One], caplog: pytest.LogCaptureFixture
) -> None:
    status, pieces = await answered(kind, "broken")
    (told,) = lines(pieces)
    assert (status, told["data"]["code"]) == (500, "internal")
    assert "ValueError" in told["message"]
    assert "test_operator_route.py" in caplog.text
    assert "a-secret-value" not in json.dumps(told) + caplog.text


async def test_an_error_after_the_first_line_is_the_last() -> None:
    status, pieces = await answered(_Lines, "begun")
    first, last = lines(pieces)
    assert (status, first) == (200, {"item": {"n": 1}})
    assert (last["error"]["message"], last["error"]["data"]["exit_code"]) == ("not now", 5)


async def test_a_method_ends_with_its_client(autojump_clock: trio.testing.MockClock) -> None:
    ended: list[float] = []
    begin = trio.current_time()
    _, pieces = await answered(
        _Lines, "endless", leave_after=3, ended=lambda: ended.append(trio.current_time() - begin)
    )
    assert ended == [3.0]
    assert lines(pieces) == [{"item": {"n": 1}}]


async def test_a_stream_whose_key_ends_says_so(autojump_clock: trio.testing.MockClock) -> None:
    pieces: list[tuple[float, bytes]] = []
    with trio.move_on_after(3):  # as the guard cancels what a key held
        await answered(_Lines, "endless", check=ended_key, into=pieces, ended=lambda: None)
    first, last = lines(pieces)
    assert first == {"item": {"n": 1}}
    assert last["error"]["data"]["code"] == "invalid_api_key"
