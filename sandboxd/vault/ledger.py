"""The keyed half of the vault: the store's own keys, and the proof that nobody else changed it.

The master key wraps two kinds of key. The *integrity key* signs every variable row, and the set of
all rows together with a generation number, so that a changed, moved, removed or older row is
noticed; it also keys fingerprints. A team's *data key* seals its values. Both are random, so that
a new master key only has to wrap them again. API keys and revocations are signed like variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sandboxd.errors import StoreError
from sandboxd.names import shown
from sandboxd.secret import Secret
from sandboxd.vault.custody import MasterKey
from sandboxd.vault.envelope import Box, Digest, Field, new_key, pack
from sandboxd.vault.guard import Guard
from sandboxd.vault.store import (
    ApiKeyRow,
    Header,
    KeyRow,
    RevocationRow,
    Store,
    Transaction,
    VariableRow,
)

__all__ = ["Change", "Ledger", "Where", "corrupted"]

_INTEGRITY, _DATA = "integrity", "data"
_RESTORE = "restore the store from a backup"


#: Team, agent and name of a variable.
Where = tuple[str, str, str]


@dataclass
class Change:
    """A change in progress. ``header`` is what will be written with it."""

    tx: Transaction
    header: Header


class Ledger:
    """Every transaction of the vault goes through here, under one lock."""

    def __init__(
        self,
        store: Store,
        guard: Guard,
        key: MasterKey,
        clock: Callable[[], float],
    ) -> None:
        """Unlock the store, or set up a new one, and authenticate every row. Raises StoreError."""
        self._store, self._guard, self._clock = store, guard, clock
        self.lock = threading.RLock()
        self._wrap = Box(Secret(key.derive("wrap")))
        #: By team and key id; retired ones still open live snapshots.
        self._boxes: dict[tuple[str, int], Box] = {}
        self._key_ids: dict[str, int] = {}  # of each team's current data key
        self._generation = 0
        self._guard_missing = self._guard_failed = ""
        with store.transaction(write=True) as tx:
            mark = guard.read()
            header = tx.header()
            fresh = header is None
            if header is None:
                if tx.key_rows() or any(True for _ in tx.digests()) or tx.api_key_rows():
                    raise StoreError("the store is corrupted: its header is gone", hint=_RESTORE)
                if mark is not None:
                    raise StoreError(
                        f"the store is empty, and {guard.path} says that it was not",
                        hint=guard.hint,
                    )
                header = self._create(tx, key)
            self._use_integrity_key(self._unlock(tx, header, key))
            for row in tx.rows():
                self.check(row)
            header = self._verified(tx)
            if mark is not None:
                guard.check(mark, header.store, header.generation, self._guards)
            elif not fresh:
                self._guard_missing = (
                    f"the rollback guard {guard.path} was missing and is made anew: whether the "
                    "store was rolled back can't be told"
                )
            self._generation = header.generation
        self._mark(header)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(text for text in (self._guard_missing, self._guard_failed) if text)

    @property
    def generation(self) -> int:
        return self._generation

    @contextlib.contextmanager
    def read(self) -> Iterator[Transaction]:
        """A consistent, authenticated view."""
        with self.lock, self._store.transaction(write=False) as tx:
            self._verified(tx)
            yield tx

    @contextlib.contextmanager
    def change(self) -> Iterator[Change]:
        """One change: all of it and a higher generation, or nothing."""
        with self.lock:
            with self._store.transaction(write=True) as tx:
                change = Change(tx, self._verified(tx))
                yield change
                header = self._put_header(tx, change.header)
            self._generation = header.generation
            self._mark(header)
            self._store.forget()

    @contextlib.contextmanager
    def aside(self, *, write: bool) -> Iterator[Transaction]:
        """A transaction for what the generation doesn't count: last use, session records."""
        with self.lock, self._store.transaction(write=write) as tx:
            yield tx

    def row(self, tx: Transaction, team: str, agent: str, name: str) -> VariableRow | None:
        """The authenticated row of a variable, live or removed."""
        row = tx.row(team, agent, name)
        if row is not None:
            self.check(row)
        return row

    def signed(self, row: VariableRow) -> VariableRow:
        """The row with its digests made."""
        return dataclasses.replace(
            row,
            digest=self._rows.of(*_row_fields(row)),
            used_digest=self._uses.of(*_use_fields(row)),
        )

    def check(self, row: VariableRow) -> None:
        """Raise StoreError, naming the row, unless it is as it was signed."""
        if not self._rows.matches(row.digest, *_row_fields(row)):
            raise corrupted(row, "its row was changed or moved")
        if not self._uses.matches(row.used_digest, *_use_fields(row)):
            raise corrupted(row, "its time of last use was changed")

    def signed_key(self, row: ApiKeyRow) -> ApiKeyRow:
        """The API key's row with its digests made."""
        return dataclasses.replace(
            row,
            digest=self._api_keys.of(*_api_key_fields(row)),
            used_digest=self._api_key_uses.of(row.id, row.last_used_at),
        )

    def signed_revocation(self, row: RevocationRow) -> RevocationRow:
        return dataclasses.replace(row, digest=self._revocations.of(*_revocation_fields(row)))

    def api_keys(self, tx: Transaction) -> list[ApiKeyRow]:
        """Every API key, authenticated. StoreError names the one that isn't as it was signed."""
        rows = tx.api_key_rows()
        for row in rows:
            if not self._api_keys.matches(row.digest, *_api_key_fields(row)):
                raise _corrupted_key(row, "its row was changed or moved")
            if not self._api_key_uses.matches(row.used_digest, row.id, row.last_used_at):
                raise _corrupted_key(row, "its time of last use was changed")
        return rows

    def revocations(self, tx: Transaction) -> list[RevocationRow]:
        """Every revocation of tokens, authenticated."""
        rows = tx.revocation_rows()
        for row in rows:
            if not self._revocations.matches(row.digest, *_revocation_fields(row)):
                raise StoreError(
                    f"the store is corrupted: the revocation of {shown(str(row.kind))} "
                    f"{shown(str(row.what))} was changed or moved",
                    hint=_RESTORE,
                )
        return rows

    def keys_of(self, tx: Transaction, purpose: str) -> list[tuple[KeyRow, Secret]]:
        """The store's own keys of one purpose, oldest first, unwrapped."""
        header = tx.header()
        assert header is not None  # every transaction that comes here was verified
        found = sorted((row for row in tx.key_rows() if row.purpose == purpose), key=_key_order)
        return [(row, self._unwrapped(row, header)) for row in found]

    def add_key(self, change: Change, purpose: str, key_id: int, key: Secret, at: float) -> None:
        """Keep a key of the store's own, wrapped as all of them are."""
        row = dataclasses.replace(self._key_row(purpose, "", key_id), created_at=at)
        change.tx.put_key(self._wrapped(row, key, change.header))

    def data_key(self, change: Change, team: str) -> tuple[int, Box]:
        """Id and box of the team's current data key, made when it has none yet."""
        key_id = self._key_ids.get(team, 0)
        if key_id:
            return key_id, self._boxes[team, key_id]
        key = new_key()
        change.tx.put_key(self._wrapped(self._key_row(_DATA, team, 1), key, change.header))
        return 1, Box(key)  # remembered when it is read back: this change may still fail

    def seal(
        self, using: tuple[int, Box], where: Where, version: int, value: Secret
    ) -> tuple[int, bytes, bytes]:
        """Key id, nonce and ciphertext under a data key of the team."""
        key_id, box = using
        return key_id, *box.seal(value, _bound(where, version, key_id))

    def open(
        self, where: Where, version: int, key_id: int, nonce: bytes, sealed: bytes
    ) -> Secret | None:
        """The value, or None when it doesn't authenticate. Takes no lock, reads no disk."""
        box = self._boxes.get((where[0], key_id))
        if box is None:
            return None
        return box.open(nonce, sealed, _bound(where, version, key_id))

    def fingerprint(self, team: str, agent: str, value: Secret) -> str:
        """16 hex digits: equal for equal values of one agent, useless without the key."""
        return self._fingerprints.of_value(value, team, agent).hex()[:16]

    def subkey(self, purpose: str) -> Secret:
        return Secret(self._subkeys.of(purpose))

    def rekey(self, new: MasterKey) -> None:
        """Wrap every key of every team with ``new``."""
        box = Box(Secret(new.derive("wrap")))
        with self.lock:
            with self.change() as change:
                for row in change.tx.key_rows():
                    key = self._unwrapped(row, change.header)
                    change.tx.put_key(self._wrapped(row, key, change.header, box))
                change.header = dataclasses.replace(change.header, key_check=_key_check(new))
            self._wrap = box

    def rotate(self) -> None:
        """Seal every value of every team under a new data key of it and drop the old ones."""
        with self.change() as change:
            tx = change.tx
            places = [(team, agent, name) for team, agent, name, _ in tx.digests()]
            for team, old in self._key_ids.items():
                key = new_key()
                row = self._key_row(_DATA, team, old + 1)
                tx.put_key(self._wrapped(row, key, change.header))
                for where in places:
                    if where[0] == team:
                        self._reseal(tx, where, old, (old + 1, Box(key)))
                tx.delete_key(_DATA, team, old)

    def _reseal(self, tx: Transaction, where: Where, old: int, using: tuple[int, Box]) -> None:
        row = self.row(tx, *where)
        if row is None or not row.live:
            return
        value = self.open(where, row.version, old, row.nonce, row.ciphertext)
        if value is None:
            raise corrupted(row, "its value does not authenticate")
        key_id, nonce, sealed = self.seal(using, where, row.version, value)
        moved = dataclasses.replace(row, key_id=key_id, nonce=nonce, ciphertext=sealed)
        tx.put_row(self.signed(moved))

    def close(self) -> None:
        with self.lock:
            self._boxes = {}
            self._store.close()

    def _create(self, tx: Transaction, key: MasterKey) -> Header:
        """Header and integrity key of a new store. A data key comes with a team's first value."""
        header = Header(os.urandom(16), float(self._clock()), _key_check(key), 0, b"")
        integrity = new_key()
        tx.put_key(self._wrapped(self._key_row(_INTEGRITY, "", 1), integrity, header))
        self._use_integrity_key(integrity)
        return self._put_header(tx, header)

    def _unlock(self, tx: Transaction, header: Header, key: MasterKey) -> Secret:
        """The integrity key. Tells a wrong master key from a damaged store."""
        known = header.key_check == _key_check(key)
        row = next((row for row in tx.key_rows() if row.purpose == _INTEGRITY), None)
        if row is None:
            raise StoreError("the store is corrupted: its integrity key is gone", hint=_RESTORE)
        secret = self._open_key(row, header)
        if secret is None and not known:
            raise StoreError(
                f"wrong key: the master key {key.id} did not seal this store",
                hint="give the key that it was made with; without it nothing in it can be opened",
            )
        if secret is None or not known:
            what = "integrity key" if secret is None else "key check"
            raise StoreError(f"the store is corrupted: its {what} was changed", hint=_RESTORE)
        return secret

    def _use_integrity_key(self, key: Secret) -> None:
        self._rows = Digest(key, "row")
        self._uses = Digest(key, "use")
        self._whole = Digest(key, "whole")
        self._guards = Digest(key, "guard")
        self._fingerprints = Digest(key, "fingerprint")
        self._subkeys = Digest(key, "subkey")
        self._api_keys = Digest(key, "api key")
        self._api_key_uses = Digest(key, "api key use")
        self._revocations = Digest(key, "revocation")

    def _verified(self, tx: Transaction) -> Header:
        """The header, when the store as a whole is what was last signed; learns new data keys."""
        header = tx.header()
        if header is None:
            raise StoreError("the store is corrupted: its header is gone", hint=_RESTORE)
        keys = tx.key_rows()
        for row in keys:
            if row.purpose == _DATA and (row.team, row.id) not in self._boxes:
                self._boxes[row.team, row.id] = Box(self._unwrapped(row, header))
        if not self._whole.matches(header.digest, *_whole_fields(tx, header)):
            raise StoreError(
                "the store is corrupted: a variable or key was removed, added or put back to an "
                "older state",
                hint=_RESTORE,
            )
        if header.generation < self._generation:
            raise StoreError(
                f"the store was rolled back: it is at change {header.generation} and was at "
                f"{self._generation}",
                hint="stop sandboxd before touching its store",
            )
        # In the order of their ids: the newest of a team is its current one.
        self._key_ids = {row.team: row.id for row in keys if row.purpose == _DATA}
        return header

    def _put_header(self, tx: Transaction, header: Header) -> Header:
        header = dataclasses.replace(header, generation=header.generation + 1)
        digest = self._whole.of(*_whole_fields(tx, header))
        header = dataclasses.replace(header, digest=digest)
        tx.put_header(header)
        return header

    def _mark(self, header: Header) -> None:
        """Tell the guard. A failure doesn't undo the commit: the guard may lag, and says so."""
        self._guard_failed = self._guard.write(header.store, header.generation, self._guards)

    def _key_row(self, purpose: str, team: str, key_id: int) -> KeyRow:
        return KeyRow(purpose, team, key_id, float(self._clock()), b"", b"")

    def _wrapped(self, row: KeyRow, key: Secret, header: Header, box: Box | None = None) -> KeyRow:
        nonce, wrapped = (box or self._wrap).seal(key, _key_bound(row, header))
        return dataclasses.replace(row, nonce=nonce, wrapped=wrapped)

    def _open_key(self, row: KeyRow, header: Header) -> Secret | None:
        return self._wrap.open(row.nonce, row.wrapped, _key_bound(row, header))

    def _unwrapped(self, row: KeyRow, header: Header) -> Secret:
        key = self._open_key(row, header)
        if key is None:
            raise StoreError(
                f"the store is corrupted: {shown(str(row.purpose))} key {row.id} of team "
                f"{shown(str(row.team))} was changed or moved",
                hint=_RESTORE,
            )
        return key


