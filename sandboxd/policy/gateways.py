"""Credential gateways as files say them: one upstream, one credential that stays outside.

A program in the sandbox speaks plain HTTP to its own loopback; the broker adds the credential on
the way to the upstream, over TLS. The presets are what the makers of the APIs document.
"""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

import attrs

from sandboxd.policy.destinations import (
    AddressRange,
    Destination,
    DestinationRule,
    HostPattern,
    HttpMethod,
    Port,
    destination,
)
from sandboxd.policy.problems import Problems
from sandboxd.policy.values import AbsolutePath, Count, Line, VariableName, WebAddress, Wrong, text
from sandboxd.policy.yamlpos import Document

__all__ = ["PLACEHOLDER", "Gateway", "HeaderName", "check_gateways", "completed", "path_pattern"]

#: What programs that insist on a key are given instead of one.
PLACEHOLDER = "held-by-sandboxd"

HeaderName = Literal["authorization", "x-api-key", "x-goog-api-key", "api-key", "private-token"]
Scheme = Literal["plain", "bearer", "basic", "token"]
Preset = Literal["anthropic", "openai", "google", "mistral", "github"]


@attrs.frozen
class _Known:
    """What a preset stands for. ``variables``: with {url} for the gateway's own address."""

    upstream: str
    header: HeaderName
    scheme: Scheme
    variables: tuple[tuple[str, str], ...]


_PRESETS: dict[str, _Known] = {
    "anthropic": _Known(
        "https://api.anthropic.com",
        "x-api-key",
        "plain",
        (("ANTHROPIC_BASE_URL", "{url}"), ("ANTHROPIC_API_KEY", PLACEHOLDER)),
    ),
    "openai": _Known(
        "https://api.openai.com",
        "authorization",
        "bearer",
        (("OPENAI_BASE_URL", "{url}/v1"), ("OPENAI_API_KEY", PLACEHOLDER)),
    ),
    "google": _Known(
        "https://generativelanguage.googleapis.com",
        "x-goog-api-key",
        "plain",
        (("GOOGLE_GEMINI_BASE_URL", "{url}"), ("GEMINI_API_KEY", PLACEHOLDER)),
    ),
    "mistral": _Known(
        "https://api.mistral.ai",
        "authorization",
        "bearer",
        (("MISTRAL_SERVER_URL", "{url}"), ("MISTRAL_API_KEY", PLACEHOLDER)),
    ),
    "github": _Known(
        "https://api.github.com",
        "authorization",
        "bearer",
        (("GITHUB_API_URL", "{url}"), ("GITHUB_TOKEN", PLACEHOLDER)),
    ),
}


@attrs.frozen
class Gateway:
    """One upstream at 127.0.0.1:``port`` of the sandbox.

    ``secret``: a variable of the agent's store. ``scheme``: how it stands in ``header``; ``basic``
    takes ``user`` as the name and the secret as the password. ``per_minute`` and ``budget`` bound
    the requests of one session.
    """

    port: Port
    secret: VariableName
    preset: Preset | None = None
    upstream: WebAddress | None = None
    header: HeaderName | None = None
    scheme: Scheme | None = None
    user: Line | None = None
    methods: tuple[HttpMethod, ...] = ()
    paths: tuple[str, ...] = ()
    addresses: tuple[AddressRange, ...] = ()
    ca: AbsolutePath | None = None
    per_minute: Count | None = None
    budget: Count | None = None
    source: str = attrs.field(default="", metadata={"loaded": True})

    @property
    def url(self) -> str:
        """The upstream, without a slash at its end."""
        known = _PRESETS[self.preset].upstream if self.preset else ""
        return (self.upstream or known).rstrip("/")

    @property
    def destination(self) -> Destination:
        url = urlsplit(self.url)
        return destination(url.hostname or "", url.port or (443 if url.scheme == "https" else 80))

    @property
    def rule(self) -> DestinationRule:
        """What the gateway reaches, as a rule."""
        wanted = self.destination
        return DestinationRule(
            HostPattern(wanted.host),
            ports=(Port(wanted.port),),
            addresses=self.addresses,
            source=self.source,
        )

    @property
    def style(self) -> tuple[HeaderName, Scheme]:
        """The header that carries the credential, and how."""
        known = _PRESETS.get(self.preset or "")
        header = self.header or (known.header if known else "authorization")
        if self.scheme is not None:
            return header, self.scheme
        if known is not None and header == known.header:
            return header, known.scheme
        return header, "bearer" if header == "authorization" else "plain"

    @property
    def variables(self) -> dict[str, str]:
        """What programs find in their environment to come this way."""
        known = _PRESETS.get(self.preset or "")
        url = f"http://127.0.0.1:{self.port}"
        return {n: v.format(url=url) for n, v in known.variables} if known else {}


def completed(gateways: tuple[Gateway, ...], document: Document, label: str) -> tuple[Gateway, ...]:
    """With the file and line of each."""
    return tuple(
        attrs.evolve(one, source=f"{label}:{document.at(('egress', 'gateways', n)).line}")
        for n, one in enumerate(gateways)
    )


def check_gateways(gateways: tuple[Gateway, ...], document: Document, problems: Problems) -> None:
    """What one file says that can't hold together."""
    ports: set[int] = set()
    for index, one in enumerate(gateways):

        def add(key: str, message: str, hint: str = "", at: int = index) -> None:
            place = document.at(("egress", "gateways", at, key))
            problems.add(document.file, place, message, hint)

        if one.preset is None and one.upstream is None:
            add("preset", "expected a preset or an upstream")
            continue
        if one.port in ports:
            add("port", f"port {one.port} is another gateway's")
        ports.add(one.port)
        wanted = one.destination
        if not one.url.startswith("https://") and wanted.address is None:
            add("upstream", "the credential would travel in the clear", "take https")
        if urlsplit(one.url).query:
            add("upstream", "an upstream has no query", "give the address and a path at most")
        if (one.style[1] == "basic") != (one.user is not None):
            add("user", "scheme: basic and user belong together")
        for number, path in enumerate(one.paths):
            try:
                path_pattern(path)
            except Wrong as wrong:
                place = document.at(("egress", "gateways", index, "paths", number))
                problems.add(document.file, place, wrong.message, wrong.hint)


def path_pattern(value: object) -> str:
    """A path in which ``*`` stands for any run of characters."""
    words = text(value)
    if not words.startswith("/") or "?" in words or not words.isascii() or not words.isprintable():
        raise Wrong("expected a path with *, from its first slash", "write /v1/messages or /v1/*")
    return words
