"""Plain HTTP through the proxy: what is passed on, what isn't, and what can't be smuggled."""

from __future__ import annotations

import h11
import pytest
import trio
from egress_support import Names, all_of, proxy, rule, server, until

HOST = "api.example.com"
NAMES = {HOST: "127.0.0.1"}


class Web:
    """A server that keeps what it was sent, as bytes, and answers each request with ``answer``."""

    def __init__(
        self, answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    ) -> None:
        self.answer = answer
        self.requests: list[tuple[bytes, bytes, dict[bytes, bytes], bytes]] = []

    async def __call__(self, stream: trio.SocketStream) -> None:
        wire = h11.Connection(h11.SERVER)
        request, body = None, b""
        while True:
            event = wire.next_event()
            if event is h11.NEED_DATA:
                wire.receive_data(await stream.receive_some())
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return
        assert request is not None
        self.requests.append((request.method, request.target, dict(request.headers), body))
        await stream.send_all(self.answer)


def get(url: str, *headers: str, method: str = "GET", body: str = "") -> str:
    host = url.split("/")[2]
    lines = (f"{method} {url} HTTP/1.1", f"Host: {host}", "Connection: close", *headers)
    return "\r\n".join((*lines, "", body))


async def test_a_request_is_passed_on_in_origin_form_and_the_answer_comes_back() -> None:
    web = Web()
    async with server(web) as port:
        async with proxy([rule(HOST, port)], names=Names(**NAMES)) as one:
            answer = await one.ask(get(f"http://{HOST}:{port}/a/b?c=d#", "X-Mine: 1"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nhello")
    ((method, target, headers, body),) = web.requests
    assert (method, target, body) == (b"GET", b"/a/b?c=d#", b"")
    assert headers == {
        b"host": f"{HOST}:{port}".encode(), b"x-mine": b"1", b"connection": b"close"
    }  # fmt: skip
    (closed,) = one.records.of("egress.closed")
    assert closed["sent"] > 0
    assert closed["received"] > 0
    assert one.records.of("egress.opened")[0]["method"] == "GET"


async def test_one_connection_carries_request_after_request_each_decided_by_itself() -> None:
    web = Web()
    async with server(web) as port:
        async with proxy([rule(HOST, port, methods=("GET",))], names=Names(**NAMES)) as one:
            stream = await one.connect()
            for method, status in (("GET", b"200"), ("DELETE", b"403"), ("GET", b"200")):
                text = f"{method} http://{HOST}:{port}/ HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n"
                await stream.send_all(text.encode())
                answer = await until(stream, b"hello" if status == b"200" else b"crawler\n")
                assert answer.startswith(b"HTTP/1.1 " + status)
    assert [request[0] for request in web.requests] == [b"GET", b"GET"]
    (row,) = one.records.of("egress.refused")
    assert row["reason"] == f"no rule allows DELETE to {HOST}:{port}"


async def test_a_redirect_is_the_clients_to_follow_and_is_decided_like_any_address() -> None:
    web = Web(
        b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n"
    )
    async with server(web) as port:
        async with proxy([rule(HOST, port)], names=Names(**NAMES)) as one:
            answer = await one.ask(get(f"http://{HOST}:{port}/"))
            followed = await one.ask(get("http://169.254.169.254/"))
    assert answer.startswith(b"HTTP/1.1 302 ")
    assert followed.startswith(b"HTTP/1.1 403 ")
    assert len(web.requests) == 1


async def test_a_body_is_streamed_both_ways() -> None:
    async def both(stream: trio.SocketStream) -> None:
        head = await until(stream, b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await until(stream, b"one")
        await stream.send_all(b"3\r\nuno\r\n")
        await until(stream, b"two")
        await stream.send_all(b"3\r\ndos\r\n0\r\n\r\n")

    async with server(both) as port:
        async with proxy([rule(HOST, port)], names=Names(**NAMES)) as one:
            stream = await one.connect()
            head = get(f"http://{HOST}:{port}/", "Transfer-Encoding: chunked", method="POST")
            await stream.send_all(head.encode() + b"3\r\none\r\n")
            assert (await until(stream, b"uno\r\n")).startswith(b"HTTP/1.1 200")
            await stream.send_all(b"3\r\ntwo\r\n0\r\n\r\n")
            assert await all_of(stream) == b"3\r\ndos\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: other.example.com",),  # a second Host
        ("Content-Length: 5", "Content-Length: 6"),
        ("Transfer-Encoding: gzip",),
        ("Transfer-Encoding : chunked",),
        ("Bad Header: 1",),
        ("X: a\rb",),
    ],
)
async def test_what_two_servers_could_read_differently_goes_nowhere(
    headers: tuple[str, ...],
) -> None:
    web = Web()
    async with server(web) as port:
        async with proxy([rule(HOST, port)], names=Names(**NAMES)) as one:
            answer = await one.ask(get(f"http://{HOST}:{port}/", *headers, method="POST"))
            control = await one.ask(get(f"http://{HOST}:{port}/", method="POST"))
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 "))
    assert control.startswith(b"HTTP/1.1 200 ")
    assert len(web.requests) == 1


