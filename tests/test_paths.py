"""Where a daemon keeps its things."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandboxd.errors import Invalid
from sandboxd.paths import MAX_SOCKET_PATH, Paths, shipped


def test_root_gets_the_system_directories_whatever_its_environment_says() -> None:
    paths = Paths.resolve(environ={"HOME": "/root", "XDG_STATE_HOME": "/x"}, uid=0)
    assert (paths.config, paths.state, paths.runtime) == (
        Path("/etc/sandboxd"),
        Path("/var/lib/sandboxd"),
        Path("/run/sandboxd"),
    )


def test_a_user_gets_the_xdg_directories() -> None:
    environ = {
        "HOME": "/home/u",
        "XDG_CONFIG_HOME": "/c",
        "XDG_STATE_HOME": "/s",
        "XDG_RUNTIME_DIR": "/run/user/5",
    }
    paths = Paths.resolve(environ=environ, uid=5)
    assert (paths.config, paths.state, paths.runtime) == (
        Path("/c/sandboxd"),
        Path("/s/sandboxd"),
        Path("/run/user/5/sandboxd"),
    )


def test_a_user_without_xdg_variables_gets_their_defaults() -> None:
    paths = Paths.resolve(environ={"HOME": "/home/u"}, uid=5)
    assert (paths.config, paths.state, paths.runtime) == (
        Path("/home/u/.config/sandboxd"),
        Path("/home/u/.local/state/sandboxd"),
        Path("/home/u/.local/state/sandboxd/run"),
    )


def test_a_relative_xdg_path_is_ignored_as_the_specification_demands() -> None:
    environ = {"HOME": "/home/u", "XDG_CONFIG_HOME": "c", "XDG_RUNTIME_DIR": "./r"}
    assert Paths.resolve(environ=environ, uid=5) == Paths.resolve(
        environ={"HOME": "/home/u"}, uid=5
    )


def test_an_argument_wins_over_the_environment_and_that_over_the_default(tmp_path: Path) -> None:
    environ = {"HOME": "/h", "SANDBOXD_CONFIG": "/env/c", "SANDBOXD_STATE": "/env/s"}
    paths = Paths.resolve(config=tmp_path, environ=environ, uid=5)
    assert (paths.config, paths.state) == (tmp_path, Path("/env/s"))


def test_a_relative_argument_starts_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Paths.resolve(state="s", environ={}, uid=0).state == tmp_path / "s"


def test_a_relative_argument_in_a_deleted_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert Paths.resolve(state="/s", environ={}, uid=0).state == Path("/s")
    with pytest.raises(Invalid, match="working directory is gone"):
        Paths.resolve(state="s", environ={}, uid=0)


def test_every_file_lies_below_its_directory() -> None:
    paths = Paths(Path("/c"), Path("/s"), Path("/r"))
    assert paths.admin_socket == Path("/r/admin.sock")
    assert paths.sessions == Path("/r/sessions")
    assert [paths.store, paths.audit, paths.lock, paths.logs, paths.workspaces] == [
        Path("/s/store.sqlite"),
        Path("/s/audit"),
        Path("/s/lock"),
        Path("/s/sessions"),
        Path("/s/workspaces"),
    ]


def test_a_runtime_directory_is_refused_exactly_when_its_longest_socket_path_is_too_long() -> None:
    tail = "/sessions/s-0123456789abcdef/broker.sock"
    fits = "/" + "r" * (MAX_SOCKET_PATH - len(tail) - 1)
    Paths(Path("/c"), Path("/s"), Path(fits)).check_sockets()
    with pytest.raises(Invalid, match="is 1 bytes too long"):
        Paths(Path("/c"), Path("/s"), Path(fits + "r")).check_sockets()
    # The limit counts bytes, not characters.
    with pytest.raises(Invalid, match="too long"):
        Paths(Path("/c"), Path("/s"), Path(fits[:-1] + "é")).check_sockets()


@pytest.mark.parametrize("kind", ["tools", "policies", "systemd"])
def test_shipped_files_are_found(kind: str) -> None:
    assert shipped(kind).is_dir()
    assert os.access(shipped(kind), os.R_OK)
