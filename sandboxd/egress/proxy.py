"""The HTTP proxy that a sandbox finds on its loopback: CONNECT, and plain HTTP in absolute form.

It runs in the broker, on a listening socket that was made inside the sandbox's network namespace.
RFC 9110, 9.3.6 for CONNECT and 7.6 for what a proxy forwards; RFC 9112, 3.2.2 for the absolute
form. A refusal is an answer, with the rule and what to run, never a hang.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NoReturn

import h11
import trio

from sandboxd.egress.accept import serve_each
from sandboxd.egress.forward import forward, headers_for
from sandboxd.egress.gate import Connection, Gate
from sandboxd.egress.hello import ClientHello
from sandboxd.egress.intercept import Interception
from sandboxd.egress.pump import pump
from sandboxd.egress.wire import Begun, Client, Refused
from sandboxd.errors import Denied, Invalid, SandboxdError, Unavailable
from sandboxd.policy.destinations import Destination, destination, split_authority

__all__ = ["serve_proxy"]

_TLS_PORT = 443


async def serve_proxy(
    listener: trio.SocketListener, gate: Gate, interception: Interception | None = None
) -> NoReturn:
    """Serve one sandbox until cancelled. Clients beyond the gate's bound wait to be accepted.

    The listener is closed then. Tunnels to hosts that ``interception`` covers end here.
    """

    async def one(stream: trio.SocketStream) -> None:
        served = _Served(Client(stream, gate.bounds), stream, gate, interception)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await _one(served):
                pass

    await serve_each(listener, one, gate.bounds.connections)


@dataclass(frozen=True)
class _Served:
    """A client on its connection."""

    client: Client
    stream: trio.SocketStream
    gate: Gate
    interception: Interception | None


async def _one(served: _Served) -> bool:
    """One request and its answer; whether another may follow on the connection."""
    client, gate = served.client, served.gate
    try:
        try:
            request = await client.request()
            if request is None:
                return False
            if request.method == b"CONNECT":
                await _tunnel(served, request)
                return False
            await _plain(served, request)
        except Refused as refused:
            await gate.refuse(None, "http", "the proxy's protocol", refused.message)
            await client.answer(refused.status, refused.message, refused.hint)
    except Denied as denied:
        rule = f"rule: {denied.rule}\n" if denied.rule else ""
        await client.answer(403, denied.message, rule + denied.hint)
    except Unavailable as failure:
        await client.answer(502, failure.message, failure.hint)
    except SandboxdError as failure:  # what happened could not be recorded
        await client.answer(503, "the connection can't be recorded", failure.hint)
    return await client.next()


async def _tunnel(served: _Served, request: h11.Request) -> None:
    client, gate = served.client, served.gate
    wanted = _destination(request.target.decode("latin-1"), None)
    if served.interception is not None and served.interception.covers(wanted):
        await gate.admit(wanted, "placeholder")
        rest = await client.tunnel()
        await served.interception.serve(Begun(served.stream, rest), gate, wanted)
        return
    connection = await gate.open(wanted, "connect")
    outcome = "closed"
    try:
        rest = await client.tunnel()
        outcome = await _checked(served, connection, rest)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        outcome = "reset"
    except trio.Cancelled:
        outcome = "cancelled"
        raise
    finally:
        await gate.close(connection, outcome)


async def _checked(served: _Served, connection: Connection, first: bytes) -> str:
    """Pass the tunnel's bytes on once its first ones ask for the host that was allowed."""
    gate, wanted = served.gate, connection.destination
    word = _FirstWord(gate, connection)
    if not first and wanted.port != _TLS_PORT and not connection.methods:
        # The server may have to speak first (SSH, SMTP), so nothing waits for the client's word.
        return await pump(served.stream, connection, gate.bounds, word.check)
    held: bytes | None = b""
    with trio.move_on_after(gate.bounds.head):
        while held == b"":
            data = first or bytes(await served.stream.receive_some(64 << 10))
            if not data:
                return "closed"
            first, held = b"", await word.check(data)
    if held == b"":
        await word.refuse("the tunnel's first message did not arrive in time")
    if not held:
        return "refused"
    await connection.stream.send_all(held)
    connection.sent += len(held)
    return await pump(served.stream, connection, gate.bounds)


class _FirstWord:
    """Looks at the first message of a tunnel's client when it comes: TLS has to be for its host."""

    def __init__(self, gate: Gate, connection: Connection) -> None:
        self._gate, self._connection = gate, connection
        self._hello, self._held = ClientHello(), bytearray()

    async def check(self, data: bytes) -> bytes | None:
        """What may go on of all that came so far: nothing yet, or None where it was refused."""
        if self._hello.done:
            return data
        self._held += data
        if not self._hello.feed(data):
            return b""
        problem = _mismatch(self._hello, self._connection)
        if problem:
            await self.refuse(problem)
            return None
        held, self._held = bytes(self._held), bytearray()
        return held

    async def refuse(self, problem: str) -> None:
        connection = self._connection
        await self._gate.refuse(connection.destination, "connect", connection.rule, problem)


def _mismatch(hello: ClientHello, connection: Connection) -> str:
    wanted = connection.destination
    if not hello.is_tls:
        if connection.methods:
            return "a rule names methods, and a tunnel without TLS would get around it"
        return "port 443 takes TLS only" if wanted.port == _TLS_PORT else ""
    if not hello.readable:
        return "the tunnel's first message is not a TLS client's"
    name = (hello.server_name or "").lower().removesuffix(".")
    if wanted.address is None and name and name != wanted.host:
        return f"the tunnel is for {wanted.host} and its TLS asks for another host"
    return ""


async def _plain(served: _Served, request: h11.Request) -> None:
    client, gate = served.client, served.gate
    target = request.target.decode("latin-1")
    if not target.lower().startswith("http://"):
        raise Refused(
            400,
            "this is a proxy: it takes CONNECT, and http:// addresses",
            "set HTTP_PROXY and HTTPS_PROXY to it rather than sending requests to it",
        )
    authority, slash, path = target[len("http://") :].partition("/")
    if "?" in authority or "#" in authority:
        raise Refused(400, "the address has no path before its query")
    wanted = _destination(authority, 80)
    method = request.method.decode("latin-1")
    headers = headers_for(request, authority)
    if served.interception is not None and served.interception.foreign(
        b"\n".join((bytes(request.target), *(value for _, value in headers)))
    ):
        raise Refused(403, "the request holds a placeholder, and isn't to its host by TLS")
    connection = await gate.open(wanted, "http", method)
    outcome = "closed"
    try:
        outcome = await forward(
            client, connection, gate.bounds, method, slash + path or "/", headers
        )
    except trio.Cancelled:
        outcome = "cancelled"
        raise
    finally:
        await gate.close(connection, outcome)


def _destination(authority: str, default: int | None) -> Destination:
    try:
        host, port = split_authority(authority, default)
        return destination(host, port)
    except Invalid as error:
        raise Refused(400, error.message, error.hint) from None
