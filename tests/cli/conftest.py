"""A real daemon for sandboxctl to talk to, and a place where none runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import AGENT, Ctl


@pytest.fixture(scope="package")
def daemon() -> Iterator[Ctl]:
    """One daemon for all tests of sandboxctl: agents ``sh`` and ``other``, no variables."""
    # Not below pytest's own directory: started as root the broker becomes nobody, who can't enter.
    directory = Path(tempfile.mkdtemp(prefix="sbx-", dir="/tmp"))
    directory.chmod(0o755)
    ctl = Ctl(directory)
    ctl("init", str(directory / "config"))
    agents = directory / "config" / "agents"
    (agents / "sh.yaml").write_text(AGENT + "tools: [shell, http_request]\n")
    (agents / "other.yaml").write_text(AGENT)
    (agents / "missing.yaml").write_text(AGENT.replace("/bin/sh", "/bin/no-such-program"))
    (agents / "unexecutable.yaml").write_text(AGENT.replace("/bin/sh", "/etc/passwd"))
    for agent in agents.iterdir():
        agent.chmod(0o644)
    log = (directory / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "sandboxd.main", *(["--user", "nobody"] if not os.getuid() else [])],
        env=ctl.environ,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    try:
        for _ in range(300):
            if ctl("status", status=None).returncode == 0:
                break
            assert process.poll() is None, (directory / "log").read_text()
            time.sleep(0.1)
        yield ctl
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0, (directory / "log").read_text()
    finally:
        process.kill()
        process.wait()
        log.close()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def alone(tmp_path: Path) -> Ctl:
    """sandboxctl where no daemon runs."""
    return Ctl(tmp_path)
