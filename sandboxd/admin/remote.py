"""The admin methods over HTTP, with the face of :class:`sandboxd.admin.client.AdminClient`.

``POST URL/api/v1/operator/METHOD`` with the parameters as a JSON object; the answer is lines of
JSON: ``{"item": ...}`` for each item of a stream, then ``{"result": ...}`` or ``{"error": ...}``.
Empty lines keep the connection alive. An answer without its last line was cut off, and says so.

Standard library only, and loaded only where a server is named. http.client follows no redirect and
uses no proxy, so the key goes to the named server and nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import socket
import ssl
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from sandboxd.admin import protocol
from sandboxd.errors import (
    Denied,
    Invalid,
    NotFound,
    SandboxdError,
    Unauthenticated,
    Unavailable,
)
from sandboxd.names import shown
from sandboxd.secret import Secret

__all__ = ["RemoteClient", "Server"]

#: Seconds for the connection to be made, and longest silence of a server that is alive.
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 4 * protocol.BEAT_SECONDS

_NDJSON = "application/x-ndjson"
_CHUNK = 1 << 16


class Server:
    """Where the operator route is, and how its certificate is checked."""

    def __init__(self, url: str, *, ca: Path | None = None) -> None:
        """``https://HOST[:PORT][/PREFIX]``, ``http://`` for this host alone, or ``unix:/PATH``.

        ``ca`` holds the certificates to trust instead of the system's. Raises Invalid for what is
        no such URL, Denied where a key would travel unencrypted.
        """
        self.url, self._ca = url, ca
        self.path = ""
        if url.startswith("unix:"):
            self.path = url.removeprefix("unix:")
            if not self.path.startswith("/"):
                raise Invalid("a server at a Unix socket is unix:/PATH")
            self.host, self.port, self.prefix, self.encrypted = "localhost", None, "", False
            return
        parts = _parts(url)
        assert parts.hostname is not None
        self.host, self.port = parts.hostname, parts.port
        self.prefix = parts.path.rstrip("/").removesuffix("/api/v1")
        self.encrypted = parts.scheme == "https"
        if not self.encrypted and not _is_here(self.host):
            raise Denied(
                f"the API key would travel to {shown(self.host)} unencrypted",
                hint="use https://, or http:// with this host's own address (127.0.0.1)",
            )

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        """A connection that is made with the first request. Raises Invalid for a bad ``ca``."""
        if self.path:
            return _UnixConnection(self.path, timeout)
        if not self.encrypted:
            return http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        return http.client.HTTPSConnection(
            self.host, self.port, timeout=timeout, context=self._context()
        )

    def _context(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=str(self._ca) if self._ca else None)
        except (OSError, ssl.SSLError) as error:
            reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
            raise Invalid(
                f"{self._ca} holds no certificates to trust: {reason}",
                hint="--ca takes a file of PEM certificates",
            ) from None


class RemoteClient:
    """One server. Use it as a context manager; closing it ends what still streams."""

    def __init__(self, server: Server, key: Secret, *, timeout: float = CONNECT_SECONDS) -> None:
        self._server, self._key, self._timeout = server, key, timeout
        self._open: set[http.client.HTTPConnection] = set()
        self._followed: dict[int, _Followed] = {}

    def call(self, method: str, /, **params: Any) -> Any:
        """The method's result. Raises what the daemon raised, Unauthenticated for a key that isn't
        known there, or Unavailable when no sandboxd answers.
        """
        answer = _Answer(self, method, params)
        with contextlib.closing(answer):
            for _ in answer.items():
                pass
            return answer.result

    def stream(self, method: str, /, **params: Any) -> Iterator[Any]:
        """What a streaming method sends. Close the client, or the iterator, to stop one early."""
        with contextlib.closing(_Answer(self, method, params)) as answer:
            yield from answer.items()

    def call_with_fds(self, method: str, /, **params: Any) -> tuple[Any, list[int]]:
        """Never possible: descriptors pass over the admin socket alone."""
        raise Invalid(f"{method} needs the admin socket", hint="run it on the daemon's own host")

    def follow(self, method: str, /, **params: Any) -> int:
        """Start a streaming method without waiting: :meth:`arrived` takes the number."""
        followed = _Followed(_Answer(self, method, params))
        self._followed[followed.fileno()] = followed
        return followed.fileno()

    def arrived(self, request: int) -> list[Any]:
        """What :meth:`follow` brought since the last time. Raises what ended the method."""
        return self._followed[request].take()

    def fileno(self) -> int:
        """Readable when :meth:`arrived` has something."""
        return next(iter(self._followed))

    def close(self) -> None:
        for connection in list(self._open):
            self._end(connection)
        for followed in self._followed.values():
            followed.close()
        self._followed.clear()

    def __enter__(self) -> RemoteClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- within ----------------------------------------------------------------------------------

    def _begin(
        self, method: str, params: dict[str, Any]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send one request on a connection of its own; its answer's head has been read."""
        server = self._server
        body = protocol.encode(params)
        connection = server.connection(self._timeout)
        self._open.add(connection)
        try:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(SILENCE_SECONDS)
            connection.request(
                "POST",
                f"{server.prefix}/api/v1/operator/{quote(method, safe='.')}",
                body,
                {
                    "Authorization": "Bearer " + self._key.reveal().decode("ascii"),
                    "Content-Type": "application/json",
                    "Accept": _NDJSON,
                    "Connection": "close",
                },
            )
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._end(connection)
            failure = _unreachable(server, error)
        except BaseException:
            self._end(connection)
            raise
        raise failure from None  # outside of the handler: no chained error holds the headers

    def _end(self, connection: http.client.HTTPConnection) -> None:
        self._open.discard(connection)
        if connection.sock is not None:
            # Another thread may be reading: closing alone would not wake it.
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()


