"""From an allowed destination to a connection: resolved once, checked, and dialled as checked.

The address that is checked is the one that is dialled, so a name that resolves differently a
moment later (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import trio

from sandboxd.errors import Denied, SandboxdError, Unavailable
from sandboxd.policy.destinations import Address, Admission, Destination

__all__ = ["Dialer"]

#: Seconds after which the next address is tried beside the one that doesn't answer (RFC 8305, 8).
_STAGGER = 0.25
#: Names that are looked up at once. A lookup is a thread that nothing can stop, so it counts until
#: its end; without a bound of its own one sandbox could take all threads of the broker with them.
_LOOKUPS = 8
#: Addresses of one name that are tried.
_MOST = 8

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]


class Dialer:
    """Resolves by the broker's own resolver, and connects."""

    def __init__(self, resolve: Resolve | None = None) -> None:
        self._resolve = resolve or partial(_system, trio.CapacityLimiter(_LOOKUPS))

    async def resolve(self, wanted: Destination, admission: Admission) -> tuple[Address, ...]:
        """The addresses of ``wanted`` that may be reached, in the resolver's order.

        Raises Denied when it has none that may be, Unavailable when it has none at all.
        """
        if wanted.address is not None:
            found: Sequence[Address] = (wanted.address,)
        else:
            found = await self._resolve(wanted.host, wanted.port)
        allowed, refusal = [], ""
        for address in dict.fromkeys(found):
            why = admission.refuses(address)
            if (
                not why
                and _is_ours(address)
                and not all(r.admits(address) for r in admission.rules)
            ):
                why = f"{address} is an address of this host itself"
            if why:
                refusal = refusal or why
            else:
                allowed.append(address)
        if allowed:
            return tuple(allowed[:_MOST])
        if refusal:
            raise Denied(f"{wanted.host}: {refusal}")
        raise Unavailable(f"{wanted.host} has no address", hint="look at the name's spelling")

    async def dial(
        self, wanted: Destination, addresses: Sequence[Address], timeout: float
    ) -> trio.SocketStream:
        """The first connection that one of ``addresses`` takes. Raises Unavailable."""
        failures: list[OSError] = []
        winner: list[trio.SocketStream] = []

        async def attempt(address: Address, failed: trio.Event, nursery: trio.Nursery) -> None:
            try:
                stream = await _connected(address, wanted.port)
            except OSError as failure:
                failures.append(failure)
                failed.set()
                return
            if winner:
                await trio.aclose_forcefully(stream)
                return
            winner.append(stream)
            nursery.cancel_scope.cancel()

        try:
            with trio.move_on_after(timeout):
                async with trio.open_nursery() as nursery:
                    failed: trio.Event | None = None
                    for address in addresses:
                        if failed is not None:
                            with trio.move_on_after(_STAGGER):
                                await failed.wait()
                        failed = trio.Event()
                        nursery.start_soon(attempt, address, failed, nursery)
        except BaseException:  # cancelled in the moment that one was made
            for stream in winner:
                await trio.aclose_forcefully(stream)
            raise
        if winner:
            return winner[0]
        if len(failures) < len(addresses):
            raise self.silent(wanted)
        reason = os.strerror(failures[0].errno or errno.EIO).lower()
        raise Unavailable(f"{wanted} can't be reached: {reason}")

    def silent(self, wanted: Destination) -> SandboxdError:
        """What to raise when nobody answered in time."""
        return Unavailable(f"{wanted} doesn't answer")


async def _connected(address: Address, port: int) -> trio.SocketStream:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.connect((str(address), port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


async def _system(lookups: trio.CapacityLimiter, host: str, port: int) -> Sequence[Address]:
    # The final dot keeps the resolver from trying the host's search domains.
    name = host if "." not in host else host + "."
    look_up = partial(socket.getaddrinfo, name, port, type=socket.SOCK_STREAM)
    try:
        found: Any = await trio.to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=lookups)
    except OSError:
        raise Unavailable(f"{host} can't be resolved", hint="look at the name's spelling") from None
    return [ipaddress.ip_address(entry[4][0].partition("%")[0]) for entry in found]


def _is_ours(address: Address) -> bool:
    """Whether the kernel answers from ``address`` itself. Nothing is sent (udp(7))."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((str(address), 9))
        return bool(ipaddress.ip_address(probe.getsockname()[0]) == address)
    return False
