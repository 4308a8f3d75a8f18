"""Placeholder credentials as files say them: for clients that insist on TLS to the real host.

The sandbox gets a value that means nothing; the broker reads what a client sends to the named hosts
and puts the real one in its place. That takes an authority of the sandbox's own, which its programs
have to trust, so it is asked for by name and never a default.
"""

from __future__ import annotations

import attrs

from sandboxd.policy.destinations import (
    AddressRange,
    DestinationRule,
    HostPattern,
    Port,
    destination,
)
from sandboxd.policy.problems import Problems
from sandboxd.policy.values import AbsolutePath, VariableName
from sandboxd.policy.yamlpos import Document

__all__ = ["TLS_PORT", "Placeholder", "check_placeholders", "placed_placeholders"]

TLS_PORT = Port(443)


@attrs.frozen
class Placeholder:
    """The variable ``secret`` of the store, standing for itself at ``hosts`` alone.

    Programs find the placeholder in the environment as ``as_name``, or under the secret's own name.
    ``ca``: what the hosts' certificates are checked by, instead of the system's authorities.
    """

    secret: VariableName
    hosts: tuple[HostPattern, ...]
    as_name: VariableName | None = attrs.field(default=None, metadata={"key": "as"})
    port: Port = TLS_PORT
    addresses: tuple[AddressRange, ...] = ()
    ca: AbsolutePath | None = None
    source: str = attrs.field(default="", metadata={"loaded": True})

    @property
    def variable(self) -> str:
        return self.as_name or self.secret

    @property
    def rules(self) -> tuple[DestinationRule, ...]:
        """What it reaches, as rules."""
        return tuple(
            DestinationRule(host, ports=(self.port,), addresses=self.addresses, source=self.source)
            for host in self.hosts
        )


def placed_placeholders(
    placeholders: tuple[Placeholder, ...], document: Document, label: str
) -> tuple[Placeholder, ...]:
    """With the file and line of each."""
    return tuple(
        attrs.evolve(one, source=f"{label}:{document.at(('egress', 'placeholders', n)).line}")
        for n, one in enumerate(placeholders)
    )


def check_placeholders(
    placeholders: tuple[Placeholder, ...], document: Document, problems: Problems
) -> None:
    """What one file says that can't hold together."""
    names: set[str] = set()
    settings: dict[tuple[str, int], Placeholder] = {}
    for index, one in enumerate(placeholders):

        def add(key: str, message: str, hint: str = "", at: int = index) -> None:
            place = document.at(("egress", "placeholders", at, key))
            problems.add(document.file, place, message, hint)

        if not one.hosts:
            add("hosts", "expected at least one host")
        if one.variable in names:
            add("as", f"the variable {one.variable} is another placeholder's")
        names.add(one.variable)
        for host in one.hosts:
            if "*" in host or destination(host, one.port).address is not None:
                add("hosts", f"{host} is not the name of one host", "name each host in full")
            other = settings.setdefault((host, one.port), one)
            if other.ca != one.ca or other.addresses != one.addresses:
                add("hosts", f"{host} has another ca or other addresses above")
