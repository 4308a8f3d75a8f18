"""What the store keeps of those who come in over HTTP: API keys, revocations, signing keys.

No API key and no token is in the store: of a key there is a keyed hash, of a token nothing, unless
it was revoked. The keys that sign tokens are wrapped by the master key, as all keys of the store.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sandboxd.errors import StoreError
from sandboxd.names import shown
from sandboxd.secret import Secret
from sandboxd.vault.ledger import Ledger
from sandboxd.vault.store import ApiKeyRow, RevocationRow

__all__ = ["Credentials", "SigningRow", "agents_of", "packed_agents"]

_SIGNING = "signing"


@dataclass(frozen=True)
class SigningRow:
    """A private key that signs tokens (Ed25519, raw)."""

    id: int
    created_at: float
    key: Secret


class Credentials:
    """Synchronous and thread-safe. Every change is one transaction, on disk when it returns.

    Reading authenticates every row; StoreError names the one that doesn't.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.api_keys()
        self.revocations()
        self.signing_keys()

    @property
    def store(self) -> str:
        """The store's random identity, which is public."""
        with self._ledger.read() as tx:
            header = tx.header()
        assert header is not None
        return header.store.hex()

    def api_keys(self) -> list[ApiKeyRow]:
        """Every API key that ever was, oldest first."""
        with self._ledger.read() as tx:
            rows = self._ledger.api_keys(tx)
        for row in rows:
            agents_of(row)
        return rows

    def put_api_keys(self, *rows: ApiKeyRow) -> None:
        """Add or replace these, all or none. Times of last use that are on disk are kept."""
        with self._ledger.change() as change:
            used = {row.id: row.last_used_at for row in self._ledger.api_keys(change.tx)}
            for row in rows:
                latest = _later(row.last_used_at, used.get(row.id))
                kept = dataclasses.replace(row, last_used_at=latest)
                change.tx.put_api_key(self._ledger.signed_key(kept))

    def touch(self, uses: Mapping[str, float]) -> None:
        """Note when keys were used last; earlier times than those on disk are passed over."""
        with self._ledger.aside(write=True) as tx:
            for row in self._ledger.api_keys(tx):
                at = uses.get(row.id)
                if at is None or (row.last_used_at is not None and row.last_used_at >= at):
                    continue
                used = self._ledger.signed_key(dataclasses.replace(row, last_used_at=float(at)))
                tx.put_api_key_used(row.id, float(at), used.used_digest)

    def revocations(self) -> list[RevocationRow]:
        with self._ledger.read() as tx:
            return self._ledger.revocations(tx)

    def revoke(self, team: str, kind: str, what: str, *, at: float, by: str) -> None:
        """Add a revocation, or move it to this time, and never back."""
        with self._ledger.change() as change:
            for old in self._ledger.revocations(change.tx):
                if (old.team, old.kind, old.what) == (team, kind, what) and old.at >= at:
                    return
            row = RevocationRow(team, kind, what, float(at), by, b"")
            change.tx.put_revocation(self._ledger.signed_revocation(row))

    def forget_revocations(self, before: float) -> None:
        """Drop those whose tokens have all expired long ago."""
        with self._ledger.change() as change:
            change.tx.delete_revocations(before)

    def signing_keys(self) -> list[SigningRow]:
        """The keys that tokens may be signed with, oldest first; the last one signs."""
        with self._ledger.read() as tx:
            return [
                SigningRow(row.id, row.created_at, key)
                for row, key in self._ledger.keys_of(tx, _SIGNING)
            ]

    def add_signing_key(self, key: Secret, *, at: float, drop: Collection[int] = ()) -> SigningRow:
        """Add the key that signs from now on, and drop older ones, in one transaction."""
        with self._ledger.change() as change:
            known = [row.id for row, _ in self._ledger.keys_of(change.tx, _SIGNING)]
            key_id = max(known, default=0) + 1
            self._ledger.add_key(change, _SIGNING, key_id, key, float(at))
            for old in drop:
                change.tx.delete_key(_SIGNING, "", old)
        return SigningRow(key_id, float(at), key)


def packed_agents(agents: Collection[str] | None) -> str:
    """A scope of agents as its column."""
    return json.dumps(None if agents is None else sorted(agents))


def agents_of(row: ApiKeyRow) -> tuple[str, ...] | None:
    """The agents that the key is for; None: all of its team."""
    try:
        agents = json.loads(row.agents)
    except ValueError:
        agents = 0
    if agents is None:
        return None
    if isinstance(agents, list) and all(isinstance(agent, str) for agent in agents):
        return tuple(agents)
    raise StoreError(f"the store is corrupted: API key {shown(row.id)}: its agents can't be read")


def _later(one: float | None, other: float | None) -> float | None:
    return max((at for at in (one, other) if at is not None), default=None)
