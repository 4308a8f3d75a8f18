"""What differs between an upper layer and its workspace, and how it lands: on plain directories.

The upper layers here are made by hand, with overlayfs's marks; that real ones look like this is
what the isolation and daemon tests show.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandboxd.sessions import landing, overlay, trees
from sandboxd.sessions.overlay import Change
from sandboxd.sessions.trees import Trees, Trouble

BEFORE_ALL = 0
LATER_THAN_ALL = time.time_ns() + 10**18


class Layers:
    """An upper layer and a workspace, and short ways to fill them."""

    def __init__(self, base: Path) -> None:
        self.upper, self.lower = base / "upper", base / "lower"
        self.upper.mkdir()
        self.lower.mkdir()

    def diff(self, *paths: str, since: int = LATER_THAN_ALL) -> list[Change]:
        with Trees(str(self.upper), str(self.lower)) as opened:
            return overlay.chosen(overlay.diff(opened, since), paths)

    def text(self, *paths: str) -> dict[str, Change]:
        with Trees(str(self.upper), str(self.lower)) as opened:
            found = overlay.chosen(overlay.diff(opened, LATER_THAN_ALL), paths)
            return {change.path: change for change in overlay.with_text(opened, found)}

    def told(self, *paths: str) -> list[str]:
        return [f"{change.change} {change.path}" for change in self.diff(*paths)]

    def apply(self, *paths: str, force: bool = False, since: int = LATER_THAN_ALL) -> dict:  # type: ignore[type-arg]
        with Trees(str(self.upper), str(self.lower)) as opened:
            changes = overlay.chosen(overlay.diff(opened, since), paths)
            return landing.apply(opened, changes, force=force)


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path)


def whiteout(path: Path) -> None:
    """The mark of a deletion, which anybody may make (Linux 5.8)."""
    os.mknod(path, stat.S_IFCHR, 0)


def opaque(path: Path) -> None:
    os.setxattr(path, trees.OPAQUE, b"y")


def test_equal_files_are_no_change(layers: Layers) -> None:
    for side in (layers.upper, layers.lower):
        (side / "same").write_text("content")
        (side / "d").mkdir()
    assert layers.diff() == []


def test_each_kind_of_change_is_told(layers: Layers) -> None:
    (layers.lower / "mode").write_text("x")
    (layers.lower / "text").write_text("old")
    (layers.lower / "gone").write_text("x")
    (layers.lower / "tree/inner").mkdir(parents=True)
    (layers.lower / "tree/inner/f").write_text("x")
    (layers.lower / "to").symlink_to("here")
    (layers.upper / "mode").write_text("x")
    (layers.upper / "mode").chmod(0o700)
    (layers.upper / "text").write_text("new")
    (layers.upper / "to").symlink_to("there")
    (layers.upper / "fresh").mkdir()
    (layers.upper / "fresh/f").write_text("x")
    whiteout(layers.upper / "gone")
    whiteout(layers.upper / "tree")
    whiteout(layers.upper / "never-was")
    assert layers.told() == [
        "added fresh",
        "added fresh/f",
        "deleted gone",
        "changed mode",
        "changed text",
        "changed to",
        "deleted tree/inner/f",
        "deleted tree/inner",
        "deleted tree",
    ]
    assert layers.apply()["failed"] == []
    assert layers.diff() == []
    assert sorted(os.listdir(layers.lower)) == ["fresh", "mode", "text", "to"]
    assert os.readlink(layers.lower / "to") == "there"
    assert (layers.lower / "mode").stat().st_mode & 0o777 == 0o700


def test_an_opaque_directory_hides_what_is_below(layers: Layers) -> None:
    for name in ("a", "b", "c"):
        (layers.lower / "d").mkdir(exist_ok=True)
        (layers.lower / "d" / name).write_text(name)
    (layers.upper / "d").mkdir()
    (layers.upper / "d/b").write_text("b")
    assert layers.told() == []
    opaque(layers.upper / "d")
    assert layers.told() == ["deleted d/a", "deleted d/c"]
    layers.apply()
    assert [p.name for p in (layers.lower / "d").iterdir()] == ["b"]


@pytest.mark.parametrize("path", ["x", "x/f"])
def test_a_directory_takes_a_files_place_and_a_file_a_directorys(layers: Layers, path: str) -> None:
    (layers.lower / "x").write_text("a file")
    (layers.upper / "x").mkdir()
    (layers.upper / "x/f").write_text("in it")
    (layers.lower / "y").mkdir()
    (layers.lower / "y/f").write_text("in it")
    (layers.upper / "y").write_text("a file")
    assert layers.told(path) == ["deleted x", "added x", "added x/f"]
    assert layers.apply(path)["failed"] == []
    assert layers.told() == ["deleted y/f", "deleted y", "added y"]
    assert layers.apply()["failed"] == []
    assert (layers.lower / "x/f").read_text() == "in it"
    assert (layers.lower / "y").read_text() == "a file"


def test_part_of_a_deleted_directory_can_go_alone(layers: Layers) -> None:
    (layers.lower / "d").mkdir()
    for name in ("a", "b"):
        (layers.lower / "d" / name).write_text(name)
    whiteout(layers.upper / "d")
    assert layers.told("d/a") == ["deleted d/a"]
    assert layers.apply("d/a")["failed"] == []
    assert (layers.lower / "d/b").exists()


def test_a_path_is_no_prefix_of_a_longer_name(layers: Layers) -> None:
    for name in ("a", "ab"):
        (layers.upper / name).write_text(name)
    assert layers.told("a") == ["added a"]
    with pytest.raises(Trouble, match="nothing changed at b"):
        layers.told("b")


def test_names_of_any_bytes_survive(layers: Layers) -> None:
    name = b"new\nline \xff\xfe \x1b[31m"
    (layers.upper / os.fsdecode(name)).write_bytes(b"\0binary\xff")
    (change,) = layers.text().values()
    assert os.fsencode(change.path) == name
    assert change.binary
    assert layers.apply(change.path)["failed"] == []
    assert os.listdir(os.fsencode(layers.lower)) == [name]
    assert (layers.lower / os.fsdecode(name)).read_bytes() == b"\0binary\xff"


def test_line_differences_are_bounded_in_size_and_lines(layers: Layers) -> None:
    (layers.lower / "big").write_text("x" * overlay.MAX_TEXT)
    (layers.upper / "big").write_text("x" * (overlay.MAX_TEXT + 1))
    for side, word in ((layers.upper, "a"), (layers.lower, "b")):
        (side / "long").write_text(f"{word}\n" * overlay.MAX_LINES)
    (layers.upper / "no-newline").write_text("a\x0cb\r\u2028c\nend")
    told = layers.text()
    assert told["big"].omitted == "too large to show"
    assert told["long"].omitted == "too many lines to compare"
    assert told["no-newline"].text is not None
    assert told["no-newline"].text.endswith("+a\x0cb\r\u2028c\n+end\n\\ no newline at the end\n")


def test_line_differences_are_bounded_in_time(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layers.upper / "a-short-one").write_text("x\n")
    for side, factor in ((layers.upper, 7), (layers.lower, 11)):
        lines = [f"{i * factor % 397}\n" for i in range(overlay.MAX_LINES // 2)]
        (side / "long").write_text("".join(lines))
    assert layers.text()["long"].text is not None
    monkeypatch.setattr(overlay, "TEXT_SECONDS", 0.002)
    told = layers.text()
    assert "too long" in told["long"].omitted
    assert told["a-short-one"].text is not None


def test_a_workspace_that_changed_meanwhile_is_a_conflict_and_untouched(layers: Layers) -> None:
    (layers.lower / "f").write_text("theirs")
    (layers.upper / "f").write_text("ours")
    (layers.upper / "g").write_text("ours")
    assert [bool(change.conflict) for change in layers.diff(since=BEFORE_ALL)] == [True, False]
    refused = layers.apply(since=BEFORE_ALL)
    assert [c["path"] for c in refused["conflicts"]] == ["f"]
    assert (layers.lower / "f").read_text() == "theirs"
    assert not (layers.lower / "g").exists()
    assert layers.apply("g", since=BEFORE_ALL)["conflicts"] == []
    assert layers.apply(since=BEFORE_ALL, force=True)["failed"] == []
    assert (layers.lower / "f").read_text() == "ours"


def test_a_file_removed_from_the_workspace_meanwhile_is_a_conflict(layers: Layers) -> None:
    (layers.upper / "copied-up").write_text("x")
    (layers.upper / "made").write_text("x")
    os.setxattr(layers.upper / "copied-up", trees.ORIGIN, b"")
    told = {change.path: change.conflict for change in layers.diff(since=BEFORE_ALL)}
    assert "removed" in told["copied-up"]
    assert told["made"] == ""


def test_what_is_no_file_never_lands_and_is_told(layers: Layers) -> None:
    os.mkfifo(layers.upper / "fifo")
    (layers.upper / "fine").write_text("x")
    (layers.upper / "suid").write_text("x")
    (layers.upper / "suid").chmod(0o6755)
    assert "setuid" in layers.text()["suid"].note
    done = layers.apply()
    assert [f["path"] for f in done["failed"]] == ["fifo"]
    assert stat.S_IMODE((layers.lower / "suid").stat().st_mode) == 0o755
    assert not (layers.lower / "fifo").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_told(layers: Layers) -> None:
    (layers.upper / "closed").write_text("x")
    (layers.upper / "closed").chmod(0)
    (layers.upper / "dir").mkdir(0)
    failed = {f["path"]: f["why"] for f in layers.apply()["failed"]}
    assert failed["closed"] == "permission denied"
    assert failed["dir"] == "permission denied"
    (layers.upper / "dir").chmod(0o700)


def test_a_directory_that_forbids_writing_lands_with_what_is_in_it(layers: Layers) -> None:
    (layers.upper / "d").mkdir()
    (layers.upper / "d/f").write_text("x")
    (layers.upper / "d").chmod(0o555)
    assert layers.apply()["failed"] == []
    assert stat.S_IMODE((layers.lower / "d").stat().st_mode) == 0o555
    assert (layers.lower / "d/f").read_text() == "x"
    for side in (layers.lower, layers.upper):
        (side / "d").chmod(0o755)


def test_a_depth_that_nobody_reviews_is_told(layers: Layers) -> None:
    with _descended(layers.upper, 150):
        pass
    told = layers.diff()
    assert len(told) == trees.MAX_DEPTH + 1
    assert "directories deep" in told[-1].problem


def test_more_changes_than_anybody_reviews_are_refused(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlay, "MAX_CHANGES", 10)
    for number in range(11):
        (layers.upper / str(number)).touch()
    with pytest.raises(Trouble, match="more than 10 changes"):
        layers.diff()


def test_a_hole_of_a_terabyte_costs_nothing(layers: Layers) -> None:
    with (layers.upper / "sparse").open("wb") as file:
        file.write(b"start")
        file.truncate(1 << 40)
    assert layers.apply()["failed"] == []
    landed = (layers.lower / "sparse").stat()
    assert landed.st_size == 1 << 40
    assert landed.st_blocks * 512 < 1 << 20
    (layers.lower / "sparse").unlink()


def test_what_is_kept_compares_like_the_original(layers: Layers, tmp_path: Path) -> None:
    (layers.lower / "gone").write_text("x")
    (layers.lower / "d").mkdir()
    (layers.lower / "d/hidden").write_text("x")
    whiteout(layers.upper / "gone")
    (layers.upper / "d").mkdir()
    opaque(layers.upper / "d")
    (layers.upper / "d/new").write_text("x")
    (layers.upper / "d").chmod(0o500)
    (layers.upper / "closed").write_text("secretive")
    (layers.upper / "closed").chmod(0)
    (layers.upper / "link").symlink_to("/etc/passwd")
    os.mkfifo(layers.upper / "fifo")
    before = layers.told()
    kept = tmp_path / "kept"
    kept.mkdir()
    with Trees(str(layers.upper), str(kept)) as opened:
        assert landing.keep(opened.upper, opened.lower) == 1  # the fifo
    layers.upper = kept
    assert layers.told() == [line for line in before if line != "added fifo"]
    assert stat.S_IMODE((kept / "d").stat().st_mode) == 0o500
    assert stat.S_IMODE((kept / "closed").stat().st_mode) == 0
    (kept / "d").chmod(0o700)


def test_a_deep_and_closed_tree_can_be_removed(layers: Layers) -> None:
    with _descended(layers.upper, 3000) as bottom:
        fd = os.open("file", os.O_CREAT | os.O_WRONLY, 0, dir_fd=bottom)
        os.close(fd)
    (layers.upper / "d").chmod(0)
    whiteout(layers.upper / "w")
    (layers.upper / "link").symlink_to(layers.lower)
    (layers.lower / "stays").touch()
    trees.remove(layers.upper)
    assert not layers.upper.exists()
    assert (layers.lower / "stays").exists()
    trees.remove(layers.upper)  # an absent one is fine


@contextmanager
def _descended(path: Path, depth: int) -> Iterator[int]:
    """Directories ``d`` within each other; the innermost one, open."""
    at = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    try:
        yield at
    finally:
        os.close(at)


_libc = ctypes.CDLL(None, use_errno=True)
_EXCHANGE = 2


@contextmanager
def swapping(*pairs: tuple[Path, Path]) -> Iterator[None]:
    """Exchange each pair of paths, again and again, until the block ends (renameat2(2))."""
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for one, other in pairs:
                _libc.renameat2(-100, bytes(one), -100, bytes(other), _EXCHANGE)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def until_both(attempt: Callable[[], bool], times: int = 20, limit: float = 30.0) -> None:
    """Repeat until the attempt has gone both ways many times, so that the race was really run."""
    won = lost = 0
    end = time.monotonic() + limit
    while (won < times or lost < times) and time.monotonic() < end:
        if attempt():
            won += 1
        else:
            lost += 1
    assert won >= 1, "it never succeeded: the test shows nothing"
    assert lost >= 1, "it was never disturbed: the test shows nothing"


@pytest.fixture
def raced(layers: Layers, tmp_path: Path) -> Iterator[tuple[Layers, Path, int]]:
    """``d/inner`` on both sides, beside each ``d`` a link to a directory outside that looks the
    same, and the workspace's real ``d/inner``, open."""
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "inner/victim").write_text("precious")
    (outside / "inner/source").write_text("precious")
    for side in (layers.upper, layers.lower):
        (side / "d/inner").mkdir(parents=True)
        (side / "swap").symlink_to(outside)
    (layers.upper / "d/inner/f").write_text("the agent's")
    (layers.upper / "d/inner/source").write_text("the agent's")
    fd = os.open(layers.lower / "d/inner", os.O_RDONLY)
    yield layers, outside, fd
    os.close(fd)


