"""The daemon's own Python, made visible in a sandbox for tools that say ``runtime: python``."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from sandboxd.isolation.wire import MountSpec

__all__ = ["python_argv", "python_mounts", "python_prefixes"]


def python_argv(program: str) -> tuple[bytes, ...]:
    """How the daemon's interpreter runs ``program``: isolated (-I), and leaving no .pyc (-B)."""
    return (os.fsencode(sys.executable), b"-I", b"-B", os.fsencode(program))


def python_mounts() -> tuple[MountSpec, ...]:
    """Read-only mounts that show the interpreter and its packages at their own paths."""
    return tuple(MountSpec(prefix, prefix) for prefix in python_prefixes())


@functools.cache
def python_prefixes() -> tuple[str, ...]:
    """The directories that the interpreter and its packages live in, beyond /usr.

    A virtual environment, the installation below it, and where its links really lead.
    """
    executable = Path(sys.executable)
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.base_exec_prefix)}
    found |= {path.resolve() for path in found}
    found.add(executable.resolve().parent.parent)
    outside = sorted(str(p) for p in found if not p.is_relative_to("/usr") and p != Path("/"))
    return tuple(
        path
        for path in outside
        if not any(path != other and Path(path).is_relative_to(other) for other in outside)
    )
