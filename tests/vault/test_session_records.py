"""What the store remembers of sessions whose processes are gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from sandboxd.errors import Invalid
from sandboxd.vault import SessionRecord, Vault

SESSION = SessionRecord(
    id="s-0123456789abcdef",
    agent="bot",
    policy="default",
    state="running",
    started_at=1000.25,
    ended_at=None,
    exit_code=None,
    exit_signal=None,
    reason="",
    by="ann",
    variables={"A": 2},
    workspace="/w",
    team="default",
    key="key_0123456789ab",
    token="t-1",
    subject="user-7",
)


def test_a_session_record_comes_back_after_a_restart_as_it_was(
    reopen: Callable[..., Vault],
) -> None:
    reopen().put_session(SESSION)
    assert reopen().sessions(include_ended=False) == [SESSION]


def test_an_ended_session_is_listed_when_asked_for(vault: Vault) -> None:
    ended = dataclasses.replace(
        SESSION, state="ended", ended_at=1001.0, exit_signal=9, reason="stopped"
    )
    vault.put_session(SESSION)
    vault.put_session(ended)
    vault.put_session(dataclasses.replace(SESSION, id="s-2", started_at=999.0))
    assert [s.id for s in vault.sessions(include_ended=False)] == ["s-2"]
    assert vault.sessions(include_ended=True)[1] == ended


def test_a_session_in_no_known_state_is_refused(vault: Vault) -> None:
    with pytest.raises(Invalid, match="'paused'"):
        vault.put_session(dataclasses.replace(SESSION, state="paused"))


def test_only_so_many_ended_sessions_are_remembered(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandboxd.vault.sqlite._ENDED_SESSIONS", 3)
    vault.put_session(SESSION)
    for n in range(6):
        vault.put_session(
            dataclasses.replace(SESSION, id=f"s-{n}", state="ended", started_at=n, ended_at=n)
        )
    assert [s.id for s in vault.sessions(include_ended=True)] == ["s-3", "s-4", "s-5", SESSION.id]


def test_the_records_of_a_team_are_its_own(vault: Vault) -> None:
    vault.put_session(SESSION)
    vault.put_session(dataclasses.replace(SESSION, team="blue", agent="other"))
    assert [s.agent for s in vault.sessions("default", include_ended=False)] == ["bot"]
    assert [s.agent for s in vault.sessions("blue", include_ended=False)] == ["other"]
    assert vault.sessions("red", include_ended=True) == []
    assert len(vault.sessions(include_ended=False)) == 2


def test_one_team_s_many_sessions_do_not_push_out_another_s(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandboxd.vault.sqlite._ENDED_SESSIONS", 2)
    ended = dataclasses.replace(SESSION, state="ended", ended_at=1.0)
    vault.put_session(dataclasses.replace(ended, team="blue", id="s-blue"))
    for n in range(4):
        vault.put_session(dataclasses.replace(ended, id=f"s-{n}", ended_at=10.0 + n))
    assert [s.id for s in vault.sessions("blue", include_ended=True)] == ["s-blue"]
    assert len(vault.sessions("default", include_ended=True)) == 2
