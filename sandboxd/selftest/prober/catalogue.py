"""Every probe, in the order of the table: as design and documents list the threats."""

from __future__ import annotations

# Each of these adds its rows when it is imported.
# isort: off
from sandboxd.selftest.prober import secrets  # noqa: F401
from sandboxd.selftest.prober import processes  # noqa: F401
from sandboxd.selftest.prober import shared  # noqa: F401
from sandboxd.selftest.prober import before  # noqa: F401
from sandboxd.selftest.prober import files  # noqa: F401
from sandboxd.selftest.prober import namespaces  # noqa: F401
from sandboxd.selftest.prober import facts  # noqa: F401
from sandboxd.selftest.prober import syscalls  # noqa: F401
from sandboxd.selftest.prober import abi  # noqa: F401
from sandboxd.selftest.prober import unix_sockets  # noqa: F401
from sandboxd.selftest.prober import network  # noqa: F401
from sandboxd.selftest.prober import devices  # noqa: F401
from sandboxd.selftest.prober import privileges  # noqa: F401
from sandboxd.selftest.prober import limits  # noqa: F401
from sandboxd.selftest.prober import observed  # noqa: F401
from sandboxd.selftest.prober.probe import CATALOGUE, Probe
# isort: on

__all__ = ["PROBES"]

PROBES: tuple[Probe, ...] = tuple(CATALOGUE.values())
