"""Where a sandbox finds what it may reach: pure, from its terms to listeners and variables.

The proxy is on 127.0.0.1; every relayed host has an address of its own on loopback, to which its
name leads by hosts(5), so that its ports are what clients expect.
"""

from __future__ import annotations

from sandboxd.isolation.listeners import Listener
from sandboxd.policy.egress import PROXY_PORT, EgressTerms, Relay

__all__ = ["AUTHORITIES", "PROXY", "environment", "listeners", "relayed", "trusting"]

#: Where a sandbox with placeholders finds the authorities to trust, the system's among them.
AUTHORITIES = "/run/sandboxd/authorities.pem"
#: The variables by which programs are told of such a file: OpenSSL and what uses it, curl, git,
#: Python's requests, pip, npm, Node.js, cargo, AWS's tools, Deno.
_TRUST = (
    "SSL_CERT_FILE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "REQUESTS_CA_BUNDLE", "PIP_CERT",
    "npm_config_cafile", "NODE_EXTRA_CA_CERTS", "CARGO_HTTP_CAINFO", "AWS_CA_BUNDLE", "DENO_CERT",
)  # fmt: skip

PROXY = Listener("127.0.0.1", PROXY_PORT)


def listeners(terms: EgressTerms) -> tuple[Listener, ...]:
    """The proxy where hosts are allowed, then one for each relay and gateway in order."""
    proxy = (PROXY,) if terms.egress.proxied else ()
    gateways = (Listener(PROXY.address, one.port) for one in terms.egress.gateways)
    return (*proxy, *(listener for listener, _ in relayed(terms)), *gateways)


def relayed(terms: EgressTerms) -> list[tuple[Listener, Relay]]:
    """Each relay with its listener."""
    addresses: dict[str, str] = {}
    found = []
    for relay in terms.egress.relays:
        wanted = relay.destination
        address = addresses.setdefault(wanted.host, f"127.0.0.{2 + len(addresses)}")
        found.append((Listener(address, wanted.port, wanted.host), relay))
    return found


def environment(terms: EgressTerms) -> dict[str, str]:
    """The variables by which programs find gateways and the proxy; none where there is none.

    Those of the proxy in both cases of letters, for curl reads the lower one alone of http_proxy.
    """
    found: dict[str, str] = {}
    for gateway in terms.egress.gateways:
        found |= gateway.variables
    if not terms.egress.proxied:
        return found
    url = f"http://{PROXY.address}:{PROXY.port}"
    direct = ",".join(dict.fromkeys(("localhost", "127.0.0.1", *_names(terms))))
    for name, value in (("HTTP_PROXY", url), ("HTTPS_PROXY", url), ("NO_PROXY", direct)):
        found[name] = found[name.lower()] = value
    return {**found, "NODE_USE_ENV_PROXY": "1"}  # Node.js reads them only then


def trusting() -> dict[str, str]:
    """The variables by which programs trust what is in :data:`AUTHORITIES`."""
    return dict.fromkeys(_TRUST, AUTHORITIES)


def _names(terms: EgressTerms) -> list[str]:
    return [relay.destination.host for relay in terms.egress.relays]
