"""A value that can be used but not shown.

Every plaintext credential in the broker is a :class:`Secret`. Printing, formatting, logging,
pickling or iterating one gives a fixed text or an error, so that a stray f-string or a traceback
with locals cannot leak it. ``reveal()`` is the single way to the bytes; grep for it to audit
every place where plaintext leaves custody.
"""

from __future__ import annotations

import hmac
from typing import NoReturn

from sandboxd.errors import Invalid

__all__ = ["Secret"]

_HIDDEN = "<secret>"


class Secret:
    """Immutable bytes that refuse to be displayed.

    >>> f"{Secret(b'hunter2')}"
    '<secret>'
    """

    __slots__ = ("__value",)

    def __init__(self, value: bytes | bytearray | memoryview | str) -> None:
        """Text becomes UTF-8. Raises Invalid for text that has no encoding (lone surrogates)."""
        raw = _encoded(value) if isinstance(value, str) else value
        if isinstance(raw, (bytes, bytearray, memoryview)):
            self.__value = bytes(raw)  # no copy when it is bytes already
            return
        del value, raw  # a traceback that shows locals must not show it
        # Raised here and not in a handler: no chained error may hold the text.
        raise Invalid("a secret is bytes or text that UTF-8 can encode")

    def reveal(self) -> bytes:
        """The plaintext bytes. The caller owns keeping them out of logs, errors and argv."""
        return self.__value

    def __len__(self) -> int:
        return len(self.__value)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self.__value, other.reveal())

    __hash__ = None  # type: ignore[assignment]  # a hash of a secret is a fingerprint without a key

    def __repr__(self) -> str:
        return _HIDDEN

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return _HIDDEN

    def __bytes__(self) -> NoReturn:
        raise TypeError("a Secret is not bytes; call reveal() where the plaintext is really needed")

    def __iter__(self) -> NoReturn:
        raise TypeError("a Secret cannot be iterated")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret cannot be pickled or copied")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a Secret has no state to show")


def _encoded(text: str) -> bytes | None:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # it carries the whole text as .object
        return None
