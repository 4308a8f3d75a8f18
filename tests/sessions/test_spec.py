"""From an agent's configuration to the sandbox it runs in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sandboxd.policy.model import AGENT_LIMITS
from sandboxd.policy.model import Limits as PolicyLimits
from sandboxd.sessions.spec import bridge_command, launch_limits


@pytest.mark.parametrize("name", ["plain", "with space", "it's $HOME", "l" * 200])
def test_the_bridge_starts_whatever_this_pythons_path_is(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name / ("d" * 100)
    directory.mkdir(parents=True)
    python = directory / "python"
    python.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    python.chmod(0o755)
    command = tmp_path / "sandboxd-mcp"
    command.write_bytes(bridge_command(str(python)))
    command.chmod(0o755)
    done = subprocess.run([command, "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == "<-IS></run/sandboxd/lib/bridge.py><a b>"


def test_every_limit_of_a_policy_reaches_the_launcher() -> None:
    given = PolicyLimits(
        memory=1 << 20, processes=2, files=3, cpu=0.4, file_size=5, tmp_size=6, cpus=0.5, io=7
    )
    limits = launch_limits(given)
    assert (limits.memory, limits.processes, limits.open_files) == (1 << 20, 2, 3)
    assert (limits.cpu_seconds, limits.file_size, limits.tmp_size) == (1, 5, 6)
    assert (limits.millicpus, limits.io) == (500, 7)
    assert launch_limits(AGENT_LIMITS).cpu_seconds == 0  # an agent runs as long as it must
