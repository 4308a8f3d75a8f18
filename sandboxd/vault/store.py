"""What a store keeps, and what the vault asks of one.

A store moves rows; it knows no key and understands no ciphertext. Everything that it could get
wrong, or that somebody could change behind its back, is caught by the vault's digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

__all__ = [
    "ApiKeyRow",
    "Header",
    "KeyRow",
    "RevocationRow",
    "SessionRecord",
    "Store",
    "Transaction",
    "VariableRow",
]


@dataclass(frozen=True)
class Header:
    """One per store. ``digest`` covers it, every key and every row that has a digest."""

    store: bytes  # random identity
    created_at: float
    key_check: bytes  # derived from the master key: tells a wrong key from a damaged store
    generation: int  # counts changes; a lower one than before is a rollback
    digest: bytes


@dataclass(frozen=True)
class KeyRow:
    """A key of the store, wrapped by the master key, which authenticates the whole row."""

    purpose: str  # "integrity", "data" or "signing"
    team: str
    id: int
    created_at: float
    nonce: bytes
    wrapped: bytes


@dataclass(frozen=True)
class VariableRow:
    """The newest version of a variable, or what remains of a removed one.

    A removed variable keeps its row without a value, so that its version is never given out twice
    and a revocation of it stays. ``digest`` covers all but the last two columns, ``used_digest``
    covers ``last_used_at``.
    """

    team: str
    agent: str
    name: str
    version: int
    live: int  # 0 when removed
    revoked_up_to: int
    key_id: int
    nonce: bytes
    ciphertext: bytes
    fingerprint: str
    set_at: float
    set_by: str
    digest: bytes
    last_used_at: float | None
    used_digest: bytes


@dataclass(frozen=True)
class ApiKeyRow:
    """An API key, without the key: ``hash`` tells it under a key of the store.

    A row is never removed, so that what rests on a deactivated key stays refused. ``digest`` covers
    all but the last two columns, ``used_digest`` covers ``last_used_at``.
    """

    id: str
    team: str
    label: str
    role: str
    agents: str  # a JSON list, or null for all of the team
    prefix: str
    hash: bytes
    created_at: float
    created_by: str
    expires_at: float | None
    ended_at: float | None  # when it was deactivated
    ended_by: str
    replaces: str  # the key that a rotation made this one for
    digest: bytes
    last_used_at: float | None
    used_digest: bytes


@dataclass(frozen=True)
class RevocationRow:
    """Tokens that are refused though they have not expired: one of them, or all of a user's."""

    team: str
    kind: str  # "token": ``what`` is its jti; "user": its subject, of tokens made until ``at``
    what: str
    at: float
    by: str
    digest: bytes


@dataclass(frozen=True)
class SessionRecord:
    """What is known of a session after its processes are gone. Not secret, not sealed."""

    id: str
    agent: str
    policy: str
    state: str  # starting, running or ended
    started_at: float
    ended_at: float | None
    exit_code: int | None
    exit_signal: int | None
    reason: str
    by: str
    variables: Mapping[str, int]  # name -> version that it started with
    workspace: str
    team: str
    key: str = ""  # id of the API key that it rests on
    token: str = ""  # its token's jti
    subject: str = ""  # the application's user that the token is for


class Transaction(Protocol):
    """One consistent view of the store; a writing one is applied whole or not at all."""

    def header(self) -> Header | None: ...
    def put_header(self, header: Header) -> None: ...
    def key_rows(self) -> list[KeyRow]: ...
    def put_key(self, row: KeyRow) -> None: ...
    def delete_key(self, purpose: str, team: str, key_id: int) -> None: ...
    def digests(self) -> Iterator[tuple[str, str, str, bytes]]:
        """(team, agent, name, digest) of every variable row, in that order."""

    def rows(self, team: str | None = None, agent: str | None = None) -> Iterator[VariableRow]: ...
    def row(self, team: str, agent: str, name: str) -> VariableRow | None: ...
    def put_row(self, row: VariableRow) -> None: ...
    def put_used(
        self, team: str, agent: str, name: str, last_used_at: float, used_digest: bytes
    ) -> None: ...
    def api_key_rows(self) -> list[ApiKeyRow]: ...
    def put_api_key(self, row: ApiKeyRow) -> None: ...
    def put_api_key_used(self, id: str, last_used_at: float, used_digest: bytes) -> None: ...
    def revocation_rows(self) -> list[RevocationRow]: ...
    def put_revocation(self, row: RevocationRow) -> None: ...
    def delete_revocations(self, before: float) -> None: ...
    def put_session(self, record: SessionRecord) -> None: ...
    def sessions(self, team: str | None, *, include_ended: bool) -> list[SessionRecord]: ...


class Store(Protocol):
    """Where the rows are."""

    def transaction(self, *, write: bool) -> AbstractContextManager[Transaction]:
        """Commit on leaving, roll back on an error. Raises StoreError when the store fails."""

    def forget(self) -> None:
        """Let no copy of replaced rows linger, as far as the store can tell."""

    def close(self) -> None: ...
