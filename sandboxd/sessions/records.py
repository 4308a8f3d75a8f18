"""What is remembered of sessions: audit records, and rows of the store that outlive processes."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from sandboxd.audit import AuditLog
from sandboxd.egress.outlet import Outlet, open_outlet
from sandboxd.errors import SandboxdError
from sandboxd.policy.egress import egress_lines
from sandboxd.sessions.changes import OVERLAY
from sandboxd.sessions.output import OUTPUT
from sandboxd.sessions.session import Ending, Session
from sandboxd.vault.store import SessionRecord
from sandboxd.vault.vault import Vault

__all__ = ["MAX_LOGS", "Records", "both"]

#: Detached sessions of each team whose recorded output is kept, at most twice output.MAX_LOG.
MAX_LOGS = 100

#: Sessions of which it is known whose they are; of older ones hardly anything is kept.
_KNOWN = 10_000


async def both(*calls: Callable[[], Awaitable[Any]]) -> None:
    """Await all of them at once, each to its end. Raises the first SandboxdError of theirs."""
    failures: list[SandboxdError] = []

    async def one(call: Callable[[], Awaitable[Any]]) -> None:
        try:
            await call()
        except SandboxdError as failure:
            failures.append(failure)

    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(one, call)
    if failures:
        raise failures[0]


class Records:
    """The records of every session of one daemon."""

    def __init__(self, vault: Vault, audit: AuditLog) -> None:
        self._vault, self._audit = vault, audit
        self._unwritten: list[SessionRecord] = []
        #: Whose the sessions are, as far as their output is still kept.
        self._teams: OrderedDict[str, str] = OrderedDict()

    def starts(self, session: Session) -> int:
        """Note that it starts, for :meth:`started` to make durable. Raises StoreError."""
        return self._audit.note(
            "session.started",
            **session.about,
            policy=session.policy.name,
            by=session.by,
            **_rests_on(session),
            generation=session.config.generation,
            workspace=str(session.workspace or ""),
            network=session.terms.network,
            egress=egress_lines(session.terms.egress),
            lowered=list(session.terms.lowered),
            variables={name: v.version for name, v in session.snapshot.variables.items()},
        )

    async def started(self, session: Session, number: int) -> None:
        """Return once what was noted under ``number``, and its row, are on disk. Raises StoreError.

        Nothing of the session runs before that.
        """
        await both(partial(self._audit.settle, number), partial(self.keep, session, "running"))

    def outlet(self, session: Session) -> AbstractContextManager[Outlet]:
        """The way out of a session's sandbox, whose connections are recorded here too."""
        terms, snapshot = session.terms.egress, session.snapshot
        return open_outlet(terms, session.about, self._audit.append, self._vault, snapshot)

    async def ended(self, session: Session) -> None:
        """Note how it ended, cancelled or not. Raises StoreError when that can't be recorded."""
        ending = session.ending
        assert ending is not None
        with trio.CancelScope(shield=True):
            try:
                await self._audit.append(
                    "session.ended",
                    **session.about,
                    exit_code=ending.code,
                    signal=ending.signal,
                    reason=ending.reason,
                    seconds=round(ending.at - session.started_at, 3),
                )
            finally:
                await self.keep(session, "ended")

    async def keep(self, session: Session, state: str) -> None:
        """Write its row, and those that could not be written before."""
        record = _record_of(session, state)
        self._know(session.id, session.team)
        try:
            await trio.to_thread.run_sync(self._vault.put_session, record)
            while self._unwritten:  # what a full disk kept from being written
                await trio.to_thread.run_sync(self._vault.put_session, self._unwritten[0])
                del self._unwritten[0]
        except SandboxdError:
            if session.ending is not None:
                self._unwritten.append(record)
            raise

    async def close_leftovers(self) -> list[str]:
        """Close the rows that a crash left open; returns the ids of the sessions."""
        records = await trio.to_thread.run_sync(partial(self._vault.sessions, include_ended=True))
        for record in records:
            self._know(record.id, record.team)
        leftover = [record for record in records if record.state != "ended"]
        for record in leftover:
            reason = "the daemon died"
            await self._audit.append(
                "session.ended",
                session=record.id,
                agent=record.agent,
                team=record.team,
                reason=reason,
            )
            ended = dataclasses.replace(record, state="ended", ended_at=time.time(), reason=reason)
            await trio.to_thread.run_sync(self._vault.put_session, ended)
        return [record.id for record in leftover]

    def prune(self, logs: Path, live: Collection[str]) -> None:
        """Keep what the newest sessions of each team printed: the disk is not the agents'.

        One team's sessions don't push out another's. Changes that nobody reviewed yet stay,
        however old their session is.
        """
        seen: Counter[str] = Counter()
        for directory in sorted(_directories(logs), key=_age):
            team = self._teams.get(directory.name, "")
            seen[team] += 1
            if seen[team] > MAX_LOGS and directory.name not in live:
                _let_go(directory)

    def _know(self, id: str, team: str) -> None:
        self._teams[id] = team
        while len(self._teams) > _KNOWN:
            self._teams.popitem(last=False)


def _directories(logs: Path) -> list[Path]:
    try:
        return list(logs.iterdir())
    except FileNotFoundError:
        return []


def _age(directory: Path) -> float:
    try:
        return -directory.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _let_go(directory: Path) -> None:
    if not (directory / OVERLAY).is_dir():
        shutil.rmtree(directory, ignore_errors=True)
        return
    for name in OUTPUT:
        (directory / name).unlink(missing_ok=True)


def _record_of(session: Session, state: str) -> SessionRecord:
    ending = session.ending or Ending(None, None, "")
    return SessionRecord(
        id=session.id,
        agent=session.agent.slug,
        policy=session.policy.name,
        state=state,
        started_at=session.started_at,
        ended_at=ending.at if session.ending else None,
        exit_code=ending.code,
        exit_signal=ending.signal,
        reason=ending.reason,
        by=session.by,
        variables={name: v.version for name, v in session.snapshot.variables.items()},
        workspace=str(session.workspace or ""),
        team=session.team,
        key=session.key,
        token=session.token,
        subject=session.subject,
    )


def _rests_on(session: Session) -> dict[str, Any]:
    """What not every session has."""
    found = {
        "key": session.key,
        "token": session.token,
        "subject": session.subject,
        "environment": sorted(session.environment),  # names alone
        "lifetime": session.lifetime,
    }
    return {name: value for name, value in found.items() if value}
