"""Placeholder credentials, before a real TLS server and with a client that trusts the authority."""

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
from egress_support import LOOPBACK, Names, Records, all_of, connect_to, rule, until
from egress_upstream import HOST, Upstream, say

from sandboxd.egress.dial import Dialer
from sandboxd.egress.exchange import Credential
from sandboxd.egress.gate import Bounds, Gate
from sandboxd.egress.intercept import Interception, Stand, token
from sandboxd.egress.proxy import serve_proxy
from sandboxd.errors import Denied
from sandboxd.policy.destinations import HostPattern, Port
from sandboxd.policy.placeholders import Placeholder
from sandboxd.policy.values import AbsolutePath, VariableName
from sandboxd.secret import Secret

KEY, OTHER = b"sk-test-0123456789abcdefghij", b"other-0123456789abcdefghij"
ELSEWHERE = "elsewhere.test"


@dataclass
class Box:
    """A proxy whose tunnels to HOST end in it; ``mine`` and ``other`` are the placeholders."""

    proxy: int
    port: int
    records: Records
    upstream: Upstream
    interception: Interception
    key: bytes = KEY
    revoked: bool = False
    clients: list[trio.abc.AsyncResource] = field(default_factory=list)

    @property
    def mine(self) -> str:
        return self.interception.stands[0].token.decode()

    @property
    def other(self) -> str:
        return self.interception.stands[1].token.decode()

    def reveal(self) -> Secret:
        if self.revoked:
            raise Denied("variable TOKEN of agent one, version 3, is revoked")
        return Secret(self.key)

    async def connect(self, host: str = HOST) -> trio.SSLStream[trio.SocketStream]:
        """A tunnel, and TLS in it as a program would speak it that trusts the authority alone."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.proxy)
        self.clients.append(stream)
        await stream.send_all(connect_to(f"{host}:{self.port}"))
        head = await until(stream, b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        trusting = ssl.create_default_context(
            cadata=self.interception.authority.certificate.decode()
        )
        secured = trio.SSLStream(stream, trusting, server_hostname=host, https_compatible=True)
        await secured.do_handshake()
        return secured

    async def ask(
        self, method: str, path: str, *headers: str, body: str = "", host: str = HOST
    ) -> bytes:
        stream = await self.connect(host)
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{self.port}", "Connection: close"]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        await stream.send_all("\r\n".join((*lines, *headers, "", body)).encode())
        return await all_of(stream)  # type: ignore[arg-type]


@asynccontextmanager
async def boxed(
    authority: Path, upstream: Upstream | None = None, trusted: bool = True
) -> AsyncIterator[Box]:
    upstream = upstream or Upstream()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem")
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, upstream.serve, listeners)
        port = listeners[0].transport_listener.socket.getsockname()[1]
        ca = AbsolutePath(authority / "ca.pem") if trusted else None

        def placeholder(name: str, host: str) -> Placeholder:
            return Placeholder(
                secret=VariableName(name), hosts=(HostPattern(host),), port=Port(port),
                addresses=LOOPBACK, ca=ca, source="agents/one.yaml:9",
            )  # fmt: skip

        held: list[Box] = []
        own = Credential("TOKEN", 3, lambda: held[0].reveal())
        other = Credential("OTHER", 1, lambda: Secret(OTHER))
        stands = (
            Stand(placeholder("TOKEN", HOST), token().encode(), own),
            Stand(placeholder("OTHER", ELSEWHERE), token().encode(), other),
        )
        interception = Interception(stands)
        (inside,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        records = Records()
        gate = Gate(
            lists=[[rule(HOST, port), rule(ELSEWHERE, port), rule("plain.test", port)]],
            who={"session": "s-1", "agent": "one"},
            record=records,
            dialer=Dialer(Names(**dict.fromkeys((HOST, ELSEWHERE, "plain.test"), "127.0.0.1"))),
            bounds=Bounds(idle=20),
        )
        box = Box(inside.socket.getsockname()[1], port, records, upstream, interception)
        held.append(box)
        async with interception.open():
            nursery.start_soon(serve_proxy, inside, gate, interception)
            yield box
            for client in box.clients:
                await trio.aclose_forcefully(client)
            nursery.cancel_scope.cancel()


async def test_the_real_value_goes_where_the_placeholder_stood(authority: Path) -> None:
    async with boxed(authority) as box:
        answer = await box.ask(
            "POST", f"/v1?key={box.mine}", f"Authorization: Bearer {box.mine}", "X-Kept: 1",
            "Accept-Encoding: gzip", body=json.dumps({"token": box.mine}),
        )  # fmt: skip
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"hello" in answer
    ((request, body),) = box.upstream.requests
    key = KEY.decode()
    assert request.target == f"/v1?key={key}".encode()
    assert json.loads(body) == {"token": key}
    assert dict(request.headers) == {
        b"host": f"{HOST}:{box.port}".encode(), b"authorization": f"Bearer {key}".encode(),
        b"x-kept": b"1", b"accept-encoding": b"identity",
        b"content-length": str(len(body)).encode(),
    }  # fmt: skip
    (asked,), (answered,) = (box.records.of(f"placeholder.{e}") for e in ("request", "response"))
    assert asked["injected"] == [{"name": "TOKEN", "version": 3}]
    assert (asked["method"], asked["path"], answered["status"]) == ("POST", "/v1", 200)
    told = json.dumps(box.records.rows, default=str)
    assert key not in told


async def test_user_name_and_password_are_looked_into(authority: Path) -> None:
    import base64

    async with boxed(authority) as box:
        given = base64.b64encode(f"me:{box.mine}".encode()).decode()
        await box.ask("GET", "/", f"Authorization: Basic {given}")
    sent = dict(box.upstream.requests[0][0].headers)[b"authorization"]
    assert base64.b64decode(sent.removeprefix(b"Basic ")) == b"me:" + KEY


async def test_a_request_without_a_placeholder_is_passed_on_as_it_is(authority: Path) -> None:
    async with boxed(authority) as box:
        answer = await box.ask("GET", "/", "Authorization: Bearer mine")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert dict(box.upstream.requests[0][0].headers)[b"authorization"] == b"Bearer mine"
    assert box.records.of("placeholder.request")[0]["injected"] == []


@pytest.mark.parametrize("where", ["header", "query", "body", "password", "unknown"])
async def test_a_placeholder_that_is_not_for_this_host_goes_nowhere(
    authority: Path, where: str
) -> None:
    import base64

    async with boxed(authority) as box:
        other = token() if where == "unknown" else box.other
        secret = base64.b64encode(f"me:{other}".encode()).decode()
        asked = {
            "header": ("GET", "/", f"X-Key: {other}"),
            "unknown": ("GET", "/", f"X-Key: {other}"),
            "query": ("GET", f"/?a={other}"),
            "body": ("POST", "/"),
            "password": ("GET", "/", f"Authorization: Basic {secret}"),
        }[where]
        answer = await box.ask(*asked, body=other if where == "body" else "")
        control = await box.ask("GET", "/", f"X-Key: {box.mine}")
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"a placeholder that isn't for this host" in answer
    assert control.startswith(b"HTTP/1.1 200 ")
    assert len(box.upstream.requests) == 1


async def test_what_comes_back_is_searched_for_the_real_value(authority: Path) -> None:
    async def echo(stream: Any, wire: h11.Connection) -> None:
        await say(stream, wire, 200, b"it is " + KEY[:7], KEY[7:], x_echo=KEY.decode(),
                  set_cookie="a=b")  # fmt: skip

    async with boxed(authority, Upstream(echo)) as box:
        answer = await box.ask("GET", "/", f"X-Key: {box.mine}")
    assert KEY not in answer
    assert b"[redacted:TOKEN]" in answer
    assert b"set-cookie: a=b" in answer  # a client of the real host may need its cookies


async def test_a_large_body_is_passed_on_and_one_with_a_placeholder_is_not(
    authority: Path,
) -> None:
    async with boxed(authority) as box:
        plain = await box.ask("PUT", "/large", body="x" * (3 << 20))
        marked = await box.ask("PUT", "/large", body="x" * (2 << 20) + box.mine + "x")
    assert plain.startswith(b"HTTP/1.1 200 ")
    assert not marked.startswith(b"HTTP/1.1 200 ")
    assert [len(body) for _, body in box.upstream.requests] == [3 << 20]


async def test_the_request_has_to_be_for_the_host_of_the_tunnel(authority: Path) -> None:
    async with boxed(authority) as box:
        stream = await box.connect()
        head = "GET / HTTP/1.1\r\nHost: other.test\r\nConnection: close\r\n"
        await stream.send_all(f"{head}X-Key: {box.mine}\r\n\r\n".encode())
        answer = await all_of(stream)  # type: ignore[arg-type]
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert box.upstream.requests == []


async def test_the_real_host_has_to_prove_itself(authority: Path) -> None:
    async with boxed(authority, trusted=False) as box:
        answer = await box.ask("GET", "/", f"X-Key: {box.mine}")
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"TLS with the upstream failed" in answer
    assert box.upstream.requests == []


async def test_a_revoked_value_is_refused(authority: Path) -> None:
    async with boxed(authority) as box:
        box.revoked = True
        answer = await box.ask("GET", "/", f"X-Key: {box.mine}")
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"is revoked" in answer
    assert box.upstream.requests == []


async def test_a_client_that_does_not_trust_the_authority_gets_no_connection(
    authority: Path,
) -> None:
    async with boxed(authority) as box:
        stream = await trio.open_tcp_stream("127.0.0.1", box.proxy)
        box.clients.append(stream)
        await stream.send_all(connect_to(f"{HOST}:{box.port}"))
        await until(stream, b"\r\n\r\n")
        context = ssl.create_default_context(cafile=authority / "ca.pem")
        secured = trio.SSLStream(stream, context, server_hostname=HOST)
        with pytest.raises(trio.BrokenResourceError):
            await secured.do_handshake()
        await trio.aclose_forcefully(stream)
        control = await box.ask("GET", "/")
    assert control.startswith(b"HTTP/1.1 200 ")
    (row,) = box.records.of("egress.refused")
    assert "doesn't trust the sandbox's authority" in row["reason"]


async def test_other_hosts_keep_their_own_tls(authority: Path) -> None:
    """A tunnel to a host without placeholders is not opened on the way."""
    async with boxed(authority) as box:
        stream = await trio.open_tcp_stream("127.0.0.1", box.proxy)
        box.clients.append(stream)
        await stream.send_all(connect_to(f"plain.test:{box.port}"))
        await until(stream, b"\r\n\r\n")
        context = ssl.create_default_context(cafile=authority / "ca.pem")
        context.check_hostname = False  # the certificate is HOST's
        secured = trio.SSLStream(stream, context, server_hostname="plain.test")
        await secured.do_handshake()
        await secured.send_all(
            f"GET / HTTP/1.1\r\nHost: plain.test\r\nX-Key: {box.mine}\r\n\r\n".encode()
        )
        await until(secured, b"hello")  # type: ignore[arg-type]
    assert dict(box.upstream.requests[0][0].headers)[b"x-key"] == box.mine.encode()


async def test_a_placeholder_in_the_clear_goes_nowhere(authority: Path) -> None:
    async with boxed(authority) as box:
        stream = await trio.open_tcp_stream("127.0.0.1", box.proxy)
        box.clients.append(stream)
        url = f"http://plain.test:{box.port}/"
        head = f"GET {url} HTTP/1.1\r\nHost: plain.test:{box.port}\r\nConnection: close\r\n"
        await stream.send_all(f"{head}X-Key: {box.mine}\r\n\r\n".encode())
        answer = await all_of(stream)
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert not box.records.of("egress.opened")


def test_placeholders_are_new_each_time_and_recognisable() -> None:
    assert len({token() for _ in range(100)}) == 100
    assert all(len(token()) == 45 and token().startswith("sbxd-") for _ in range(10))
