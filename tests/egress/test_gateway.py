"""The credential gateway before a real TLS server: what it adds, takes out, streams and refuses."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
from egress_support import LOOPBACK, Names, Records, all_of, until
from egress_upstream import HOST, Upstream, say

from sandboxd.egress.dial import Dialer
from sandboxd.egress.exchange import Credential
from sandboxd.egress.gate import Bounds, Gate
from sandboxd.egress.gateway import serve_gateway
from sandboxd.errors import Denied
from sandboxd.policy.destinations import Port
from sandboxd.policy.egress import Egress, EgressTerms
from sandboxd.policy.gateways import Gateway
from sandboxd.policy.values import AbsolutePath, Count, VariableName, WebAddress
from sandboxd.secret import Secret

KEY = b"sk-test-0123456789abcdefghij"


@dataclass
class Running:
    port: int
    records: Records
    upstream: Upstream
    revoked: bool = False
    key: bytes = KEY
    clients: list[trio.SocketStream] = field(default_factory=list)

    def reveal(self) -> Secret:
        if self.revoked:
            raise Denied("variable MODEL_KEY of agent one, version 3, is revoked")
        return Secret(self.key)

    async def connect(self) -> trio.SocketStream:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        self.clients.append(stream)
        return stream

    async def ask(self, method: str, path: str, *headers: str, body: str = "") -> bytes:
        stream = await self.connect()
        length = f"Content-Length: {len(body)}"
        lines = (f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", length)
        await stream.send_all("\r\n".join((*lines, *headers, "", body)).encode("latin-1"))
        return await all_of(stream)


@asynccontextmanager
async def running(
    authority: Path, upstream: Upstream | None = None, trusted: bool = True, **keys: Any
) -> AsyncIterator[Running]:
    upstream = upstream or Upstream()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem")
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, upstream.serve, listeners)
        behind = listeners[0].transport_listener.socket.getsockname()[1]
        host, bounds = keys.pop("host", HOST), keys.pop("bounds", Bounds(idle=20))
        gateway = Gateway(
            port=Port(4000),
            secret=VariableName("MODEL_KEY"),
            upstream=WebAddress(f"https://{host}:{behind}{keys.pop('prefix', '')}"),
            addresses=LOOPBACK,
            ca=AbsolutePath(authority / "ca.pem") if trusted else None,
            source="agents/one.yaml:9",
            **keys,
        )
        (inside,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        found = Running(inside.socket.getsockname()[1], Records(), upstream)
        gate = Gate(
            lists=EgressTerms(Egress()).of(gateway),
            who={"session": "s-1", "agent": "one"},
            record=found.records,
            dialer=Dialer(Names(**{HOST: "127.0.0.1", "other.test": "127.0.0.1"})),
            bounds=bounds,
        )
        credential = Credential("MODEL_KEY", 3, found.reveal)
        nursery.start_soon(serve_gateway, inside, gateway, gate, credential)
        yield found
        for client in found.clients:
            await client.aclose()
        nursery.cancel_scope.cancel()


def headers_of(upstream: Upstream) -> dict[bytes, bytes]:
    return dict(upstream.requests[-1][0].headers)


async def test_the_credential_is_added_on_the_way_and_nothing_of_the_programs_is_kept(
    authority: Path,
) -> None:
    async with running(authority, header="x-api-key") as one:
        answer = await one.ask(
            "POST", "/v1/messages?beta=true", "x-api-key: mine", "Authorization: Bearer mine",
            "Cookie: a=b", "X-Kept: 1", "X-Forwarded-For: 1.2.3.4", "Accept-Encoding: gzip",
            body='{"model": "m"}',
        )  # fmt: skip
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"hello" in answer
    ((request, body),) = one.upstream.requests
    assert (request.method, request.target, body) == (
        b"POST", b"/v1/messages?beta=true", b'{"model": "m"}',
    )  # fmt: skip
    sent = headers_of(one.upstream)
    port = sent.pop(b"host").rpartition(b":")
    assert port[0] == HOST.encode()
    assert sent == {
        b"accept-encoding": b"identity", b"x-kept": b"1", b"content-length": b"14",
        b"x-api-key": KEY,
    }  # fmt: skip
    (asked,), (answered,) = (one.records.of(f"gateway.{e}") for e in ("request", "response"))
    assert asked["injected"] == [{"name": "MODEL_KEY", "version": 3}]
    assert (asked["method"], asked["path"]) == ("POST", "/v1/messages")
    assert answered["status"] == 200
    assert asked["request"] == answered["request"]
    assert KEY.decode() not in json.dumps(one.records.rows, default=str)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, b"Bearer " + KEY),
        ({"scheme": "token"}, b"token " + KEY),
        ({"scheme": "basic", "user": "me"}, b"Basic bWU6c2stdGVzdC0wMTIzNDU2Nzg5YWJjZGVmZ2hpag=="),
        ({"scheme": "plain"}, KEY),
    ],
)
async def test_the_credential_stands_as_the_scheme_says(
    authority: Path, keys: dict[str, Any], expected: bytes
) -> None:
    async with running(authority, **keys) as one:
        await one.ask("GET", "/")
    assert headers_of(one.upstream)[b"authorization"] == expected


async def test_an_upstream_with_a_path_has_it_before_every_path(authority: Path) -> None:
    async with running(authority, prefix="/api/") as one:
        await one.ask("GET", "/v1/models?a=b")
    assert one.upstream.requests[0][0].target == b"/api/v1/models?a=b"


async def test_events_arrive_as_they_come_and_the_credential_in_them_does_not(
    authority: Path,
) -> None:
    go = trio.Event()

    async def events(stream: Any, wire: h11.Connection) -> None:
        named = [("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]
        head = h11.Response(status_code=200, headers=named)
        await stream.send_all(wire.send(head))
        await stream.send_all(wire.send(h11.Data(data=b"data: one\n\n")))
        await go.wait()
        for piece in (b"data: " + KEY[:9], KEY[9:], b" two\n\n"):
            await stream.send_all(wire.send(h11.Data(data=piece)))
        await stream.send_all(wire.send(h11.EndOfMessage()))

    async with running(authority, Upstream(events)) as one:
        stream = await one.connect()
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with trio.fail_after(20):
            first = await until(stream, b"data: one\n\n")  # before the second one is even sent
            go.set()
            rest = await all_of(stream)
    assert b"text/event-stream" in first
    assert KEY not in first + rest
    assert b"[redacted:MODEL_KEY]" in rest
    assert b" two" in rest
    assert one.records.of("gateway.response")[0]["redactions"] == 1


async def test_a_credential_in_a_header_of_the_answer_is_taken_out(authority: Path) -> None:
    async def echo(stream: Any, wire: h11.Connection) -> None:
        await say(stream, wire, 401, b"no", www_authenticate=f"Bearer {KEY.decode()}",
                  set_cookie="a=b", x_kept="1")  # fmt: skip

    async with running(authority, Upstream(echo)) as one:
        answer = await one.ask("GET", "/")
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert KEY not in answer
    assert b"set-cookie" not in answer
    assert b"x-kept: 1" in answer


async def test_an_answer_that_can_not_be_searched_is_not_passed_on(authority: Path) -> None:
    async def compressed(stream: Any, wire: h11.Connection) -> None:
        await say(stream, wire, 200, b"\x1f\x8b", content_encoding="gzip")

    async with running(authority, Upstream(compressed)) as one:
        answer = await one.ask("GET", "/")
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"is compressed" in answer


async def test_an_answer_without_a_body_has_none(authority: Path) -> None:
    async def nothing(stream: Any, wire: h11.Connection) -> None:
        await say(stream, wire, 204)

    async with running(authority, Upstream(nothing)) as one:
        answer = await one.ask("DELETE", "/x")
    assert answer.startswith(b"HTTP/1.1 204 ")
    assert b"chunked" not in answer


@pytest.mark.parametrize(
    "path",
    ["//v1", "/v1/../admin", "/v1/./x", "/v1/%2e%2e/admin", "/v1%2fadmin", "/v1\\admin", "/v1/..",
     "/a#b", "/a%00b", "http://other.test/v1", "*"],
)  # fmt: skip
async def test_a_path_with_more_than_one_reading_is_refused(authority: Path, path: str) -> None:
    async with running(authority, paths=("/v1*", "/a*")) as one:
        answer = await one.ask("GET", path)
        control = await one.ask("GET", "/v1/admin?x=../y")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert control.startswith(b"HTTP/1.1 200 ")
    assert len(one.upstream.requests) == 1


async def test_methods_and_paths_that_are_not_listed_are_refused(authority: Path) -> None:
    async with running(authority, methods=("POST",), paths=("/v1/messages",)) as one:
        refused = [
            await one.ask("GET", "/v1/messages"),
            await one.ask("POST", "/v1/files"),
        ]
        control = await one.ask("POST", "/v1/messages")
    assert all(answer.startswith(b"HTTP/1.1 403 ") for answer in refused)
    assert control.startswith(b"HTTP/1.1 200 ")
    assert [row["reason"] for row in one.records.of("egress.refused")] == [
        "GET is not allowed here: POST are",
        "this path is not allowed here: /v1/messages are",
    ]


@pytest.mark.parametrize("keys", [{"per_minute": Count(2)}, {"budget": Count(2)}])
async def test_requests_are_bounded(authority: Path, keys: dict[str, Any]) -> None:
    async with running(authority, **keys) as one:
        answers = [await one.ask("GET", "/") for _ in range(4)]
    assert [answer.split()[1] for answer in answers] == [b"200", b"200", b"429", b"429"]
    assert len(one.upstream.requests) == 2


async def test_a_revoked_credential_is_refused_from_the_next_request_on(authority: Path) -> None:
    async with running(authority) as one:
        assert (await one.ask("GET", "/")).startswith(b"HTTP/1.1 200 ")
        one.revoked = True
        answer = await one.ask("GET", "/")
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"is revoked" in answer
    assert len(one.upstream.requests) == 1


@pytest.mark.parametrize("keys", [{"trusted": False}, {"host": "other.test"}])
async def test_an_upstream_that_can_not_prove_itself_gets_nothing(
    authority: Path, keys: dict[str, Any]
) -> None:
    """An authority that nobody trusts; a certificate for another name."""
    async with running(authority, **keys) as one:
        answer = await one.ask("GET", "/")
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"TLS with the upstream failed" in answer
    assert one.upstream.requests == []


async def test_connections_to_the_upstream_are_used_again(authority: Path) -> None:
    async with running(authority) as one:
        for _ in range(5):
            assert (await one.ask("GET", "/")).startswith(b"HTTP/1.1 200 ")
    assert len(one.upstream.requests) == 5
    assert one.upstream.connections == 1


async def test_a_credential_of_several_lines_is_not_sent(authority: Path) -> None:
    async with running(authority) as one:
        one.key = b"a\r\nx: y"
        answer = await one.ask("GET", "/")
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"more than one line" in answer
    assert one.upstream.requests == []


async def test_an_answer_that_breaks_off_is_not_passed_on_as_a_whole_one(authority: Path) -> None:
    async def half(stream: Any, wire: h11.Connection) -> None:
        head = h11.Response(status_code=200, headers=[("content-length", "100")])
        await stream.send_all(wire.send(head) + wire.send(h11.Data(data=b"half")))
        await stream.aclose()

    async with running(authority, Upstream(half)) as one:
        answer = await one.ask("GET", "/")
    assert b"half" in answer
    assert not answer.endswith(b"0\r\n\r\n")  # the end of a chunked body
    assert one.records.of("gateway.response")[0]["status"] == 200


SHAKE = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZQ==",
         "Sec-WebSocket-Version: 13", "Sec-WebSocket-Extensions: permessage-deflate")  # fmt: skip


def talking(*answers: bytes) -> Upstream:
    """An upstream that switches, then gives each answer to what it is sent."""

    async def switch(stream: Any, wire: h11.Connection) -> None:
        headers = [("upgrade", "websocket"), ("connection", "Upgrade"),
                   ("sec-websocket-accept", "x")]  # fmt: skip
        await stream.send_all(
            wire.send(h11.InformationalResponse(status_code=101, headers=headers))
        )
        for answer in answers:
            await stream.receive_some()
            await stream.send_all(answer)
        await stream.aclose()

    return Upstream(switch)


async def test_websocket_goes_through_with_the_credential_and_without_extensions(
    authority: Path,
) -> None:
    async with running(authority, talking(b"one", b"two")) as one:
        stream = await one.connect()
        lines = ("GET /live HTTP/1.1", "Host: x", *SHAKE)
        await stream.send_all("\r\n".join((*lines, "", "")).encode() + b"early")
        with trio.fail_after(20):
            head = await until(stream, b"one")
            await stream.send_all(b"late")
            assert await all_of(stream) == b"two"
    assert head.startswith(b"HTTP/1.1 101 ")
    sent = headers_of(one.upstream)
    assert sent[b"authorization"] == b"Bearer " + KEY
    assert sent[b"sec-websocket-key"] == b"dGhlIHNhbXBsZQ=="
    assert b"sec-websocket-extensions" not in sent
    assert one.records.of("gateway.response")[0]["status"] == 101


async def test_websocket_ends_before_the_credential_comes_back(authority: Path) -> None:
    async with running(authority, talking(b"fine", b"it is " + KEY)) as one:
        stream = await one.connect()
        lines = ("GET /live HTTP/1.1", "Host: x", *SHAKE)
        await stream.send_all("\r\n".join((*lines, "", "")).encode() + b"one")
        with trio.fail_after(20):
            await until(stream, b"fine")
            await stream.send_all(b"two")
            rest = await all_of(stream)
    assert KEY not in rest
    assert KEY[:8] not in rest
    assert one.records.of("gateway.response")[0]["redactions"] == 1


async def test_an_upstream_that_does_not_switch_answers_like_any(authority: Path) -> None:
    async with running(authority) as one:
        stream = await one.connect()
        lines = ("GET /live HTTP/1.1", "Host: x", *SHAKE)
        await stream.send_all("\r\n".join((*lines, "", "")).encode())
        with trio.fail_after(20):
            answer = await until(stream, b"hello")
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_a_connection_to_the_upstream_moves_so_much_and_no_more(authority: Path) -> None:
    async def large(stream: Any, wire: h11.Connection) -> None:
        await say(stream, wire, 200, *[bytes(1000)] * 100)

    async with running(authority, Upstream(large), bounds=Bounds(volume=20_000)) as one:
        answer = await one.ask("GET", "/")
    assert not answer.endswith(b"0\r\n\r\n")
    async with running(authority, Upstream(large)) as one:  # the control
        answer = await one.ask("GET", "/")
    assert answer.count(bytes(1000)) == 100
    assert answer.endswith(b"0\r\n\r\n")
