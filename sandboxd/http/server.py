"""HTTP/1.1 on trio for one ASGI application: h11 parses and frames, this module owns sockets, time
and tasks.

Every wait has a bound: for a request's head (against clients that dribble), its body, an answer
that nobody reads, an idle connection. One connection's trouble stays its own: whatever a peer
sends, the worst that it gets is a closed connection. There is no HTTP/2 and no WebSocket, so
nothing can be upgraded to either. What fails is logged by type and place, never by text.

Sources: RFC 9110 and 9112; the ASGI specification 3.0, HTTP spec_version 2.3.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import h11
import trio

from sandboxd.errors import where

__all__ = ["Application", "BodyTooSlow", "Bounds", "Server", "source_of"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]

_log = logging.getLogger(__name__)

_CHUNK = 65536


class BodyTooSlow(Exception):
    """A request's body did not arrive in time; raised by ASGI's receive()."""


@dataclass(frozen=True)
class Bounds:
    """How much of everything. Times in seconds, sizes in bytes."""

    connections: int = 256
    connections_per_source: int = 128
    head: int = 32 * 1024
    handshake_seconds: float = 10.0
    head_seconds: float = 10.0
    idle_seconds: float = 60.0
    body_seconds: float = 60.0
    #: For each 64 KiB of an answer.
    write_seconds: float = 20.0
    #: What requests that still run may take to end when the server stops.
    stop_seconds: float = 2.0


class Server:
    """Serves one application on any number of listeners."""

    def __init__(self, app: Application, bounds: Bounds) -> None:
        self.app, self.bounds = app, bounds
        self.stopping = False
        self._sources: Counter[str] = Counter()
        self._idle: set[trio.CancelScope] = set()

    async def serve(
        self,
        listeners: list[trio.SocketListener] | list[trio.SSLListener[trio.SocketStream]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled; then requests that run have ``stop_seconds``, idle ones none."""
        async with trio.open_nursery() as nursery:
            connections, scope = await nursery.start(self._hold)
            task_status.started()
            try:
                serve: Any = trio.serve_listeners  # its types take one kind of listener alone
                await serve(self._handle, listeners, handler_nursery=connections)
            finally:
                self.stopping = True
                for idle in self._idle:
                    idle.cancel()
                scope.deadline = trio.current_time() + self.bounds.stop_seconds
                self._stopped.set()

    async def _hold(self, *, task_status: trio.TaskStatus[Any]) -> None:
        """The connections' nursery, which outlives by a little who accepts them."""
        self._stopped = trio.Event()
        with trio.CancelScope(shield=True) as scope:
            async with trio.open_nursery() as connections:
                task_status.started((connections, scope))
                await self._stopped.wait()

    async def _handle(self, stream: Stream) -> None:
        try:
            source, client = _peer(stream)
            with self._counted(source) as taken:
                if taken and await self._secured(stream):
                    await _Connection(self, stream, client).run()
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # how peers leave
        except Exception as failure:  # noqa: BLE001  # one connection must not end the daemon
            _log.error("an HTTP connection failed: %s", where(failure))
        finally:
            await trio.aclose_forcefully(stream)

    @contextmanager
    def _counted(self, source: str) -> Iterator[bool]:
        bounds = self.bounds
        if (
            self._sources.total() >= bounds.connections
            or self._sources[source] >= bounds.connections_per_source
        ):
            _log.warning("too many HTTP connections; one of %s was closed", source)
            yield False
            return
        self._sources[source] += 1
        try:
            yield True
        finally:
            self._sources[source] -= 1
            if not self._sources[source]:
                del self._sources[source]

    async def _secured(self, stream: Stream) -> bool:
        if isinstance(stream, trio.SSLStream):
            with trio.move_on_after(self.bounds.handshake_seconds) as scope:
                await stream.do_handshake()
            return not scope.cancelled_caught
        return True

    @contextmanager
    def idle(self) -> Iterator[trio.CancelScope]:
        """A scope for waiting on a client that has nothing running here: a stop ends it."""
        with trio.CancelScope() as scope:
            self._idle.add(scope)
            if self.stopping:
                scope.cancel()
            try:
                yield scope
            finally:
                self._idle.discard(scope)


