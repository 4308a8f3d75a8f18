"""How a command finds its daemon."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sandboxd.admin.client import AdminClient
from sandboxd.paths import Paths

__all__ = ["connect", "paths"]

_SYSTEM_RUNTIME = Path("/run/sandboxd")


def paths(args: argparse.Namespace) -> Paths:
    """The directories that the options, the environment and the defaults give."""
    return Paths.resolve(config=args.config, state=args.state, runtime=args.runtime)


def connect(args: argparse.Namespace) -> AdminClient:
    """Connect to the daemon. Raises Unavailable with what to do when there is none.

    An ordinary user who named no runtime directory and runs no daemon means the host's.
    """
    chosen = paths(args)
    named = args.runtime or os.environ.get("SANDBOXD_RUNTIME")
    system = Paths(chosen.config, chosen.state, _SYSTEM_RUNTIME)
    if not named and not _exists(chosen.admin_socket) and _exists(system.admin_socket):
        return AdminClient.connect(system)
    return AdminClient.connect(chosen)


def _exists(path: Path) -> bool:
    """Whether it is there; what lies in a directory closed to us is not, for us."""
    try:
        return path.exists()
    except OSError:
        return False