def _bound(where: Where, version: int, key_id: int) -> bytes:
    return pack("sandboxd value", *where, version, key_id)


def corrupted(row: VariableRow, why: str) -> StoreError:
    """The error that names the row, and its team where that isn't the default one."""
    name, agent = shown(str(row.name)), shown(str(row.agent))
    if row.team != "default":
        agent += f" of team {shown(str(row.team))}"
    return StoreError(
        f"the store is corrupted: variable {name} of agent {agent}, version {row.version}: {why}",
        hint=_RESTORE,
    )


def _corrupted_key(row: ApiKeyRow, why: str) -> StoreError:
    return StoreError(f"the store is corrupted: API key {shown(str(row.id))}: {why}", hint=_RESTORE)


def _key_order(row: KeyRow) -> int:
    return row.id


def _key_check(key: MasterKey) -> bytes:
    return bytes.fromhex(key.id)


def _key_bound(row: KeyRow, header: Header) -> bytes:
    return pack("sandboxd key", header.store, row.purpose, row.team, row.id, row.created_at)


def _row_fields(row: VariableRow) -> tuple[Field, ...]:
    """Every column but the digests and the time of last use."""
    return (
        row.team,
        row.agent,
        row.name,
        row.version,
        row.live,
        row.revoked_up_to,
        row.key_id,
        row.nonce,
        row.ciphertext,
        row.fingerprint,
        row.set_at,
        row.set_by,
    )


