from __future__ import annotations

from collections.abc import Iterator

import pytest
from real_daemon import RealDaemon, directories


@pytest.fixture
def configured() -> Iterator[RealDaemon]:
    """A daemon's directories with a key and HTTP on; the test writes files, then starts it."""
    with directories() as daemon:
        daemon.http()
        yield daemon
