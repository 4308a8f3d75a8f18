"""Fixtures of the sandbox tests; what they are made of is in ``isolation_support``."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from isolation_support import PRELUDE, PYTHON, Box

from sandboxd.isolation.client import Launcher


@pytest.fixture(params=["", "session"], ids=["made", "template"])
def template(request: pytest.FixtureRequest) -> str:
    """The group of templates to launch from; empty: each sandbox is made for its launch."""
    group: str = request.param
    return group


@pytest.fixture
async def box(launcher: Launcher, template: str) -> Box:
    return Box(launcher, template)


@pytest.fixture
def outside() -> Callable[..., dict[str, Any]]:
    """Run a probe as an ordinary process of the host."""

    def run(code: str, **options: Any) -> dict[str, Any]:
        argv = [PYTHON, "-I", "-S", "-c", PRELUDE + code]
        if options.get("user") == os.geteuid():
            del options["user"]
        if "user" in options:
            options |= {"group": options["user"], "extra_groups": []}
        done = subprocess.run(argv, capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    return run


@pytest.fixture
def workspace(box: Box, tmp_path: Path) -> Path:
    """A directory of an ordinary user's, reachable by the launcher."""
    path = tmp_path / "workspace"
    path.mkdir()
    if os.geteuid() == 0:
        for parent in (*path.parents,):
            if parent.stat().st_uid == 0 and parent.is_relative_to("/tmp/pytest-of-root"):
                parent.chmod(0o755)
        os.chown(path, box.user, box.user)
    return path
