"""Where a connection may go: names, addresses and the rules that name them. Pure decisions.

A name is decided by its text and then, once resolved, by its address: both have to be allowed.
What isn't public is refused unless a rule names that very address or network, in whatever
spelling it comes, because such addresses lead to the host, its neighbours and the cloud's
metadata service (RFC 6890, RFC 6598, RFC 1918, RFC 4193).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, NewType

import attrs

from sandboxd.errors import Invalid
from sandboxd.names import shown
from sandboxd.policy.values import Wrong, checked_text, found, text

__all__ = [
    "ANY_HOST",
    "Address",
    "AddressRange",
    "Admission",
    "Destination",
    "DestinationRule",
    "HostAddress",
    "HostPattern",
    "HostPort",
    "HttpMethod",
    "Network",
    "Port",
    "Verdict",
    "checks",
    "decide",
    "destination",
    "host_pattern",
    "kind_of",
    "network",
    "read_address",
    "split_authority",
]

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: A host name, ``*.`` and a suffix, an address, or :data:`ANY_HOST`.
HostPattern = NewType("HostPattern", str)
#: An address or a network, as its text.
AddressRange = NewType("AddressRange", str)
HostAddress = NewType("HostAddress", str)
HostPort = NewType("HostPort", str)
HttpMethod = NewType("HttpMethod", str)
Port = NewType("Port", int)

#: Every public host: for a policy, which bounds what agents and tools name.
ANY_HOST = "*"

#: A host name's label: letters, digits and hyphens (RFC 1123, 2.1); underscores do occur in DNS.
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
#: A last label that some resolver or library takes for a part of an address (inet_aton(3)).
_NUMBER = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)")
_MAX_NAME = 253
_PORT = re.compile(r"[0-9]{1,5}")

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
#: Ranges that ipaddress's own properties don't tell, or not in every version of Python.
_KINDS: tuple[tuple[str, Network], ...] = (
    ("of a cloud's metadata service", ipaddress.ip_network("169.254.169.254/32")),
    ("of a cloud's metadata service", ipaddress.ip_network("fd00:ec2::254/128")),
    ("of a cloud's metadata service", ipaddress.ip_network("100.100.100.200/32")),
    ("of shared address space", ipaddress.ip_network("100.64.0.0/10")),
    ("of protocol assignments", ipaddress.ip_network("192.0.0.0/24")),
    ("for documentation", ipaddress.ip_network("192.0.2.0/24")),
    ("for documentation", ipaddress.ip_network("198.51.100.0/24")),
    ("for documentation", ipaddress.ip_network("203.0.113.0/24")),
    ("for documentation", ipaddress.ip_network("2001:db8::/32")),
    ("for documentation", ipaddress.ip_network("3fff::/20")),
    ("for benchmarks", ipaddress.ip_network("198.18.0.0/15")),
    ("of a retired relay", ipaddress.ip_network("192.88.99.0/24")),
    ("of this network", ipaddress.ip_network("0.0.0.0/8")),
    ("reserved", ipaddress.ip_network("240.0.0.0/4")),
    ("of protocol assignments", ipaddress.ip_network("2001::/23")),
)


@attrs.frozen
class Destination:
    """A host as a client named it, normal: a name in lower case, or an address; and a port."""

    host: str
    port: int
    address: Address | None = None

    def __str__(self) -> str:
        colon = isinstance(self.address, IPv6Address)
        return f"[{self.host}]:{self.port}" if colon else f"{self.host}:{self.port}"


@attrs.frozen
class DestinationRule:
    """Hosts that may be reached. ``host``: a name, ``*.`` and a suffix, or an address.

    ``methods`` hold for plain HTTP, the only requests that can be read; empty: all.
    ``addresses``: what else than public addresses the host may have.
    """

    host: HostPattern
    ports: tuple[Port, ...] = (Port(443),)
    methods: tuple[HttpMethod, ...] = ()
    addresses: tuple[AddressRange, ...] = ()
    source: str = attrs.field(default="", metadata={"loaded": True})

    @property
    def title(self) -> str:
        """How audit and explain name it: file, line and what it allows."""
        ports = ",".join(map(str, self.ports))
        return f"{self.source} allow {self.host}:{ports}".lstrip()

    def names(self, wanted: Destination) -> bool:
        """Whether the host is one that this rule names."""
        if self.host == ANY_HOST:
            return True
        if self.host.startswith("*."):
            return wanted.host.endswith(self.host[1:])
        return wanted.host == self.host

    def admits(self, address: Address) -> bool:
        """Whether an address that isn't public is named."""
        ranges = map(network, self.addresses)
        return str(address) == self.host or any(
            address.version == one.version and address in one for one in ranges
        )


