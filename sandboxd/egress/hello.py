"""The server name in a TLS client's first message, read by OpenSSL (RFC 8446, 4.1.2; RFC 6066, 3).

A tunnel that was allowed for one host must not be used to ask the server behind it for another
one, as front ends of many hosts allow.
"""

from __future__ import annotations

import ssl

__all__ = ["ClientHello"]

#: Longest first message that is waited for; post-quantum key shares make them a few kilobytes.
_MOST = 64 << 10
_HANDSHAKE = 22  # RFC 8446, 5.1


class ClientHello:
    """Reads a client's first bytes. ``feed`` until ``done``; then ``server_name`` is known."""

    def __init__(self) -> None:
        self.done = False
        self.is_tls = False
        self.server_name: str | None = None
        self._seen = False
        self._size = 0
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sni_callback = self._named
        self._incoming = ssl.MemoryBIO()
        self._session = context.wrap_bio(self._incoming, ssl.MemoryBIO(), server_side=True)

    def feed(self, data: bytes) -> bool:
        """More of what the client sent; whether it is ``done``: without a handshake, at once."""
        if self.done or not data:
            return self.done
        if self._size == 0:
            self.is_tls = data[0] == _HANDSHAKE
            if not self.is_tls:
                self.done = True
                return True
        self._size += len(data)
        self._incoming.write(data)
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            self.done = self._seen or self._size > _MOST
        except ssl.SSLError:  # no certificate to answer with, which is all right: it was read
            self.done = True
        return self.done

    @property
    def readable(self) -> bool:
        """Whether the message was understood, so that a missing name really is missing."""
        return self._seen

    def _named(self, _: object, name: str | None, __: object) -> int:
        self._seen = True
        self.server_name = name
        return int(ssl.ALERT_DESCRIPTION_INTERNAL_ERROR)
