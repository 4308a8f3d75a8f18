"""The package where an ordinary user can read it: a checkout may lie in root's home."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def public_copy() -> Iterator[Path]:
    """A directory that holds the package and what it ships, open to everybody for reading."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        top = Path(name)
        for part in ("sandboxd", "systemd"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PROJECT / part, top / part, ignore=ignore)
        for path in (top, *top.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield top
