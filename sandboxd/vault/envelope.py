"""Sealing: AES-256-GCM boxes, keyed digests, and the encoding that both bind.

A :class:`Box` is one key. Every sealing draws a fresh random 96-bit nonce (NIST SP 800-38D, 8.2.2
allows 2^32 of them per key; an operator's hand doesn't get near). Associated data and digests are
made by :func:`pack`, in which no two different lists of fields look alike.
"""

from __future__ import annotations

import hmac
import os
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sandboxd.secret import Secret

__all__ = ["KEY_SIZE", "Box", "Digest", "new_key", "pack"]

KEY_SIZE = 32
_NONCE_SIZE = 12


class Box:
    """Authenticated encryption under one key, which the box keeps to itself."""

    __slots__ = ("_aead",)

    def __init__(self, key: Secret) -> None:
        self._aead = AESGCM(key.reveal())

    def seal(self, value: Secret, bound: bytes) -> tuple[bytes, bytes]:
        """A fresh nonce, and the ciphertext with its tag."""
        nonce = os.urandom(_NONCE_SIZE)
        # The plaintext has no name here, so no traceback with locals can show it.
        return nonce, self._aead.encrypt(nonce, value.reveal(), bound)

    def open(self, nonce: bytes, sealed: bytes, bound: bytes) -> Secret | None:
        """The value, or None when nonce, ciphertext or ``bound`` isn't what was sealed.

        None rather than an error, so that the caller's error chains to nothing.
        """
        try:
            if len(nonce) != _NONCE_SIZE:
                return None
            return Secret(self._aead.decrypt(nonce, sealed, bound))
        except (InvalidTag, TypeError):  # TypeError: a damaged column of another type
            return None


class Digest:
    """HMAC-SHA256 for one purpose under one key."""

    __slots__ = ("_key",)

    def __init__(self, key: Secret, purpose: str) -> None:
        self._key = Secret(hmac.digest(key.reveal(), pack("sandboxd", purpose), "sha256"))

    def of(self, *fields: Field) -> bytes:
        return hmac.digest(self._key.reveal(), pack(*fields), "sha256")

    def of_value(self, value: Secret, *fields: Field) -> bytes:
        """Like :meth:`of`, with a secret as the last field."""
        return hmac.digest(self._key.reveal(), pack(*fields) + value.reveal(), "sha256")

    def matches(self, digest: object, *fields: Field) -> bool:
        return isinstance(digest, bytes) and hmac.compare_digest(digest, self.of(*fields))


def new_key() -> Secret:
    """A fresh key from the kernel's generator."""
    return Secret(os.urandom(KEY_SIZE))


Field = str | bytes | int | float | None


def pack(*fields: Field) -> bytes:
    """The fields as bytes: each one with its type and length, so that none can pose as another."""
    out = bytearray()
    for field in fields:
        if field is None:
            kind, raw = b"n", b""
        elif isinstance(field, str):
            kind, raw = b"s", field.encode("utf-8", "surrogateescape")
        elif isinstance(field, bytes):
            kind, raw = b"b", field
        elif isinstance(field, int):
            kind, raw = b"i", str(int(field)).encode()
        else:
            kind, raw = b"f", struct.pack(">d", field)
        out += kind + struct.pack(">Q", len(raw)) + raw
    return bytes(out)
