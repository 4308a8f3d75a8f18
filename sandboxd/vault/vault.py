"""The vault: agents' variables, sealed; values go in, and come out only to a tool's launch."""

from __future__ import annotations

import builtins
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from sandboxd.errors import Denied, Invalid, NotFound, StoreError
from sandboxd.names import agent_slug, loader_reason, shown, variable_name, variable_value
from sandboxd.secret import Secret
from sandboxd.vault.credentials import Credentials
from sandboxd.vault.custody import MasterKey
from sandboxd.vault.guard import Guard
from sandboxd.vault.ledger import Ledger, Where
from sandboxd.vault.sqlite import SqliteStore
from sandboxd.vault.store import SessionRecord, VariableRow

__all__ = ["Sealed", "Snapshot", "TeamVault", "Variable", "Vault"]

_TAG_SIZE = 16
_STATES = ("starting", "running", "ended")


@dataclass(frozen=True)
class Variable:
    """What an operator may know of a variable: everything but its value."""

    name: str
    version: int
    set_at: float
    set_by: str
    last_used_at: float | None
    fingerprint: str  # keyed; equal for equal values of one agent
    size: int
    revoked: bool = False


@dataclass(frozen=True)
class Sealed:
    """One version of a variable, as ciphertext. Good for :meth:`Vault.unseal` and nothing else."""

    team: str
    agent: str
    name: str
    version: int
    key_id: int
    nonce: bytes = field(repr=False)
    ciphertext: bytes = field(repr=False)

    @property
    def where(self) -> Where:
        return self.team, self.agent, self.name


@dataclass(frozen=True)
class Snapshot:
    """An agent's variables at one moment. Later changes don't reach it; revocations do."""

    team: str
    agent: str
    variables: Mapping[str, Sealed]


class Vault:
    """The variables of every team, by way of :meth:`of`, and the records of sessions.

    Synchronous and thread-safe. Every change is one transaction, on disk when the call returns.
    Every read and change first checks that nobody else changed the store, and raises
    :class:`StoreError` saying what doesn't authenticate.
    """

    @classmethod
    def open(
        cls,
        path: Path,
        key: MasterKey,
        *,
        clock: Callable[[], float] = time.time,
    ) -> Vault:
        """The vault at ``path``, made when there is none, every row authenticated.

        Raises :class:`StoreError` when it can't be opened or written, when ``key`` isn't the one
        that sealed it, when a row doesn't authenticate (the message names it), when it was rolled
        back, or when a newer sandboxd made it; :class:`Denied` when others could touch the file.
        """
        store = SqliteStore(path)
        try:
            guard = Guard(path.with_name(path.name + ".guard"))
            return cls(Ledger(store, guard, key, clock), clock)
        except BaseException:
            store.close()
            raise

    def __init__(self, ledger: Ledger, clock: Callable[[], float]) -> None:
        self._ledger, self._clock = ledger, clock
        #: API keys, revoked tokens and the keys that sign tokens.
        self.credentials = Credentials(ledger)
        with ledger.read() as tx:
            self._revoked: dict[Where, int] = {
                (row.team, row.agent, row.name): row.revoked_up_to
                for row in tx.rows()
                if row.revoked_up_to
            }

    def of(self, team: str) -> TeamVault:
        """The variables of one team: no other team's are in its reach."""
        return TeamVault(self._ledger, agent_slug(team), self._clock, self._revoked)

    def teams_of(self, agent: str) -> list[str]:
        """The teams in which an agent of this slug has variables, sorted."""
        with self._ledger.read() as tx:
            return sorted({row.team for row in tx.rows(None, agent_slug(agent)) if row.live})

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know: a rollback guard that was missing or can't be written."""
        return self._ledger.warnings

    @property
    def generation(self) -> int:
        """How many changes the store has seen; it never goes down."""
        return self._ledger.generation

    def subkey(self, purpose: str) -> Secret:
        """A key for one purpose that :meth:`rekey` leaves as it is."""
        return self._ledger.subkey(purpose)

    def unseal(self, sealed: Sealed) -> Secret:
        """The value. Reads no disk and waits for nobody.

        Raises :class:`Denied` when the version is revoked, and :class:`StoreError` when it doesn't
        authenticate or the vault is closed.
        """
        where = f"variable {sealed.name} of agent {sealed.agent}, version {sealed.version}"
        if self.is_revoked(sealed):
            raise Denied(f"{where}, is revoked", hint="a new session gets the current version")
        value = self._ledger.open(
            sealed.where, sealed.version, sealed.key_id, sealed.nonce, sealed.ciphertext
        )
        if value is None:
            raise StoreError(f"{where}, does not authenticate")
        return value

    def is_revoked(self, sealed: Sealed) -> bool:
        return sealed.version <= self._revoked.get(sealed.where, 0)

    def rekey(self, new: MasterKey) -> None:
        """Wrap every key of the store with ``new``, in one transaction. Values stay as they are."""
        self._ledger.rekey(new)

    def rotate_data_key(self) -> None:
        """Seal every team's values again under a fresh data key of it, in one transaction.

        The old keys are gone from the store afterwards; snapshots of live sessions still open.
        """
        self._ledger.rotate()

    def put_session(self, record: SessionRecord) -> None:
        """Add the record, or replace the one with its id."""
        if record.state not in _STATES:
            raise Invalid(f"a session is {', '.join(_STATES)}, not {shown(record.state)}")
        with self._ledger.aside(write=True) as tx:
            tx.put_session(record)

    def sessions(self, team: str | None = None, *, include_ended: bool) -> list[SessionRecord]:
        """Records of one team or of all, in the order of their start.

        The oldest ended ones of each team are dropped with time.
        """
        with self._ledger.aside(write=False) as tx:
            return tx.sessions(team, include_ended=include_ended)

    def close(self) -> None:
        """Close the store and drop every key. Nothing can be unsealed afterwards."""
        self._ledger.close()


