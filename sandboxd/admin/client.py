"""The admin methods from the other side: synchronous, standard library only, for sandboxctl."""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from sandboxd.admin import protocol
from sandboxd.errors import Denied, Invalid, SandboxdError, Unavailable
from sandboxd.paths import MAX_SOCKET_PATH, Paths

__all__ = ["AdminClient", "Client"]


class Client(Protocol):
    """What commands use of a daemon, over the admin socket or over HTTP."""

    def call(self, method: str, /, **params: Any) -> Any:
        """The method's result. Raises what the daemon raised, or Unavailable when it went away."""

    def stream(self, method: str, /, **params: Any) -> Iterator[Any]:
        """What a streaming method sends, until its reply. Close the client to stop one early."""

    def follow(self, method: str, /, **params: Any) -> int:
        """Start a streaming method without waiting: :meth:`arrived` takes the number."""

    def arrived(self, request: int) -> list[Any]:
        """What :meth:`follow` brought since the last time. Raises what ended the method."""

    def fileno(self) -> int:
        """Readable when something of a followed method may have arrived."""

    def close(self) -> None: ...
    def __enter__(self) -> Client: ...
    def __exit__(self, *exc: object) -> None: ...


class AdminClient:
    """One connection. Use it as a context manager; closing it cancels what still runs."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._last_id = 0
        self._replies: dict[int, dict[str, Any]] = {}
        self._reply_fds: dict[int, list[int]] = {}
        self._items: dict[int, deque[Any]] = {}

    @classmethod
    def connect(cls, paths: Paths) -> AdminClient:
        """Connect to the daemon whose runtime directory this is.

        Raises Unavailable when none runs there, Denied when the socket may not be opened.
        """
        path = paths.admin_socket
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise Invalid(
                f"the socket path {path} is longer than {MAX_SOCKET_PATH} bytes (unix(7))",
                hint="give the daemon and sandboxctl a shorter --runtime directory",
            )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(os.fspath(path))
        except OSError as error:
            sock.close()
            raise _unreachable(path, error) from None
        return cls(sock)

    def call(self, method: str, /, **params: Any) -> Any:
        """The method's result. Raises what the daemon raised, or Unavailable when it went away."""
        return self.result(self.submit(method, **params))

    def call_with_fds(self, method: str, /, **params: Any) -> tuple[Any, list[int]]:
        """The result and the descriptors that came with it, close-on-exec and the caller's."""
        request = self.submit(method, **params)
        result = self._finish(request)
        return result, self._reply_fds.pop(request, [])

    def stream(self, method: str, /, **params: Any) -> Iterator[Any]:
        """What a streaming method sends, until its reply. Close the client to stop one early."""
        request = self.submit(method, **params)
        items = self._items.setdefault(request, deque())
        while True:
            while items:
                yield items.popleft()
            if request in self._replies:
                break
            self._receive()
        self.result(request)

    def follow(self, method: str, /, **params: Any) -> int:
        """Start a streaming method without waiting: :meth:`arrived` takes the number."""
        request = self.submit(method, **params)
        self._items.setdefault(request, deque())
        return request

    def arrived(self, request: int) -> list[Any]:
        """What :meth:`follow` brought since the last time. Raises what ended the method."""
        while self._receive(socket.MSG_DONTWAIT):
            pass
        items = self._items[request]
        found = [items.popleft() for _ in range(len(items))]
        if request in self._replies and not found:
            self.result(request)
        return found

    def submit(self, method: str, /, **params: Any) -> int:
        """Send a request without waiting: :meth:`ready` and :meth:`result` take the number."""
        self._last_id += 1
        line = protocol.encode(protocol.request(self._last_id, method, params))
        try:
            self._sock.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            # The daemon closed first; it may have said why.
            self._receive_all()
            raise _gone() from None
        return self._last_id

    def ready(self, request: int) -> bool:
        """Whether the reply is here, reading what has arrived without waiting for more."""
        while request not in self._replies and self._receive(socket.MSG_DONTWAIT):
            pass
        return request in self._replies

    def result(self, request: int) -> Any:
        """Wait for the reply of :meth:`submit`; descriptors that come with it are closed."""
        result = self._finish(request)
        for fd in self._reply_fds.pop(request, []):
            os.close(fd)
        return result

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()
        for fds in (self._fds, *self._reply_fds.values()):
            while fds:
                os.close(fds.pop())
        self._reply_fds.clear()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _finish(self, request: int) -> Any:
        while request not in self._replies:
            self._receive()
        self._items.pop(request, None)
        message = self._replies.pop(request)
        if "error" in message:
            raise protocol.raised(message["error"])
        return message.get("result")

    def _receive(self, flags: int = 0) -> bool:
        """Read once and file whole lines; False when nothing was there (MSG_DONTWAIT)."""
        try:
            data, ancillary, got, _ = self._sock.recvmsg(
                1 << 18,
                socket.CMSG_SPACE(protocol.MAX_FDS * 4),
                flags | socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return False
        except ConnectionResetError:
            raise _gone() from None
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self._fds.extend(numbers)
        if got & socket.MSG_CTRUNC:
            raise Unavailable(
                "the daemon's descriptors did not arrive",
                hint="this process may have too many open files: ulimit -n",
            )
        if not data:
            raise _gone()
        searched = len(self._buffer)
        self._buffer += data
        while (end := self._buffer.find(b"\n", searched)) >= 0:
            line, searched = bytes(self._buffer[:end]), 0
            del self._buffer[: end + 1]
            self._file(protocol.decode(line))
        if len(self._buffer) > protocol.MAX_LINE:
            raise Unavailable("the daemon sent a line without an end")
        return True

    def _file(self, message: dict[str, Any]) -> None:
        params = message.get("params")
        if message.get("method") == "stream" and isinstance(params, dict):
            if params.get("id") in self._items:
                self._items[params["id"]].append(params.get("data"))
            return
        id = message.get("id")
        if id is None and "error" in message:
            raise protocol.raised(message["error"])
        if not isinstance(id, int):
            return
        wanted = message.get("fds", 0)
        if wanted:
            if len(self._fds) < wanted:
                raise Unavailable("the daemon's descriptors did not arrive")
            self._reply_fds[id] = [self._fds.popleft() for _ in range(wanted)]
        self._replies[id] = message

    def _receive_all(self) -> None:
        while self._receive():
            pass


def _gone() -> SandboxdError:
    return Unavailable("sandboxd closed the connection", hint="see its log: journalctl -u sandboxd")


def _unreachable(path: Path, error: OSError) -> SandboxdError:
    if isinstance(error, PermissionError):
        return Denied(
            f"may not open {path}",
            hint="use the daemon's own user, root, or a member of its admin_group",
        )
    why = {
        FileNotFoundError: "there is no",
        ConnectionRefusedError: "nobody answers at",
    }.get(type(error))
    said = f"{why} {path}" if why else f"{path}: {error.strerror}"
    return Unavailable(
        f"no sandboxd is running: {said}",
        hint="start one (sandboxd, or systemctl start sandboxd), or say where it is: --runtime DIR",
    )