@attrs.frozen
class Admission:
    """The rules by which a destination was allowed, one of each list; they decide addresses too."""

    rules: tuple[DestinationRule, ...]

    def refuses(self, address: Address) -> str:
        """Why this address of the destination may not be reached; empty: it may."""
        plain = _plain(address)
        if plain is None:
            return f"{address} is an address that carries another one"
        kind = kind_of(plain)
        if kind and not all(rule.admits(plain) for rule in self.rules):
            return f"{plain} is an address {kind}"
        return ""


@attrs.frozen
class Verdict:
    """Whether a destination may be reached at all, by which rule, and why not."""

    admission: Admission | None
    rule: str
    reason: str = ""


def decide(
    lists: Sequence[Sequence[DestinationRule]], wanted: Destination, method: str = ""
) -> Verdict:
    """Every list has to allow ``wanted``: the first is who asks, the rest bound what that may.

    ``method`` is that of a plain HTTP request, empty where none is in sight. An address given
    outright is checked here; those of a name once it is resolved (:meth:`Admission.refuses`).
    """
    chosen: list[DestinationRule] = []
    for rules in lists:
        rule, reason = _chosen(rules, wanted, method)
        if rule is None:
            return Verdict(None, "default deny", reason)
        chosen.append(rule)
    admission = Admission(tuple(chosen))
    if not chosen:
        return Verdict(None, "default deny", f"nothing allows {wanted}")
    decided = chosen[0].title
    if wanted.address is not None and (refusal := admission.refuses(wanted.address)):
        return Verdict(None, decided, refusal)
    return Verdict(admission, decided)


def _chosen(
    rules: Iterable[DestinationRule], wanted: Destination, method: str
) -> tuple[DestinationRule | None, str]:
    reason = f"no rule names the host {wanted.host}"
    for rule in rules:
        if not rule.names(wanted):
            continue
        if wanted.port not in rule.ports:
            reason = f"no rule allows port {wanted.port} of {wanted.host}"
        elif method and rule.methods and method not in rule.methods:
            reason = f"no rule allows {method} to {wanted}"
        else:
            return rule, ""
    return None, reason


def destination(host: str, port: int) -> Destination:
    """The destination that a client names. Raises Invalid for what has more than one reading.

    Decimal, octal, hexadecimal and shortened addresses, which inet_aton(3) takes and a check by
    text doesn't, are refused; so are zone indices, NUL and anything outside of ASCII.
    """
    if not 0 < port < 65536:
        raise Invalid(f"there is no port {port}")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in bare or _NUMBER.fullmatch(bare.rstrip(".").rpartition(".")[2].lower()):
        address = read_address(bare)
        return Destination(str(address), port, address)
    return Destination(_name(bare), port)