def test_the_race_is_real_for_code_that_follows_paths(raced: tuple[Layers, Path, int]) -> None:
    layers, outside, _ = raced

    def naive() -> bool:
        with contextlib.suppress(OSError):
            (layers.lower / "d/inner/f").write_text("x")
        return (outside / "inner/f").exists()

    with swapping((layers.lower / "d", layers.lower / "swap")):
        until_both(lambda: not naive() or bool((outside / "inner/f").unlink()))


def test_nothing_lands_outside_while_a_parent_becomes_a_link(
    raced: tuple[Layers, Path, int],
) -> None:
    layers, outside, inner = raced
    change = Change("d/inner/f", "added", "file", mode=0o644)

    def attempt() -> bool:
        os.close(os.open("victim", os.O_CREAT | os.O_WRONLY, dir_fd=inner))
        seen = trees.identity(trees.lstat(inner, "victim"))
        gone = Change("d/inner/victim", "deleted", old_kind="file", seen=seen)
        with Trees(str(layers.upper), str(layers.lower)) as opened:
            done = landing.apply(opened, [change, gone], force=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink("f", dir_fd=inner)
        assert not [f["why"] for f in done["failed"] if f["why"] not in REFUSALS]
        return "d/inner/f" in done["applied"]

    with swapping((layers.lower / "d", layers.lower / "swap")):
        until_both(attempt)
    assert sorted(p.name for p in (outside / "inner").iterdir()) == ["source", "victim"]
    assert {p.read_text() for p in (outside / "inner").iterdir()} == {"precious"}


def test_nothing_is_read_from_outside_while_a_parent_becomes_a_link(
    raced: tuple[Layers, Path, int],
) -> None:
    layers, _, inner = raced
    change = Change("d/inner/source", "added", "file", mode=0o644, size=1)

    def attempt() -> bool:
        with Trees(str(layers.upper), str(layers.lower)) as opened:
            (told,) = overlay.with_text(opened, [change])
            done = landing.apply(opened, [change], force=True)
        assert "precious" not in (told.text or "")
        if not done["applied"]:
            return False
        fd = os.open("source", os.O_RDONLY, dir_fd=inner)
        assert os.read(fd, 100) == b"the agent's"
        os.close(fd)
        os.unlink("source", dir_fd=inner)
        return True

    with swapping((layers.upper / "d", layers.upper / "swap")):
        until_both(attempt)


def test_a_file_that_becomes_a_link_is_never_written_through(
    raced: tuple[Layers, Path, int],
) -> None:
    layers, outside, inner = raced
    link = layers.lower / "d/inner/link"
    link.symlink_to(outside / "inner/victim")

    def attempt() -> bool:
        fresh = layers.lower / "d/inner/fresh"
        fresh.write_text("theirs")
        fresh.rename(layers.lower / "d/inner/f")
        seen = trees.identity(trees.lstat(inner, "f"))
        change = Change("d/inner/f", "changed", "file", "file", mode=0o644, seen=seen)
        with Trees(str(layers.upper), str(layers.lower)) as opened:
            done = landing.apply(opened, [change], force=True)
        if not link.is_symlink():
            with contextlib.suppress(OSError):
                os.symlink(outside / "inner/victim", "relink", dir_fd=inner)
                os.rename("relink", "link", src_dir_fd=inner, dst_dir_fd=inner)
        return bool(done["applied"])

    with swapping((layers.lower / "d/inner/f", link)):
        until_both(attempt, times=5)
    assert (outside / "inner/victim").read_text() == "precious"


#: What a lost race is called: a link where a directory was, or a name that has come or gone.
REFUSALS = {
    "too many levels of symbolic links",
    "not a directory",
    "no such file or directory",
    "changed in the workspace while this was under way",
}
