"""Before any route: by which name we are called, from where, by whom, how often and how much.

The order matters. Nothing of a body is read before its sender is known, where a route needs a key;
what an unknown sender can make us do is bounded by its source. Host and Origin are checked against
DNS rebinding and foreign pages; there is no CORS, so no page of another origin reads an answer.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from sandboxd.access.roles import Principal
from sandboxd.access.tokens import MAX_BEARER
from sandboxd.errors import SandboxdError, Unauthenticated
from sandboxd.http.errors import TOKENS, Refusal, answer, form_of_tokens, refusal_of
from sandboxd.http.rates import Rates
from sandboxd.http.server import (
    Application,
    BodyTooSlow,
    Message,
    Receive,
    Scope,
    Send,
    source_of,
)
from sandboxd.names import shown
from sandboxd.policy.model import HttpSettings
from sandboxd.running import Daemon

__all__ = ["Caller", "Guard", "principal_of", "replayed"]

#: Below these nothing is answered without an API key or a token.
GUARDED = ("/v1", "/api/v1", "/nextjs", "/mcp")

#: The largest body of a route that asks for no key.
OPEN_BODY = 1 << 20

#: What asks for a token is short, and is read before anything else: see form_of_tokens.
_TOKEN_BODY = 16 << 10

#: How much more a source may ask than one key, as several keys may be behind it.
_SOURCE_FACTOR = 4

#: Keys that were right lately, which somebody else's guessing on the same address can't lock out.
_KNOWN = 4096

_log = logging.getLogger(__name__)

_scheme = HTTPBearer(
    auto_error=False,
    scheme_name="key",
    description="An API key (an_sk_...), or a token made with one by POST /v1/tokens.",
)


async def principal_of(request: Request, _: Annotated[Any, Depends(_scheme)]) -> Principal:
    """FastAPI's dependency: who asks. Every route of a guarded path takes it."""
    principal = request.scope["state"].get("principal")
    if not isinstance(principal, Principal):
        raise Refusal.unauthenticated()
    return principal


