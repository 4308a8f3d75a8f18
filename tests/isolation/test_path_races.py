"""An agent turns directories into links and back while the launcher is on its way through them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from isolation_support import Box

from sandboxd.errors import KernelError
from sandboxd.isolation.wire import MountSpec

LAUNCHES = 10
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
#: What a launch may say that met a link, or nothing at all.
REFUSALS = {errno.ELOOP, errno.ENOTDIR, errno.ENOENT, errno.EXDEV}


@contextlib.contextmanager
def swapping(one: Path, other: Path) -> Iterator[threading.Event]:
    """Exchange two names without end; the event is set once that has happened many times."""
    libc = ctypes.CDLL(None, use_errno=True)
    stop, begun = threading.Event(), threading.Event()
    failures = []

    def swap() -> None:
        count = 0
        while not stop.is_set():
            names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
            if libc.renameat2(*names, _RENAME_EXCHANGE) < 0:
                failures.append(os.strerror(ctypes.get_errno()))
                begun.set()
                return
            count += 1
            if count == 100:
                begun.set()

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        assert begun.wait(30)
        yield begun
    finally:
        stop.set()
        thread.join()
    assert failures == []


def seen_by_path(path: Path, words: set[bytes]) -> set[bytes]:
    """The control: who goes by the path alone is led to each of these places, sooner or later."""
    found: set[bytes] = set()
    for _ in range(1_000_000):
        with contextlib.suppress(OSError):
            found.add(path.read_bytes())
        if found >= words:
            break
    return found


@pytest.mark.parametrize("depth", ["the directory itself", "its parent"])
async def test_a_workspace_is_never_reached_through_a_link_that_comes_and_goes(
    box: Box, workspace: Path, tmp_path: Path, depth: str
) -> None:
    for top, word in ((workspace / "place", "own"), (tmp_path / "foreign", "foreign")):
        (top / "below").mkdir(parents=True)
        (top / "below" / "word").write_text(word)
        (top / "word").write_text(word)
        if os.geteuid() == 0:
            for path in (top, *top.rglob("*")):
                os.chown(path, box.user, box.user)
    (workspace / "link").symlink_to(tmp_path / "foreign")
    source = workspace / "place"
    if depth == "its parent":
        source = source / "below"
    outcomes: set[bytes | int] = set()
    with swapping(workspace / "place", workspace / "link"):
        assert seen_by_path(source / "word", {b"own", b"foreign"}) == {b"own", b"foreign"}
        for _ in range(LAUNCHES):
            mount = MountSpec(str(source), "/workspace", readonly=False, idmap=True)
            try:
                outcomes.add((await box.run("/bin/cat", "/workspace/word", mounts=(mount,))).out)
            except KernelError as failure:
                outcomes.add(failure.errno)
    assert b"foreign" not in outcomes
    assert outcomes <= {b"own", *REFUSALS}


async def test_a_mount_point_is_never_reached_through_a_link_that_comes_and_goes(
    box: Box, workspace: Path, tmp_path: Path
) -> None:
    """Followed, the link would put the mount into the sandbox's own /tmp."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "word").write_text("mounted")
    (workspace / "place" / "below").mkdir(parents=True)
    if os.geteuid() == 0:
        for path in (workspace / "place", workspace / "place" / "below"):
            os.chown(path, box.user, box.user)
    (workspace / "link").symlink_to("/tmp")
    mounts = (
        MountSpec(str(workspace), "/workspace", readonly=False, idmap=True),
        MountSpec(str(source), "/workspace/place/below"),
    )
    where: set[bytes | int] = set()
    with swapping(workspace / "place", workspace / "link"):
        for _ in range(LAUNCHES):
            try:
                where.add((await box.sh("ls -d /tmp/below 2>&1; true", mounts=mounts)).out)
            except KernelError as failure:
                where.add(failure.errno)
    assert where <= {b"ls: cannot access '/tmp/below': No such file or directory\n", *REFUSALS}
    # Nothing turns now: the mount point is reached.
    if (workspace / "place").is_symlink():
        (workspace / "place").unlink()
        (workspace / "link").rename(workspace / "place")
    result = await box.run("/bin/cat", "/workspace/place/below/word", mounts=mounts)
    assert result.out == b"mounted"
