"""One sandbox's way out, from its launch to its end: the sockets passed out of it, served."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from sandboxd.egress.dial import Dialer
from sandboxd.egress.gate import Bounds, Gate, Record
from sandboxd.egress.layout import listeners, relayed
from sandboxd.egress.proxy import serve_proxy
from sandboxd.egress.relay import serve_relay
from sandboxd.isolation.listeners import take
from sandboxd.policy.egress import EgressTerms

__all__ = ["Outlet", "open_outlet"]

_log = logging.getLogger(__name__)


@dataclass
class Outlet:
    """A launch with listeners takes :attr:`fds` along; then come :meth:`take` and :meth:`serve`."""

    terms: EgressTerms
    who: Mapping[str, Any]
    record: Record
    dialer: Dialer
    explain: str
    bounds: Bounds = field(default_factory=Bounds)
    _inlet: socket.socket | None = field(default=None, repr=False)
    _outlet: socket.socket | None = field(default=None, repr=False)
    _made: list[socket.socket] = field(default_factory=list, repr=False)

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptor for the launch to bring; none where nothing is allowed."""
        return (self._outlet.fileno(),) if self._outlet is not None else ()

    def take(self) -> None:
        """Take what the launched sandbox passed out. Raises KernelError when it isn't there."""
        if self._inlet is not None:
            self._made = take(self._inlet, len(listeners(self.terms)))

    async def serve(self) -> None:
        """Serve what :meth:`take` took, until cancelled; the sockets are closed then."""
        made, self._made = self._made, []
        for one in made:
            one.setblocking(False)
        accepting = [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in made]
        async with trio.open_nursery() as nursery:
            if made and self.terms.egress.allow:
                nursery.start_soon(serve_proxy, accepting.pop(0), self._gate(self.terms.lists))
            for listener, (_, relay) in zip(accepting, relayed(self.terms), strict=bool(made)):
                gate = self._gate(self.terms.of_relay(relay))
                nursery.start_soon(serve_relay, listener, gate, relay.destination)

    def _gate(self, lists: Any) -> Gate:
        return Gate(lists, self.who, self.record, self.dialer, self.explain, self.bounds)


@contextmanager
def open_outlet(terms: EgressTerms, who: Mapping[str, Any], record: Record) -> Iterator[Outlet]:
    """The outlet of a sandbox that is about to be launched with these terms.

    ``who`` is in every record: agent and session, and of a call its tool.
    """
    tool = f" --tool {who['tool']}" if "tool" in who else ""
    explain = f"sandboxctl policy egress {who['agent']}{tool}"
    outlet = Outlet(terms, who, record, Dialer(), explain)
    if not listeners(terms):
        yield outlet
        return
    inlet, out = socket.socketpair()
    with inlet, out:
        outlet._inlet, outlet._outlet = inlet, out
        yield outlet
