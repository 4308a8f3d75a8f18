"""A broker of real parts for every test here."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from broker_parts import Broker

from sandboxd.broker.calls import Bounds
from sandboxd.isolation.client import open_launcher


@pytest.fixture
def open_broker(
    tmp_path: Path, start_launcher: Callable[[str], socket.socket]
) -> Callable[..., Any]:
    """Open a broker, with the launcher's mode and bounds of the test's own."""

    @asynccontextmanager
    async def opened(mode: str = "root", bounds: Bounds | None = None) -> AsyncIterator[Broker]:
        async with open_launcher(start_launcher(mode)) as launcher:
            broker = Broker(tmp_path, launcher, bounds)
            try:
                yield broker
            finally:
                broker.close()

    return opened


@pytest.fixture
async def broker(open_broker: Callable[..., Any]) -> AsyncIterator[Broker]:
    """A broker whose launcher is privileged where the tests run as root."""
    async with open_broker() as opened:
        yield opened
