from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from access_parts import Parts


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    """Where fsync(2) costs nothing: these tests don't need a disk."""
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as directory:
        made = Parts(Path(directory))
        try:
            yield made
        finally:
            made.close()
