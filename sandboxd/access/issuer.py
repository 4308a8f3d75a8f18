"""Tokens of this installation: made, told, revoked; and the rotation of the keys that sign them."""

from __future__ import annotations

from typing import Any

import trio

from sandboxd.access.keys import ApiKey
from sandboxd.access.signing import SigningKeys, new_signing_key
from sandboxd.access.tokens import (
    DEFAULT_LIFETIME,
    LEEWAY,
    LONGEST_LIFETIME,
    Claims,
    Clock,
    Token,
    is_jti,
    issuer_of,
    new_jti,
    read,
    write,
)
from sandboxd.audit import AuditLog
from sandboxd.errors import Invalid
from sandboxd.vault.credentials import Credentials

__all__ = ["Issuer"]

#: A revocation is forgotten this long after the last token that it refuses has expired.
_KEPT = 30 * 86400.0

_MAX_SUBJECT = 200


class Issuer:
    """Signs tokens, and knows which ones are refused though they have not expired."""

    def __init__(self, kept: Credentials, audit: AuditLog, clock: Clock) -> None:
        """Reads the store. Raises StoreError for a row that does not authenticate."""
        self._kept, self._audit, self._clock = kept, audit, clock
        self._issuer = issuer_of(kept.store)
        self._load()
        self._revoked = {(r.team, r.kind, r.what): r.at for r in kept.revocations()}
        self._turn = trio.Lock()

    def read(self, bearer: str) -> Claims | None:
        """What a token says that is valid and not revoked; None for everything else."""
        claims = read(bearer, self._signing, self._issuer, self._clock())
        if claims is None or self.refuses(
            claims.team, claims.jti, claims.subject, claims.issued_at
        ):
            return None
        return claims

    def refuses(self, team: str, jti: str, subject: str | None, issued_at: float | None) -> bool:
        """Whether the token was revoked, by its id or with all others of its user."""
        until = self._revoked.get((team, "user", subject or ""))
        return (team, "token", jti) in self._revoked or (
            until is not None and (issued_at is None or issued_at <= until)
        )

    async def issue(
        self,
        key: ApiKey,
        agents: tuple[str, ...] | None,
        subject: str | None,
        lifetime: float | None,
        by: str,
    ) -> Token:
        """A token of this key, recorded before it exists. Raises Invalid for an odd subject."""
        subject = checked_subject(subject) if subject else None
        since = self._revoked.get((key.team, "user", subject or ""))
        # Not among those that were revoked in this very second.
        issued = int(self._clock()) if since is None else max(int(self._clock()), int(since) + 1)
        ends = issued + max(1.0, min(lifetime or DEFAULT_LIFETIME, LONGEST_LIFETIME))
        claims = Claims(
            issuer=self._issuer,
            key=key.id,
            team=key.team,
            # For no user it is the client itself (RFC 9068, 2.2).
            subject=subject or key.id,
            agents=agents,
            jti=new_jti(),
            issued_at=issued,
            expires_at=int(ends if key.expires_at is None else min(ends, key.expires_at)),
        )
        await self._ensure_key()
        await self._audit.append(
            "token.created",
            token=claims.jti,
            key=key.id,
            team=key.team,
            agents=None if agents is None else list(agents),
            subject=subject or "",
            expires_at=claims.expires_at,
            by=by,
        )
        signing = self._signing.current
        assert signing is not None
        return write(claims, signing)

    async def revoke(self, team: str, kind: str, what: str, by: str) -> None:
        """Refuse from now on: at once, whatever becomes of the record; then durably."""
        at = self._clock()
        self._revoked[team, kind, what] = max(at, self._revoked.get((team, kind, what), at))
        try:
            await self._audit.append("token.revoked", team=team, by=by, **{kind: what})
        finally:
            await trio.to_thread.run_sync(self._keep, team, kind, what, at, by)

    async def rotate(self, *, now: bool) -> None:
        """Sign with a new key from here on; ``now`` drops all others at once."""
        async with self._turn:
            known = self._signing.ids() if now else self._signing.over(self._clock())
            await self._new_key(known)

    async def jwks(self) -> dict[str, Any]:
        """The JSON Web Key Set (RFC 7517, 5) of the keys whose tokens are accepted."""
        await self._ensure_key()
        return self._signing.jwks(self._clock())

    def _load(self) -> None:
        self._signing = SigningKeys(self._kept.signing_keys(), overlap=LONGEST_LIFETIME + LEEWAY)

    def _keep(self, team: str, kind: str, what: str, at: float, by: str) -> None:
        old = at - LONGEST_LIFETIME - _KEPT
        if any(one < old for one in self._revoked.values()):
            self._kept.forget_revocations(old)
        self._kept.revoke(team, kind, what, at=at, by=by)

    async def _ensure_key(self) -> None:
        async with self._turn:
            if self._signing.current is None:
                await self._new_key(())

    async def _new_key(self, drop: tuple[int, ...] | list[int]) -> None:
        def add() -> None:
            self._kept.add_signing_key(new_signing_key(), at=self._clock(), drop=drop)
            self._load()

        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(add)


def checked_jti(jti: str) -> str:
    """A token's id. Raises Invalid without quoting it: it may be a token."""
    if not is_jti(jti):
        raise Invalid(
            "that is not the id of a token",
            hint="it is tok_ and 24 hexadecimal digits, as in token.created in the audit log",
        )
    return jti


def checked_subject(subject: str) -> str:
    """An application's user: 1 to 200 printable characters that are not the id of a key."""
    if not subject.isprintable() or not 0 < len(subject) <= _MAX_SUBJECT:
        raise Invalid(
            f"a user is named by 1 to {_MAX_SUBJECT} printable characters",
            hint="an id, or an address: ann@example.org",
        )
    if subject.startswith("key_"):
        raise Invalid("a user's name must not begin with key_", hint="that is how key ids begin")
    return subject
