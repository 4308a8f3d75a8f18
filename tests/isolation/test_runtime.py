"""The daemon's own Python, shown to tools that ask for it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import trio
from isolation_support import Box

from sandboxd.isolation import runtime
from sandboxd.isolation.client import open_launcher
from sandboxd.isolation.launcher import fork_launcher
from sandboxd.isolation.runtime import python_argv, python_mounts, python_prefixes
from sandboxd.isolation.wire import FileSpec

_PROGRAM = b"""
import json, os, sys, trio
def write(path):
    try:
        open(path, "w")
    except OSError as failure:
        return failure.errno
print(json.dumps([sys.executable, sys.flags.isolated, sys.flags.dont_write_bytecode,
                  os.path.dirname(trio.__file__), write(sys.prefix + "/planted")]))
"""


async def test_a_tool_runs_on_the_daemons_interpreter_with_its_packages() -> None:
    packages = [sys.prefix, *python_prefixes()]
    if not any(Path(trio.__file__).is_relative_to(prefix) for prefix in packages):
        pytest.skip("this Python's packages are not in its prefix")
    async with open_launcher(fork_launcher()) as launcher:
        result = await Box(launcher).run(
            *python_argv("/run/tool.py"),
            mounts=python_mounts(),
            files=(FileSpec("/run/tool.py", _PROGRAM, 0o444),),
        )
    assert result.exit.code == 0, result.err
    executable, isolated, no_bytecode, package, write = json.loads(result.out)
    assert (executable, isolated, no_bytecode) == (sys.executable, 1, 1)
    assert package == os.path.dirname(trio.__file__)
    assert write == 30  # EROFS


def test_the_prefixes_cover_the_interpreter_and_no_directory_twice() -> None:
    prefixes = [Path(prefix) for prefix in python_prefixes()]
    real = Path(sys.executable).resolve()
    assert real.is_relative_to("/usr") or any(real.is_relative_to(p) for p in prefixes)
    assert Path("/") not in prefixes
    for one in prefixes:
        assert not any(one != other and one.is_relative_to(other) for other in prefixes)


def test_a_python_in_a_home_directory_shows_no_more_of_it_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bin", "lib", "Documents"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(runtime, "python_prefixes", lambda: (str(tmp_path),))
    assert [mount.source for mount in runtime.python_mounts()] == [str(tmp_path)]
    monkeypatch.setattr(runtime, "_homes", lambda: frozenset({tmp_path}))
    shown = [str(tmp_path / name) for name in ("bin", "lib")]
    assert [mount.source for mount in runtime.python_mounts()] == shown
