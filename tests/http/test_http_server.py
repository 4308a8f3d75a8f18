"""HTTP/1.1 on trio: what well-behaved clients get, and what the others don't take down."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from sandboxd.http.server import BodyTooSlow, Bounds, Server, source_of

HEAD = b"Host: localhost\r\n"
QUICK = Bounds(
    head=4096,
    head_seconds=0.3,
    idle_seconds=0.3,
    body_seconds=0.3,
    write_seconds=0.5,
    stop_seconds=0.5,
)


class App:
    """Answers with the method, the path and the body that it was asked with."""

    def __init__(self) -> None:
        self.left = trio.Event()
        self.running = trio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        behave: Callable[..., Awaitable[None]] = getattr(
            self, "on_" + scope["path"].strip("/"), self.echo
        )
        await behave(scope, receive, send)

    async def echo(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        text = f"{scope['method']} {scope['path']} ".encode() + body
        length = (b"content-length", b"%d" % len(text))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": text})

    async def on_stream(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"one", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    async def on_big(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(4096):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        self.left.set()

    async def on_unread(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b"too large"})

    async def on_wait(self, scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        self.running.set()
        assert (await receive())["type"] == "http.disconnect"
        self.left.set()

    async def on_slow(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
        except BodyTooSlow:
            await send({"type": "http.response.start", "status": 408, "headers": []})
            await send({"type": "http.response.body", "body": b"slow"})

    async def on_broken(self, scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("hunter2")

    async def on_cut(self, scope: Any, receive: Any, send: Any) -> None:
        length = (b"content-length", b"100")
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": b"short", "more_body": True})
        raise ValueError("hunter2")


@asynccontextmanager
async def serving(
    app: Any, bounds: Bounds = QUICK, wrap: Callable[[trio.SocketListener], Any] = lambda x: x
) -> AsyncIterator[tuple[str, int]]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listener.socket.getsockname()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(Server(app, bounds).serve, [wrap(listener)]))
        yield address
        nursery.cancel_scope.cancel()


async def said(stream: trio.SocketStream) -> bytes:
    """All that the server sends until it closes the connection."""
    with trio.fail_after(10):
        return b"".join([part async for part in stream])


async def ask(address: tuple[str, int], *parts: bytes) -> bytes:
    async with await trio.open_tcp_stream(*address) as stream:
        for part in parts:
            await stream.send_all(part)
        return await said(stream)


async def test_requests_are_answered_one_after_the_other_on_one_connection() -> None:
    first = b"POST /a HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\n\r\nhi"
    second = b"GET /b HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n"
    async with serving(App()) as address:
        got = await ask(address, first + second)  # sent ahead, at once
    assert got.count(b"HTTP/1.1 200") == 2
    assert b"POST /a hi" in got
    assert got.endswith(b"GET /b ")


async def test_a_head_has_no_body_and_an_unknown_length_is_chunked() -> None:
    head = b"HEAD /x HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n"
    stream = b"GET /stream HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n"
    async with serving(App()) as address:
        assert (await ask(address, head)).endswith(b"\r\n\r\n")
        assert (await ask(address, stream)).endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")


async def test_a_client_that_expects_100_is_told_to_go_on() -> None:
    head = b"POST / HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\nExpect: 100-continue\r\n"
    async with serving(App()) as address, await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(head + b"Connection: close\r\n\r\n")
        with trio.fail_after(10):
            assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 100 ")
        await stream.send_all(b"hi")
        assert (await said(stream)).endswith(b"POST / hi")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"hello\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no Host (RFC 9112, 3.2)
        (b"GET / HTTP/1.1\r\n" + HEAD + HEAD + b"\r\n", b"400"),
        (b"GET http://other/ HTTP/1.1\r\n" + HEAD + b"\r\n", b"400"),
        (b"CONNECT other:443 HTTP/1.1\r\n" + HEAD + b"\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + HEAD + b"X: " + b"x" * 100_000 + b"\r\n\r\n", b"431"),
        # Two framings of one body are how requests are smuggled (RFC 9112, 6.1).
        (b"POST / HTTP/1.1\r\n" + HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: gzip\r\n\r\n", b"501"),
        (b"GET / HTTP/1.1\r\n" + HEAD + b"A: b\r\n c\r\nContent-Length : 1\r\n\r\n", b"400"),
    ],
)
async def test_what_is_no_request_is_refused_and_the_next_client_served(
    request_: bytes, status: bytes
) -> None:
    async with serving(App()) as address:
        got = await ask(address, request_)
        assert got.startswith(b"HTTP/1.1 " + status)
        assert got.count(b"HTTP/1.1 ") == 1
        fine = await ask(address, b"GET / HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n")
    assert fine.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "opening",
    [
        b"GET / HTTP/1.1\r\n" + HEAD + b"Connection: close, Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAAAAAAAA\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HEAD + b"Connection: close, Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    ],
)
async def test_nothing_is_upgraded(opening: bytes) -> None:
    async with serving(App()) as address:
        got = await ask(address, opening)
    assert got.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.1 505"))
    assert b"101" not in got.split(b"\r\n")[0]


async def test_a_head_that_dribbles_in_ends_its_connection() -> None:
    async with serving(App()) as address, await trio.open_tcp_stream(*address) as stream:
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
            await _dribble(stream)


async def _dribble(stream: trio.SocketStream) -> None:
    while True:  # never silent for as long as the bound
        await stream.send_all(b"G")
        await trio.sleep(0.05)


async def test_a_connection_without_a_request_is_closed() -> None:
    async with serving(App()) as address:
        assert await ask(address) == b""


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    head = b"POST /slow HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\n\r\n"
    async with serving(App()) as address:
        assert (await ask(address, head)).startswith(b"HTTP/1.1 408")


async def test_an_answer_before_the_body_was_read_arrives_whole() -> None:
    head = b"POST /unread HTTP/1.1\r\n" + HEAD + b"Content-Length: 5000000\r\n\r\n"
    async with serving(App()) as address:
        got = await ask(address, head, b"x" * 1_000_000)
    assert got.startswith(b"HTTP/1.1 413")
    assert b"too large" in got


async def test_an_unread_body_that_is_here_lets_the_connection_go_on() -> None:
    refused = b"POST /unread HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\n\r\nhi"
    late = b"POST /unread HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\n\r\n"
    fine = b"GET /b HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n"
    async with serving(App()) as address:
        got = await ask(address, refused + fine)
        assert got.startswith(b"HTTP/1.1 413")
        assert got.endswith(b"GET /b ")
        # Where the rest is still on its way, the client is told not to count on the connection.
        assert b"connection: close" in (await ask(address, late)).lower()


async def test_a_client_that_does_not_read_is_given_up() -> None:
    app = App()
    async with serving(app) as address, await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(b"GET /big HTTP/1.1\r\n" + HEAD + b"\r\n")
        with trio.fail_after(10):
            await app.left.wait()  # what it would have got is dropped


async def test_the_application_learns_that_its_client_left() -> None:
    app = App()
    async with serving(app) as address:
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(b"POST /wait HTTP/1.1\r\n" + HEAD + b"Content-Length: 0\r\n\r\n")
            await app.running.wait()
        with trio.fail_after(10):
            await app.left.wait()


async def test_a_stop_ends_idle_connections_at_once_and_running_requests_soon() -> None:
    app = App()
    async with serving(app, Bounds(stop_seconds=0.3)) as address:
        idle = await trio.open_tcp_stream(*address)
        busy = await trio.open_tcp_stream(*address)
        unread = await trio.open_tcp_stream(*address)
        await busy.send_all(b"GET /wait HTTP/1.1\r\n" + HEAD + b"\r\n")
        await unread.send_all(b"GET /big HTTP/1.1\r\n" + HEAD + b"\r\n")
        await app.running.wait()
        began = trio.current_time()
    assert trio.current_time() - began < 5
    for stream in (idle, busy, unread):
        await stream.aclose()


async def test_a_request_that_is_nearly_done_gets_its_answer_when_the_server_stops() -> None:
    class Finishing(App):
        async def on_finish(self, scope: Any, receive: Any, send: Any) -> None:
            self.running.set()
            await trio.sleep(0.2)
            await self.echo(scope, receive, send)

    app = Finishing()
    async with serving(app, Bounds(stop_seconds=5)) as address:
        stream = await trio.open_tcp_stream(*address)
        await stream.send_all(b"GET /finish HTTP/1.1\r\n" + HEAD + b"\r\n")
        await app.running.wait()
    async with stream:
        got = await said(stream)
    assert got.endswith(b"GET /finish ")
    assert b"connection: close" in got.lower()


@pytest.mark.parametrize(
    ("path", "begins"), [("broken", b"HTTP/1.1 500"), ("cut", b"HTTP/1.1 200")]
)
async def test_an_application_that_fails_is_logged_by_place_alone(
    path: str, begins: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    request = f"GET /{path} HTTP/1.1\r\n".encode() + HEAD + b"Authorization: Bearer s3cr3t\r\n\r\n"
    with caplog.at_level(logging.DEBUG):
        async with serving(App()) as address:
            got = await ask(address, request)
    assert got.startswith(begins)
    assert b"hunter2" not in got
    assert "ValueError at server.py" in caplog.text
    assert "hunter2" not in caplog.text
    assert "s3cr3t" not in caplog.text


async def test_one_source_does_not_get_all_connections() -> None:
    bounds = Bounds(connections=3, connections_per_source=2)
    async with serving(App(), bounds) as address:
        held = [await trio.open_tcp_stream(*address) for _ in range(2)]
        for stream in held:  # each is served, so each is counted
            await stream.send_all(b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n")
            assert await stream.receive_some(9)
        assert not await _answered(address)
        await held[0].aclose()
        with trio.fail_after(10):
            while not await _answered(address):  # noqa: ASYNC110 - what another task does
                await trio.sleep(0.01)
        await held[1].aclose()


async def _answered(address: tuple[str, int]) -> bool:
    try:
        got = await ask(address, b"GET / HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n")
    except trio.BrokenResourceError:
        return False
    return got.startswith(b"HTTP/1.1 200")


async def test_a_peer_that_speaks_no_tls_does_not_stop_the_others(
    certificate: tuple[str, str],
) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=certificate[0])
    wrap = partial(trio.SSLListener, ssl_context=server, https_compatible=True)
    async with serving(App(), Bounds(), wrap) as address:
        assert not await _answered(address)
        async with await trio.open_ssl_over_tcp_stream(
            *address, ssl_context=trusting, https_compatible=True
        ) as stream:
            await stream.send_all(b"GET /tls HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n")
            assert b"GET /tls" in b"".join([part async for part in stream])


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::1", "::1"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_one_customer_is_one_source(address: str, source: str) -> None:
    assert source_of(address) == source
