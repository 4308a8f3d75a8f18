"""What a sandbox without a network may reach all the same: as files say it, and as terms to hold.

The network stays an empty namespace. What is allowed is connected by the broker, which decides by
these terms for each connection (:mod:`sandboxd.policy.destinations`).
"""

from __future__ import annotations

import attrs

from sandboxd.policy.destinations import (
    AddressRange,
    Destination,
    DestinationRule,
    HostAddress,
    HostPattern,
    HostPort,
    Port,
    Verdict,
    decide,
    destination,
    read_address,
)
from sandboxd.policy.gateways import Gateway, check_gateways, completed
from sandboxd.policy.placeholders import Placeholder, check_placeholders, placed_placeholders
from sandboxd.policy.problems import Problems
from sandboxd.policy.yamlpos import Document

__all__ = [
    "NO_EGRESS",
    "PROXY_PORT",
    "Egress",
    "EgressTerms",
    "Relay",
    "check_egress",
    "decide_egress",
    "egress_lines",
    "placed",
    "placed_rules",
]

#: Where a sandbox finds the proxy, on its own loopback.
PROXY_PORT = 3128


@attrs.frozen
class Relay:
    """One TCP destination that appears inside under its own name and port.

    With an ``address`` the name is not resolved. ``addresses``: as of a rule.
    """

    to: HostPort
    address: HostAddress | None = None
    addresses: tuple[AddressRange, ...] = ()
    source: str = attrs.field(default="", metadata={"loaded": True})

    @property
    def destination(self) -> Destination:
        host, _, port = self.to.rpartition(":")
        wanted = destination(host, int(port))
        if self.address is None:
            return wanted
        return attrs.evolve(wanted, address=read_address(self.address))

    @property
    def rule(self) -> DestinationRule:
        """What the relay allows, as a rule."""
        wanted = self.destination
        return DestinationRule(
            HostPattern(wanted.host),
            ports=(Port(wanted.port),),
            addresses=(*self.addresses, *_own(self.address)),
            source=self.source,
        )


def _own(address: HostAddress | None) -> tuple[AddressRange, ...]:
    return () if address is None else (AddressRange(address),)


@attrs.frozen
class Egress:
    """``egress`` of an agent or a tool."""

    allow: tuple[DestinationRule, ...] = ()
    relays: tuple[Relay, ...] = ()
    gateways: tuple[Gateway, ...] = ()
    placeholders: tuple[Placeholder, ...] = ()

    @property
    def stated(self) -> bool:
        return bool(self.allow or self.relays or self.gateways or self.placeholders)

    @property
    def proxied(self) -> tuple[DestinationRule, ...]:
        """What the proxy reaches; there is one where this isn't empty."""
        return (*self.allow, *(rule for one in self.placeholders for rule in one.rules))


@attrs.frozen
class EgressTerms:
    """What one sandbox may reach. ``bounds``: lists that each have to allow a destination too."""

    egress: Egress = Egress()
    bounds: tuple[tuple[DestinationRule, ...], ...] = ()

    @property
    def lists(self) -> tuple[tuple[DestinationRule, ...], ...]:
        """The lists by which the proxy decides."""
        return (self.egress.proxied, *self.bounds)

    def of(self, entry: Relay | Gateway) -> tuple[tuple[DestinationRule, ...], ...]:
        """The lists by which a relay or a gateway is decided."""
        return ((entry.rule,), *self.bounds)


#: Nothing at all.
NO_EGRESS = EgressTerms()


def decide_egress(terms: EgressTerms, wanted: Destination, method: str = "") -> Verdict:
    """Whether ``wanted`` may be reached by the proxy, or else by the relay of its name."""
    verdict = decide(terms.lists, wanted, method)
    if verdict.admission is not None:
        return verdict
    for relay in terms.egress.relays:
        if relay.destination == wanted:
            return decide(terms.of(relay), wanted)
    return verdict


def egress_lines(terms: EgressTerms) -> list[str]:
    """What ``terms`` allow, a line each, for people."""
    lines = [_line(rule, "") for rule in terms.egress.allow]
    lines += [_line(relay.rule, "relay ") for relay in terms.egress.relays]
    lines += [
        _line(one.rule, f"gateway 127.0.0.1:{one.port}, {one.secret} in {one.style[0]}, to ")
        for one in terms.egress.gateways
    ]
    lines += [
        _line(rule, f"placeholder {one.variable} for {one.secret}, at ")
        for one in terms.egress.placeholders
        for rule in one.rules
    ]
    for bounds in terms.bounds if lines else ():
        names = ", ".join(_line(rule, "") for rule in bounds)
        lines.append(f"within: {names or 'nothing, by the policy'}")
    return lines


def _line(rule: DestinationRule, kind: str) -> str:
    ports = ",".join(map(str, rule.ports))
    more = [*rule.methods, *(f"at {one}" for one in rule.addresses)]
    return f"{kind}{rule.host}:{ports}" + (f" ({', '.join(more)})" if more else "")


def placed(egress: Egress, document: Document, label: str) -> Egress:
    """With the file and line of each entry."""
    return Egress(
        placed_rules(egress.allow, document, label, ("egress", "allow")),
        tuple(
            attrs.evolve(relay, source=f"{label}:{document.at(('egress', 'relays', n)).line}")
            for n, relay in enumerate(egress.relays)
        ),
        completed(egress.gateways, document, label),
        placed_placeholders(egress.placeholders, document, label),
    )


def placed_rules(
    rules: tuple[DestinationRule, ...], document: Document, label: str, path: tuple[str, ...]
) -> tuple[DestinationRule, ...]:
    """With the file and line of each rule of the list at ``path``."""
    return tuple(
        attrs.evolve(rule, source=f"{label}:{document.at((*path, n)).line}")
        for n, rule in enumerate(rules)
    )


def check_egress(egress: Egress, network: str, document: Document, problems: Problems) -> None:
    """What one file says that can't hold together."""
    if egress.stated and network == "host":
        problems.add(
            document.file,
            document.at(("egress",)),
            "egress beside network: host, which reaches everything",
            "leave network out: what egress names is reached without a network",
        )
    check_gateways(egress.gateways, document, problems)
    check_placeholders(egress.placeholders, document, problems)
    for index, gateway in enumerate(egress.gateways):
        if gateway.port == PROXY_PORT:
            problems.add(
                document.file,
                document.at(("egress", "gateways", index, "port")),
                f"port {PROXY_PORT} is the proxy's",
            )
    seen: dict[str, str] = {}
    for index, relay in enumerate(egress.relays):
        wanted = relay.destination
        if wanted.address is not None and relay.address is None:
            problems.add(
                document.file,
                document.at(("egress", "relays", index, "to")),
                f"{wanted} is an address; a relay appears under a name",
                "give the name that clients use, and beside it the address",
            )
        elif str(wanted) in seen:
            problems.add(
                document.file,
                document.at(("egress", "relays", index, "to")),
                f"{wanted} is relayed twice",
            )
        seen[str(wanted)] = ""
