"""The credential gateway: a reverse proxy to one upstream that adds what the sandbox never holds.

A program speaks plain HTTP to its own loopback. The broker takes out whatever it sends in headers
that carry credentials, adds the real one, and sends the request on over TLS; what comes back is
searched for the credential as it streams. Requests that two servers could read differently are
refused (RFC 9112, 11.2; RFC 3986, 6.2).
"""

from __future__ import annotations

import logging
import re
import time
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import h11
import httpcore2
import trio

from sandboxd.egress.accept import serve_each
from sandboxd.egress.answer import send_back
from sandboxd.egress.exchange import Credential, Way, exchange, pool_to, serve_requests
from sandboxd.egress.forward import Headers, in_a_header, passed_on
from sandboxd.egress.gate import Gate
from sandboxd.egress.websocket import handshake, switch, wants_websocket
from sandboxd.egress.wire import Client, Refused
from sandboxd.policy.decide import matches_glob
from sandboxd.policy.gateways import Gateway
from sandboxd.redact.stream import Redactor
from sandboxd.secret import Secret

__all__ = ["serve_gateway"]

logging.getLogger("httpcore2").setLevel(logging.WARNING)  # its debug log shows headers

#: Never passed on: they carry credentials, or state that an upstream keeps of a client.
_STRIPPED = frozenset(
    (
        b"authorization", b"x-api-key", b"x-goog-api-key", b"api-key", b"private-token", b"cookie",
        b"host", b"accept-encoding", b"forwarded", b"x-forwarded-for", b"x-forwarded-host",
        b"x-forwarded-proto", b"x-real-ip",
    )
)  # fmt: skip
#: An empty or dot segment (also with parameters, RFC 3986, 3.3, which some servers take off first),
#: a backslash, and what decodes to one of these or to NUL: once, twice, or as overlong UTF-8.
_AMBIGUOUS = re.compile(
    r"//|/\.{1,2}(?:/|;|%3b|$)|\\|%(?:25)*(?:2e|2f|5c|00)|%c[01]|[\x00-\x20\x7f]|#", re.IGNORECASE
)
#: By these some servers take another method or path than the request's own.
_OVERRIDES = frozenset((b"x-http-method-override", b"x-http-method", b"x-method-override"))
_ELSEWHERE = frozenset((b"x-original-url", b"x-rewrite-url", b"x-original-uri"))
_WINDOW = 60.0


@dataclass
class _Served:
    """One gateway of one sandbox."""

    gateway: Gateway
    way: Way
    credential: Credential
    pool: httpcore2.AsyncConnectionPool
    times: deque[float] = field(default_factory=deque)
    total: int = 0

    def take_turn(self) -> None:
        """Count a request. Raises Refused when there were too many."""
        now, most, budget = time.monotonic(), self.gateway.per_minute, self.gateway.budget
        while self.times and self.times[0] < now - _WINDOW:
            self.times.popleft()
        if budget is not None and self.total >= budget:
            raise Refused(429, f"this session's {budget:,} requests are used up")
        if most is not None and len(self.times) >= most:
            raise Refused(429, f"more than {most:,} requests in a minute")
        self.times.append(now)
        self.total += 1


async def serve_gateway(
    listener: trio.SocketListener, gateway: Gateway, gate: Gate, credential: Credential
) -> NoReturn:
    """Serve one sandbox until cancelled. The listener is closed then."""
    way = Way(gate, gateway.destination, "gateway", gateway.source)
    async with listener, await pool_to(way, gateway.ca) as pool:
        served = _Served(gateway, way, credential, pool)

        async def one(stream: trio.SocketStream) -> None:
            client = Client(stream, gate.bounds)
            await serve_requests(client, way, partial(_pass, client, served))

        await serve_each(listener, one, gate.bounds.connections)
    raise AssertionError("unreachable")


async def _pass(client: Client, served: _Served, request: h11.Request) -> None:
    gateway, way = served.gateway, served.way
    others = [
        v.decode("latin-1") for n, v in request.headers if n.replace(b"_", b"-") in _OVERRIDES
    ]
    method = request.method.decode("latin-1")
    path = _checked_path(gateway, method, request.target.decode("latin-1"), others)
    served.take_turn()
    secret = served.credential.reveal()
    values, websocket = {served.credential.name: secret}, wants_websocket(request)
    outgoing = httpcore2.Request(
        method=request.method,
        url=_url(gateway, path),
        headers=_headers(gateway, request, secret),
        content=None if websocket else _body(client),
        extensions={"timeout": {"read": way.gate.bounds.idle}},
    )

    async def give_back(response: httpcore2.Response, redactor: Redactor) -> None:
        if response.status == 101 and websocket:
            await switch(client, response, redactor)
        else:
            await send_back(client, response, redactor, values)

    await exchange(
        way,
        request,
        rule=gateway.source,
        injected=[served.credential],
        values=lambda: values,
        send=lambda: served.pool.handle_async_request(outgoing),
        give_back=give_back,
    )


def _checked_path(gateway: Gateway, method: str, target: str, others: Iterable[str]) -> str:
    """The request's path and query. Raises Refused unless they are plain and allowed."""
    if not target.startswith("/"):
        raise Refused(400, "this is a gateway: it takes a path, not a whole address")
    path = target.partition("?")[0]
    if _AMBIGUOUS.search(path) or "#" in target or not target.isascii():
        raise Refused(400, "the path has parts that servers read differently")
    if gateway.methods and method not in gateway.methods:
        raise Refused(403, f"{method} is not allowed here: {', '.join(gateway.methods)} are")
    for other in others if gateway.methods else ():
        if other.upper() not in gateway.methods:
            raise Refused(403, "a header asks for another method, which is not allowed here")
    if gateway.paths and not any(matches_glob(one, path) for one in gateway.paths):
        raise Refused(403, f"this path is not allowed here: {', '.join(gateway.paths)} are")
    return target


def _url(gateway: Gateway, path: str) -> httpcore2.URL:
    url = httpcore2.URL(gateway.url)
    prefix = url.target.rstrip(b"/")
    return httpcore2.URL(
        scheme=url.scheme, host=url.host, port=url.port, target=prefix + path.encode("ascii")
    )


def _headers(gateway: Gateway, request: h11.Request, secret: Secret) -> Headers:
    header, scheme = gateway.style
    value = secret.reveal()
    if scheme == "basic":
        value = b"Basic " + b64encode((gateway.user or "").encode() + b":" + value)
    elif scheme != "plain":
        value = {"bearer": b"Bearer ", "token": b"token "}[scheme] + value
    # Servers that make variables of headers read x_api_key as x-api-key (RFC 3875, 4.1.18).
    kept = [
        (n, v)
        for n, v in passed_on(request.headers)
        if n.replace(b"_", b"-") not in _STRIPPED | _ELSEWHERE
    ]
    wanted = gateway.destination
    standard = 443 if gateway.url.startswith("https:") else 80
    host = wanted.host if wanted.port == standard else str(wanted)
    headers = [
        (b"host", host.encode()),
        (b"accept-encoding", b"identity"),  # what is compressed can't be searched
        *kept,
        (header.encode(), in_a_header(value)),
    ]
    return handshake(headers, request) if wants_websocket(request) else headers


async def _body(client: Client) -> AsyncIterator[bytes]:
    while (piece := await client.body()) is not None:
        yield piece
