"""What is kept of sessions on disk: the output of the newest, and what waits for a review."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.audit import AuditLog
from sandboxd.sessions import records
from sandboxd.sessions.records import Records
from sandboxd.vault import SessionRecord, Vault, create_key_file


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    vault = Vault.open(tmp_path / "store.sqlite", create_key_file(tmp_path / "key"))
    yield vault
    vault.close()


@pytest.fixture
def audit(tmp_path: Path) -> Iterator[AuditLog]:
    audit = AuditLog.open(tmp_path / "audit", bytes(32))
    yield audit
    audit.close()


def remember(vault: Vault, id: str, team: str) -> None:
    vault.put_session(
        SessionRecord(
            id=id,
            agent="bot",
            policy="default",
            state="ended",
            started_at=1.0,
            ended_at=2.0,
            exit_code=0,
            exit_signal=None,
            reason="exited",
            by="ann",
            variables={},
            workspace="",
            team=team,
        )
    )


def directory(logs: Path, id: str, age: int) -> Path:
    """What a session that ended ``age`` seconds ago left."""
    path = logs / id
    path.mkdir(parents=True)
    (path / "output.log").write_text("printed")
    (path / "output.1.log").write_text("printed before")
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


async def test_the_output_of_each_team_s_newest_sessions_is_kept(
    vault: Vault, audit: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LOGS", 2)
    logs = tmp_path / "logs"
    for number in range(4):
        remember(vault, f"s-red-{number}", "red")
        directory(logs, f"s-red-{number}", number)
    remember(vault, "s-blue", "blue")
    directory(logs, "s-blue", 100)
    directory(logs, "s-nobody-knows", 200)
    kept = Records(vault, audit)
    await kept.close_leftovers()
    kept.prune(logs, {"s-red-3"})
    left = {path.name for path in logs.iterdir()}
    assert left == {"s-red-0", "s-red-1", "s-red-3", "s-blue", "s-nobody-knows"}


async def test_changes_that_nobody_reviewed_stay_when_the_output_goes(
    vault: Vault, audit: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LOGS", 1)
    logs = tmp_path / "logs"
    directory(logs, "s-new", 0)
    waiting = directory(logs, "s-waiting", 100)
    (waiting / "overlay/upper").mkdir(parents=True)
    (waiting / "overlay/upper/made").write_text("by the agent")
    (waiting / "overlay.json").write_text("{}")
    os.utime(waiting, (1e9 - 100, 1e9 - 100))
    landed = directory(logs, "s-landed", 200)
    (landed / "overlay.json").write_text("{}")
    os.utime(landed, (1e9 - 200, 1e9 - 200))
    Records(vault, audit).prune(logs, ())
    assert sorted(path.name for path in logs.iterdir()) == ["s-new", "s-waiting"]
    assert sorted(path.name for path in waiting.iterdir()) == ["overlay", "overlay.json"]
    assert (waiting / "overlay/upper/made").read_text() == "by the agent"


async def test_there_need_not_be_anything_to_prune(
    vault: Vault, audit: AuditLog, tmp_path: Path
) -> None:
    Records(vault, audit).prune(tmp_path / "logs", ())
