"""The admin socket: who may speak, one task per request, descriptors on replies.

Peer credentials decide (SO_PEERCRED and SO_PEERGROUPS, socket(7)): the kernel recorded them when
the peer connected, so there is no password to leak. Uid and groups count; the pid is for the log.

When a client goes away its running methods are cancelled, then what they left behind runs
(:meth:`Caller.on_disconnect`).
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import logging
import os
import pwd
import socket
import stat
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import trio

from sandboxd.access.roles import Principal
from sandboxd.admin import protocol
from sandboxd.errors import Conflict, Denied, Invalid, NotFound, SandboxdError, where
from sandboxd.names import shown
from sandboxd.paths import MAX_SOCKET_PATH

__all__ = ["Caller", "Method", "Reply", "clean_up", "only_expected", "serve_admin"]

#: Requests that one connection may have running, and connections that the socket serves.
MAX_RUNNING = 32
MAX_CONNECTIONS = 128

#: How long what a client left behind may take to clean up.
CLEANUP_SECONDS = 30

_SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h, Linux 4.13; Python has no name for it

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who is asking: a principal and, on the admin socket, the peer that the kernel tells."""

    principal: Principal
    uid: int | None = None
    pid: int | None = None
    gids: tuple[int, ...] = ()
    _left: list[Callable[[], Awaitable[None]]] = field(default_factory=list, repr=False)

    @classmethod
    def local(cls, uid: int, pid: int, name: str, gids: tuple[int, ...] = ()) -> Caller:
        """A peer of the admin socket; ``name`` is the login name, or the uid as text."""
        return cls(Principal("host", name, "host", None), uid, pid, gids)

    @classmethod
    def remote(cls, principal: Principal) -> Caller:
        """One request of somebody who has no connection, and so no descriptors can go there."""
        return cls(principal)

    @property
    def name(self) -> str:
        """Who it is, for records and people."""
        return self.principal.name

    @property
    def attachable(self) -> bool:
        """Whether descriptors can be passed to it."""
        return self.uid is not None

    def on_disconnect(self, action: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        """Run ``action`` when this connection is gone; the returned function takes that back.

        Actions run last-in first-out after the connection's methods were cancelled, shielded from
        cancellation and bounded by :data:`CLEANUP_SECONDS` together.
        """
        self._left.append(action)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._left.remove(action)

        return forget


@dataclass(frozen=True)
class Reply:
    """A method's result. The server owns ``fds`` from here on and closes them, sent or not."""

    result: Any
    fds: Sequence[int] = ()


#: A coroutine function that returns a Reply, or an async generator function whose items are
#: streamed (an item that is a Reply becomes the final result, which is ``{}`` otherwise).
Method = Callable[[Caller, dict[str, Any]], Awaitable[Reply] | AsyncGenerator[Any, None]]


async def serve_admin(
    path: Path,
    methods: Mapping[str, Method],
    *,
    allow: Callable[[int, list[int]], bool],
    mode: int = 0o600,
    group: int | None = None,
    listener: socket.socket | None = None,
    refused: Callable[[Caller], Awaitable[None]] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Serve ``methods`` on ``path`` until cancelled; ``started()`` once clients can connect.

    A socket left by a dead daemon is replaced, a live one is never touched.
    ``listener`` is a socket that the service manager already bound there; it is left in place.
    ``refused`` is told of each peer that ``allow`` turned away, before the peer learns it.
    Raises Invalid for a path that is too long and Conflict when something else is at the path.
    """
    with contextlib.ExitStack() as stack:
        if listener is None:
            listener = stack.enter_context(_bound(path, mode, group))
        else:
            stack.enter_context(listener)
        listener.setblocking(False)
        accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        limit = trio.CapacityLimiter(MAX_CONNECTIONS)

        async def handle(stream: trio.SocketStream) -> None:
            async with limit:
                await _serve_connection(stream, methods, allow, refused)

        task_status.started()
        await trio.serve_listeners(handle, [accepting])
    raise AssertionError("unreachable")


async def _serve_connection(
    stream: trio.SocketStream,
    methods: Mapping[str, Method],
    allow: Callable[[int, list[int]], bool],
    refused: Callable[[Caller], Awaitable[None]] | None,
) -> None:
    caller: Caller | None = None
    try:
        caller = await _peer(stream)
        assert caller.uid is not None
        if not allow(caller.uid, list(caller.gids)):
            _log.warning("refused admin connection of uid %d (pid %d)", caller.uid, caller.pid)
            if refused is not None:
                await refused(caller)
            denied = Denied(
                f"user {caller.name} may not administer this sandboxd",
                hint="use the daemon's own user, root, or a member of its admin_group",
            )
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(protocol.encode(protocol.failure(None, denied)))
            return
        await _Connection(stream, caller, methods).serve()
    except Exception as error:  # noqa: BLE001  # one bad connection must not end the daemon
        _log.error("an admin connection failed: %s", where(error))
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)
            if caller is not None:
                await clean_up(caller)


class _Connection:
    """One client: reads requests, runs each in its own task, writes whole lines in turn."""

    def __init__(
        self, stream: trio.SocketStream, caller: Caller, methods: Mapping[str, Method]
    ) -> None:
        self.stream, self.caller, self.methods = stream, caller, methods
        self.writing = trio.Lock()
        self.running: set[Any] = set()

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            try:
                await self._read(nursery)
            except (trio.BrokenResourceError, _ClientGone):
                pass  # a reset is how some clients leave
            finally:
                # The client is gone, so nobody waits for what still runs.
                nursery.cancel_scope.cancel()

    async def _read(self, nursery: trio.Nursery) -> None:
        buffer = bytearray()
        while True:
            chunk = await self.stream.receive_some(65536)
            if not chunk:
                return
            searched = len(buffer)
            buffer += chunk
            while (end := buffer.find(b"\n", searched)) >= 0:
                line, searched = bytes(buffer[:end]), 0
                del buffer[: end + 1]
                if line.strip():
                    await self._receive(line, nursery)
            if len(buffer) >= protocol.MAX_LINE:
                # There is no telling where the next message starts, so this ends the connection.
                too_long = Invalid(f"a request may have {protocol.MAX_LINE:,} bytes")
                await self._refuse(None, too_long, protocol.INVALID_REQUEST)
                return

    async def _receive(self, line: bytes, nursery: trio.Nursery) -> None:
        try:
            message = protocol.decode(line)
        except Invalid as error:
            await self._refuse(None, error, protocol.PARSE_ERROR)
            return
        if "id" not in message and isinstance(message.get("method"), str):
            return  # a notification asks for nothing that this side offers (JSON-RPC 2.0, 4.1)
        id, name, params = message.get("id"), message.get("method"), message.get("params", {})
        if isinstance(id, bool) or not isinstance(id, (int, str)):
            wrong: SandboxdError = Invalid("a request needs an id, a string or an integer")
            await self._refuse(None, wrong, protocol.INVALID_REQUEST)
        elif message.get("jsonrpc") != "2.0" or not (
            isinstance(name, str) and isinstance(params, dict)
        ):
            wrong = Invalid("a request is jsonrpc 2.0 with a method and an object of params")
            await self._refuse(id, wrong, protocol.INVALID_REQUEST)
        elif name not in self.methods:
            wrong = NotFound(
                f"this sandboxd has no method {shown(name)}",
                hint="sandboxctl and sandboxd may be of different versions: sandboxctl status",
            )
            await self._refuse(id, wrong, protocol.METHOD_NOT_FOUND)
        elif id in self.running or len(self.running) >= MAX_RUNNING:
            wrong = Conflict(f"{MAX_RUNNING} requests at most, each with an id of its own, may run")
            await self._refuse(id, wrong, protocol.INVALID_REQUEST)
        else:
            self.running.add(id)
            nursery.start_soon(self._answer, id, name, params, name=f"admin {name}")

    async def _answer(self, id: Any, name: str, params: dict[str, Any]) -> None:
        reply = Reply(None)
        try:
            try:
                reply = await self._run(id, name, params)
                line = protocol.encode(protocol.reply(id, reply.result, len(reply.fds)))
                sent_fds = reply.fds
            except _ClientGone:
                raise
            except Exception as error:  # noqa: BLE001  # one bad method must not end the daemon
                line, sent_fds = protocol.encode(_failed(id, name, error)), ()
            self.running.discard(id)
            await self._write(line, sent_fds)
        except _ClientGone:
            pass  # the reader notices too, and ends the connection
        finally:
            self.running.discard(id)
            for fd in reply.fds:
                os.close(fd)

    async def _run(self, id: Any, name: str, params: dict[str, Any]) -> Reply:
        started = self.methods[name](self.caller, params)
        if isinstance(started, AsyncGenerator):
            async with aclosing(started) as items:
                async for item in items:
                    if isinstance(item, Reply):
                        return item
                    await self._write(protocol.encode(protocol.stream_item(id, item)))
            return Reply({})
        return await started

    async def _refuse(self, id: Any, error: SandboxdError, number: int) -> None:
        await self._write(protocol.encode(protocol.failure(id, error, number)))

    async def _write(self, line: bytes, fds: Sequence[int] = ()) -> None:
        try:
            async with self.writing:
                if fds:
                    # Descriptors ride on the first byte; a partial write leaves only plain bytes.
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                    sent = await self.stream.socket.sendmsg([line], [rights])
                    line = line[sent:]
                await self.stream.send_all(line)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            raise _ClientGone from None


class _ClientGone(Exception):
    """A write failed because the client closed its end."""


async def _peer(stream: trio.SocketStream) -> Caller:
    layout = struct.Struct("iII")  # struct ucred, unix(7)
    got = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    pid, uid, gid = layout.unpack(got)
    # A directory service behind names and groups may be slow; nobody else waits for it.
    name, known = await trio.to_thread.run_sync(_login, uid, gid)
    groups = array.array("I")
    try:
        groups.frombytes(stream.socket.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024))
    except OSError as error:
        # More than the 256 groups that Python's buffer takes: ask the user database instead.
        if error.errno != errno.ERANGE:
            raise
        groups.extend(known)
    return Caller.local(uid, pid, name, (gid, *groups))


def _login(uid: int, gid: int) -> tuple[str, list[int]]:
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid), []
    return name, os.getgrouplist(name, gid)


async def clean_up(caller: Caller) -> None:
    """Do what the caller's methods left for when it is gone, within :data:`CLEANUP_SECONDS`."""
    with trio.move_on_after(CLEANUP_SECONDS) as scope:
        while caller._left:
            action = caller._left.pop()
            try:
                await action()
            except Exception as error:  # noqa: BLE001  # the next one still has to run
                _log.error("after an admin client left: %s", where(error))
    if scope.cancelled_caught:
        _log.error("cleaning up after an admin client took over %d seconds", CLEANUP_SECONDS)


def _failed(id: Any, method: str, error: Exception) -> dict[str, Any]:
    expected = only_expected(error)
    if expected is not None:
        return protocol.failure(id, expected)
    _log.error("admin method %s failed: %s", method, where(error))
    internal = SandboxdError(
        f"{method} failed inside sandboxd ({type(error).__name__})",
        hint="the daemon's log says where: journalctl -u sandboxd",
    )
    internal.code = "internal"
    return protocol.failure(id, internal, protocol.INTERNAL)


def only_expected(error: BaseException) -> SandboxdError | None:
    """The one SandboxdError that an exception or a nursery's group of them consists of."""
    if isinstance(error, SandboxdError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [only_expected(inner) for inner in error.exceptions]
        return found[0] if all(one is not None for one in found) else None
    return None


@contextmanager
def _bound(path: Path, mode: int, group: int | None) -> Iterator[socket.socket]:
    """A listening socket at ``path``, its permissions right from the first moment it is visible.

    It is made beside its place and renamed, while a lock file next to it is held for as long as the
    socket lives: two daemons that both see a stale socket can't unlink each other's new one.
    """
    fresh = path.with_name(f".{path.name}.new")
    if len(os.fsencode(fresh)) > MAX_SOCKET_PATH:
        raise Invalid(
            f"the socket path {path} is too long: {MAX_SOCKET_PATH - 5} bytes at most (unix(7))",
            hint="choose a shorter directory: --runtime DIR or SANDBOXD_RUNTIME=DIR",
        )
    with contextlib.ExitStack() as stack:
        lock = os.open(
            path.with_name(path.name + ".lock"),
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o600,
        )
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _served(path) from None
        _check_free(path)
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        # bind(2) takes the mode of the socket's own inode, so it is never wider than asked.
        os.fchmod(sock.fileno(), mode & 0o600)
        sock.bind(os.fspath(fresh))
        if group is not None:
            os.chown(fresh, -1, group)
        fresh.chmod(mode)
        sock.listen(128)
        ours = fresh.lstat()
        fresh.rename(path)
        stack.callback(_unlink_ours, path, ours)
        yield sock


def _check_free(path: Path) -> None:
    """Nothing at ``path``, or a socket that nobody listens on. Raises Conflict otherwise."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise Conflict(
            f"{path} exists and is not a socket", hint="move it away; sandboxd will not remove it"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        status = probe.connect_ex(os.fspath(path))
    # EAGAIN is a full backlog: somebody listens, however slowly. Only a refusal is a dead socket.
    if status not in (errno.ECONNREFUSED, errno.ENOENT):
        raise _served(path)


def _served(path: Path) -> Conflict:
    return Conflict(
        f"another sandboxd already serves {path}",
        hint="stop it first, or give this one another --runtime directory",
    )


def _unlink_ours(path: Path, ours: os.stat_result) -> None:
    with contextlib.suppress(OSError):
        there = path.lstat()
        if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
            path.unlink()
