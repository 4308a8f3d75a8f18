"""The keys that sign tokens: Ed25519 (RFC 8032), named by their thumbprint, published as a JWKS.

The newest key signs. One that was replaced stays known for as long as a token that it signed can
live, so nobody is signed out by a rotation; then it is dropped. A key that leaked is dropped at
once, and with it every token that it signed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sandboxd.secret import Secret
from sandboxd.vault.credentials import SigningRow

__all__ = ["SigningKey", "SigningKeys", "new_signing_key"]


@dataclass(frozen=True)
class SigningKey:
    """One key. ``retired_at`` is when its successor took over; None: it signs."""

    id: int
    kid: str
    created_at: float
    retired_at: float | None
    private: Ed25519PrivateKey
    public: Ed25519PublicKey
    x: str

    def jwk(self) -> dict[str, str]:
        """The public half (RFC 8037, 2)."""
        return {
            "kty": "OKP",
            "crv": "Ed25519",
            "x": self.x,
            "kid": self.kid,
            "use": "sig",
            "alg": "EdDSA",
        }


class SigningKeys:
    """All keys that the store has, oldest first."""

    def __init__(self, rows: Iterable[SigningRow], *, overlap: float) -> None:
        """``overlap``: seconds that a key stays known after its successor took over."""
        self._overlap = overlap
        rows = list(rows)
        ends: list[float | None] = [later.created_at for _, later in pairwise(rows)]
        self._keys = [_loaded(row, end) for row, end in zip(rows, [*ends, None], strict=False)]

    @property
    def current(self) -> SigningKey | None:
        """The key that signs; None before the first."""
        return self._keys[-1] if self._keys else None

    def known(self, now: float) -> list[SigningKey]:
        """The keys whose tokens are accepted, the current one first."""
        return [key for key in reversed(self._keys) if not self._over(key, now)]

    def over(self, now: float) -> list[int]:
        """Ids of keys that can be dropped."""
        return [key.id for key in self._keys if self._over(key, now)]

    def ids(self) -> list[int]:
        return [key.id for key in self._keys]

    def find(self, kid: str, now: float) -> SigningKey | None:
        return next((key for key in self.known(now) if key.kid == kid), None)

    def jwks(self, now: float) -> dict[str, Any]:
        """The JSON Web Key Set of the known keys (RFC 7517, 5)."""
        return {"keys": [key.jwk() for key in self.known(now)]}

    def _over(self, key: SigningKey, now: float) -> bool:
        return key.retired_at is not None and now >= key.retired_at + self._overlap


def new_signing_key() -> Secret:
    """A fresh private key from the kernel's generator."""
    return Secret(Ed25519PrivateKey.generate().private_bytes_raw())


def _loaded(row: SigningRow, retired_at: float | None) -> SigningKey:
    private = Ed25519PrivateKey.from_private_bytes(row.key.reveal())
    public = private.public_key()
    x = _base64url(public.public_bytes_raw())
    # RFC 7638, 3.2 and RFC 8037, 2: the required members in this order, without white space.
    members = json.dumps({"crv": "Ed25519", "kty": "OKP", "x": x}, separators=(",", ":"))
    kid = _base64url(hashlib.sha256(members.encode()).digest())
    return SigningKey(row.id, kid, row.created_at, retired_at, private, public, x)


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