class _Connection:
    """One client's connection: request after request, each answered by the application."""

    def __init__(self, server: Server, stream: Stream, client: tuple[str, int] | None) -> None:
        self.server, self.stream, self.client = server, stream, client
        self.bounds = server.bounds
        self.h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=server.bounds.head)
        self.served = 0

    async def run(self) -> None:
        try:
            while (request := await self._next_request()) is not None:
                await _Exchange(self, request).run()
                self.served += 1
                if self.server.stopping or (self.h11.our_state, self.h11.their_state) != (
                    h11.DONE,
                    h11.DONE,
                ):
                    break
                self.h11.start_next_cycle()
        except h11.RemoteProtocolError as wrong:
            await self.refuse(wrong.error_status_hint)
        await self._linger()

    async def _next_request(self) -> h11.Request | None:
        """The next request's head; None when the client left, took too long, or we stop."""
        found: h11.Request | None = None
        with self.server.idle() as scope:
            found = await self._head(scope)
        return found  # noqa: RET504 - None when the scope ended it

    async def _head(self, scope: trio.CancelScope) -> h11.Request | None:
        bounds, begun = self.bounds, not self.served or bool(self.h11.trailing_data[0])
        seconds = bounds.head_seconds if begun else bounds.idle_seconds
        scope.deadline = trio.current_time() + seconds
        while True:
            event = self.h11.next_event()
            if isinstance(event, h11.Request):
                return event
            if event is not h11.NEED_DATA:
                return None
            data = await self.stream.receive_some(_CHUNK)
            if not begun and data:
                begun, scope.deadline = True, trio.current_time() + bounds.head_seconds
            self.h11.receive_data(bytes(data))

    async def write(self, data: bytes | None) -> None:
        """All of ``data``, or BrokenResourceError when the client doesn't take it in time."""
        view = memoryview(data or b"")
        while view:
            with trio.move_on_after(self.bounds.write_seconds) as scope:
                await self.stream.send_all(view[:_CHUNK])
            if scope.cancelled_caught:
                raise trio.BrokenResourceError("the client does not read")
            view = view[_CHUNK:]

    async def refuse(self, status: int) -> None:
        """Answer what isn't HTTP, or too much of it, where an answer is still possible."""
        if self.h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        what = "the request's head is too long" if status == 431 else "this is not HTTP/1.1"
        body = b'{"error":"bad_request","message":"%s","status":%d}' % (what.encode(), status)
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):
            answer = self.h11.send(h11.Response(status_code=status, headers=headers)) or b""
            answer += self.h11.send(h11.Data(data=body)) or b""
            await self.write(answer + (self.h11.send(h11.EndOfMessage()) or b""))

    async def _linger(self) -> None:
        """Let the client read its answer before the close: closing with unread input resets the
        connection and takes the answer along (RFC 9112, 9.6).
        """
        read = self.h11.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
        with trio.move_on_after(self.bounds.stop_seconds):
            if isinstance(self.stream, trio.SSLStream) and read:
                await self.stream.aclose()
            elif not read or self.h11.trailing_data[0]:
                if isinstance(self.stream, trio.SocketStream):
                    await self.stream.send_eof()
                for _ in range(256):
                    if not await self.stream.receive_some(_CHUNK):
                        return


