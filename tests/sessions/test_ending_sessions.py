"""Sessions that are ended by what they rest on, wherever their start has got to."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
import trio.testing

from sandboxd.audit import AuditLog
from sandboxd.broker.socket import bind_session_socket
from sandboxd.errors import Denied, StoreError, Unavailable
from sandboxd.isolation.client import open_launcher
from sandboxd.isolation.uids import UidPool
from sandboxd.paths import Paths, shipped
from sandboxd.policy import load_config
from sandboxd.sessions.manager import Manager, Request
from sandboxd.sessions.session import Session
from sandboxd.vault import Vault, create_key_file


async def _serve(
    session: Session, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    session.socket.touch()
    task_status.started()
    await trio.sleep_forever()


class Parts:
    """A manager of real parts; only the broker's socket is left out."""

    def __init__(self, root: Path) -> None:
        root.chmod(0o755)
        self.paths = Paths(root / "config", root / "state", root / "run")
        for folder in (self.paths.state, self.paths.sessions, self.paths.config / "agents"):
            folder.mkdir(parents=True)
        (self.paths.config / "agents/bot.yaml").write_text(
            "version: 1\ndescription: a test\ncommand: [/bin/sleep, '300']\n"
            "workspace: {mode: none}\n"
        )
        key = create_key_file(root / "key")
        self.vault = Vault.open(self.paths.state / "store.sqlite", key)
        self.audit = AuditLog.open(self.paths.state / "audit", key.derive("audit"))

    def close(self) -> None:
        self.audit.close()
        self.vault.close()

    def manager(self, launcher: Any, nursery: trio.Nursery) -> Manager:
        config = load_config(
            self.paths.config, shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
        )
        return Manager(
            paths=self.paths,
            config=lambda: config,
            vault=self.vault,
            audit=self.audit,
            launcher=launcher,
            uids=UidPool(privileged=launcher.privileged),
            serve=_serve,
            bind=bind_session_socket,
            bridge=b"",
            nursery=nursery,
        )

    @contextmanager
    def slow_store(self) -> Iterator[None]:
        """The store answers nobody while this is open: a thread of ours has its lock."""
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with self.vault._ledger.lock:
                held.set()
                release.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(60)
        try:
            yield
        finally:
            release.set()
            thread.join()


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short name: socket paths are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="sbx", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
async def started(
    short: Path, start_launcher: Callable[[str], socket.socket]
) -> AsyncIterator[tuple[Parts, Manager]]:
    parts = Parts(short)
    async with open_launcher(start_launcher("root")) as launcher, trio.open_nursery() as nursery:
        manager = parts.manager(launcher, nursery)
        yield parts, manager
        await manager.stop_all(reason="the test is over", grace=0)
        nursery.cancel_scope.cancel()
    parts.close()


async def test_the_sessions_of_one_key_end_and_others_live_on(
    started: tuple[Parts, Manager],
) -> None:
    parts, manager = started
    requests = (Request("bot", key=key, token=f"t-{n}") for n, key in enumerate("aab"))
    sessions = [(await manager.start(request)).session for request in requests]
    ended = await manager.stop_where(lambda session: session.key == "a", "its key is no more")
    assert [session.id for session in ended] == [session.id for session in sessions[:2]]
    for session in ended:
        assert session.ending is not None
        assert (session.ending.signal, session.ending.reason) == (9, "its key is no more")
        assert not psutil.pid_exists(session.pid)
        assert not session.directory.exists()
    assert manager.live == [sessions[2]]
    assert psutil.pid_exists(sessions[2].pid)
    records = {r["session"]: r for r in parts.audit.tail(100) if r["event"] == "session.ended"}
    assert {record["reason"] for record in records.values()} == {"its key is no more"}
    assert [
        (r["key"], r["token"], r["team"])
        for r in parts.audit.tail(100)
        if r["event"] == "session.started"
    ] == [("a", "t-0", "default"), ("a", "t-1", "default"), ("b", "t-2", "default")]
    kept = parts.vault.sessions(include_ended=True)
    assert [(r.key, r.state) for r in kept] == [("a", "ended"), ("a", "ended"), ("b", "running")]


async def test_a_session_whose_start_waits_for_the_store_ends_without_running(
    started: tuple[Parts, Manager],
) -> None:
    parts, manager = started
    failures: list[str] = []

    async def start() -> None:
        try:
            await manager.start(Request("bot", key="a"))
        except Unavailable as refused:
            failures.append(refused.message)

    async with trio.open_nursery() as nursery:
        with parts.slow_store():
            nursery.start_soon(start)
            await trio.testing.wait_all_tasks_blocked()
            (session,) = manager.live  # it has its place, and nothing else yet
            nursery.start_soon(manager.stop_where, lambda one: one.key == "a", "its key is no more")
            await trio.testing.wait_all_tasks_blocked()
            assert not session.ended.is_set()
        with trio.fail_after(30):
            await session.ended.wait()
    assert failures == ["the session was stopped while it started: its key is no more"]
    assert manager.live == []
    assert session.process is None
    assert parts.audit.tail(100) == []


async def test_who_is_not_admitted_any_more_gets_no_session(
    started: tuple[Parts, Manager],
) -> None:
    _, manager = started

    def admit(request: Request) -> None:
        if request.key == "ended":
            raise Denied("it ended")

    manager.admit = admit
    with pytest.raises(Denied, match="it ended"):
        await manager.start(Request("bot", key="ended"))
    assert manager.live == []
    session = (await manager.start(Request("bot", key="other"))).session
    assert manager.live == [session]


async def test_a_place_is_free_again_when_a_start_fails(started: tuple[Parts, Manager]) -> None:
    parts, manager = started
    parts.vault.close()
    with pytest.raises(StoreError):
        await manager.start(Request("bot"))
    assert manager.live == []
    assert parts.audit.tail(100) == []
