"""Fixtures that every part's tests share: a real launcher, in each mode this host allows."""

from __future__ import annotations

import compileall
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from sandboxd.isolation.client import Launcher, open_launcher
from sandboxd.isolation.launcher import fork_launcher

# No deadline and no check for slow data: the machine may be busy. No database: the checkout may be
# read-only. The same examples each time, so that a change is judged by what it changes; others
# with pytest --hypothesis-profile=explore.
_PROPERTIES = settings(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("sandboxd", _PROPERTIES, derandomize=True)
settings.register_profile("explore", _PROPERTIES, max_examples=1000)
settings.load_profile("sandboxd")


def pytest_configure(config: pytest.Config) -> None:
    """Compile the package once: tests start it hundreds of times, some as users who can't write."""
    if not hasattr(config, "workerinput"):
        compileall.compile_dir(Path(__file__).parents[1] / "sandboxd", quiet=2)


#: Whom a launcher of mode "user" runs as when root runs the tests.
ORDINARY_UID = 64123

_AS_ORDINARY_USER = f"""
import os, sys
sys.path.append(sys.argv[2])
from sandboxd.isolation import launcher
os.setgroups([])
os.setresgid({ORDINARY_UID}, {ORDINARY_UID}, {ORDINARY_UID})
os.setresuid({ORDINARY_UID}, {ORDINARY_UID}, {ORDINARY_UID})
launcher.main()
"""


_USER = pytest.param("user", marks=pytest.mark.soak)  # an ordinary user runs these anyway


@pytest.fixture(params=["root", _USER] if os.geteuid() == 0 else ["user"])
def launcher_mode(request: pytest.FixtureRequest) -> str:
    """``root``: the launcher is privileged. ``user``: it has nothing but a user namespace."""
    mode: str = request.param
    return mode


@pytest.fixture
def start_launcher() -> Callable[[str], socket.socket]:
    """Start a launcher of the named mode; the broker's end of its socket."""
    return _start_launcher


@pytest.fixture
async def launcher(launcher_mode: str) -> AsyncIterator[Launcher]:
    """A running launcher. When the test ends, nothing that it started is left."""
    async with open_launcher(_start_launcher(launcher_mode)) as running:
        assert running.mode == launcher_mode
        yield running


def _start_launcher(mode: str) -> socket.socket:
    if mode == "root" or os.geteuid() != 0:
        return fork_launcher()
    # Executed as root, because the interpreter may live below a directory closed to others.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        fd = theirs.fileno()
        package = Path(__file__).parents[1]
        argv = [sys.executable, "-I", "-S", "-c", _AS_ORDINARY_USER, str(fd), str(package)]
        subprocess.run(argv, pass_fds=[fd], env={}, check=False)
    return ours
