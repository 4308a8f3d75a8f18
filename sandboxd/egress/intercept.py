"""Placeholder credentials: TLS ends here for the hosts that they are for, and the real one goes on.

Opt-in, host by host. A client in the sandbox holds a value that means nothing and connects to the
real host's name; the sandbox's own authority vouches for the broker in that host's place. What the
client sends is searched for placeholders: those of this host become the real values, and a request
with any other goes nowhere. The real host has to prove itself as always.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import ssl
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import h11
import httpcore2
import trio

from sandboxd.egress.answer import send_back
from sandboxd.egress.forward import Headers, in_a_header, passed_on
from sandboxd.egress.gate import MAX_PATH, Gate
from sandboxd.egress.search import BROKEN, told
from sandboxd.egress.upstream import Upstream, tls_context
from sandboxd.egress.wire import Client, Refused
from sandboxd.errors import SandboxdError
from sandboxd.policy.destinations import Destination
from sandboxd.policy.placeholders import Placeholder
from sandboxd.redact.matcher import Matcher
from sandboxd.redact.stream import Redactor
from sandboxd.secret import Secret

if TYPE_CHECKING:
    # Certificates are 3 MB of a library: loaded with the first sandbox that needs one.
    from sandboxd.egress.authority import Authority

__all__ = ["Interception", "Stand", "token"]

_log = logging.getLogger(__name__)

_PREFIX = b"sbxd-"
_ANY = re.compile(rb"sbxd-[0-9a-f]{40}")
_LONGEST = 45
#: A body up to this size is read whole, so that its length can be told after the exchange.
_WHOLE = 256 << 10
#: Never passed on: what was negotiated with this side alone.
_STRIPPED = frozenset((b"host", b"accept-encoding", b"content-length"))


def token() -> str:
    """A new placeholder: recognisable, and of no use to anybody."""
    return (_PREFIX + secrets.token_hex(20).encode()).decode()


@dataclass(frozen=True)
class Stand:
    """What one placeholder stands for. ``reveal`` raises what a revoked one does."""

    placeholder: Placeholder
    token: bytes
    name: str
    version: int
    reveal: Callable[[], Secret]


def _new_authority() -> Authority:
    from sandboxd.egress.authority import Authority

    return Authority()


@dataclass
class Interception:
    """All placeholders of one sandbox, and the authority that its programs trust."""

    stands: tuple[Stand, ...]
    authority: Authority = field(default_factory=_new_authority)
    _pools: dict[str, httpcore2.AsyncConnectionPool] = field(default_factory=dict)
    _ending: AsyncExitStack = field(default_factory=AsyncExitStack)

    def covers(self, wanted: Destination) -> bool:
        """Whether TLS to ``wanted`` ends here."""
        return bool(self._of(wanted))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """While it is open, connections to hosts are kept to be used again."""
        async with self._ending:
            yield

    async def serve(self, inside: trio.abc.Stream, gate: Gate, wanted: Destination) -> None:
        """Speak to a client that believes to be connected to ``wanted``, until it is done."""
        stream = trio.SSLStream(
            inside, self.authority.context(wanted.host), server_side=True, https_compatible=True
        )
        try:
            with trio.fail_after(gate.bounds.head):
                await stream.do_handshake()
        except (trio.TooSlowError, trio.BrokenResourceError, ssl.SSLError):
            reason = "the client doesn't trust the sandbox's authority, or doesn't speak TLS"
            await gate.refuse(wanted, "placeholder", self._rule(wanted), reason)
            return
        client = Client(stream, gate.bounds)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self._one(client, gate, wanted):
                pass

    def foreign(self, data: bytes) -> bool:
        """Whether ``data``, which goes elsewhere, holds a placeholder."""
        return any(stand.token in data for stand in self.stands)

    def _of(self, wanted: Destination) -> tuple[Stand, ...]:
        return tuple(
            stand
            for stand in self.stands
            if wanted.host in stand.placeholder.hosts and wanted.port == stand.placeholder.port
        )

    def _rule(self, wanted: Destination) -> str:
        return self._of(wanted)[0].placeholder.source + " placeholder"

    async def _one(self, client: Client, gate: Gate, wanted: Destination) -> bool:
        try:
            try:
                request = await client.request()
                if request is None:
                    return False
                await self._pass(client, gate, wanted, request)
            except Refused as refused:
                rule = self._rule(wanted)
                await gate.refuse(wanted, "placeholder", rule, refused.message)
                await client.answer(refused.status, refused.message, refused.hint)
        except BROKEN as failure:
            await client.answer(502, f"{wanted}: {told(failure)}")
        except SandboxdError as failure:
            status = 403 if failure.code == "denied" else 503
            await client.answer(status, failure.message, failure.hint)
        return await client.next()

    async def _pass(
        self, client: Client, gate: Gate, wanted: Destination, request: h11.Request
    ) -> None:
        swap = _Swap({stand.token: stand for stand in self._of(wanted)})
        if not request.target.startswith(b"/"):
            raise Refused(400, "this stands for one host: it takes a path, not a whole address")
        headers = _checked_headers(request, wanted)
        target = swap.target(bytes(request.target))
        sent = [(name, swap.header(name, value)) for name, value in headers]
        length, content = await _body(client, request, swap)
        sent += [(b"accept-encoding", b"identity"), *length]
        used = list(swap.used.values())
        record = {
            **gate.who, "host": wanted.host, "method": request.method.decode("latin-1"),
            "path": request.target.decode("latin-1").partition("?")[0][:MAX_PATH],
            "request": secrets.token_hex(6),
        }  # fmt: skip
        injected = [{"name": stand.name, "version": stand.version} for stand in used]
        await gate.record("placeholder.request", **record, rule=self._rule(wanted),
                          injected=injected)  # fmt: skip
        values = {stand.name: stand.reveal() for stand in self._of(wanted)}
        redactor = Redactor(Matcher(values))
        started, status = time.monotonic(), 0
        pool = await self._pool(gate, wanted)
        try:
            response = await pool.handle_async_request(
                httpcore2.Request(
                    method=request.method,
                    url=httpcore2.URL(
                        scheme=b"https", host=wanted.host.encode(), port=wanted.port, target=target
                    ),
                    headers=sent,
                    content=content,
                    extensions={"timeout": {"read": gate.bounds.idle}},
                )
            )
            try:
                status = response.status
                await send_back(client, response, redactor, values, cookies=True)
            finally:
                with trio.CancelScope(shield=True):
                    await response.aclose()
        finally:
            with trio.CancelScope(shield=True):
                await gate.record(
                    "placeholder.response",
                    **record,
                    status=status,
                    duration_ms=round((time.monotonic() - started) * 1000),
                    redactions=redactor.hits,
                )

    async def _pool(self, gate: Gate, wanted: Destination) -> httpcore2.AsyncConnectionPool:
        if str(wanted) not in self._pools:
            ca = self._of(wanted)[0].placeholder.ca
            context = await trio.to_thread.run_sync(tls_context, str(ca) if ca else None)
            if str(wanted) in self._pools:  # another client's, made meanwhile
                return self._pools[str(wanted)]
            pool = httpcore2.AsyncConnectionPool(
                ssl_context=context,
                max_connections=gate.bounds.connections,
                keepalive_expiry=30.0,
                network_backend=Upstream(gate, wanted, "placeholder"),
            )
            self._pools[str(wanted)] = await self._ending.enter_async_context(pool)
        return self._pools[str(wanted)]


@dataclass
class _Swap:
    """Puts real values in the place of one host's placeholders, and refuses all others."""

    stands: Mapping[bytes, Stand]
    used: dict[bytes, Stand] = field(default_factory=dict)

    def text(self, data: bytes) -> bytes:
        """``data`` with real values. Raises Refused for a placeholder that isn't of this host."""
        return _ANY.sub(self._real, data)

    def target(self, data: bytes) -> bytes:
        """A path and query. Raises Refused when a value can't stand there as it is."""
        swapped = self.text(data)
        if re.search(rb"[^\x21-\x7e]", swapped):
            raise Refused(502, "the credential can't stand in an address: it has other characters")
        return swapped

    def header(self, name: bytes, value: bytes) -> bytes:
        """A header's value, also where it is user name and password (RFC 7617)."""
        scheme, _, rest = value.partition(b" ")
        if name == b"authorization" and scheme.lower() == b"basic":
            with contextlib.suppress(ValueError):
                plain = b64decode(rest.strip(), validate=True)
                if _ANY.search(plain):
                    return scheme + b" " + b64encode(self.text(plain))
        swapped = self.text(value)
        return in_a_header(swapped) if swapped != value else value

    def _real(self, found: re.Match[bytes]) -> bytes:
        stand = self.stands.get(found[0])
        if stand is None:
            raise Refused(403, "the request holds a placeholder that isn't for this host")
        self.used[found[0]] = stand
        return stand.reveal().reveal()


