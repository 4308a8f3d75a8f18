#!/usr/bin/python3 -IS
"""sandboxd-mcp: connects standard input and output to the session's broker socket.

An MCP client that starts its servers as commands starts this one. It copies bytes both ways and
understands none of them; it holds no secret, and which session it speaks for is decided by the
socket alone. Standard library only, and one file: it is copied into the sandbox as it is.

Exit status: 0 when either side ended the conversation, 2 when SANDBOXD_SOCKET is missing,
6 when nobody answers on the socket.
"""

from __future__ import annotations

import _thread
import os
import select
import socket
import sys

__all__ = ["main"]

_CHUNK = 65536
_NO_SOCKET = 2
_UNAVAILABLE = 6


def main() -> None:
    """Copy until the broker closes, or the client stops reading. Never returns."""
    if any(arg in ("-h", "--help") for arg in sys.argv[1:]):
        sys.stdout.write(__doc__ or "")
        sys.stdout.flush()
        os._exit(0)
    path = os.environ.get("SANDBOXD_SOCKET", "")
    if not path:
        _fail(
            _NO_SOCKET,
            "SANDBOXD_SOCKET is not set",
            "it is set inside a session: start the agent with sandboxctl run AGENT",
        )
    broker = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        broker.connect(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        _fail(
            _UNAVAILABLE, "cannot connect to " + path + ": " + reason, "is this session still live?"
        )
    _thread.start_new_thread(_send_input, (broker,))
    _receive_output(broker)
    # The other thread may wait for input that never comes: leave without asking it.
    os._exit(0)


def _send_input(broker: socket.socket) -> None:
    """Standard input to the broker. Its end is passed on, answers still come back (half-close)."""
    try:
        while True:
            data = _read(0)
            if not data:
                broker.shutdown(socket.SHUT_WR)
                break
            broker.sendall(data)
    except OSError:
        return  # the broker closed: the main thread sees that too, and ends the process
    # A client that is gone altogether waits for no answer: leaving cancels its calls.
    output = select.poll()
    output.register(1, 0)  # errors and hang-ups are reported unasked (poll(2))
    output.poll()
    os._exit(0)


def _receive_output(broker: socket.socket) -> None:
    try:
        while True:
            data = broker.recv(_CHUNK)
            if not data:
                return
            _write(1, data)
    except OSError:
        return  # the client stopped reading, or the broker vanished


def _read(fd: int) -> bytes:
    """A blocking read, also from a descriptor that its other owner made non-blocking."""
    while True:
        try:
            return os.read(fd, _CHUNK)
        except BlockingIOError:
            select.select([fd], [], [])


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


def _fail(status: int, message: str, hint: str) -> None:
    try:
        os.write(
            2, ("sandboxd-mcp: " + message + "\nhint: " + hint + "\n").encode(errors="replace")
        )
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
