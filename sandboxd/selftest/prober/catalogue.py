"""Every probe, in the order of the table."""

from __future__ import annotations

from sandboxd.selftest.prober import (  # noqa: F401 - each adds its rows
    devices,
    files,
    limits,
    namespaces,
    network,
    privileges,
    processes,
    secrets,
    shared,
    syscalls,
    unix_sockets,
)
from sandboxd.selftest.prober.probe import CATALOGUE, Probe

__all__ = ["PROBES"]

PROBES: tuple[Probe, ...] = tuple(CATALOGUE.values())
