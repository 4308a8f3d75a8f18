"""docs/mcp-http.md: its examples are run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from real_daemon import RealDaemon

ROOT = Path(__file__).resolve().parents[2]
SHOWN = re.compile(r"<!-- run: (\w+) -->\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = dict(SHOWN.findall((ROOT / "docs" / "mcp-http.md").read_text()))


@pytest.fixture
def environment(daemon: RealDaemon) -> dict[str, str]:
    """What the examples take from the environment."""
    schema = "{type: object, properties: {whom: {type: string}}}"
    greet = '#!/bin/sh\necho "hello, $1"\n'
    daemon.tool("greet", greet, f"argv: ['{{whom}}']\ninput: {schema}\n")
    daemon.agent("helper", "exec sleep 88206", tools="[greet]")
    daemon.http()
    daemon.start()
    key = daemon.call("keys.create", role="operator", label="of a test")["key"]["id"]
    token = daemon.call("tokens.create", key=key, agents=["helper"])["token"]
    return {"PATH": os.environ["PATH"], "SANDBOXD": daemon.url, "TOKEN": token}


def test_the_examples_for_python_and_the_shell(environment: dict[str, str]) -> None:
    for command, expected in (
        ((sys.executable, "-I", "-c", EXAMPLES["python"]), "hello, you"),
        (("/bin/sh", "-ec", EXAMPLES["sh"]), '"greet"'),
    ):
        assert expected in run(command, environment, cwd=ROOT)


@pytest.mark.clients
def test_the_example_for_node(environment: dict[str, str], node: str) -> None:
    command = (node, "--input-type=module", "-e", EXAMPLES["node"])
    folder = Path(__file__).parent / "node"
    assert "hello, you" in run(command, environment, cwd=folder)


def run(command: tuple[str, ...], environment: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
