"""Access: who somebody is by the API key or token that they show, and how that ends at once.

Everything that a request needs is in memory; the store is written when a key or a revocation
changes, and now and then with times of last use. What ends is refused in memory first, so that
nothing new begins with it, then on disk, then what still rests on it is stopped; only then does the
call return.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from sandboxd.access.clock import ForwardClock
from sandboxd.access.ending import Dependent, Ending, StopWhere
from sandboxd.access.issuer import Issuer, checked_jti, checked_subject
from sandboxd.access.keys import (
    ApiKey,
    KeyRing,
    checked_label,
    new_id,
    new_key,
    no_key,
    prefix_of,
    row_of,
)
from sandboxd.access.roles import Principal
from sandboxd.access.scopes import has_team, new_key_role, reaches_key, scope_of
from sandboxd.access.tokens import LEEWAY, MAX_BEARER, Clock, Token
from sandboxd.access.uses import Uses
from sandboxd.audit import AuditLog
from sandboxd.errors import (
    Conflict,
    Denied,
    Invalid,
    NotFound,
    SandboxdError,
    StoreError,
    Unauthenticated,
)
from sandboxd.names import shown
from sandboxd.policy import Config
from sandboxd.secret import Secret
from sandboxd.vault.store import ApiKeyRow
from sandboxd.vault.vault import Vault

__all__ = ["Access"]

#: Seconds between two looks at a clock that may be set forward.
_LOOK = 30.0

_log = logging.getLogger(__name__)


class Access:
    """API keys, tokens, and what rests on them."""

    def __init__(
        self,
        vault: Vault,
        audit: AuditLog,
        *,
        config: Callable[[], Config],
        stop: StopWhere,
        clock: Clock | None = None,
    ) -> None:
        """Reads the store. Raises StoreError for a row that does not authenticate."""
        self._kept, self._audit, self._config = vault.credentials, audit, config
        rows = self._kept.api_keys()
        self._keys = KeyRing(rows, vault.subkey("api keys"))
        self._clock = clock or ForwardClock(_newest(rows))
        self._issuer = Issuer(self._kept, audit, self._clock)
        self._ending = Ending(stop)
        #: Keys that are refused before the disk says so.
        self._refused: set[str] = set()
        now = self._clock()
        self._lapsed = {key.id for key in self._keys if key.state(now) == "expired"}
        self._uses = Uses(self._kept.touch)
        self._changed, self._turn = trio.Event(), trio.Lock()
        #: Told the id of each key that was deactivated or expired, before its end is reported.
        self.on_deactivated = self._ending.listeners

    # -- who it is ------------------------------------------------------------------------------

    async def authenticate(self, bearer: str) -> Principal:
        """Who shows this API key or token. Reads no disk.

        Raises Unauthenticated, the same for everything that isn't valid.
        """
        await trio.lowlevel.checkpoint()
        bearer = bearer[: MAX_BEARER + 1]
        found = self._by_token(bearer) if bearer.count(".") == 2 else self._by_key(bearer)
        del bearer  # a traceback that shows locals must not show it
        if found is None:
            raise Unauthenticated
        return found

    def _by_key(self, bearer: str) -> Principal | None:
        key = self._keys.presented(bearer)
        if not self._usable(key):
            return None
        self._uses.note(key.id, self._clock())
        return key.principal

    def _by_token(self, bearer: str) -> Principal | None:
        claims = self._issuer.read(bearer)
        key = None if claims is None else self._keys.get(claims.key)
        if claims is None or key is None or claims.team != key.team or not self._usable(key):
            return None
        self._uses.note(key.id, self._clock())
        subject = None if claims.subject == key.id else claims.subject
        agents = None if claims.agents is None else frozenset(claims.agents)
        if key.agents is not None:
            agents = frozenset(key.agents) & (frozenset(key.agents) if agents is None else agents)
        return Principal(
            kind="token",
            name=f"{key.name} for {subject[:80]}" if subject else f"{key.name} by token",
            role="application",
            team=key.team,
            agents=agents,
            key=key.id,
            token=claims.jti,
            subject=subject,
            issued_at=float(claims.issued_at),
            expires_at=float(claims.expires_at),
        )

    def check(self, principal: Principal) -> None:
        """Raise Unauthenticated unless what the principal rests on still holds."""
        if principal.key is None:
            return
        key = self._keys.get(principal.key)
        if key is None or not self._usable(key):
            raise Unauthenticated
        if principal.expires_at is not None and principal.expires_at + LEEWAY <= self._clock():
            raise Unauthenticated
        if principal.token and self._issuer.refuses(
            key.team, principal.token, principal.subject, principal.issued_at
        ):
            raise Unauthenticated

    def admits(self, key: str, token: str) -> bool:
        """Whether a session that rests on these may start now; "" rests on nothing."""
        found = self._keys.get(key)
        return not key or (
            found is not None
            and self._usable(found)
            and not (token and self._issuer.refuses(found.team, token, None, None))
        )

    @contextmanager
    def held(self, principal: Principal) -> Iterator[None]:
        """Run what is inside for as long as the principal's key and token hold, and no longer.

        Raises Unauthenticated when they don't, and in the place of what was cancelled when they
        end meanwhile. Whoever ends them waits until what is inside is gone.
        """
        self.check(principal)
        ends = principal.expires_at
        with self._ending.leases.hold(
            principal, None if ends is None else ends + LEEWAY - self._clock()
        ) as scope:
            yield
        if scope.cancelled_caught:
            raise Unauthenticated

    # -- keys -----------------------------------------------------------------------------------

    async def create_key(
        self,
        *,
        team: str,
        role: str,
        label: str,
        agents: Collection[str] | None = None,
        lifetime: float | None = None,
        by: Principal,
    ) -> tuple[ApiKey, Secret]:
        """A new key; the secret is kept nowhere and can't be had again.

        Raises Invalid for a label, role or scope that makes no sense, NotFound for an unknown team
        or agent, Denied for a key that could do more than who makes it.
        """
        checked = new_key_role(self._config(), team, role, agents, by)
        now, secret = self._clock(), new_key()
        key = ApiKey(
            id=new_id(),
            team=team,
            label=checked_label(label),
            role=checked,
            agents=None if agents is None else tuple(sorted(set(agents))),
            prefix=prefix_of(secret.reveal().decode()),
            created_at=now,
            created_by=by.name,
            last_used_at=None,
            expires_at=None if lifetime is None else now + lifetime,
            deactivated_at=None,
            deactivated_by="",
            replaces="",
        )
        with trio.CancelScope(shield=True):
            await self._record("key.created", key, by, expires_at=key.expires_at)
            async with self._turn:
                self.check(by)  # it may have ended while the record was written
                await self._put(row_of(key, self._keys.hash(secret.reveal().decode())))
        return key, secret

    def keys(self, by: Principal) -> list[ApiKey]:
        """The keys in reach, oldest first, as memory has them."""
        return [self._current(key) for key in self._keys if reaches_key(by, key)]

    async def list_keys(self, by: Principal, team: str | None = None) -> list[ApiKey]:
        """The keys in reach. Reads the store: a changed row is a StoreError that names the key."""
        await trio.to_thread.run_sync(self._kept.api_keys)
        return [key for key in self.keys(by) if team is None or key.team == team]

    def find(self, named: str, by: Principal) -> ApiKey:
        """The key in reach of this id or prefix, or shown itself. NotFound otherwise."""
        presented = self._keys.presented(named)
        if presented.id and reaches_key(by, presented):
            return self._current(presented)
        return self._keys.find(named, self.keys(by))

    def made_by(self, key: ApiKey, by: Principal) -> list[ApiKey]:
        """Keys in reach that this one made and that still work: they don't end with it."""
        made = [one for one in self.keys(by) if one.created_by == key.name]
        return [one for one in made if self.state(one) == "active"]

    def state(self, key: ApiKey) -> str:
        """``active``, ``expired`` or ``deactivated``."""
        return "deactivated" if key.id in self._refused else key.state(self._clock())

    async def deactivate(self, id: str, *, by: Principal) -> list[str]:
        """End a key for good: every token of it is refused, every session that rests on it is gone.

        Returns the ended sessions' ids when all of that is so, and durably. Raises NotFound, and
        StoreError when it could not be recorded: it holds all the same until the next start.
        """
        key = self._keys.get(id)
        if key is None or not reaches_key(by, key):
            raise no_key(id)
        self._refused.add(id)  # from here on nothing begins with it
        with trio.CancelScope(shield=True):
            problem = ""
            try:
                await self._record("key.deactivated", key, by)
            except SandboxdError as failure:
                problem = failure.message
            try:
                async with self._turn:
                    row = self._keys.row(id)
                    if row.ended_at is None:
                        at = self._clock()
                        await self._put(dataclasses.replace(row, ended_at=at, ended_by=by.name))
            except SandboxdError as failure:
                problem = failure.message
            else:
                self._refused.discard(id)
            sessions = await self._ending.of_key(id, f"its API key was deactivated by {by.name}")
        if problem:
            raise StoreError(
                f"API key {id} is refused and its sessions are ended, but not durably: {problem}",
                hint="repair the disk and deactivate it again before the daemon is restarted",
            )
        return sessions

    async def rotate(
        self, id: str, *, overlap: float, lifetime: float | None = None, by: Principal
    ) -> tuple[ApiKey, Secret, list[str]]:
        """A new key in the place of an active one, which ends after ``overlap`` seconds.

        Without an overlap the old one is deactivated before this returns. Raises NotFound, and
        Conflict for a key that is not active or was rotated already.
        """
        old = self._keys.get(id)
        if old is None or not reaches_key(by, old):
            raise no_key(id)
        new_key_role(self._config(), old.team, old.role, old.agents, by)
        now, secret = self._clock(), new_key()
        if lifetime is None and old.expires_at is not None:
            lifetime = old.expires_at - old.created_at
        new = dataclasses.replace(
            old,
            id=new_id(),
            prefix=prefix_of(secret.reveal().decode()),
            created_at=now,
            created_by=by.name,
            last_used_at=None,
            expires_at=None if lifetime is None else now + lifetime,
            replaces=old.id,
        )
        end = now + overlap if old.expires_at is None else min(old.expires_at, now + overlap)
        with trio.CancelScope(shield=True):
            async with self._turn:
                self.check(by)
                self._rotatable(old)
                await self._record("key.rotated", new, by, replaces=old.id, overlap=overlap)
                await self._put(
                    row_of(new, self._keys.hash(secret.reveal().decode())),
                    dataclasses.replace(self._keys.row(id), expires_at=end),
                )
            ended = await self.deactivate(id, by=by) if overlap <= 0 else []
        return new, secret, ended

    # -- tokens ---------------------------------------------------------------------------------

    async def issue_token(
        self,
        principal: Principal,
        agents: Collection[str] | None = None,
        subject: str | None = None,
        lifetime: float | None = None,
        *,
        by: str = "",
    ) -> Token:
        """A token of the principal's key: for these agents (None: all that it reaches), for a user.

        It lives for ``lifetime`` seconds, an hour by default and a day at most, and never longer
        than its key. Raises Denied for a token that asks or a role that may not, NotFound for an
        agent out of reach, Invalid for what makes no sense.
        """
        if principal.kind == "token":
            raise Denied("a token can't make tokens", hint="make it with the API key")
        if not principal.may("tokens.create"):
            raise Denied(
                f"a key of the role {principal.role} can't make tokens",
                hint="use a key of the role operator or owner",
            )
        key = self._keys.get(principal.key or "")
        if key is None:
            raise Invalid("a token is made with an API key", hint="name it: --key KEY")
        self.check(principal)
        scope = None if agents is None else scope_of(self._config(), principal, agents)
        token = await self._issuer.issue(key, scope, subject, lifetime, by or principal.name)
        self.check(principal)  # it may have ended while the record was written
        return token

    async def revoke_token(self, jti: str, *, team: str, by: Principal) -> list[str]:
        """Refuse a team's token from now on, and end the sessions that it started: their ids.

        Raises Invalid for what is no token's id. An id that never was is refused as well.
        """
        return await self._revoke(team, "token", checked_jti(jti), by)

    async def revoke_user(self, subject: str, *, team: str, by: Principal) -> list[str]:
        """Refuse every token made so far for one of the application's users, as revoke_token.

        Denied for a key of some agents: tokens of other agents would end as well.
        """
        if by.agents is not None:
            raise Denied(
                "a key for some agents can't revoke all tokens of a user",
                hint="revoke them by their ids, or use a key for the whole team",
            )
        return await self._revoke(team, "user", checked_subject(subject), by)

    def read_token(self, text: str, by: Principal) -> tuple[str, str] | None:
        """Team and id of a valid token that somebody shows; None for any other text."""
        claims = self._issuer.read(text)
        if claims is None or by.team not in (None, claims.team):
            return None
        return claims.team, claims.jti

    async def rotate_signing_key(self, *, now: bool = False, by: Principal) -> list[str]:
        """Sign with a new key from here on. Tokens of the old one are accepted until they expire.

        With ``now`` they are refused at once, and every session that a token started is ended.
        """
        with trio.CancelScope(shield=True):
            await self._audit.append("tokens.key_rotated", by=by.name, now=now)
            await self._issuer.rotate(now=now)
            reason = "the key that signs tokens was replaced"
            ended = await self._ending.where(_by_token, _by_token, reason) if now else []
        return list(ended)

    async def jwks(self) -> dict[str, Any]:
        """The public keys that tokens are verified with (RFC 7517)."""
        return await self._issuer.jwks()

    # -- what goes on by itself -----------------------------------------------------------------

    async def run(self) -> None:
        """End what expires and write times of last use, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expiring)
            nursery.start_soon(self._uses.run)

    @property
    def warnings(self) -> list[str]:
        """What an operator should know."""
        behind = self._clock.behind if isinstance(self._clock, ForwardClock) else 0.0
        if behind <= LEEWAY:
            return []
        return [
            f"the host's clock is {behind:,.0f} seconds behind the last use of an API key: "
            "what expires is judged by the later time"
        ]

    async def _expiring(self) -> None:
        while True:
            self._changed = trio.Event()
            now, next_ = self._clock(), float("inf")
            for key in self._keys:
                state = key.state(now)
                if state == "active" and key.expires_at is not None:
                    self._lapsed.discard(key.id)  # a clock that was ahead is right again
                    next_ = min(next_, key.expires_at - now, _LOOK)
                elif state == "expired" and key.id not in self._lapsed:
                    self._lapsed.add(key.id)
                    await self._end_expired(key)
            with trio.move_on_after(next_):
                await self._changed.wait()

    async def _end_expired(self, key: ApiKey) -> None:
        with trio.CancelScope(shield=True):
            try:
                await self._audit.append("key.expired", key=key.id, team=key.team)
            except SandboxdError as failure:
                _log.error("API key %s expired: %s", key.id, failure.message)
            await self._ending.of_key(key.id, "its API key expired")

    # -- inside ---------------------------------------------------------------------------------

    def _usable(self, key: ApiKey) -> bool:
        # Every question is asked, whatever the answers: a refusal takes the same steps.
        active, refused = key.state(self._clock()) == "active", key.id in self._refused
        return has_team(self._config(), key.team) and active and not refused

    def _current(self, key: ApiKey) -> ApiKey:
        used = self._uses.latest(key.id, key.last_used_at)
        return dataclasses.replace(key, last_used_at=used)

    def _rotatable(self, key: ApiKey) -> None:
        if self.state(self._keys.get(key.id) or key) != "active":
            raise Conflict(
                f"API key {key.id} is {self.state(key)}",
                hint="make a new one: sandboxctl keys create",
            )
        if any(other.replaces == key.id for other in self._keys):
            raise Conflict(
                f"API key {key.id} was rotated already",
                hint="rotate the one that replaced it: sandboxctl keys list",
            )

    async def _record(self, event: str, key: ApiKey, by: Principal, **more: Any) -> None:
        await self._audit.append(
            event,
            key=key.id,
            prefix=key.prefix,
            label=key.label,
            team=key.team,
            role=key.role,
            agents=None if key.agents is None else list(key.agents),
            **more,
            by=by.name,
        )

    async def _put(self, *rows: ApiKeyRow) -> None:
        await trio.to_thread.run_sync(self._kept.put_api_keys, *rows)
        for row in rows:
            self._keys.put(row)
        self._changed.set()

    async def _revoke(self, team: str, kind: str, what: str, by: Principal) -> list[str]:
        if by.team not in (None, team):
            raise NotFound(f"no team {shown(team)}")
        with trio.CancelScope(shield=True):
            problem: SandboxdError | None = None
            try:
                await self._issuer.revoke(team, kind, what, by.name)
            except SandboxdError as failure:
                problem = failure

            def rests(one: Dependent | Principal) -> bool:
                if one.team != team or not one.token:
                    return False
                return what == (one.token if kind == "token" else one.subject)

            sessions = await self._ending.where(rests, rests, f"its token was revoked by {by.name}")
        if problem is not None:
            raise StoreError(
                f"it is refused and its sessions are ended, but not durably: {problem.message}",
                hint="repair the disk and revoke it again before the daemon is restarted",
            )
        return sessions


def _by_token(one: Dependent | Principal) -> bool:
    return bool(one.token)


def _newest(rows: Sequence[ApiKeyRow]) -> float:
    """The newest time that is known of any key."""
    times = [at for row in rows for at in (row.created_at, row.last_used_at, row.ended_at)]
    return max((at for at in times if at is not None), default=0.0)
