"""Debian 12 root filesystems for tests: debootstrap, the project's wheel, its dependencies.

Everything that is slow is made once and kept below /var/tmp, in directories named by what they
are made of: delete them at will.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
_CACHES = Path("/var/tmp")


def need(*programs: tuple[str, str]) -> None:
    """Fail a test that was asked for and can't run: each program, and the package that has it."""
    missing = [package for program, package in programs if shutil.which(program) is None]
    if missing:
        pytest.fail(f"missing: apt-get install {' '.join(missing)}", pytrace=False)
    if sys.version_info[:2] != (3, 11):
        pytest.fail(
            f"{SUITE} has Python 3.11, and wheels are built by the Python that runs this",
            pytrace=False,
        )


@contextlib.contextmanager
def cache(kind: str, *recipe: str) -> Iterator[Path]:
    """The directory of things made by this recipe; nobody else makes them meanwhile."""
    directory = _CACHES / f"sandboxd-{kind}-{digest(SUITE, *recipe)}"
    directory.mkdir(mode=0o700, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """Make ``target`` under another name first: what is there is whole."""
    partial = target.with_name(f"{target.name}.building")
    _remove(partial)
    yield partial
    partial.rename(target)


def debootstrap(to: Path, packages: Sequence[str]) -> None:
    """A minimal Debian with these packages."""
    do("debootstrap", "--variant=minbase", f"--include={','.join(packages)}", SUITE, str(to),
       MIRROR)  # fmt: skip
    shutil.rmtree(to / "var/cache/apt/archives", ignore_errors=True)


def dependencies(*extras: str) -> list[str]:
    """What the project says that it needs."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    more = (line for extra in extras for line in project["optional-dependencies"][extra])
    return [*project["dependencies"], *more]


def install_dependencies(root: Path) -> None:
    """A virtual environment /opt/sandboxd in ``root`` with all that the project needs."""
    wheels = root / "opt/wheels"
    do(sys.executable, "-m", "pip", "wheel", "-q", "-w", str(wheels), *dependencies())
    chroot(root, "python3", "-m", "venv", "/opt/sandboxd")
    chroot(root, "/opt/sandboxd/bin/pip", "install", "-q", "--no-index",
           "--find-links=/opt/wheels", *dependencies())  # fmt: skip
    shutil.rmtree(wheels)


def build_wheel(to: Path) -> Path:
    """The project's wheel of today."""
    do(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(to), str(PROJECT))
    (built,) = to.glob("sandboxd-*.whl")
    return built


def chroot(root: Path, *command: str) -> None:
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"}
    do("chroot", str(root), *command, env=environ)


def do(*command: str, env: dict[str, str] | None = None) -> None:
    """Run a command; RuntimeError with what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
