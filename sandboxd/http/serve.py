"""Serves the HTTP API of one daemon on the socket that was opened before it gave up root."""

from __future__ import annotations

import logging
import socket

import trio

from sandboxd.http.app import make_app
from sandboxd.http.listen import Listening
from sandboxd.http.server import Bounds, Server
from sandboxd.policy.model import HttpSettings
from sandboxd.running import Daemon

__all__ = ["serve_http"]

_log = logging.getLogger(__name__)


async def serve_http(
    daemon: Daemon,
    listening: Listening,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; ``started()`` once clients get answers."""
    settings = daemon.boot.settings.http or HttpSettings()
    app = make_app(daemon)
    connections = int(settings.limits.connections)
    bounds = Bounds(connections=connections, connections_per_source=max(1, connections // 2))
    listening.socket.setblocking(False)
    if listening.socket.family != socket.AF_UNIX:
        listening.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain = trio.SocketListener(trio.socket.from_stdlib_socket(listening.socket))
    listeners: list[trio.SocketListener] | list[trio.SSLListener[trio.SocketStream]] = [plain]
    if listening.context is not None:
        listeners = [trio.SSLListener(plain, listening.context, https_compatible=True)]
    try:
        async with app.router.lifespan_context(app):
            _log.info("serving HTTP on %s", listening.url)
            await Server(app, bounds).serve(listeners, task_status=task_status)
    finally:
        listening.close()