def _api_key_fields(row: ApiKeyRow) -> tuple[Field, ...]:
    """Every column but the digests and the time of last use."""
    return (
        row.id,
        row.team,
        row.label,
        row.role,
        row.agents,
        row.prefix,
        row.hash,
        row.created_at,
        row.created_by,
        row.expires_at,
        row.ended_at,
        row.ended_by,
        row.replaces,
    )


def _revocation_fields(row: RevocationRow) -> tuple[Field, ...]:
    return row.team, row.kind, row.what, row.at, row.by


def _use_fields(row: VariableRow) -> tuple[Field, ...]:
    return row.team, row.agent, row.name, row.version, row.last_used_at


def _whole_fields(tx: Transaction, header: Header) -> Iterator[Field]:
    yield from (header.store, header.created_at, header.key_check, header.generation)
    for key in tx.key_rows():
        yield from (key.purpose, key.team, key.id, key.created_at, key.nonce, key.wrapped)
    for digest in tx.digests():
        yield from digest
    # A number apart from each kind of rows: those of one can't pose as another's.
    if api_keys := tx.api_key_rows():
        yield len(api_keys)
        for api_key in api_keys:
            yield from (api_key.id, api_key.digest)
    if revocations := tx.revocation_rows():
        yield from (0, len(revocations))
        for revocation in revocations:
            yield revocation.digest
