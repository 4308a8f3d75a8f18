"""Who may speak on a session's socket, and what becomes of everybody else."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from broker_parts import ORDINARY_UID, Broker, StandIn

from sandboxd.broker import socket as module
from sandboxd.broker.socket import Peer, check_descent, peer_of, serve_session_socket
from sandboxd.errors import Denied, Invalid

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PING = b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n'

#: Connects, as the user that argument 3 names, sends argument 2 and prints the answer.
CLIENT = """
import os, socket, sys
if len(sys.argv) > 3:
    os.setresgid(*[int(sys.argv[3])] * 3)
    os.setresuid(*[int(sys.argv[3])] * 3)
with socket.socket(socket.AF_UNIX) as s:
    s.connect(sys.argv[1])
    s.sendall(sys.argv[2].encode())
    s.shutdown(socket.SHUT_WR)
    print(s.makefile().read(), end="", flush=True)
"""


@asynccontextmanager
async def serving(broker: Broker, session: StandIn, **more: Any) -> AsyncIterator[Path]:
    path = broker.root / "s.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_session_socket, path, session, broker.calls, **more))
        yield path
        nursery.cancel_scope.cancel()


async def ask(path: Path, *, user: int | None = None, text: bytes = PING) -> dict[str, Any]:
    """The first answer that a process of its own gets."""
    argv = [sys.executable, "-IS", "-c", CLIENT, str(path), text.decode()]
    if user is not None:
        argv.append(str(user))
    with trio.fail_after(20):
        done = await trio.run_process(argv, capture_stdout=True, check=False)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return answer


async def test_a_process_below_the_session_s_init_is_served(broker: Broker) -> None:
    async with serving(broker, broker.session()) as path:
        assert await ask(path) == {"jsonrpc": "2.0", "id": 1, "result": {}}


async def test_a_process_elsewhere_is_refused_and_told_so(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    session = broker.session()
    async with trio.open_nursery() as nursery:
        other = await nursery.start(partial(trio.run_process, ["sleep", "60"], check=False))
        session.pid = other.pid
        async with serving(broker, session) as path:
            answer = await ask(path)
        other.kill()
    assert answer["id"] is None
    assert "does not belong to the session" in answer["error"]["message"]
    assert "connection refused" in caplog.text


@needs_root
async def test_another_user_is_refused(broker: Broker) -> None:
    async with serving(broker, broker.session()) as path:
        answer = await ask(path, user=ORDINARY_UID)
    assert f"the peer is uid {ORDINARY_UID}" in answer["error"]["message"]


@needs_root
async def test_the_session_s_own_user_is_served(broker: Broker) -> None:
    session = broker.session()
    session.uid = ORDINARY_UID
    async with serving(broker, session) as path:
        assert (await ask(path, user=ORDINARY_UID))["result"] == {}


async def test_an_agent_may_speak_before_its_launch_is_reported(broker: Broker) -> None:
    session = broker.session()
    session.pid = 0
    async with serving(broker, session) as path, trio.open_nursery() as nursery:
        answers: list[dict[str, Any]] = []

        async def client() -> None:
            answers.append(await ask(path))

        nursery.start_soon(client)
        await trio.sleep(0.2)
        assert answers == []
        session.pid = os.getpid()
    assert answers[0]["result"] == {}


async def test_a_check_of_the_caller_s_own_replaces_ours(broker: Broker) -> None:
    seen: list[Peer] = []

    def check(peer: Peer) -> None:
        seen.append(peer)
        raise Denied("not today")

    async with serving(broker, broker.session(), check_peer=check) as path:
        answer = await ask(path)
    assert answer["error"]["message"] == "not today"
    assert seen[0].uid == os.geteuid()
    assert seen[0].pidfd is not None


async def test_connections_over_the_bound_are_refused_and_others_served(broker: Broker) -> None:
    async with serving(broker, broker.session()) as path:
        held = [await trio.open_unix_socket(path) for _ in range(32)]
        for stream in held:
            await stream.send_all(PING)
            assert b"result" in await stream.receive_some()
        answer = await ask(path)
        assert "32 connections" in answer["error"]["message"]
        await held.pop().aclose()
        with trio.fail_after(20):
            while "error" in await ask(path):
                pass
        for stream in held:
            await stream.aclose()


async def test_a_connection_s_failure_is_its_own(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(*args: Any) -> None:
        raise RuntimeError("secret-text")

    async with serving(broker, broker.session()) as path:
        with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG):
            patch.setattr(module, "serve_connection", fails)
            stream = await trio.open_unix_socket(path)
            with trio.fail_after(20):
                assert await stream.receive_some() == b""
            await stream.aclose()
        assert (await ask(path))["result"] == {}
    assert "connection failed: RuntimeError" in caplog.text
    assert "secret-text" not in caplog.text


async def test_the_socket_is_gone_when_serving_ends(broker: Broker) -> None:
    async with serving(broker, broker.session()) as path:
        assert path.is_socket()
    assert not path.exists()


async def test_another_socket_at_the_same_path_is_left_alone(broker: Broker) -> None:
    async with serving(broker, broker.session()) as path:
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.is_socket()


async def test_a_path_that_is_too_long_is_told_with_its_length(broker: Broker) -> None:
    path = broker.root / ("x" * 108)
    with pytest.raises(Invalid, match=r"has \d+ bytes; a socket path may have 107"):
        await serve_session_socket(path, broker.session(), broker.calls)


async def test_a_path_that_is_taken_is_told(broker: Broker) -> None:
    path = broker.root / "s.sock"
    path.write_text("")
    with pytest.raises(Invalid, match=r"cannot listen on .*: Address already in use"):
        await serve_session_socket(path, broker.session(), broker.calls)
    assert path.read_text() == ""


# --- the check itself ---------------------------------------------------------------------------


def connected(tmp_path: Path) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Our end of a connection that a child process made, and the child."""
    path = tmp_path / "peer.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        argv = [sys.executable, "-IS", "-c", CLIENT, str(path), ""]
        child = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        ours, _ = listener.accept()
    return ours, child


