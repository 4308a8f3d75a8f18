"""The rollback guard: a small file beside the store that remembers how far the store had come.

A store restored from an old backup is intact and still wrong: revoked versions are valid again.
The guard holds the store's identity and generation under a key of the store. It is written after
each commit, so after a crash it may lag behind the store, never lead; a store that lags behind its
guard was rolled back. Somebody who can put both files back together is not noticed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sandboxd.errors import StoreError
from sandboxd.files import open_private, read_all, replace_file
from sandboxd.vault.envelope import Digest

__all__ = ["Guard", "GuardMark"]

_LINE = re.compile(rb"sandboxd-guard-1 ([0-9a-f]{32}) ([0-9]{1,18}) ([0-9a-f]{64})\n")


@dataclass(frozen=True)
class GuardMark:
    store: bytes
    generation: int
    digest: bytes


@dataclass(frozen=True)
class Guard:
    path: Path

    @property
    def hint(self) -> str:
        """What to do when it contradicts the store."""
        return (
            "bring back the newest store; if this one was restored on purpose, remove "
            f"{self.path} and set again what was revoked since"
        )

    def read(self) -> GuardMark | None:
        """The mark, not yet authenticated; None where there is none. Raises StoreError."""
        try:
            fd = open_private(self.path, os.O_RDONLY, "the rollback guard")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"can't open {self.path}: {error.strerror}") from None
        try:
            found = _LINE.fullmatch(read_all(fd, 4096))
        finally:
            os.close(fd)
        if found is None:
            raise StoreError(f"the rollback guard {self.path} is corrupted", hint=self.hint)
        return GuardMark(
            bytes.fromhex(found[1].decode()), int(found[2]), bytes.fromhex(found[3].decode())
        )

    def check(self, mark: GuardMark, store: bytes, generation: int, digest: Digest) -> None:
        """Raise StoreError unless the store is at least as new as the mark."""
        if mark.store != store:
            raise StoreError(f"the rollback guard {self.path} is another store's", hint=self.hint)
        if not digest.matches(mark.digest, mark.store, mark.generation):
            raise StoreError(f"the rollback guard {self.path} is corrupted", hint=self.hint)
        if mark.generation > generation:
            raise StoreError(
                f"the store was rolled back: it is at change {generation} and was at "
                f"{mark.generation}",
                hint=self.hint,
            )

    def write(self, store: bytes, generation: int, digest: Digest) -> str:
        """Remember a commit. Returns why that failed, "" if it didn't: the commit stands."""
        line = f"sandboxd-guard-1 {store.hex()} {generation} {digest.of(store, generation).hex()}\n"
        try:
            replace_file(self.path, line.encode())
        except OSError as error:
            return f"the rollback guard {self.path} can't be written: {error.strerror}"
        return ""
