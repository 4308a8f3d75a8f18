"""The definitions that operators accepted, in one authenticated file of the state directory.

The file is JSON and ends in a line with its HMAC-SHA256, under a key that the store derives. Who
can write the file and doesn't have the key can't make a tool acceptable; an older file put back
whole would be taken, as its definitions were accepted once.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sandboxd.errors import SandboxdError, StoreError
from sandboxd.files import open_private, read_all, replace_file
from sandboxd.policy.definitions import Definition, canonical
from sandboxd.policy.mcpserver import Pin
from sandboxd.secret import Secret

__all__ = ["PinStore"]

_VERSION = 1
_MAX_FILE = 64 << 20


class PinStore:
    """What is accepted of each server, by the server's name. Synchronous."""

    @classmethod
    def open(cls, path: Path, key: Secret) -> PinStore:
        """The pins in the file at ``path``; none when there is no file.

        Raises :class:`StoreError` when the file does not authenticate, and
        :class:`~sandboxd.errors.Denied` when others could touch it.
        """
        store = cls(path, key)
        try:
            descriptor = open_private(path, os.O_RDONLY, "the file of accepted tools")
        except FileNotFoundError:
            return store
        except OSError as error:
            raise store._untrusted(error.strerror or "it can't be read") from None
        try:
            data = read_all(descriptor, _MAX_FILE + 1)
        finally:
            os.close(descriptor)
        store.pins = MappingProxyType(store._decoded(data))
        return store

    def __init__(self, path: Path, key: Secret) -> None:
        self._path, self._key = path, key
        self.pins: Mapping[str, Pin] = MappingProxyType({})

    def put(self, pin: Pin) -> None:
        """Accept what ``pin`` holds, in place of what was accepted before. Durable on return."""
        self._write({**self.pins, pin.server: pin})

    def remove(self, server: str) -> None:
        """Accept nothing of ``server`` any more."""
        self._write({name: pin for name, pin in self.pins.items() if name != server})

    def _write(self, pins: dict[str, Pin]) -> None:
        body = canonical(
            {
                "version": _VERSION,
                "pins": {
                    name: {
                        "by": pin.by,
                        "at": pin.at,
                        "definitions": [dict(d.content) for d in pin.definitions],
                    }
                    for name, pin in pins.items()
                },
            }
        )
        try:
            replace_file(self._path, body + b"\n" + self._mac(body) + b"\n")
        except OSError as error:
            raise StoreError(
                f"{self._path} can't be written: {error.strerror}",
                hint="nothing was accepted; sandboxd must be able to write there",
            ) from None
        self.pins = MappingProxyType(pins)

    def _decoded(self, data: bytes) -> dict[str, Pin]:
        body, _, mac = data.rstrip(b"\n").rpartition(b"\n")
        if not hmac.compare_digest(mac, self._mac(body)):
            raise self._untrusted("it is damaged, or was not written by this sandboxd")
        held: dict[str, Any] = json.loads(body)
        if held.get("version") != _VERSION:
            raise self._untrusted("a newer sandboxd wrote it")
        return {
            name: Pin(
                server=name,
                definitions=tuple(
                    Definition(content["name"], MappingProxyType(content))
                    for content in pin["definitions"]
                ),
                by=pin["by"],
                at=pin["at"],
            )
            for name, pin in held["pins"].items()
        }

    def _mac(self, body: bytes) -> bytes:
        return hmac.new(self._key.reveal(), body, "sha256").hexdigest().encode()

    def _untrusted(self, why: str) -> SandboxdError:
        return StoreError(
            f"the accepted tools in {self._path} can't be trusted: {why}",
            hint="move the file away and accept anew: sandboxctl tools accept NAME",
        )
