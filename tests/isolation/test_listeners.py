"""A sandbox without a network that finds single sockets of the broker's on its loopback."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from isolation_support import Box

from sandboxd.errors import Invalid, KernelError
from sandboxd.isolation.listeners import Listener, take

#: Connects to each address of the arguments and prints what came of it.
CLIENT = """
for address in sys.argv[1:]:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(b"ping")
            client.shutdown(socket.SHUT_WR)
            print(address, client.recv(100).decode(), flush=True)
    except OSError as failure:
        print(address, errno.errorcode.get(failure.errno, failure), flush=True)
"""


@contextmanager
def outlet() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


async def run(box: Box, listeners: tuple[Listener, ...], *addresses: str) -> list[str]:
    """What a sandbox with these listeners says of the addresses; each answers with its place."""
    argv, more = box.python(CLIENT)
    with outlet() as (ours, theirs):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await trio.lowlevel.wait_readable(ours)
                for one, listener in zip(take(ours, len(listeners)), listeners, strict=True):
                    one.setblocking(False)
                    accepting = trio.SocketListener(trio.socket.from_stdlib_socket(one))

                    async def answer(stream: trio.SocketStream, name: str = str(listener)) -> None:
                        async with stream:
                            got = await stream.receive_some()
                            await stream.send_all(got + b" " + name.encode()[:60])

                    nursery.start_soon(trio.serve_listeners, answer, [accepting])

            nursery.start_soon(serve)
            done = await box.run(
                *argv, *addresses, **more, listeners=listeners, extra=(theirs.fileno(),)
            )
            nursery.cancel_scope.cancel()
    assert done.exit.code == 0, done
    return done.out.decode().splitlines()


async def test_what_is_passed_out_is_reached_inside_and_nothing_else_is(box: Box) -> None:
    listeners = (Listener("127.0.0.1", 3128), Listener("127.0.0.2", 5432, "db.internal"))
    with socket.create_server(("127.0.0.1", 0)) as host:
        here = host.getsockname()[1]
        told = await run(
            box,
            listeners,
            "127.0.0.1:3128",
            "db.internal:5432",
            "127.0.0.1:5432",
            "127.0.0.2:3128",
            f"127.0.0.1:{here}",
            "93.184.216.34:3128",
        )
    closed = "EACCES" if box.launcher.landlock >= 4 else "ECONNREFUSED"
    assert told[0].startswith("127.0.0.1:3128 ping Listener(address='127.0.0.1', port=3128")
    assert told[1].startswith("db.internal:5432 ping Listener(address='127.0.0.2', port=5432")
    assert told[2:] == [
        "127.0.0.1:5432 ECONNREFUSED",
        "127.0.0.2:3128 ECONNREFUSED",
        f"127.0.0.1:{here} {closed}",  # the host's loopback is another one
        "93.184.216.34:3128 ENETUNREACH",
    ]


async def test_the_same_program_without_listeners_reaches_nothing(box: Box) -> None:
    argv, more = box.python(CLIENT)
    done = await box.run(*argv, "127.0.0.1:3128", **more)
    closed = b"EACCES" if box.launcher.landlock >= 4 else b"ENETUNREACH"
    assert done.out == b"127.0.0.1:3128 " + closed + b"\n"


async def test_nobody_inside_can_listen_in_their_place(box: Box) -> None:
    """A port that was passed out stays the broker's; others can't be bound either."""
    code = """
for port in (3128, 8080):
    try:
        socket.create_server(("127.0.0.1", port))
        print(port, "bound")
    except OSError as failure:
        print(port, errno.errorcode[failure.errno])
"""
    argv, more = box.python(code)
    with outlet() as (ours, theirs):
        listeners = (Listener("127.0.0.1", 3128),)
        done = await box.run(*argv, **more, listeners=listeners, extra=(theirs.fileno(),))
        for one in take(ours, 1):
            one.close()
    expected = [b"3128 EACCES", b"8080 EACCES"]
    if box.launcher.landlock < 4:
        expected = [b"3128 EADDRINUSE", b"8080 bound"]
    assert done.out.splitlines() == expected


async def test_the_program_gets_neither_the_outlet_nor_a_listener(box: Box) -> None:
    argv, more = box.python("print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])")
    with outlet() as (ours, theirs):
        listeners = (Listener("127.0.0.1", 3128),)
        done = await box.run(*argv, **more, listeners=listeners, extra=(theirs.fileno(),))
        for one in take(ours, 1):
            one.close()
    assert done.out == b"[0, 1, 2]\n"


async def test_an_address_that_does_not_exist_fails_the_launch_and_names_it(box: Box) -> None:
    with outlet() as (ours, theirs):
        listeners = (Listener("127.0.0.999", 3128),)
        with pytest.raises(KernelError, match=r"bind 127\.0\.0\.999:3128"):
            await box.run("/bin/true", listeners=listeners, extra=(theirs.fileno(),))
        with pytest.raises(KernelError) as raised:
            take(ours, 1)
        assert raised.value.errno == errno.EAGAIN


@pytest.mark.parametrize(
    ("listeners", "message"),
    [
        ((Listener("10.0.0.1", 80),), "is on loopback"),
        ((Listener("127.0.0.1", 0),), "has a port"),
        ((Listener("127.0.0.1", 80), Listener("127.0.0.1", 80, "x")), "different addresses"),
        ((Listener("127.0.0.1", 80, "a b"),), "can't have the name"),
        (tuple(Listener("127.0.0.1", 1000 + n) for n in range(65)), "at most 64"),
    ],
)
async def test_listeners_that_make_no_sense_are_refused(
    box: Box, listeners: tuple[Listener, ...], message: str
) -> None:
    with outlet() as (_, theirs), pytest.raises(Invalid, match=message):
        await box.run("/bin/true", listeners=listeners, extra=(theirs.fileno(),))


async def test_a_sandbox_with_the_hosts_network_has_no_listeners(box: Box) -> None:
    with outlet() as (_, theirs), pytest.raises(Invalid, match="either the host's network"):
        await box.run(
            "/bin/true",
            network="host",
            listeners=(Listener("127.0.0.1", 80),),
            extra=(theirs.fileno(),),
        )


async def test_taking_more_than_was_passed_is_an_error_and_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with outlet() as (ours, theirs):
        theirs.send(b"L")
        with pytest.raises(KernelError, match="EPROTO"):
            take(ours, 2)
    assert len(os.listdir("/proc/self/fd")) == before
