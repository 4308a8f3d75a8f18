"""What a way out leaves behind when something runs short, or ends in the middle of something."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from egress_support import LOOPBACK, Names, Records, connect_to, echo, proxy, rule, server

from sandboxd.egress.dial import Dialer
from sandboxd.egress.gate import Bounds, Gate
from sandboxd.egress.upstream import Upstream, tls_context
from sandboxd.policy.destinations import Admission, destination

HOST = "api.example.com"


@contextmanager
def no_descriptors() -> Iterator[None]:
    """No further descriptor can be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open("/dev/null", os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1, hard))
        while descriptor := _another():
            held.append(descriptor)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for one in held:
            os.close(one)


def _another() -> int | None:
    try:
        return os.open("/dev/null", os.O_RDONLY)
    except OSError:
        return None


async def test_no_descriptor_left_makes_clients_wait_and_ends_nothing() -> None:
    async with server(echo) as port:
        names = Names(**{HOST: "127.0.0.1"})
        async with proxy([rule(HOST, port)], names=names) as one:
            client = socket.socket()
            with client, no_descriptors():
                # Made by the kernel alone: nobody has accepted it yet.
                client.connect(("127.0.0.1", one.port))
                client.sendall(connect_to("other:443"))
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
            with trio.fail_after(20):
                stream, head = await one.tunnel(f"{HOST}:{port}")
            assert head.startswith(b"HTTP/1.1 200 ")
            await stream.aclose()


async def test_names_that_nobody_resolves_take_no_threads_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The outside's name server is the one thing that isn't real here: it doesn't answer."""
    answer = threading.Event()

    def silent(*_: Any, **__: Any) -> list[Any]:
        answer.wait(20)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 443))]

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    dialer, allowed = Dialer(), Admission((rule(HOST, 443),))
    before = trio.to_thread.current_default_thread_limiter().borrowed_tokens
    running = threading.active_count()
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(dialer.resolve, destination(HOST, 443), allowed)
            await trio.testing.wait_all_tasks_blocked()
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == before
            assert threading.active_count() - running <= 8
            answer.set()  # the control: all are answered in turn
    finally:
        answer.set()


async def test_a_connection_that_is_cancelled_while_it_is_made_is_recorded_as_ended() -> None:
    records = Records()
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):  # the one that waits; no more fit
            names = Names(**{HOST: "127.0.0.1"})
            gate = Gate([[rule(HOST, port)]], {}, records, Dialer(names))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gate.open, destination(HOST, port), "connect")
                await trio.testing.wait_all_tasks_blocked()
                assert [row["event"] for row in records.rows] == ["egress.opened"]
                nursery.cancel_scope.cancel()
    assert [row["outcome"] for row in records.of("egress.closed")] == ["cancelled"]


async def test_tls_that_is_cancelled_halfway_closes_its_connection(authority: Path) -> None:
    records, ended = Records(), trio.Event()

    async def silent(stream: trio.SocketStream) -> None:
        while await stream.receive_some():
            begun.set()
        ended.set()

    begun = trio.Event()
    async with server(silent) as port:
        wanted = destination(HOST, port)
        dialer = Dialer(Names(**{HOST: "127.0.0.1"}))
        gate = Gate([[rule(HOST, port, addresses=LOOPBACK)]], {}, records, dialer, "", Bounds())
        stream = await Upstream(gate, wanted, "gateway").connect_tcp(HOST, port)
        async with trio.open_nursery() as nursery:
            context = tls_context(str(authority / "ca.pem"))
            nursery.start_soon(stream.start_tls, context, HOST)
            with trio.fail_after(20):
                await begun.wait()
            nursery.cancel_scope.cancel()
        with trio.fail_after(20):
            await ended.wait()
    assert [row["outcome"] for row in records.of("egress.closed")] == ["closed"]
