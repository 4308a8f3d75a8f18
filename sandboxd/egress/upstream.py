"""Connections of a gateway to its upstream: pooled by httpcore, opened and counted by the gate."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable
from typing import Any

import httpcore2
import trio

from sandboxd.egress.gate import Bounds, Connection, Gate
from sandboxd.errors import SandboxdError
from sandboxd.policy.destinations import Destination

__all__ = ["Upstream", "tls_context"]

_CHUNK = 64 << 10


def tls_context(ca: str | None) -> ssl.SSLContext:
    """Verifies by the system's authorities, or by the ones in the file ``ca`` alone.

    Raises OSError when that can't be read.
    """
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


class Upstream(httpcore2.AsyncNetworkBackend):
    """What httpcore connects by: one destination, whatever it asks for."""

    def __init__(self, gate: Gate, wanted: Destination, kind: str) -> None:
        self._gate, self._wanted, self._kind = gate, wanted, kind

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            connection = await self._gate.open(self._wanted, self._kind)
        except SandboxdError as refusal:
            raise httpcore2.ConnectError(refusal.message) from None
        return _Stream(_Counted(connection, self._gate.bounds), connection, self._gate)

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        raise httpcore2.ConnectError("a gateway has no Unix socket")

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class _Counted(trio.abc.Stream):
    """The bytes on the wire, counted where TLS can't hide them, within the gate's bounds."""

    def __init__(self, connection: Connection, bounds: Bounds) -> None:
        self._connection, self._bounds = connection, bounds

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._check()
        await self._connection.stream.send_all(data)
        self._connection.sent += len(data)

    def _check(self) -> None:
        """Raise BrokenResourceError once the connection has moved or lasted as much as it may."""
        connection, bounds = self._connection, self._bounds
        lasted = time.monotonic() - connection.opened_at
        if connection.sent + connection.received > bounds.volume or lasted > bounds.lifetime:
            raise trio.BrokenResourceError("the connection is used up")

    async def wait_send_all_might_not_block(self) -> None:
        await self._connection.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self._check()
        data = bytes(await self._connection.stream.receive_some(max_bytes))
        self._connection.received += len(data)
        return data

    async def aclose(self) -> None:
        await self._connection.stream.aclose()


class _Stream(httpcore2.AsyncNetworkStream):
    def __init__(self, stream: trio.abc.Stream, connection: Connection, gate: Gate) -> None:
        self._stream, self._connection, self._gate = stream, connection, gate
        self._closed = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            with trio.fail_after(timeout or self._gate.bounds.idle):
                return bytes(await self._stream.receive_some(min(max_bytes, _CHUNK)))
        except trio.TooSlowError:
            raise httpcore2.ReadTimeout("the upstream doesn't answer") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise httpcore2.ReadError("the upstream closed the connection") from None

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not buffer:
            return
        try:
            with trio.fail_after(timeout or self._gate.bounds.idle):
                await self._stream.send_all(buffer)
        except trio.TooSlowError:
            raise httpcore2.WriteTimeout("the upstream doesn't read") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise httpcore2.WriteError("the upstream closed the connection") from None

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await self._gate.close(self._connection, "closed")

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        secured = trio.SSLStream(
            self._stream, ssl_context, server_hostname=server_hostname, https_compatible=True
        )
        try:
            with trio.fail_after(self._gate.bounds.dial):
                await secured.do_handshake()
        except (trio.TooSlowError, trio.BrokenResourceError, ssl.SSLError) as failure:
            await self.aclose()
            reason = getattr(failure.__cause__ or failure, "verify_message", "")
            raise httpcore2.ConnectError(
                f"TLS with the upstream failed {reason}".rstrip()
            ) from None
        except BaseException:  # cancelled: nobody else knows of the connection yet
            await self.aclose()
            raise
        return _Stream(secured, self._connection, self._gate)

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return getattr(self._stream, "_ssl_object", None)
        if info == "is_readable":  # what a pooled connection shows when its peer is gone
            return self._connection.stream.socket.is_readable()
        return None
