"""The sandbox's side of an HTTP connection to the broker: read by h11, within bounds."""

from __future__ import annotations

import contextlib
from http import HTTPStatus

import h11
import trio

from sandboxd.egress.gate import Bounds

__all__ = ["MAX_HEAD", "Begun", "Client", "Refused"]

#: Longest head of a request or response, in bytes.
MAX_HEAD = 64 << 10


class Refused(Exception):
    """A request that can't be served: ``status`` and what to tell the client."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.hint = status, message, hint


class Client:
    """One client's connection. Requests are read one after another, each answered before the next.

    BrokenResourceError: the client went away.
    """

    def __init__(self, stream: trio.abc.Stream, bounds: Bounds) -> None:
        self.stream, self._bounds = stream, bounds
        self._wire = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)

    async def request(self) -> h11.Request | None:
        """The next request's head; None when the client is done. Raises Refused."""
        with trio.move_on_after(self._bounds.head) as scope:
            try:
                event = await self._event()
            except h11.RemoteProtocolError as error:
                raise Refused(error.error_status_hint, "the request is not valid HTTP") from None
        if scope.cancelled_caught:
            if self._wire.trailing_data[0]:
                raise Refused(408, "the request's head did not arrive in time")
            return None
        if isinstance(event, h11.ConnectionClosed):
            return None
        assert isinstance(event, h11.Request)
        return event

    async def body(self) -> bytes | None:
        """The next piece of the request's body; None at its end. Raises Refused."""
        try:
            with trio.fail_after(self._bounds.idle):
                event = await self._event()
        except trio.TooSlowError:
            raise Refused(408, "the request's body did not arrive in time") from None
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, "the request is not valid HTTP") from None
        if isinstance(event, h11.Data):
            return bytes(event.data)
        return None

    async def send(self, event: h11.Event) -> None:
        """Send a part of the response."""
        data = self._wire.send(event)
        if data:
            with trio.fail_after(self._bounds.idle):
                await self.stream.send_all(data)

    async def answer(self, status: int, message: str, hint: str = "") -> None:
        """A whole response of our own, as text; nothing when a response has begun already."""
        if self._wire.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        self._skip()
        body = f"sandboxd: {message}\n{hint}".rstrip("\n").encode() + b"\n"
        head = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"x-sandboxd", b"refused" if status == 403 else b"failed"),
        ]
        if self._wire.their_state is not h11.DONE:
            head.append((b"connection", b"close"))
        reason = HTTPStatus(status).phrase.encode()
        await self.send(h11.Response(status_code=status, headers=head, reason=reason))
        await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())

    async def tunnel(self) -> bytes:
        """Answer CONNECT; what the client sent already for the other end."""
        await self.send(h11.Response(status_code=200, headers=[], reason=b"Connection established"))
        return self.rest()

    def rest(self) -> bytes:
        """What came after the last request, once the connection is no longer HTTP."""
        return bytes(self._wire.trailing_data[0])

    async def next(self) -> bool:
        """Get ready for another request on the connection; whether there can be one."""
        if self._wire.our_state is h11.DONE and self._wire.their_state is h11.DONE:
            self._wire.start_next_cycle()
            return True
        return False

    def _skip(self) -> None:
        """Read what has arrived of a request that is answered without it."""
        with contextlib.suppress(h11.RemoteProtocolError):
            while self._wire.their_state is h11.SEND_BODY:
                if self._wire.next_event() is h11.NEED_DATA:
                    return

    async def _event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._wire.next_event()
            if event is h11.NEED_DATA:
                if self._wire.they_are_waiting_for_100_continue:
                    await self.send(h11.InformationalResponse(status_code=100, headers=[]))
                self._wire.receive_data(bytes(await self.stream.receive_some(64 << 10)))
                continue
            return event  # type: ignore[return-value]


class Begun(trio.abc.Stream):
    """A stream of which ``first`` was read already."""

    def __init__(self, stream: trio.SocketStream, first: bytes) -> None:
        self._stream, self._first = stream, first

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._first:
            await trio.lowlevel.checkpoint()
            size = max_bytes or len(self._first)
            first, self._first = self._first[:size], self._first[size:]
            return first
        return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        await self._stream.aclose()
