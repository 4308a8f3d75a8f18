"""Sandboxes that are ready for an agent's next session: used once, as they would be built now."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_daemon import RealDaemon, directories, until

WAIT = "id -u; cat /workspace/mark 2>/dev/null; exec sleep 600"


@pytest.fixture
def daemon() -> Iterator[RealDaemon]:
    with directories() as daemon:
        yield daemon


def start(daemon: RealDaemon, agent: str = "often") -> dict[str, Any]:
    started: dict[str, Any] = daemon.call(
        "session.start", agent=agent, args=[], tty=False, attach=False
    )
    return started


def ready(daemon: RealDaemon) -> set[str]:
    """Ids of what is ready: directories that are no session's, with a sandbox each."""
    live = {row["id"] for row in daemon.call("session.list")["sessions"]}
    return {path.name for path in daemon.paths.sessions.iterdir()} - live


def inits(daemon: RealDaemon) -> set[int]:
    """Of all sandboxes that run or wait."""
    assert daemon.process is not None
    found = {p.pid for p in psutil.process_iter() if _is_init(p)}
    mine = {row["pid"] for row in daemon.call("session.list")["sessions"]}
    parents = {_parent(pid) for pid in mine}
    return {pid for pid in found if _parent(pid) in parents}


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return -pid


def _is_init(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] == ["sandboxd-init"] and process.status() != "zombie"
    except psutil.Error:
        return False


def _has_children(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).children())
    except psutil.Error:
        return False


def wait_for_one(daemon: RealDaemon, but: set[int]) -> tuple[str, int]:
    """The id and the init of the one that is ready, once it is."""

    def built() -> bool:
        return len(ready(daemon)) == 1 and any(_has_children(pid) for pid in inits(daemon) - but)

    until(built)
    return ready(daemon).pop(), (inits(daemon) - but).pop()


def test_the_next_session_is_the_one_that_was_ready(daemon: RealDaemon) -> None:
    daemon.agent("often", WAIT)
    daemon.start()
    first = start(daemon)
    id, init = wait_for_one(daemon, {first["pid"]})
    second = start(daemon)
    assert (second["id"], second["pid"]) == (id, init)
    assert first["id"] != second["id"]
    another, _ = wait_for_one(daemon, {first["pid"], second["pid"]})
    assert another not in (first["id"], second["id"])
    # Each is alone, with a user of its own where there are any.
    for one in (first, second):
        until(lambda pid=one["pid"]: len(psutil.Process(pid).children(recursive=True)) == 1)
    uids = {psutil.Process(one["pid"]).uids().real for one in (first, second)}
    assert len(uids) == (2 if os.geteuid() == 0 else 1)
    daemon.call("session.stop", id=second["id"], grace=0)
    assert daemon.call("session.show", id=first["id"])["state"] == "running"


def test_what_was_changed_meanwhile_is_as_it_is_now(daemon: RealDaemon) -> None:
    workspace = daemon.base / "work"
    _new_workspace(workspace, "old")
    daemon.agent("often", WAIT, workspace=f"{{path: {workspace}}}")
    daemon.start()
    first = start(daemon)
    stale, init = wait_for_one(daemon, {first["pid"]})
    workspace.rename(daemon.base / "moved")
    _new_workspace(workspace, "new")
    second = start(daemon)
    assert second["pid"] != init
    until(lambda: "new" in daemon.ctl("session", "logs", second["id"]).stdout)
    assert not psutil.pid_exists(init)
    assert stale == second["id"]  # its directory and socket are as good as new ones

    _, init = wait_for_one(daemon, {first["pid"], second["pid"]})
    daemon.agent("often", "ulimit -n; exec sleep 600", limits="{files: 77}")
    daemon.call("reload")
    third = start(daemon)
    assert third["pid"] != init
    until(lambda: "77" in daemon.ctl("session", "logs", third["id"]).stdout)


def _new_workspace(path: Path, text: str) -> None:
    path.mkdir()
    (path / "mark").write_text(text + "\n")
    if os.geteuid() == 0:
        shutil.chown(path, 64123, 64123)


def test_one_that_was_killed_is_not_missed(daemon: RealDaemon) -> None:
    daemon.agent("often", WAIT)
    daemon.start()
    first = start(daemon)
    _, init = wait_for_one(daemon, {first["pid"]})
    os.kill(init, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(init))
    second = start(daemon)
    assert second["pid"] != init
    assert daemon.call("session.show", id=second["id"])["state"] == "running"


def test_none_is_left_when_the_daemon_stops(daemon: RealDaemon) -> None:
    daemon.agent("often", WAIT)
    daemon.agent("other", WAIT)
    daemon.start()
    started = [start(daemon), start(daemon, "other")]
    until(lambda: len(ready(daemon)) == 2)
    until(lambda: len(inits(daemon)) == 4)
    found = inits(daemon)
    assert {one["pid"] for one in started} < found
    assert daemon.stop() == 0
    assert not [pid for pid in found if psutil.pid_exists(pid)]
    assert not list(daemon.paths.sessions.iterdir())


def test_a_terminal_or_a_copy_on_write_view_is_built_when_it_is_asked_for(
    daemon: RealDaemon,
) -> None:
    daemon.agent("seen", WAIT, workspace="{mode: overlay}")
    daemon.start()
    start(daemon, "seen")
    daemon.ctl("session", "list")
    assert not ready(daemon)
