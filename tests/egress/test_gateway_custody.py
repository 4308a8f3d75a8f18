"""A credential stays outside, also where something goes wrong on its way."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import h11
import pytest
from egress_upstream import Upstream, say
from test_gateway import KEY, running
from test_placeholders import boxed


@pytest.mark.parametrize("key", [KEY + b" ", b"\t" + KEY, KEY + b"\x0bx", KEY + b"\x7f", b"\n"])
async def test_a_credential_that_is_no_header_is_not_in_the_error(
    authority: Path, key: bytes
) -> None:
    async with running(authority, header="x-api-key") as one:
        one.key = key
        answer = await one.ask("GET", "/")
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"can't stand in a header" in answer
    assert KEY not in answer
    assert KEY.decode() not in json.dumps(one.records.rows, default=str)
    assert one.upstream.requests == []


@pytest.mark.parametrize("key", [KEY + b" ", KEY + b"\x0bx", KEY + b"\r\nx: y"])
async def test_a_real_value_that_does_not_fit_is_not_in_the_error(
    authority: Path, key: bytes
) -> None:
    async with boxed(authority) as box:
        box.key = key
        in_header = await box.ask("GET", "/", f"X-Token: {box.mine}")
        in_path = await box.ask("GET", f"/?t={box.mine}")
    for answer in (in_header, in_path):
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert b"the credential can't stand in" in answer
        assert KEY not in answer
    assert box.upstream.requests == []


async def test_an_upstream_that_repeats_it_in_a_bad_header_does_not_bring_it_in(
    authority: Path,
) -> None:
    async def bad(stream: Any, wire: h11.Connection) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nnot a name: " + KEY + b"\r\n\r\n")
        await stream.aclose()

    async with running(authority, Upstream(bad)) as one:
        answer = await one.ask("GET", "/")
    async with boxed(authority, Upstream(bad)) as box:
        other = await box.ask("GET", "/", f"X-Token: {box.mine}")
    for got in (answer, other):
        assert got.startswith(b"HTTP/1.1 502 ")
        assert KEY not in got


async def test_user_name_and_password_repeated_in_a_header_are_taken_out(authority: Path) -> None:
    basic = base64.b64encode(b"me:" + KEY).decode()

    async def repeat(stream: Any, wire: h11.Connection) -> None:
        await say(stream, wire, 200, b"fine", x_seen=f"Basic {basic}")

    async with running(authority, Upstream(repeat), scheme="basic", user="me") as one:
        answer = await one.ask("GET", "/")
    assert b"fine" in answer
    assert b"x-seen: Basic " in answer
    assert basic[8:].encode() not in answer
