"""CONNECT: what a tunnel reaches, what it doesn't, and what is recorded of both."""

from __future__ import annotations

import contextlib
import ssl

import pytest
import trio
import trio.testing
from egress_support import Names, Records, all_of, connect_to, echo, proxy, rule, server, until

from sandboxd.egress.gate import Bounds
from sandboxd.errors import StoreError

HOST = "api.example.com"


def hello(name: str | None) -> bytes:
    """A TLS client's first message."""
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


async def test_a_named_host_is_reached_and_recorded_with_its_bytes() -> None:
    async with server(echo) as port:
        async with proxy([rule(HOST, port)], names=Names(**{HOST: "127.0.0.1"})) as one:
            stream, head = await one.tunnel(f"{HOST}:{port}")
            assert head.startswith(b"HTTP/1.1 200 ")
            await stream.send_all(b"x" * 100_000)
            await stream.send_eof()
            assert await all_of(stream) == b"x" * 100_000
            await stream.aclose()
            with trio.fail_after(10):
                while not one.records.of("egress.closed"):
                    await trio.lowlevel.checkpoint()
            (opened,), (closed,) = (one.records.of(f"egress.{e}") for e in ("opened", "closed"))
    named = {"session": "s-1", "agent": "crawler", "kind": "connect", "host": HOST, "port": port}
    title = f"agents/crawler.yaml:9 allow {HOST}:{port}"
    assert opened == {"event": "egress.opened", **named, "rule": title, "address": "127.0.0.1"}
    assert closed.pop("duration_ms") >= 0
    assert closed == {
        "event": "egress.closed", **named, "rule": title, "sent": 100_000, "received": 100_000,
        "outcome": "closed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("other.example.com:443", "no rule names the host other.example.com"),
        (f"{HOST}:22", f"no rule allows port 22 of {HOST}"),
        ("93.184.216.34:443", "no rule names the host 93.184.216.34"),
    ],
)
async def test_what_no_rule_names_is_refused_with_reason_rule_and_what_to_run(
    target: str, reason: str
) -> None:
    async with proxy([rule(HOST, 443)]) as one:
        stream, answer = await one.tunnel(target)
        answer += await all_of(stream)
    assert answer.startswith(b"HTTP/1.1 403 ")
    body = answer.partition(b"\r\n\r\n")[2].decode()
    assert body == (
        f"sandboxd: {reason}\nrule: default deny\n"
        "the operator sees what is allowed with: sandboxctl policy egress crawler\n"
    )
    assert one.names.asked == []  # nothing was resolved: no name leaves by DNS
    (row,) = one.records.of("egress.refused")
    assert (row["reason"], row["rule"]) == (reason, "default deny")
    assert not one.records.of("egress.opened")


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("169.254.169.254", "of a cloud's metadata service"),
        ("10.0.0.1", "of a private network"),
        ("127.0.0.1", "of this host itself"),
        ("::1", "of this host itself"),
        ("::ffff:127.0.0.1", "of this host itself"),
        ("100.64.1.1", "of shared address space"),
    ],
)
async def test_a_name_with_an_address_that_is_not_public_is_refused(
    address: str, kind: str
) -> None:
    names = Names(**{HOST: address})
    async with proxy([rule(HOST, 443, addresses=())], names=names) as one:
        stream, answer = await one.tunnel(f"{HOST}:443")
        await stream.aclose()
    assert answer.startswith(b"HTTP/1.1 403 ")
    (row,) = one.records.of("egress.refused")
    assert row["reason"].endswith(f"is an address {kind}")
    assert not one.records.of("egress.opened")


async def test_the_same_name_with_that_address_named_is_reached() -> None:
    async with server(echo) as port:
        async with proxy([rule(HOST, port)], names=Names(**{HOST: "127.0.0.1"})) as one:
            stream, head = await one.tunnel(f"{HOST}:{port}")
            await stream.aclose()
    assert head.startswith(b"HTTP/1.1 200 ")


