"""Interpreters made visible in a sandbox, for tools that say ``runtime: python`` or ``node``."""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import sys
from pathlib import Path

from sandboxd.errors import Unavailable
from sandboxd.isolation.wire import MountSpec

__all__ = ["node_argv", "node_mounts", "python_argv", "python_mounts", "python_prefixes"]


def python_argv(program: str) -> tuple[bytes, ...]:
    """How the daemon's interpreter runs ``program``: isolated (-I), and leaving no .pyc (-B)."""
    return (os.fsencode(sys.executable), b"-I", b"-B", os.fsencode(program))


def node_argv(program: str) -> tuple[bytes, ...]:
    """How this host's Node.js runs ``program``. Raises Unavailable where there is none."""
    return (os.fsencode(_node()), os.fsencode(program))


def node_mounts() -> tuple[MountSpec, ...]:
    """Read-only mounts that show Node.js where it is, when that is not below /usr."""
    binary = Path(_node())
    if binary.is_relative_to("/usr"):
        return ()
    parts = [binary, binary.parent.parent / "lib"]
    return tuple(MountSpec(str(part), str(part)) for part in parts if part.exists())


def python_mounts() -> tuple[MountSpec, ...]:
    """Read-only mounts that show the interpreter and its packages at their own paths.

    Of a Python that was installed right into somebody's home directory only its own parts are
    shown: the rest is that person's.
    """
    homes = _homes()
    mounts = []
    for prefix in python_prefixes():
        if any(home.is_relative_to(prefix) for home in homes):
            parts = [Path(prefix, name) for name in ("bin", "lib", "lib64", "pyvenv.cfg")]
            mounts += [MountSpec(str(part), str(part)) for part in parts if part.exists()]
        else:
            mounts.append(MountSpec(prefix, prefix))
    return tuple(mounts)


@functools.cache
def python_prefixes() -> tuple[str, ...]:
    """The directories that the interpreter and its packages live in, beyond /usr.

    A virtual environment, the installation below it, and where its links really lead.
    """
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.base_exec_prefix)}
    found |= {path.resolve() for path in found}
    installation = Path(sys.executable).resolve().parent.parent
    if (installation / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}").is_dir():
        found.add(installation)
    outside = sorted(str(p) for p in found if not p.is_relative_to("/usr") and p != Path("/"))
    return tuple(
        path
        for path in outside
        if not any(path != other and Path(path).is_relative_to(other) for other in outside)
    )


@functools.cache
def _node() -> str:
    found = shutil.which("node")
    if found is None:
        raise Unavailable(
            "there is no node on this host that the daemon could start",
            hint="install Node.js, or put its directory on the daemon's PATH; then restart it",
        )
    return str(Path(found).resolve())


@functools.cache
def _homes() -> frozenset[Path]:
    """Everybody's home directory, and this process's own."""
    named = {entry.pw_dir for entry in pwd.getpwall()} | {os.environ.get("HOME", "")}
    return frozenset(Path(name) for name in named if name.startswith("/") and name != "/")
