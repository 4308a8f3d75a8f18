"""A session's own socket: made for it, mounted into its sandbox, and checked on every connection.

The socket is the identity: who reaches it is the session's agent, for nothing else has it. Peer
credentials confirm that, so that a descriptor passed out of a sandbox is of no use outside.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from sandboxd.broker import calls as broker_calls
from sandboxd.broker.calls import Calls
from sandboxd.broker.mcp import refuse_connection, serve_connection
from sandboxd.errors import Denied, Invalid
from sandboxd.paths import MAX_SOCKET_PATH

__all__ = [
    "CheckPeer",
    "Peer",
    "Session",
    "bind_session_socket",
    "check_descent",
    "peer_of",
    "serve_session_socket",
]

log = logging.getLogger(__name__)

#: socket(7); Python names it from 3.14 on.
_SO_PEERPIDFD = getattr(socket, "SO_PEERPIDFD", 77)
_UCRED = struct.Struct("iII")
#: Connections that one session may have open.
_MAX_CONNECTIONS = 32
#: Seconds that a session's process may take to be known once it speaks.
_STARTING = 10.0
_MAX_ANCESTORS = 1024


class Session(broker_calls.Session, Protocol):
    """A session that has a process: ``pid`` is its init's on the host, 0 before it runs."""

    @property
    def pid(self) -> int: ...


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, as the kernel recorded it at connect(2). ``pidfd`` may be None."""

    pid: int
    uid: int
    gid: int
    pidfd: int | None


CheckPeer = Callable[[Peer], None]


async def serve_session_socket(
    path: Path,
    session: Session,
    calls: Calls,
    *,
    listener: socket.socket | None = None,
    check_peer: CheckPeer | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve MCP to the session's processes on ``path`` until cancelled.

    ``listener`` is the socket there if it was made before, by :func:`bind_session_socket`.

    ``check_peer`` raises Denied for a peer that does not belong to the session; by default that is
    any process of another user, or one that does not descend from the session's init. Raises
    Invalid for a path that is too long or taken.
    """
    with _listening(path, listener or bind_session_socket(path)) as listening:
        async with trio.open_nursery() as nursery:
            open_now: set[trio.SocketStream] = set()

            async def serve(stream: trio.SocketStream) -> None:
                async with stream:
                    await _serve_one(stream, session, calls, check_peer, open_now)

            task_status.started()
            await trio.serve_listeners(serve, [listening], handler_nursery=nursery)


async def _serve_one(
    stream: trio.SocketStream,
    session: Session,
    calls: Calls,
    check_peer: CheckPeer | None,
    open_now: set[trio.SocketStream],
) -> None:
    """One connection from its check to its end. Its failure is its own."""
    busy = len(open_now) >= _MAX_CONNECTIONS
    if not busy:
        open_now.add(stream)
    try:
        try:
            if busy:
                raise Denied(
                    f"this session has {_MAX_CONNECTIONS} connections open", hint="close one first"
                )
            await _check(stream, session, check_peer)
        except Denied as denied:
            log.warning("session %s: connection refused: %s", session.id, denied.message)
            await refuse_connection(stream, denied)
        else:
            await serve_connection(stream, session, calls)
    except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the peer went away
    except* Exception as group:  # noqa: BLE001 - a connection must not end the session
        # Classes alone: an exception's text may quote what an agent or a tool said.
        log.error("session %s: connection failed: %s", session.id, _names(group))
    finally:
        open_now.discard(stream)


async def _check(stream: trio.SocketStream, session: Session, check_peer: CheckPeer | None) -> None:
    with peer_of(stream.socket) as peer:
        if check_peer is not None:
            check_peer(peer)
            return
        if peer.uid != session.uid:
            raise Denied(f"the peer is uid {peer.uid}, the session's is {session.uid}")
        with trio.move_on_after(_STARTING):
            # An agent may speak before its launch has been reported; nothing announces that.
            while not session.pid:  # noqa: ASYNC110
                await trio.sleep(0.005)
        check_descent(peer, session.pid)


@contextmanager
def peer_of(sock: trio.socket.SocketType | socket.socket) -> Iterator[Peer]:
    """The peer's credentials, with a pidfd that keeps its pid from meaning another process.

    SO_PEERPIDFD names the very process that connected (Linux 6.5). An older kernel gets a pidfd
    by number, which a reused pid would fool: that is logged. Raises Denied when the peer is gone
    already or is not visible from here.
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    if pid <= 0:
        raise Denied("the peer's process is not visible from here")
    pidfd = _peer_pidfd(sock, pid)
    try:
        yield Peer(pid, uid, gid, pidfd)
    finally:
        os.close(pidfd)


def check_descent(peer: Peer, ancestor: int) -> None:
    """Raise Denied unless the living peer is ``ancestor`` or one of its descendants.

    Walks the parents in /proc. The pidfd is asked last: while it says that the peer lives, the
    pid that the walk began at was the peer's.
    """
    if ancestor <= 0:
        raise Denied("the session has no process yet")
    pid, steps = peer.pid, 0
    while pid != ancestor:
        pid, steps = _parent(pid), steps + 1
        if pid <= 1 or steps > _MAX_ANCESTORS:
            raise Denied(f"process {peer.pid} does not belong to the session")
    if peer.pidfd is not None and _has_ended(peer.pidfd):
        raise Denied(f"process {peer.pid} ended while it was being checked")


def _peer_pidfd(sock: trio.socket.SocketType | socket.socket, pid: int) -> int:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL):
            raise Denied(f"process {pid} has ended") from None
    _warn_once()
    try:
        return os.pidfd_open(pid)
    except OSError:
        raise Denied(f"process {pid} has ended") from None


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        log.warning(
            "this kernel has no SO_PEERPIDFD (Linux 6.5): a peer that ends at once and whose pid "
            "is reused inside the session can't be told from its successor"
        )


_warned = False


def _has_ended(pidfd: int) -> bool:
    """A pidfd is readable once its process has ended (pidfd_open(2))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _parent(pid: int) -> int:
    """The parent's pid; Denied when the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        raise Denied(f"process {pid} has ended, or /proc hides it") from None
    for line in status.splitlines():
        if line.startswith(b"PPid:"):
            return int(line.split()[1])
    return 0


def bind_session_socket(path: Path) -> socket.socket:
    """A listening socket at ``path``. Invalid for a path that is too long or taken."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise Invalid(
            f"the socket path {path} has {length} bytes; a socket path may have "
            f"{MAX_SOCKET_PATH} (unix(7))",
            hint="choose a shorter runtime directory",
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(os.fspath(path))
        # Any user: the directory above keeps others out, and the sandbox has only this file.
        path.chmod(0o666)
        sock.listen(_MAX_CONNECTIONS)
    except OSError as error:
        sock.close()
        raise Invalid(f"cannot listen on {path}: {error.strerror}") from None
    return sock


@contextmanager
def _listening(path: Path, sock: socket.socket) -> Iterator[trio.SocketListener]:
    """A listener on ``sock``. Leaving closes it, and removes the path if it is still its own."""
    with sock:
        made = path.stat()
        try:
            sock.setblocking(False)
            yield trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        finally:
            _remove(path, made)


def _remove(path: Path, made: os.stat_result) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISSOCK(found.st_mode) and (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
        path.unlink()


def _names(group: BaseExceptionGroup[Exception]) -> str:
    names: set[str] = set()
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            names.update(_names(error).split(", "))
        else:
            names.add(type(error).__name__)
    return ", ".join(sorted(names))