async def test_of_two_lengths_the_encoding_counts_and_the_other_is_not_passed_on() -> None:
    web = Web()
    hidden = f"0\r\n\r\nGET http://{HOST}/hidden HTTP/1.1\r\nHost: {HOST}\r\n\r\n"
    async with server(web) as port:
        async with proxy([rule(HOST, port)], names=Names(**NAMES)) as one:
            await one.ask(
                get(
                    f"http://{HOST}:{port}/",
                    f"Content-Length: {len(hidden)}",
                    "Transfer-Encoding: chunked",
                    method="POST",
                    body=hidden,
                )
            )
    assert [request[1] for request in web.requests] == [b"/"]
    assert b"content-length" not in web.requests[0][2]


async def test_a_body_that_is_not_what_its_head_says_is_told() -> None:
    async def swallow(stream: trio.SocketStream) -> None:
        await all_of(stream)

    async with server(swallow) as port:
        async with proxy([rule(HOST, port)], names=Names(**NAMES)) as one:
            text = get(f"http://{HOST}:{port}/", "Transfer-Encoding: chunked", method="POST")
            answer = await one.ask(text + "zz\r\nnot a chunk")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert [row["outcome"] for row in one.records.of("egress.closed")] == ["refused"]


async def test_host_has_to_be_the_address() -> None:
    web = Web()
    async with server(web) as port:
        async with proxy([rule(HOST, port)], names=Names(**NAMES)) as one:
            text = get(f"http://{HOST}:{port}/").replace(f"Host: {HOST}:{port}", "Host: inner.host")
            answer = await one.ask(text)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"the Host header names another host than the address" in answer
    assert not web.requests


async def test_what_concerns_the_proxy_is_not_passed_on() -> None:
    web = Web()
    kept = "X-Kept: 1"
    dropped = ("Proxy-Authorization: Basic eA==", "TE: trailers", "Upgrade: h2c", "X-Dropped: 1")
    async with server(web) as port:
        async with proxy([rule(HOST, port)], names=Names(**NAMES)) as one:
            text = get(f"http://{HOST}:{port}/", kept, *dropped)
            await one.ask(text.replace("Connection: close", "Connection: close, X-Dropped"))
    assert set(web.requests[0][2]) == {b"host", b"x-kept", b"connection"}


@pytest.mark.parametrize(
    "answer", [b"", b"not http\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"]
)
async def test_a_server_that_does_not_speak_http_is_told(answer: bytes) -> None:
    async with server(Web(answer)) as port:
        async with proxy([rule(HOST, port)], names=Names(**NAMES)) as one:
            got = await one.ask(get(f"http://{HOST}:{port}/"))
    assert got.startswith(b"HTTP/1.1 502 ")
    assert [row["outcome"] for row in one.records.of("egress.closed")] == ["reset"]


async def test_a_request_that_is_not_for_a_proxy_is_told_so() -> None:
    async with proxy([rule(HOST, 80)]) as one:
        answer = await one.ask("GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"this is a proxy" in answer


@pytest.mark.soak
async def test_a_thousand_clients_are_served_in_turn() -> None:
    web = Web()
    async with server(web) as port:
        async with proxy([rule(HOST, port)], names=Names(**NAMES)) as one:
            answers: list[bytes] = []

            async def ask() -> None:
                answers.append(await one.ask(get(f"http://{HOST}:{port}/")))

            async with trio.open_nursery() as nursery:
                for _ in range(1000):
                    nursery.start_soon(ask)
    assert len(web.requests) == 1000
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