def test_the_peer_is_the_process_that_connected(tmp_path: Path) -> None:
    ours, child = connected(tmp_path)
    with ours, child:
        with peer_of(ours) as peer:
            assert (peer.pid, peer.uid, peer.gid) == (child.pid, os.geteuid(), os.getegid())
            check_descent(peer, os.getpid())
            check_descent(peer, child.pid)
        ours.close()


def test_a_peer_that_has_ended_is_refused(tmp_path: Path) -> None:
    ours, child = connected(tmp_path)
    with ours:
        with peer_of(ours) as peer:
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: pid still taken
            with pytest.raises(Denied, match="ended while it was being checked"):
                check_descent(peer, os.getpid())
        child.wait()
        with pytest.raises(Denied), peer_of(ours) as peer:
            check_descent(peer, os.getpid())


def test_a_kernel_without_a_pidfd_of_the_peer_is_told_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SO_PEERPIDFD", 9999)  # what no kernel knows: ENOPROTOOPT
    monkeypatch.setattr(module, "_warned", False)
    ours, child = connected(tmp_path)
    with ours, child:
        for _ in range(2):
            with peer_of(ours) as peer:
                assert peer.pid == child.pid
                check_descent(peer, os.getpid())
        ours.close()
    assert caplog.text.count("no SO_PEERPIDFD") == 1


def test_nobody_descends_from_a_session_without_a_process() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, peer_of(ours) as peer, pytest.raises(Denied, match="no process yet"):
        check_descent(peer, 0)


def test_no_descriptor_stays_open_after_a_check() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = sorted(os.listdir("/proc/self/fd"))
        with peer_of(ours):
            pass
        assert sorted(os.listdir("/proc/self/fd")) == before