class TeamVault:
    """The variables of one team. As synchronous, thread-safe and checked as the vault is."""

    def __init__(
        self, ledger: Ledger, team: str, clock: Callable[[], float], revoked: dict[Where, int]
    ) -> None:
        self._ledger, self._clock, self._revoked = ledger, clock, revoked
        self.team = team

    def set(self, agent: str, values: Mapping[str, Secret], *, by: str) -> dict[str, int]:
        """Store new versions, all or none; gives each name's new version.

        Raises :class:`Invalid` for a name or value that no tool can or should get.
        """
        agent_slug(agent)
        _person(by)
        for name, value in values.items():
            _settable(name, value)
        if not values:
            return {}
        versions = {}
        with self._ledger.change() as change:
            data_key = self._ledger.data_key(change, self.team)
            for name, value in values.items():
                where = (self.team, agent, name)
                old = self._ledger.row(change.tx, *where)
                version = old.version + 1 if old else 1
                key_id, nonce, ciphertext = self._ledger.seal(data_key, where, version, value)
                row = VariableRow(
                    team=self.team,
                    agent=agent,
                    name=name,
                    version=version,
                    live=1,
                    revoked_up_to=old.revoked_up_to if old else 0,
                    key_id=key_id,
                    nonce=nonce,
                    ciphertext=ciphertext,
                    fingerprint=self._ledger.fingerprint(self.team, agent, value),
                    set_at=float(self._clock()),
                    set_by=by,
                    digest=b"",
                    last_used_at=None,
                    used_digest=b"",
                )
                change.tx.put_row(self._ledger.signed(row))
                versions[name] = version
        return versions

    def remove(self, agent: str, names: Sequence[str], *, by: str) -> dict[str, int]:
        """Forget values, all or none; gives the version that each name had.

        Raises :class:`NotFound` naming those that aren't set. The version number lives on: setting
        the name again gives a higher one.
        """
        agent_slug(agent)
        _person(by)
        if not names:
            return {}
        removed = {}
        with self._ledger.change() as change:
            rows = {name: self._ledger.row(change.tx, self.team, agent, name) for name in names}
            live = {name: row for name, row in rows.items() if row and row.live}
            missing = [shown(name) for name in rows if name not in live]
            if missing:
                raise NotFound(
                    f"agent {agent} has no variable {', '.join(missing)}; nothing was removed",
                    hint=f"see: sandboxctl env list {agent}",
                )
            for name, row in live.items():
                gone = dataclasses.replace(
                    row,
                    live=0,
                    key_id=0,
                    nonce=b"",
                    ciphertext=b"",
                    fingerprint="",
                    set_at=float(self._clock()),
                    set_by=by,
                    last_used_at=None,
                )
                change.tx.put_row(self._ledger.signed(gone))
                removed[name] = row.version
        return removed

    def list(self, agent: str) -> builtins.list[Variable]:
        """The agent's variables by name, without their values."""
        return [
            Variable(
                name=row.name,
                version=row.version,
                set_at=row.set_at,
                set_by=row.set_by,
                last_used_at=row.last_used_at,
                fingerprint=row.fingerprint,
                size=len(row.ciphertext) - _TAG_SIZE,
                revoked=row.version <= row.revoked_up_to,
            )
            for row in self._live(agent)
        ]

    def snapshot(self, agent: str) -> Snapshot:
        """The agent's variables now, as ciphertext."""
        sealed = {
            row.name: Sealed(
                self.team, agent, row.name, row.version, row.key_id, row.nonce, row.ciphertext
            )
            for row in self._live(agent)
        }
        return Snapshot(self.team, agent, MappingProxyType(sealed))

    def revoke(self, agent: str, name: str, *, up_to: int) -> None:
        """Refuse to unseal versions up to ``up_to`` from now on, also after a restart.

        0 revokes nothing. Raises :class:`NotFound` for a variable that never was, and
        :class:`Invalid` for a version not yet given out. A revocation is never taken back.
        """
        if up_to < 1:
            return
        with self._ledger.lock:
            with self._ledger.change() as change:
                row = self._ledger.row(change.tx, self.team, agent, name)
                if row is None:
                    raise NotFound(f"agent {agent} has no variable {shown(name)}")
                if up_to > row.version:
                    raise Invalid(f"variable {name} of agent {agent} has no version {up_to} yet")
                up_to = max(up_to, row.revoked_up_to)
                revoked = dataclasses.replace(row, revoked_up_to=up_to)
                change.tx.put_row(self._ledger.signed(revoked))
            self._revoked[self.team, agent, name] = up_to

    def touch(self, uses: Iterable[tuple[str, str, int]], at: float) -> None:
        """Note that these (agent, name, version) were used; outdated versions are passed over."""
        with self._ledger.aside(write=True) as tx:
            for agent, name, version in sorted(set(uses)):
                row = self._ledger.row(tx, self.team, agent, name)
                if row is None or not row.live or row.version != version:
                    continue
                if row.last_used_at is None or row.last_used_at < at:
                    used = self._ledger.signed(dataclasses.replace(row, last_used_at=float(at)))
                    tx.put_used(self.team, agent, name, float(at), used.used_digest)

    def _live(self, agent: str) -> builtins.list[VariableRow]:
        agent_slug(agent)
        with self._ledger.read() as tx:
            rows = [row for row in tx.rows(self.team, agent) if row.live]
            for row in rows:
                self._ledger.check(row)
        return rows


def _settable(name: str, value: Secret) -> None:
    variable_name(name)
    reason = loader_reason(name)
    if reason:
        raise Invalid(
            f"{name} can't be set: {reason}",
            hint="store it under another name; a tool's manifest says how its program gets it",
        )
    variable_value(name, value.reveal())


def _person(by: str) -> None:
    """Who did it goes into listings: one line of printable text."""
    if not by.isprintable() or not 0 < len(by) <= 200:
        raise Invalid(f"{shown(by)} is not who can change a variable")
