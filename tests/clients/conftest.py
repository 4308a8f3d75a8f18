"""An agent in a real session of a real daemon, with tools that show what a client can see."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_daemon import RealDaemon, directories

_INPUT = """
argv: ["{word}"]
input:
  type: object
  additionalProperties: false
  properties: {word: {type: string}}
"""
FASTMCP = "fastmcp>=4,<5"
_NO_INPUT = "input: {type: object, additionalProperties: false}\n"


@pytest.fixture
def daemon() -> Iterator[RealDaemon]:
    """A daemon whose agent ``client`` has five tools; the test writes the agent and starts it."""
    with directories() as daemon:
        daemon.tool(
            "use",
            '#!/bin/sh\nprintf "%s used " "$1"\nprintf %s "$TOKEN" | wc -c\necho "it is $TOKEN"\n',
            _INPUT + "secrets: [{variable: TOKEN}]\nannotations: {title: Uses the token}\n",
        )
        daemon.tool("fail", "#!/bin/sh\necho out\necho err >&2\nexit 3\n", _NO_INPUT)
        daemon.tool(
            "talk",
            '#!/bin/sh\necho "one $TOKEN"\nsleep 0.4\necho two\nsleep 0.4\n',
            _NO_INPUT + "secrets: [{variable: TOKEN}]\n",
        )
        daemon.tool("long", "#!/bin/sh\nsleep 88201\n", _NO_INPUT)
        daemon.tool("foreign", "#!/bin/sh\necho not yours\n", _NO_INPUT)
        yield daemon


@pytest.fixture(scope="session")
def node() -> str:
    """The interpreter, with the client's packages installed beside the client."""
    found, npm = shutil.which("node"), shutil.which("npm")
    assert found, "these tests need Node.js"
    assert npm, "these tests need npm"
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(command, cwd=Path(__file__).parent / "node", check=True, timeout=300)
    return found


@pytest.fixture(scope="session")
def fastmcp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with fastmcp and all that it needs; not in our own environment."""
    site = tmp_path_factory.mktemp("fastmcp") / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), FASTMCP]
    subprocess.run(command, check=True, timeout=600)
    for directory in (site, *site.parents[:3]):
        if not directory.stat().st_mode & stat.S_ISVTX:  # /tmp itself, with a short --basetemp
            directory.chmod(0o755)
    return site
