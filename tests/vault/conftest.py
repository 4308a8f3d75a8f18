"""A real vault on a real disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandboxd.secret import Secret
from sandboxd.vault import MasterKey, Vault


@pytest.fixture
def key() -> MasterKey:
    return MasterKey(Secret(bytes(range(32))))


@pytest.fixture
def other_key() -> MasterKey:
    return MasterKey(Secret(bytes(range(1, 33))))


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory where fsync(2) costs nothing, for the many tests that don't need a disk."""
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as directory:
        yield Path(directory)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture
def reopen(path: Path, key: MasterKey) -> Iterator[Callable[..., Vault]]:
    """Open the vault (again); what is still open at the end is closed."""
    opened: list[Vault] = []

    def open_it(with_key: MasterKey | None = None, **options: object) -> Vault:
        for vault in opened:
            vault.close()
        opened.append(Vault.open(path, with_key or key, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_it
    for vault in opened:
        vault.close()


@pytest.fixture
def vault(reopen: Callable[..., Vault]) -> Vault:
    return reopen()
