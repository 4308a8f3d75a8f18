"""The selftest as users start it, as root and as an ordinary user; and with sabotaged sandboxes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from escape_support import PROJECT, Selftest, selftest_of
from public_copy import public_copy

ORDINARY_UID = 64123
_OTHERS_MAY = 0o005


@pytest.fixture(scope="session", params=["root", "user"] if os.geteuid() == 0 else ["user"])
def mode(request: pytest.FixtureRequest) -> str:
    """Who runs it: root, or somebody who has nothing but a user namespace."""
    mode: str = request.param
    return mode


@pytest.fixture(scope="session")
def selftest(mode: str) -> Iterator[Selftest]:
    """``sandboxctl selftest --json`` for real, once for all tests that look at it."""
    if mode == "root" or os.geteuid() != 0:
        yield selftest_of([sys.executable, "-m", "sandboxd.cli"], cwd=PROJECT)
        return
    with public_copy() as copy:
        environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "TMPDIR": "/tmp"}
        yield selftest_of(
            [_open_python(), "-m", "sandboxd.cli"],
            cwd=copy,
            user=ORDINARY_UID,
            group=ORDINARY_UID,
            extra_groups=[],
            env={**environment, "PYTHONPATH": os.pathsep.join([str(copy), *_packages()])},
        )


def _open_python() -> str:
    """An interpreter of our version that everybody may run."""
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        real = Path(path).resolve()
        if not real.exists() or not all(p.stat().st_mode & _OTHERS_MAY == 5 for p in _chain(real)):
            continue
        version = subprocess.run(
            [path, "-c", "import sys; print(sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=True,
        )
        if version.stdout.strip() == str(sys.version_info[:2]):
            return path
    pytest.skip("no Python of this version that an ordinary user may run")


def _packages() -> list[str]:
    found = [Path(name) for name in sys.path if name.endswith("site-packages")]
    if not all(p.stat().st_mode & _OTHERS_MAY == 5 for path in found for p in _chain(path)):
        pytest.skip("the packages are closed to an ordinary user")
    return [str(path) for path in found]


def _chain(path: Path) -> list[Path]:
    return [path, *path.parents]
