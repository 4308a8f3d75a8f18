"""API keys: what they look like, how they are told, and what an operator may know of one.

The key is ``an_sk_`` and 64 hexadecimal digits from the kernel's generator. What is kept is its
HMAC under a key of the store: whoever reads the store can neither use nor try keys. A key is looked
up by that HMAC, whose value nobody outside can steer, so how long the look-up takes tells nothing.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from sandboxd.access.roles import KEY_ROLES, Principal, Role
from sandboxd.errors import Conflict, Invalid, NotFound, StoreError
from sandboxd.names import shown
from sandboxd.secret import Secret
from sandboxd.vault.credentials import agents_of, packed_agents
from sandboxd.vault.store import ApiKeyRow

__all__ = ["PREFIX", "ApiKey", "KeyRing", "checked_label", "new_id", "new_key", "prefix_of"]

PREFIX = "an_sk_"

#: How many characters of a key are shown: 24 of its 256 bits.
_SHOWN = len(PREFIX) + 6

_LIKE_A_KEY = re.compile(r"an_sk_[0-9a-f]{6}")
_MAX_LABEL = 64

State = Literal["active", "expired", "deactivated"]


@dataclass(frozen=True)
class ApiKey:
    """What may be known of a key: everything but the key."""

    id: str
    team: str
    label: str
    role: Role
    agents: tuple[str, ...] | None
    prefix: str
    created_at: float
    created_by: str
    last_used_at: float | None
    expires_at: float | None
    deactivated_at: float | None
    deactivated_by: str
    replaces: str

    @property
    def name(self) -> str:
        """For records and people."""
        return f"{self.label} ({self.prefix})"

    @property
    def principal(self) -> Principal:
        """Whom the key stands for."""
        agents = None if self.agents is None else frozenset(self.agents)
        return Principal("key", self.name, self.role, self.team, agents, self.id)

    def state(self, now: float) -> State:
        if self.deactivated_at is not None:
            return "deactivated"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "active"


_NOBODY = ApiKey("", "", "", "viewer", (), "", 0.0, "", None, None, 0.0, "", "")


class KeyRing:
    """Every API key of the store, in memory, by its HMAC and by its id."""

    def __init__(self, rows: Iterable[ApiKeyRow], key: Secret) -> None:
        """``key`` is the HMAC's. Raises StoreError for a row that no version of ours wrote."""
        self._key = key
        self._rows: dict[str, ApiKeyRow] = {}
        self._keys: dict[str, ApiKey] = {}
        self._ids: dict[bytes, str] = {}
        for row in rows:
            self.put(row)

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(list(self._keys.values()))

    def hash(self, presented: str) -> bytes:
        """The HMAC by which a key is told."""
        text = presented.encode("utf-8", "surrogatepass")
        return hmac.digest(self._key.reveal(), text, "sha256")

    def presented(self, bearer: str) -> ApiKey:
        """The key that somebody shows, in whatever state; for an unknown one a deactivated one.

        The same steps are taken whatever is shown.
        """
        return self._keys.get(self._ids.get(self.hash(bearer), ""), _NOBODY)

    def get(self, id: str) -> ApiKey | None:
        return self._keys.get(id)

    def row(self, id: str) -> ApiKeyRow:
        return self._rows[id]

    def put(self, row: ApiKeyRow) -> ApiKey:
        """Take a new or changed row."""
        key = _described(row)
        self._rows[row.id], self._keys[row.id], self._ids[row.hash] = row, key, row.id
        return key

    def find(self, named: str, among: Iterable[ApiKey]) -> ApiKey:
        """The key of this id, or of this prefix where no other has it. NotFound otherwise."""
        found = [key for key in among if named == key.id]
        found = found or [key for key in among if named == key.prefix]
        if len(found) == 1:
            return found[0]
        if found:
            raise Conflict(
                f"{len(found)} API keys begin with {shown(named)}",
                hint="name it by its id: sandboxctl keys list",
            )
        raise no_key(named)


def no_key(named: str) -> NotFound:
    """What a key out of reach gets, whether it exists or not. Never quotes what may be a key."""
    quoted = "like that" if _LIKE_A_KEY.match(named) and len(named) > _SHOWN else shown(named, 40)
    return NotFound(f"no API key {quoted}", hint="see: sandboxctl keys list")


def new_key() -> Secret:
    """A fresh key."""
    return Secret(PREFIX + os.urandom(32).hex())


def new_id() -> str:
    """A fresh public id of a key."""
    return "key_" + os.urandom(6).hex()


def prefix_of(bearer: str) -> str:
    """What may be logged of something shown as a key: its prefix, or "" where it is no key."""
    return bearer[:_SHOWN] if _LIKE_A_KEY.match(bearer) else ""


def checked_label(label: str) -> str:
    """A label: one printable line of 1 to 64 characters, and no key."""
    if not label.isprintable() or not 0 < len(label.strip()) <= _MAX_LABEL >= len(label):
        raise Invalid(
            f"a label is one line of 1 to {_MAX_LABEL} printable characters",
            hint="say where the key is used: 'web shop, production'",
        )
    if PREFIX in label:
        raise Invalid("a label must not hold a key", hint="labels are listed and recorded")
    return label.strip()


def row_of(key: ApiKey, hash: bytes) -> ApiKeyRow:
    """The row that keeps a key; its digests are made when it is written."""
    return ApiKeyRow(
        id=key.id,
        team=key.team,
        label=key.label,
        role=key.role,
        agents=packed_agents(key.agents),
        prefix=key.prefix,
        hash=hash,
        created_at=key.created_at,
        created_by=key.created_by,
        expires_at=key.expires_at,
        ended_at=key.deactivated_at,
        ended_by=key.deactivated_by,
        replaces=key.replaces,
        digest=b"",
        last_used_at=key.last_used_at,
        used_digest=b"",
    )


def _described(row: ApiKeyRow) -> ApiKey:
    role = next((role for role in KEY_ROLES if role == row.role), None)
    if role is None:
        raise StoreError(
            f"API key {shown(row.id)} has the role {shown(row.role)}, which this sandboxd lacks",
            hint="upgrade sandboxd",
        )
    return ApiKey(
        id=row.id,
        team=row.team,
        label=row.label,
        role=role,
        agents=agents_of(row),
        prefix=row.prefix,
        created_at=row.created_at,
        created_by=row.created_by,
        last_used_at=row.last_used_at,
        expires_at=row.expires_at,
        deactivated_at=row.ended_at,
        deactivated_by=row.ended_by,
        replaces=row.replaces,
    )