#: What a route writes to have its caller: ``async def route(caller: Caller)``.
Caller = Annotated[Principal, Depends(principal_of)]


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Application, daemon: Daemon, settings: HttpSettings) -> None:
        self._app, self._daemon = app, daemon
        limits = settings.limits
        self._hosts = frozenset(("localhost", *settings.hosts))
        self._body = limits.body
        per_key = float(limits.requests)
        self._keys = Rates(per_key, 2 * per_key)
        self._sources = Rates(_SOURCE_FACTOR * per_key, 2 * _SOURCE_FACTOR * per_key)
        self._failures = Rates(limits.failures / 60.0, float(limits.failures))
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._known_key = os.urandom(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def told(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                message = {**message, "headers": _with_defaults(message.get("headers", ()))}
            await send(message)

        path = scope["path"]
        try:
            ahead = None
            if path == TOKENS and scope["method"] == "POST":
                ahead = await _body(scope, receive, _TOKEN_BODY)
                path = scope["state"]["form"] = form_of_tokens(ahead)
            limit = await self._admit(scope)
            body = await _body(scope, receive, limit) if ahead is None else ahead
            if body is None:
                return  # the client left
            with self._held(scope):
                await self._app(scope, replayed(body, receive), told)
        except Refusal as refusal:
            await answer(path, refusal)(scope, receive, told)
        except BodyTooSlow:
            slow = Refusal(408, "too_slow", "the request's body took too long to arrive")
            await answer(path, slow)(scope, receive, told)
        except Unauthenticated as ended:  # meanwhile; half an answer is cut off
            if not begun:
                await answer(path, refusal_of(ended))(scope, receive, told)
        except SandboxdError as failure:
            if begun:
                raise
            await answer(path, refusal_of(failure))(scope, receive, told)

    async def _admit(self, scope: Scope) -> int:
        """The largest body that this request may have, or Refusal. Finds out who asks."""
        headers = scope["headers"]
        self._check_host(headers)
        _check_origin(headers, scope["scheme"])
        source = _source(scope)
        if wait := self._sources.take(source):
            raise Refusal.too_many(wait)
        if not _is_guarded(scope["path"]):
            return OPEN_BODY
        principal = await self.authenticate(scope, _bearer(headers))
        scope["state"]["principal"] = principal
        name = principal.token or principal.key or principal.name
        if wait := self._keys.take(name):
            raise Refusal.too_many(wait)
        return self._body

    async def authenticate(self, scope: Scope, bearer: str) -> Principal:
        """Who holds this API key or token. Refusal when nobody may, or after too many failures.

        For routes with a sign-in of their own, too: failures count for the source alike.
        """
        source = _source(scope)
        if not bearer:
            raise Refusal.unauthenticated("this needs 'Authorization: Bearer' with an API key")
        digest = hashlib.blake2b(bearer.encode(), key=self._known_key, digest_size=16).digest()
        known = digest in self._known
        if not known and (wait := self._failures.wait_of(source)):
            raise Refusal.too_many(wait, "failed attempts")
        try:
            principal = await self._daemon.access.authenticate(bearer)
        except SandboxdError as failure:
            self._known.pop(digest, None)
            refusal = refusal_of(failure)
            if refusal.status == 401:
                self._failures.take(source)
                _log.warning("a request from %s had no valid key", source)
            raise refusal from None
        self._known[digest] = None
        self._known.move_to_end(digest)
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return principal

    def _held(self, scope: Scope) -> AbstractContextManager[None]:
        """Serve a known sender only as long as its key and token hold."""
        principal = scope["state"].get("principal")
        return self._daemon.access.held(principal) if principal is not None else nullcontext()

    def _check_host(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """An IP address, localhost or a configured name. A page that made its own name point here
        (DNS rebinding) still sends that name.
        """
        host = _header(headers, b"host").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.removesuffix(".")
        if name in self._hosts or _is_address(name):
            return
        raise Refusal(
            421,
            "wrong_host",
            f"this server is not {shown(name)}: add the name to http.hosts in sandboxd.yaml",
        )


def _check_origin(headers: Iterable[tuple[bytes, bytes]], scheme: str) -> None:
    """Browsers name the page that sends a request (RFC 6454); only our own pages may."""
    origin = _header(headers, b"origin").lower()
    host = _header(headers, b"host").lower()
    if origin and origin not in (f"{scheme}://{host}", f"https://{host}"):
        raise Refusal(403, "cross_origin", "pages of other origins may not call this server")


def _source(scope: Scope) -> str:
    client = scope.get("client")
    return source_of(client[0]) if client else "unix"


def _is_guarded(path: str) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in GUARDED)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The credential of ``Authorization: Bearer`` (RFC 6750, 2.1); "" where there is none."""
    scheme, _, credential = _header(headers, b"authorization").partition(" ")
    credential = credential.strip()
    if scheme.lower() != "bearer" or len(credential) > MAX_BEARER or not credential.isascii():
        return ""
    return credential


def _header(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> str:
    """The one header of this name; a repeated one is as good as none, so that nobody else reads
    another of them than we do.
    """
    found = [value for name, value in headers if name == wanted]
    return found[0].decode("latin-1") if len(found) == 1 else ""


async def _body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None when the client leaves. Refusal for more than ``limit``."""
    too_large = Refusal(413, "too_large", f"a request's body may have {limit:,} bytes here")
    stated = _header(scope["headers"], b"content-length")
    if stated.isdigit() and int(stated) > limit:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives a body that was read already, and then what still comes."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_defaults(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Nothing is to be cached, sniffed or framed, unless a route says otherwise."""
    given = list(headers)
    names = {name.lower() for name, _ in given}
    for name, value in (
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-frame-options", b"DENY"),
    ):
        if name not in names:
            given.append((name, value))
    return given
