"""One sandbox's way out, from its launch to its end: the sockets passed out of it, served."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import trio

from sandboxd.egress.dial import Dialer
from sandboxd.egress.exchange import Credential
from sandboxd.egress.gate import Bounds, Gate, Record
from sandboxd.egress.gateway import serve_gateway
from sandboxd.egress.intercept import Interception, Stand, token
from sandboxd.egress.layout import AUTHORITIES, listeners, relayed, trusting
from sandboxd.egress.proxy import serve_proxy
from sandboxd.egress.relay import serve_relay
from sandboxd.errors import Denied
from sandboxd.isolation.listeners import take
from sandboxd.isolation.wire import FileSpec, LaunchSpec
from sandboxd.policy.egress import EgressTerms
from sandboxd.policy.gateways import Gateway
from sandboxd.policy.placeholders import Placeholder
from sandboxd.vault.vault import Snapshot, Vault

__all__ = ["Outlet", "open_outlet"]


@dataclass
class Outlet:
    """A launch with listeners takes :attr:`fds` along; then come :meth:`take` and :meth:`serve`."""

    terms: EgressTerms
    who: Mapping[str, Any]
    record: Record
    dialer: Dialer
    explain: str
    credentials: Mapping[str, Credential]
    interception: Interception | None = None
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

    def close(self) -> None:
        """Close what was taken and isn't served."""
        while self._made:
            self._made.pop().close()

    def complete(self, spec: LaunchSpec) -> LaunchSpec:
        """The launch with placeholders, and with the authority that vouches for their hosts."""
        if self.interception is None:
            return spec
        environment = {**dict(spec.env), **self.environment}
        file = FileSpec(AUTHORITIES, self.interception.authority.bundle(), 0o444)
        return replace(spec, env=tuple(environment.items()), files=(*spec.files, file))

    @property
    def environment(self) -> dict[bytes, bytes]:
        """The variables of placeholders, and those by which programs trust their hosts here."""
        if self.interception is None:
            return {}
        stands = self.interception.stands
        own = {stand.placeholder.variable.encode(): stand.token for stand in stands}
        return own | {name.encode(): path.encode() for name, path in trusting().items()}

    async def serve(self) -> None:
        """Serve what :meth:`take` took, until cancelled; the sockets are closed then."""
        made, self._made = self._made, []
        for one in made:
            one.setblocking(False)
        accepting = [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in made]
        async with self._intercepting(), trio.open_nursery() as nursery:
            if made and self.terms.egress.proxied:
                gate = self._gate(self.terms.lists)
                nursery.start_soon(serve_proxy, accepting.pop(0), gate, self.interception)
            for _, relay in relayed(self.terms) if made else ():
                gate = self._gate(self.terms.of(relay))
                nursery.start_soon(serve_relay, accepting.pop(0), gate, relay.destination)
            for gateway in self.terms.egress.gateways if made else ():
                gate = self._gate(self.terms.of(gateway))
                held = self.credentials[gateway.secret]
                nursery.start_soon(serve_gateway, accepting.pop(0), gateway, gate, held)

    def _intercepting(self) -> AbstractAsyncContextManager[None]:
        return self.interception.open() if self.interception is not None else nullcontext()

    def _gate(self, lists: Any) -> Gate:
        return Gate(lists, self.who, self.record, self.dialer, self.explain, self.bounds)


@contextmanager
def open_outlet(
    terms: EgressTerms, who: Mapping[str, Any], record: Record, vault: Vault, snapshot: Snapshot
) -> Iterator[Outlet]:
    """The outlet of a sandbox that is about to be launched with these terms.

    ``who`` is in every record: agent and session, and of a call its tool. Credentials are those of
    ``snapshot``, unsealed for each request. Raises Denied when one of a gateway isn't there.
    """
    tool = f" --tool {who['tool']}" if "tool" in who else ""
    explain = f"sandboxctl policy egress {who['agent']}{tool}"
    credentials: dict[str, Credential] = {
        one.secret: _credential(one, vault, snapshot) for one in terms.egress.gateways
    }
    stands = tuple(_stand(one, vault, snapshot) for one in terms.egress.placeholders)
    interception = Interception(stands) if stands else None
    outlet = Outlet(terms, who, record, Dialer(), explain, credentials, interception)
    if not listeners(terms):
        yield outlet
        return
    inlet, out = socket.socketpair()
    with inlet, out:
        outlet._inlet, outlet._outlet = inlet, out
        yield outlet


def _stand(placeholder: Placeholder, vault: Vault, snapshot: Snapshot) -> Stand:
    return Stand(placeholder, token().encode(), _credential(placeholder, vault, snapshot))


def _credential(one: Gateway | Placeholder, vault: Vault, snapshot: Snapshot) -> Credential:
    sealed = snapshot.variables.get(one.secret)
    if sealed is None:
        kind = "gateway" if isinstance(one, Gateway) else "placeholder"
        raise Denied(
            f"agent {snapshot.agent} has no variable {one.secret}, which its way out adds",
            rule=f"{one.source} {kind}",
            hint=f"set it: sandboxctl env set {snapshot.agent} {one.secret}",
        )
    return Credential(sealed.name, sealed.version, partial(vault.unseal, sealed))