def _checked_headers(request: h11.Request, wanted: Destination) -> Headers:
    """What is passed on. Raises Refused when the request is for another host than the tunnel."""
    hosts = [value.decode("latin-1").lower() for name, value in request.headers if name == b"host"]
    if len(hosts) != 1 or hosts[0] not in (wanted.host, str(wanted)):
        raise Refused(400, "the Host header names another host than the tunnel is for")
    kept = [(n, v) for n, v in passed_on(request.headers) if n not in _STRIPPED]
    return [(b"host", hosts[0].encode()), *(h for h in kept if h[0] != b"transfer-encoding")]


async def _body(
    client: Client, request: h11.Request, swap: _Swap
) -> tuple[Headers, bytes | AsyncIterator[bytes] | None]:
    """The body with real values, and the header that tells its length.

    One that is too large to be read whole is passed on as it is, or with a placeholder in it, not.
    """
    whole = bytearray()
    while (piece := await client.body()) is not None:
        whole += piece
        if len(whole) > _WHOLE:
            return [(b"transfer-encoding", b"chunked")], _searched(client, bytes(whole))
    if not whole and not any(n in (b"content-length", b"transfer-encoding")
                             for n, _ in request.headers):  # fmt: skip
        return [], None
    data = swap.text(bytes(whole))
    return [(b"content-length", str(len(data)).encode())], data


async def _searched(client: Client, piece: bytes | None) -> AsyncIterator[bytes]:
    before = b""
    while piece is not None:
        if _ANY.search(before + piece):
            raise Refused(413, "a placeholder in a body of more than 256 KiB is not replaced")
        before = (before + piece)[-_LONGEST:]
        yield piece
        piece = await client.body()
