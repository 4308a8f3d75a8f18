"""What gateways and placeholders have in common: one request to an upstream, with a credential.

Recorded before it is sent and after it was answered; the answer is searched on its way back.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import h11
import httpcore2
import trio

from sandboxd.egress.gate import MAX_PATH, Gate
from sandboxd.egress.search import BROKEN, told
from sandboxd.egress.upstream import Upstream, tls_context
from sandboxd.egress.wire import Client, Refused
from sandboxd.errors import SandboxdError
from sandboxd.policy.destinations import Destination
from sandboxd.redact.matcher import Matcher
from sandboxd.redact.stream import Redactor
from sandboxd.secret import Secret

__all__ = ["Credential", "Way", "exchange", "pool_to", "serve_requests"]

#: Passes an answer on: the answer, and what searches it.
GiveBack = Callable[[httpcore2.Response, Redactor], Awaitable[None]]


@dataclass(frozen=True)
class Credential:
    """A credential of the store: ``reveal`` gives the value, or raises what a revoked one does.

    ``name`` and ``version`` are recorded.
    """

    name: str
    version: int
    reveal: Callable[[], Secret]


@dataclass(frozen=True)
class Way:
    """Where requests go and what they are recorded as; ``kind``: gateway or placeholder."""

    gate: Gate
    wanted: Destination
    kind: str
    source: str

    @property
    def rule(self) -> str:
        return f"{self.source} {self.kind}"


async def pool_to(way: Way, ca: Path | None) -> httpcore2.AsyncConnectionPool:
    """Connections to the upstream, kept to be used again. OSError for a bad ``ca``."""
    return httpcore2.AsyncConnectionPool(
        ssl_context=await trio.to_thread.run_sync(tls_context, str(ca) if ca is not None else None),
        max_connections=way.gate.bounds.connections,
        keepalive_expiry=30.0,
        network_backend=Upstream(way.gate, way.wanted, way.kind),
    )


async def serve_requests(
    client: Client, way: Way, handle: Callable[[h11.Request], Awaitable[None]]
) -> None:
    """Handle one request after another until the client is done; each failure is an answer."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while await _one(client, way, handle):
            pass


async def _one(client: Client, way: Way, handle: Callable[[h11.Request], Awaitable[None]]) -> bool:
    try:
        try:
            request = await client.request()
            if request is None:
                return False
            await handle(request)
        except Refused as refused:
            await way.gate.refuse(way.wanted, way.kind, way.rule, refused.message)
            await client.answer(refused.status, refused.message, refused.hint)
    except BROKEN as failure:
        await client.answer(502, f"{way.wanted}: {told(failure)}")
    except SandboxdError as failure:
        status = 403 if failure.code == "denied" else 503
        await client.answer(status, failure.message, failure.hint)
    return await client.next()


async def exchange(
    way: Way,
    request: h11.Request,
    *,
    rule: str,
    injected: Iterable[Credential],
    values: Callable[[], Mapping[str, Secret]],
    send: Callable[[], Awaitable[httpcore2.Response]],
    give_back: GiveBack,
) -> None:
    """Record, ``send``, and ``give_back`` the answer, searched for ``values``."""
    record = {
        **way.gate.who,
        "host": way.wanted.host,
        "method": request.method.decode("latin-1"),
        "path": request.target.decode("latin-1").partition("?")[0][:MAX_PATH],
        "request": secrets.token_hex(6),
    }
    await way.gate.record(
        f"{way.kind}.request",
        **record,
        rule=rule,
        injected=[{"name": one.name, "version": one.version} for one in injected],
    )
    redactor = Redactor(Matcher(values()))
    started, status = time.monotonic(), 0
    try:
        response = await send()
        try:
            status = response.status
            await give_back(response, redactor)
        finally:
            with trio.CancelScope(shield=True):
                await response.aclose()
    finally:
        with trio.CancelScope(shield=True):
            await way.gate.record(
                f"{way.kind}.response",
                **record,
                status=status,
                duration_ms=round((time.monotonic() - started) * 1000),
                redactions=redactor.hits,
            )