async def test_of_a_name_with_two_addresses_only_the_checked_one_is_dialled() -> None:
    """A name that resolves to the host and to a public address at once."""
    names = Names(**{HOST: ["10.255.255.1", "127.0.0.1"]})
    async with server(echo) as port:
        async with proxy([rule(HOST, port)], names=names) as one:
            stream, head = await one.tunnel(f"{HOST}:{port}")
            await stream.aclose()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert [row["address"] for row in one.records.of("egress.opened")] == ["127.0.0.1"]


async def test_a_name_is_resolved_once_and_dialled_as_it_was_checked() -> None:
    """What the name resolves to a moment later is never asked (DNS rebinding)."""
    async with server(echo) as port:
        names = Names(**{HOST: "127.0.0.1"})
        async with proxy([rule(HOST, port)], names=names) as one:
            stream, head = await one.tunnel(f"{HOST}:{port}")
            await stream.aclose()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert names.asked == [HOST]


@pytest.mark.parametrize(
    "target",
    [
        "2130706433:443", "0x7f.1:443", "127.1:443", "0177.0.0.1:443", "[fe80::1%lo]:443",
        "user@api.example.com:443", "api.example.com", "api.example.com:", "api.example.com:0",
        "api.example.com:99999", "api.example.com:443:1", "ex\u00e4mple.com:443",
    ],
)  # fmt: skip
async def test_a_target_with_more_than_one_reading_is_a_bad_request(target: str) -> None:
    async with proxy([rule(HOST, 443)]) as one:
        answer = await one.ask(connect_to(target))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert not one.records.of("egress.opened")


