"""Private files and durable replacement."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sandboxd.errors import Denied
from sandboxd.files import fsync_directory, open_private, read_all, replace_file, write_all


def private(path: Path, mode: int = 0o600) -> Path:
    path.write_bytes(b"content")
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_private_file_opens_and_reads(tmp_path: Path, mode: int) -> None:
    fd = open_private(private(tmp_path / "f", mode), os.O_RDONLY, "the file")
    try:
        assert read_all(fd, 100) == b"content"
        assert read_all(fd, 3) == b"con"
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o700, 0o4600, 0o200])
def test_any_other_mode_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    path = private(tmp_path / "f", mode)
    if os.geteuid() != 0 and not mode & 0o400:
        pytest.skip("only root opens a file that its mode forbids")
    with pytest.raises(Denied, match=f"the file {path} has mode {mode:04o}") as caught:
        open_private(path, os.O_RDONLY, "the file")
    assert caught.value.hint == f"chmod it: chmod 0600 {path}"


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    private(tmp_path / "f")
    (tmp_path / "l").symlink_to("f")
    with pytest.raises(Denied, match="is a symbolic link"):
        open_private(tmp_path / "l", os.O_RDONLY, "the file")


def test_a_directory_and_a_fifo_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path, tmp_path / "fifo"):
        for flags in (os.O_RDONLY, os.O_WRONLY):
            with pytest.raises(Denied, match="is not a regular file"):
                open_private(path, flags, "the file")


def test_another_users_file_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives a file away")
    path = private(tmp_path / "f")
    os.chown(path, 12345, -1)
    with pytest.raises(Denied, match="belongs to user 12345"):
        open_private(path, os.O_RDONLY, "the file")


def test_refusing_leaks_no_descriptor(tmp_path: Path) -> None:
    path = private(tmp_path / "f", 0o644)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(Denied):
            open_private(path, os.O_RDONLY, "the file")
    assert len(os.listdir("/proc/self/fd")) == before


def test_replacing_gives_the_new_content_and_mode_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "f"
    (tmp_path / "f.new").write_text("left by a crash")
    old = os.umask(0o777)
    try:
        replace_file(path, b"one", 0o400)
    finally:
        os.umask(old)
    replace_file(path, b"two", 0o600)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["f"]


def test_a_replacement_that_fails_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "d"
    target.mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(target, b"x")
    assert os.listdir(tmp_path) == ["d"]


def test_writing_goes_on_after_a_short_write() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data = b"x" * 1_000_000
    try:
        with pytest.raises(BlockingIOError):
            write_all(writer, data)  # it wrote until the pipe was full, and went on to the error
        assert 0 < len(os.read(reader, len(data))) < len(data)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_missing_directory_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fsync_directory(tmp_path / "none")
