"""A configuration directory that a test writes file by file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from sandboxd.paths import shipped
from sandboxd.policy import Config, ConfigErrors, load_config

AGENT = """\
version: 1
description: a test agent
command: [sh]
tools: [echo]
"""

TOOL = """\
version: 1
name: echo
description: prints what it is given
program: run
argv: ["{text}"]
input:
  type: object
  additionalProperties: false
  properties:
    text: {type: string}
"""


class ConfigDirectory:
    """CONFIG with one agent and one tool; tests replace or add what they are about."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("agents/coder.yaml", AGENT)
        self.write("tools/echo/tool.yaml", TOOL)
        self.program("tools/echo/run")

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else dedent(text).encode())
        return path

    def program(self, name: str, text: str = "#!/bin/sh\necho hello\n") -> Path:
        path = self.write(name, text)
        path.chmod(0o755)
        return path

    def agent(self, more: str = "", *, tools: str = "[echo]", slug: str = "coder") -> Path:
        text = AGENT.replace("[echo]", tools)
        return self.write(f"agents/{slug}.yaml", text + dedent(more))

    def tool(self, more: str = "", **replaced: str) -> Path:
        """The manifest of echo, with lines added and whole keys replaced."""
        text = TOOL
        for key, value in replaced.items():
            lines = [line for line in text.splitlines() if not line.startswith(f"{key}:")]
            text = "\n".join((*lines, value)) + "\n"
        return self.write("tools/echo/tool.yaml", text + dedent(more))

    def policy(self, name: str, text: str) -> Path:
        return self.write(f"policies/{name}.yaml", "version: 1\ndescription: d\n" + dedent(text))

    def load(self) -> Config:
        return load_config(
            self.path, shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
        )

    def problems(self) -> list[str]:
        """Every problem as FILE:LINE:COLUMN: MESSAGE, files relative to the directory."""
        with pytest.raises(ConfigErrors) as caught:
            self.load()
        return [e.message.replace(f"{self.path}/", "") for e in caught.value.errors]

    def problem(self) -> str:
        """The only problem there is."""
        (only,) = self.problems()
        return only

    def hint(self) -> str:
        with pytest.raises(ConfigErrors) as caught:
            self.load()
        return caught.value.errors[0].hint


@pytest.fixture(autouse=True, scope="module")
def _umask() -> Iterator[None]:
    """Files that no group can write, whatever the umask of whoever runs the tests."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="session")
def make_config() -> type[ConfigDirectory]:
    """For fixtures that outlive one test."""
    return ConfigDirectory


@pytest.fixture
def config(tmp_path: Path) -> ConfigDirectory:
    directory = tmp_path / "config"
    directory.mkdir(mode=0o755)
    return ConfigDirectory(directory)
