"""Placeholder credentials: TLS ends here for the hosts that they are for, and the real one goes on.

Opt-in, host by host. A client in the sandbox holds a value that means nothing and connects to the
real host's name; the sandbox's own authority vouches for the broker in that host's place. What the
client sends is searched for placeholders: those of this host become the real values, and a request
with any other goes nowhere. The real host has to prove itself as always.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import h11
import httpcore2
import trio

from sandboxd.egress.answer import send_back
from sandboxd.egress.exchange import Credential, Way, exchange, pool_to, serve_requests
from sandboxd.egress.forward import Headers, in_a_header, passed_on
from sandboxd.egress.gate import Gate
from sandboxd.egress.wire import Client, Refused
from sandboxd.policy.destinations import Destination
from sandboxd.policy.placeholders import Placeholder
from sandboxd.redact.stream import Redactor
from sandboxd.secret import Secret

if TYPE_CHECKING:
    # Certificates are 3 MB of a library: loaded with the first sandbox that needs one.
    from sandboxd.egress.authority import Authority

__all__ = ["Interception", "Stand", "token"]

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
    """What one placeholder stands for."""

    placeholder: Placeholder
    token: bytes
    credential: Credential


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
        way = Way(gate, wanted, "placeholder", self._of(wanted)[0].placeholder.source)
        stream = trio.SSLStream(
            inside, self.authority.context(wanted.host), server_side=True, https_compatible=True
        )
        try:
            with trio.fail_after(gate.bounds.head):
                await stream.do_handshake()
        except (trio.TooSlowError, trio.BrokenResourceError, ssl.SSLError):
            reason = "the client doesn't trust the sandbox's authority, or doesn't speak TLS"
            await gate.refuse(wanted, way.kind, way.rule, reason)
            return
        client = Client(stream, gate.bounds)
        await serve_requests(client, way, partial(self._pass, client, way))

    def foreign(self, data: bytes) -> bool:
        """Whether ``data``, which goes elsewhere, holds a placeholder."""
        return any(stand.token in data for stand in self.stands)

    def _of(self, wanted: Destination) -> tuple[Stand, ...]:
        return tuple(
            stand
            for stand in self.stands
            if wanted.host in stand.placeholder.hosts and wanted.port == stand.placeholder.port
        )

    async def _pass(self, client: Client, way: Way, request: h11.Request) -> None:
        wanted, stands = way.wanted, self._of(way.wanted)
        swap = _Swap({stand.token: stand.credential for stand in stands})
        if not request.target.startswith(b"/"):
            raise Refused(400, "this stands for one host: it takes a path, not a whole address")
        headers = _checked_headers(request, wanted)
        target = swap.target(bytes(request.target))
        sent = [(name, swap.header(name, value)) for name, value in headers]
        length, content = await _body(client, request, swap)
        values: dict[str, Secret] = {}

        def revealed() -> dict[str, Secret]:
            values.update((one.credential.name, one.credential.reveal()) for one in stands)
            return values

        async def send() -> httpcore2.Response:
            pool = await self._pool(way)
            return await pool.handle_async_request(
                httpcore2.Request(
                    method=request.method,
                    url=httpcore2.URL(
                        scheme=b"https", host=wanted.host.encode(), port=wanted.port, target=target
                    ),
                    headers=[*sent, (b"accept-encoding", b"identity"), *length],
                    content=content,
                    extensions={"timeout": {"read": way.gate.bounds.idle}},
                )
            )

        async def give_back(response: httpcore2.Response, redactor: Redactor) -> None:
            await send_back(client, response, redactor, values, cookies=True)

        await exchange(
            way,
            request,
            rule=way.rule,
            injected=swap.used.values(),
            values=revealed,
            send=send,
            give_back=give_back,
        )

    async def _pool(self, way: Way) -> httpcore2.AsyncConnectionPool:
        name = str(way.wanted)
        if name not in self._pools:
            pool = await pool_to(way, self._of(way.wanted)[0].placeholder.ca)
            if name not in self._pools:  # else another client's, made meanwhile
                self._pools[name] = await self._ending.enter_async_context(pool)
        return self._pools[name]


@dataclass
class _Swap:
    """Puts real values in the place of one host's placeholders, and refuses all others."""

    credentials: Mapping[bytes, Credential]
    used: dict[bytes, Credential] = field(default_factory=dict)

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
        credential = self.credentials.get(found[0])
        if credential is None:
            raise Refused(403, "the request holds a placeholder that isn't for this host")
        self.used[found[0]] = credential
        return credential.reveal().reveal()


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
