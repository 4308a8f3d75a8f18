"""A TCP relay: one listening socket in a sandbox, one destination, and no byte of it looked at."""

from __future__ import annotations

import contextlib
import logging

import trio

from sandboxd.egress.accept import serve_each
from sandboxd.egress.gate import Gate
from sandboxd.egress.pump import pump
from sandboxd.errors import SandboxdError
from sandboxd.policy.destinations import Destination

__all__ = ["serve_relay"]

_log = logging.getLogger(__name__)


async def serve_relay(listener: trio.SocketListener, gate: Gate, wanted: Destination) -> None:
    """Serve until cancelled. A connection that can't be made is closed: there is no other answer.

    Why is in the audit record.
    """

    async def one(stream: trio.SocketStream) -> None:
        try:
            connection = await gate.open(wanted, "relay")
        except SandboxdError as refusal:
            _log.info("relay to %s: %s", wanted, refusal.message)
            return
        outcome = "cancelled"
        try:
            with contextlib.suppress(trio.BrokenResourceError):
                outcome = await pump(stream, connection, gate.bounds)
        finally:
            await gate.close(connection, outcome)

    await serve_each(listener, one, gate.bounds.connections)