def split_authority(words: str, default: int | None) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[address]:port``. Raises Invalid.

    User information, which some clients and servers read differently, is refused.
    """
    if "@" in words:
        raise Invalid("an address with a user name in it is not taken")
    host, colon, port = words.rpartition(":")
    if not colon or words.endswith("]"):
        host, port = words, ""
    if not port:
        if default is None or (colon and not words.endswith("]")):
            raise Invalid(f"{shown(words)} has no port")
        return host, default
    if not _PORT.fullmatch(port):
        raise Invalid(f"{shown(words)} has no valid port")
    return host, int(port)


def host_pattern(words: str) -> HostPattern:
    """A rule's host in its normal form. Raises Invalid for what can't be one."""
    if words == ANY_HOST:
        return HostPattern(ANY_HOST)
    if words.startswith("*."):
        suffix = _name(words[2:])
        if "." not in suffix:
            raise Invalid(
                f"{shown(words)} would allow a whole top-level domain",
                hint="name at least two labels: '*.example.com'",
            )
        return HostPattern("*." + suffix)
    if "*" in words:
        raise Invalid(
            f"{shown(words)} is not a host",
            hint="a * stands for whole labels at the beginning only",
        )
    return HostPattern(destination(words, 443).host)


@lru_cache(maxsize=1024)
def network(words: str) -> Network:
    """An address or a network in CIDR form. Raises Invalid."""
    try:
        return ipaddress.ip_network(words, strict=True)
    except ValueError:
        raise Invalid(
            f"{shown(words)} is not an address or a network",
            hint="write it as 10.1.2.3, 10.1.0.0/16 or fd00:1::/64",
        ) from None


def read_address(words: str) -> Address:
    """An address in its one canonical kind of spelling. Raises Invalid."""
    try:
        address = ipaddress.ip_address(words)
    except ValueError:
        raise Invalid(
            f"{shown(words)} is neither a host name nor an address in its usual spelling",
            hint="write an IPv4 address as four decimal numbers, an IPv6 address in brackets",
        ) from None
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise Invalid(f"{shown(words)} names an interface of the host")
    return address


def kind_of(address: Address) -> str:
    """What kind of address this is, when it isn't a public one; empty for a public one."""
    for kind, range_ in _KINDS:
        if address.version == range_.version and address in range_:
            return kind
    for kind, is_one in (
        ("of this host itself", address.is_loopback),
        ("of this host itself", address.is_unspecified),
        ("of the local link", address.is_link_local),
        ("for many receivers", address.is_multicast),
        ("of a private network", address.is_private),
        ("that is reserved", address.is_reserved),
    ):
        if is_one:
            return kind
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return "outside of what is public"
    return "" if address.is_global else "outside of what is public"


def _plain(address: Address) -> Address | None:
    """The IPv4 address that an IPv6 one maps to, or itself. None: it carries one in another way.

    6to4 (RFC 3056), Teredo (RFC 4380), NAT64 (RFC 6052, RFC 8215) and IPv4-compatible addresses
    lead to an IPv4 address that nobody checked.
    """
    if isinstance(address, IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    packed = address.packed
    compatible = packed[:12] == bytes(12) and int(address) > 1
    nat64 = packed[:4] == b"\x00\x64\xff\x9b"
    if address.sixtofour is not None or address.teredo is not None or compatible or nat64:
        return None
    return address


def _name(words: str) -> str:
    name = words.lower().removesuffix(".")
    if not words.isascii() or not name or len(name) > _MAX_NAME:
        raise Invalid(
            f"{shown(words)} is not a host name",
            hint="write a name in other letters in its xn-- form",
        )
    if not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise Invalid(f"{shown(words)} is not a host name")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        raise Invalid(f"{shown(words)} is neither a host name nor an address")
    return name


def _port(value: Any) -> Port:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65536:
        raise Wrong(f"expected a port from 1 to 65535, found {found(value)}")
    return Port(value)


def _method(value: Any) -> HttpMethod:
    words = text(value)
    if not re.fullmatch(r"[A-Z]{1,20}", words) or words == "CONNECT":
        raise Wrong(f"expected a method of HTTP, found {found(value)}", "write GET, HEAD, POST")
    return HttpMethod(words)


def _host_port(words: str) -> HostPort:
    host, _, port = words.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        raise Invalid(f"{shown(words)} is not a host and a port", hint="write db.internal:5432")
    wanted = destination(host, int(port))
    return HostPort(str(wanted))


def _range(words: str) -> AddressRange:
    return AddressRange(str(network(words)))


#: How the values of rules are read from a file.
checks: dict[Any, Callable[[Any], Any]] = {
    HostPattern: checked_text(host_pattern),
    HostPort: checked_text(_host_port),
    AddressRange: checked_text(_range),
    HostAddress: checked_text(lambda words: HostAddress(str(read_address(words)))),
    HttpMethod: _method,
    Port: _port,
}