async def test_a_host_name_with_a_nul_byte_is_no_request() -> None:
    async with proxy([rule(HOST, 443)]) as one:
        answer = await one.ask(connect_to(f"{HOST}\0.evil.net:443"))
        control = await one.ask(connect_to(f"{HOST}.evil.net:443"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert control.startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(("name", "reaches"), [(HOST, True), ("other.example.net", False)])
async def test_a_tunnel_asks_by_tls_for_the_host_that_it_is_for(name: str, reaches: bool) -> None:
    arrived: list[bytes] = []

    async def collect(stream: trio.SocketStream) -> None:
        arrived.append(await stream.receive_some())

    async with server(collect) as port:
        async with proxy([rule(HOST, port)], names=Names(**{HOST: "127.0.0.1"})) as one:
            first = hello(name)
            stream = await one.connect()
            # The first message comes with the request, as some clients send it.
            await stream.send_all(connect_to(f"{HOST}:{port}") + first)
            await all_of(stream)
    assert arrived == ([first] if reaches else [b""])
    refused = [row["reason"] for row in one.records.of("egress.refused")]
    told = [] if reaches else [f"the tunnel is for {HOST} and its TLS asks for another host"]
    assert refused == told
    (closed,) = one.records.of("egress.closed")
    assert (closed["sent"] > 0) is reaches


async def test_nobody_there_is_an_answer_and_not_a_hang() -> None:
    async with server(echo) as port:
        pass
    async with proxy([rule(HOST, port)], names=Names(**{HOST: "127.0.0.1"})) as one:
        stream, answer = await one.tunnel(f"{HOST}:{port}")
        answer += await all_of(stream)
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"can't be reached: connection refused" in answer
    assert [row["outcome"] for row in one.records.of("egress.closed")] != ["closed"]


async def test_a_connection_that_can_not_be_recorded_is_not_made() -> None:
    connected: list[int] = []

    async def count(stream: trio.SocketStream) -> None:
        connected.append(1)

    records = Records(fail=StoreError("the disk is full", hint="make room"))
    async with server(count) as port:
        names = Names(**{HOST: "127.0.0.1"})
        async with proxy([rule(HOST, port)], names=names, records=records) as one:
            answer = await one.ask(connect_to(f"{HOST}:{port}"))
            assert answer.startswith(b"HTTP/1.1 503 ")
            records.fail = None  # the control: it is reached when it can be
            stream, head = await one.tunnel(f"{HOST}:{port}")
            assert head.startswith(b"HTTP/1.1 200 ")
            await until(stream, b"never")
    assert connected == [1]


async def test_refusals_in_a_loop_are_answered_each_and_recorded_so_many_a_minute() -> None:
    async with proxy([rule(HOST, 443)]) as one:
        for _ in range(100):
            assert (await one.ask(connect_to("other:443"))).startswith(b"HTTP/1.1 403 ")
    assert len(one.records.rows) == 60


async def test_a_slow_request_is_ended_and_does_not_hold_its_place() -> None:
    bounds = Bounds(connections=2, head=0.2)
    async with server(echo) as port:
        names = Names(**{HOST: "127.0.0.1"})
        async with proxy([rule(HOST, port)], names=names, bounds=bounds) as one:
            slow = [await one.connect() for _ in range(20)]
            for stream in slow:
                await stream.send_all(b"CONNECT ")
            with trio.fail_after(30):
                stream, head = await one.tunnel(f"{HOST}:{port}")
                assert head.startswith(b"HTTP/1.1 200 ")
                for open_one in slow:
                    assert (await all_of(open_one)).startswith(b"HTTP/1.1 408 ")
                    await open_one.aclose()
            await stream.aclose()


@pytest.mark.parametrize(
    ("bounds", "outcome"),
    [
        (Bounds(idle=0.2), "idle"),
        (Bounds(lifetime=0.2), "lifetime"),
        (Bounds(volume=1000), "volume"),
    ],
)
async def test_a_tunnel_is_bounded(bounds: Bounds, outcome: str) -> None:
    async with server(echo) as port:
        names = Names(**{HOST: "127.0.0.1"})
        async with proxy([rule(HOST, port)], names=names, bounds=bounds) as one:
            stream, _ = await one.tunnel(f"{HOST}:{port}")
            with trio.fail_after(30), contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b"x" * 700)
                while await stream.receive_some():
                    if outcome == "volume":
                        await stream.send_all(b"x" * 700)
            await stream.aclose()
    assert [row["outcome"] for row in one.records.of("egress.closed")] == [outcome]


@pytest.mark.parametrize(("name", "reaches"), [(HOST, True), ("other.example.net", False)])
async def test_also_tls_that_begins_once_the_tunnel_stands_is_for_its_host(
    name: str, reaches: bool
) -> None:
    """As most clients do: they wait for the tunnel, and send their first message in pieces."""
    arrived: list[bytes] = []

    async def collect(stream: trio.SocketStream) -> None:
        arrived.append(await all_of(stream))

    first = hello(name)
    async with server(collect) as port:
        async with proxy([rule(HOST, port)], names=Names(**{HOST: "127.0.0.1"})) as one:
            stream, _ = await one.tunnel(f"{HOST}:{port}")
            await stream.send_all(first[:100])
            await trio.testing.wait_all_tasks_blocked()
            await stream.send_all(first[100:])
            await stream.send_eof()
            await all_of(stream)
            with trio.fail_after(10):
                while not arrived or not one.records.of("egress.closed"):
                    await trio.lowlevel.checkpoint()
    assert arrived == [first if reaches else b""]
    outcomes = [row["outcome"] for row in one.records.of("egress.closed")]
    assert outcomes == ["closed" if reaches else "refused"]


async def test_a_server_that_speaks_first_is_heard_before_the_client_says_anything() -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 hello\r\n")
        await stream.send_all(b"you said " + await stream.receive_some())

    async with server(greet) as port:
        async with proxy([rule(HOST, port)], names=Names(**{HOST: "127.0.0.1"})) as one:
            stream, _ = await one.tunnel(f"{HOST}:{port}")
            with trio.fail_after(10):
                assert await until(stream, b"\r\n") == b"220 hello\r\n"
                await stream.send_all(b"EHLO")
                assert await until(stream, b"EHLO") == b"you said EHLO"
