"""From an agent's configuration to the sandbox it runs in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sandboxd.sessions.spec import bridge_command


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