class _Answer:
    """One request's answer, read line by line."""

    def __init__(self, client: RemoteClient, method: str, params: dict[str, Any]) -> None:
        self._client = client
        self._connection, self._response = client._begin(method, params)
        self.result: Any = None
        content = self._response.headers.get_content_type()
        if self._response.status != 200 or content != _NDJSON:
            with contextlib.closing(self):
                raise _refusal(client._server, self._response)

    def items(self) -> Iterator[Any]:
        """Each item; ends with the result, or raises the error that is there instead."""
        for line in self._lines():
            message = _message(line)
            if "item" in message:
                yield message["item"]
            elif "error" in message:
                raise protocol.raised(message["error"])
            elif "result" in message:
                self.result = message["result"]
                return
        raise _cut_off()

    def close(self) -> None:
        self._response.close()
        self._client._end(self._connection)

    def _lines(self) -> Iterator[bytes]:
        buffer = bytearray()
        while True:
            try:
                data = self._response.read1(_CHUNK)
            except (OSError, http.client.HTTPException, ValueError):
                raise _cut_off() from None
            if not data:
                return
            searched = len(buffer)
            buffer += data
            while (end := buffer.find(b"\n", searched)) >= 0:
                line, searched = bytes(buffer[:end]), 0
                del buffer[: end + 1]
                if line.strip():
                    yield line
            if len(buffer) > protocol.MAX_LINE:
                raise Unavailable("the server sent a line without an end")


class _Followed:
    """An answer that a thread reads, so that select(2) can wait for it and for the terminal.

    The descriptor of the connection itself won't do: what TLS and HTTP have read ahead is not
    readable there any more.
    """

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer
        self._items: deque[Any] = deque()
        self._ended: BaseException | None = None
        self._done = False
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._ours.fileno()

    def take(self) -> list[Any]:
        with contextlib.suppress(BlockingIOError):
            while self._ours.recv(4096):
                pass
        done = self._done  # before the items: what came before the end is not lost
        found = [self._items.popleft() for _ in range(len(self._items))]
        if done and not found and self._ended is not None:
            raise self._ended
        return found

    def close(self) -> None:
        self._thread.join(timeout=5)
        self._ours.close()
        self._theirs.close()

    def _read(self) -> None:
        try:
            for item in self._answer.items():
                self._items.append(item)
                self._wake()
            self._ended = Unavailable("the server ended the answer")
        except SandboxdError as error:
            self._ended = error
        finally:
            self._answer.close()
            self._done = True
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._theirs.send(b"x")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _parts(url: str) -> SplitResult:
    """The URL in its parts. Raises Invalid without quoting more than its scheme."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise Invalid("the server's URL is malformed", hint="--server https://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not host:
        raise Invalid(
            "the server's URL is neither https://HOST[:PORT] nor unix:/PATH",
            hint="for example: --server https://sandboxd.example.com",
        )
    if parts.username is not None or parts.password is not None:
        raise Invalid(
            "the server's URL holds a user or a password",
            hint="the key comes from --key-file FILE or SANDBOXD_API_KEY",
        )
    if parts.query or parts.fragment:
        raise Invalid("the server's URL has no query and no fragment")
    return parts


def _is_here(host: str) -> bool:
    """Whether the name is surely this host: nothing that a name server answers counts."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # RFC 6761, 6.3


def _message(line: bytes) -> dict[str, Any]:
    try:
        return protocol.decode(line)
    except Invalid as error:
        raise Unavailable(f"the server's answer can't be read: {error.message}") from None


def _refusal(server: Server, response: http.client.HTTPResponse) -> SandboxdError:
    """What an answer means that isn't the method's."""
    status, message, data = response.status, "", None
    try:
        body = json.loads(response.read(_CHUNK))
        message, data = str(body["message"]), body.get("data")
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
        body = {}
    if isinstance(data, dict):
        return protocol.raised({"message": data.get("message", message), "data": data})
    message = message or f"{server.url} answered with {status}"
    if status == 401:
        return Unauthenticated(message, hint="is the key right, not expired, not deactivated?")
    if status == 403:
        return Denied(message)
    if status == 404:
        return NotFound(
            f"{server.url} has no operator API",
            hint="is this the URL of a sandboxd, with http: in its sandboxd.yaml?",
        )
    if status in (400, 411, 413, 414, 415, 421, 431):
        return Invalid(message)
    if status == 429:
        return Unavailable(message)
    if status == 200 or 300 <= status < 400:
        return Unavailable(
            f"{server.url} is not a sandboxd, or something in between answers for it",
            hint="name the server itself: redirects and proxies are not followed",
        )
    return Unavailable(message, hint="its own log says more: journalctl -u sandboxd")


def _unreachable(server: Server, error: Exception) -> SandboxdError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Denied(
            f"the certificate of {server.host} is not to be trusted: {error.verify_message}",
            hint="if an authority of your own made it: --ca FILE",
        )
    if isinstance(error, ssl.SSLError):
        return Unavailable(
            f"no TLS with {server.url}: {error.reason or 'it failed'}",
            hint="does it speak TLS on this port?",
        )
    if isinstance(error, TimeoutError):
        why = "no answer in time"
    elif isinstance(error, socket.gaierror):
        why = error.strerror or "the name is not known"
    elif isinstance(error, OSError):
        why = error.strerror or type(error).__name__
    else:
        why = "it does not speak HTTP"
    return Unavailable(
        f"no sandboxd answers at {server.url}: {why}",
        hint="does it run, with http: in its sandboxd.yaml, and is the URL right?",
    )


def _cut_off() -> SandboxdError:
    return Unavailable(
        "the connection broke before the answer was complete",
        hint="whether it was carried out is not known: look before you repeat it",
    )