class _Exchange:
    """One request and its answer, as the application sees them."""

    def __init__(self, connection: _Connection, request: h11.Request) -> None:
        self.connection, self.request, self.h11 = connection, request, connection.h11
        self.gone = trio.Event()
        self.start: Message | None = None
        self.ended = False
        self.body_by = trio.current_time() + connection.bounds.body_seconds
        self.body_told = False
        self.watching = False

    async def run(self) -> None:
        target = self.request.target
        if not target.startswith(b"/"):
            await self.connection.refuse(400)  # a proxy's or a tunnel's form: this is neither
            return
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            if self.h11.their_state is h11.SEND_BODY and not self._has_body():
                self.h11.next_event()  # the end of a message without a body
            if self.h11.their_state is not h11.SEND_BODY:
                self._start_watching()
            await self._run_application(_scope(self.request, self.connection))
            nursery.cancel_scope.cancel()

    def _has_body(self) -> bool:
        names = {name for name, _ in self.request.headers}
        return b"content-length" in names or b"transfer-encoding" in names

    async def _run_application(self, scope: Scope) -> None:
        try:
            await self.connection.server.app(scope, self.receive, self.send)
        except Exception as failure:  # noqa: BLE001  # the application's fault, not the daemon's end
            if not self.gone.is_set():
                _log.error("an HTTP request failed: %s", where(failure))
        if self.ended or self.gone.is_set():
            return
        if self.h11.our_state is h11.SEND_RESPONSE:
            await self._quietly(self.connection.refuse(500))
        # An answer that was begun and not ended can only be cut off: run() sees h11's state.

    async def receive(self) -> Message:
        """ASGI's receive: the body in pieces, then the client's leaving."""
        if self.body_told or self.gone.is_set():
            await self.gone.wait()
            return {"type": "http.disconnect"}
        data = b""
        try:
            with trio.CancelScope(deadline=self.body_by) as scope:
                event = await self._body_event()
                if isinstance(event, h11.Data):
                    data = bytes(event.data)
            if scope.cancelled_caught:
                raise BodyTooSlow
        except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
            event = None
        if event is None:
            self.gone.set()
            return {"type": "http.disconnect"}
        if isinstance(event, h11.EndOfMessage):
            self.body_told = True
            self._start_watching()
        return {"type": "http.request", "body": data, "more_body": not self.body_told}

    async def _body_event(self) -> Any:
        if self.h11.their_state is not h11.SEND_BODY:
            return h11.EndOfMessage()
        while True:
            if self.h11.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await self.connection.write(self.h11.send(go_on))
            event = self.h11.next_event()
            if event is not h11.NEED_DATA:
                return event if isinstance(event, (h11.Data, h11.EndOfMessage)) else None
            self.h11.receive_data(bytes(await self.connection.stream.receive_some(_CHUNK)))

    def _start_watching(self) -> None:
        if not self.watching:
            self.watching = True
            self.nursery.start_soon(self._watch)

    async def _watch(self) -> None:
        """Notice that the client leaves while its answer is made; keep what it sends ahead."""
        ahead = 0
        try:
            while ahead < self.connection.bounds.head:
                data = await self.connection.stream.receive_some(_CHUNK)
                self.h11.receive_data(bytes(data))
                if not data:
                    break
                ahead += len(data)
            else:
                return
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            pass
        self.gone.set()

    async def send(self, message: Message) -> None:
        """ASGI's send. What a client that left would have got is dropped."""
        kind = message["type"]
        if kind == "http.response.start":
            if self.start is not None:
                raise RuntimeError("the answer was begun already")
            self.start = message
        elif kind == "http.response.body":
            await self._send_body(bytes(message.get("body", b"")), message.get("more_body", False))
        else:
            raise RuntimeError(f"unknown ASGI message {kind}")

    async def _send_body(self, data: bytes, more: bool) -> None:
        if self.start is None or self.ended:
            raise RuntimeError("a body without a beginning, or after its end")
        if self.h11.our_state is h11.ERROR:
            return  # a write failed before
        out = b""
        if self.h11.our_state is h11.SEND_RESPONSE:
            headers = [(bytes(n), bytes(v)) for n, v in self.start.get("headers", ())]
            if not more:
                self._skip_what_came()
            # A body that nobody read stands before the next request: there is none on this one.
            unread = self.h11.their_state is h11.SEND_BODY
            if unread or self.connection.server.stopping:
                headers.append((b"connection", b"close"))
            response = h11.Response(status_code=self.start["status"], headers=headers)
            out = self.h11.send(response) or b""
        bodiless = self.request.method == b"HEAD" or self.start["status"] in (204, 304)
        if data and not bodiless:
            out += self.h11.send(h11.Data(data=data)) or b""
        if not more:
            out += self.h11.send(h11.EndOfMessage()) or b""
            self.ended = True
        if out:
            await self._quietly(self.connection.write(out))

    def _skip_what_came(self) -> None:
        """Pass over a body that nobody wants, as far as it is here: the connection can go on."""
        with contextlib.suppress(h11.RemoteProtocolError):
            while self.h11.their_state is h11.SEND_BODY:
                if self.h11.next_event() is h11.NEED_DATA:
                    return

    async def _quietly(self, writing: Awaitable[None]) -> None:
        try:
            await writing
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.gone.set()
            self._cut()
        except trio.Cancelled:
            self._cut()  # how much of it went out can't be told
            raise

    def _cut(self) -> None:
        """Let nothing follow on this connection what may be half an answer."""
        if self.h11.our_state is not h11.ERROR:
            self.h11.send_failed()


def _scope(request: h11.Request, connection: _Connection) -> Scope:
    path, _, query = request.target.partition(b"?")
    secure = isinstance(connection.stream, trio.SSLStream)
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": request.http_version.decode("ascii"),
        "method": request.method.decode("ascii").upper(),
        "scheme": "https" if secure else "http",
        "path": unquote(path.decode("ascii")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": list(request.headers),
        "client": connection.client,
        "server": None,
        "state": {},
        "extensions": {},
    }


def _peer(stream: Stream) -> tuple[str, tuple[str, int] | None]:
    """What to count this connection by, and ASGI's ``client``."""
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    address = transport.socket.getpeername()
    if isinstance(address, tuple):
        return source_of(address[0]), (address[0], address[1])
    return "unix", None


def source_of(address: str) -> str:
    """Whom an address counts as: one IPv4 address, or the /64 that one IPv6 customer gets."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        if not ip.is_loopback:
            return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
