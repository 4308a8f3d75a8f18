"""How the broker gives up root: for good, and with its own files still in reach."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandboxd.errors import Unavailable
from sandboxd.privileges import Identity, become, identity, raise_file_limit

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives up root, so needs it")


def in_child(code: str) -> Any:
    """What ``code`` prints as JSON, run in a process of its own."""
    head = (
        "import json, os\n"
        "from sandboxd.privileges import *\n"
        "who = Identity(64125, 64125, (), 'x')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@as_root
def test_root_is_given_up_for_good() -> None:
    status = in_child(
        "become(who)\n"
        "regained = []\n"
        "for call in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):\n"
        "    try: call()\n"
        "    except PermissionError: continue\n"
        "    regained.append(1)\n"
        "text = open('/proc/self/status').read()\n"
        "fields = dict(line.split(':\\t') for line in text.splitlines() if ':\\t' in line)\n"
        "print(json.dumps([regained, fields]))"
    )
    regained, fields = status
    assert regained == []
    assert fields["Uid"].split() == ["64125"] * 4
    assert fields["Groups"].split() == []
    assert {fields[f"Cap{k}"] for k in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"


@as_root
def test_a_closed_directory_shows_what_is_needed_and_nothing_else(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if directory.is_relative_to("/tmp/pytest-of-root"):
            directory.chmod(0o755)
    home = tmp_path / "home"
    (home / "project" / "venv").mkdir(parents=True)
    (home / "project" / "venv" / "module").write_text("needed")
    (home / "private").write_text("not for the broker")
    home.chmod(0o700)
    needed = home / "project" / "venv"
    covered, module, listing, write = in_child(
        f"covered = make_reachable([{str(needed)!r}, '/usr/lib'], who)\n"
        "become(who)\n"
        f"module = open({str(needed / 'module')!r}).read()\n"
        f"listing = os.listdir({str(home)!r})\n"
        f"try: open({str(needed / 'new')!r}, 'w'); error = 0\n"
        "except OSError as failure: error = failure.errno\n"
        "print(json.dumps([covered, module, listing, error]))"
    )
    assert covered == [str(home)]
    assert module == "needed"
    assert listing == ["project"]
    assert write == 30  # EROFS
    # The host's own tree is as it was.
    assert sorted(os.listdir(home)) == ["private", "project"]
    assert home.stat().st_mode & 0o777 == 0o700


@as_root
def test_what_is_closed_itself_is_refused_with_the_command_that_opens_it(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if directory.is_relative_to("/tmp/pytest-of-root"):
            directory.chmod(0o755)
    closed = tmp_path / "venv"
    closed.mkdir(mode=0o700)
    said = in_child(
        f"try: make_reachable([{str(closed)!r}], who)\n"
        "except Exception as failure: print(json.dumps([failure.code, failure.hint]))"
    )
    assert said == ["unavailable", f"open it for reading: chmod -R o+rX {closed}"]


def test_the_broker_never_becomes_root() -> None:
    with pytest.raises(Unavailable, match="must not run as root"):
        become(Identity(0, 0, (), "root"))


def test_an_unknown_user_is_told_with_the_command_that_makes_it() -> None:
    with pytest.raises(Unavailable) as caught:
        identity("no-such-user-here")
    assert "sandboxctl install" in caught.value.hint


def test_a_number_without_an_account_is_an_identity() -> None:
    assert identity("1899999998") == Identity(1899999998, 1899999998, (), "1899999998")


def test_the_file_limit_goes_as_far_as_it_may() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert raise_file_limit(512) == 512
        assert raise_file_limit(300) == 512  # never lowered
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_child_helper_tells_failures() -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        in_child("1 / 0")
