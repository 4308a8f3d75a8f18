"""Files of a workspace that is being turned over: nothing beside it is reached, ever."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxd.sessions import fileops

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
ROUNDS = 1500


class Tree:
    """``inside`` is the workspace; beside it is what nobody may reach through it."""

    def __init__(self, base: Path) -> None:
        self.inside, self.outside = base / "inside", base / "outside"
        for top, word in ((self.inside / "place", "own"), (self.outside, "foreign")):
            (top / "below").mkdir(parents=True)
            (top / "word").write_text(word)
            (top / "below" / "word").write_text(word)
        (self.inside / "link").symlink_to(self.outside)
        self.root = os.open(self.inside, os.O_RDONLY | os.O_DIRECTORY)

    def do(self, op: str, path: str = "", **fields: Any) -> dict[str, Any]:
        return fileops.perform(self.root, {"op": op, "path": path, **fields})

    def write(self, path: str, text: str) -> dict[str, Any]:
        row = {"path": path, "content": base64.b64encode(text.encode()).decode(), "mode": None}
        return self.do("write", path, files=[row])

    def state(self) -> dict[str, str]:
        """Everything outside, with what says that somebody was there."""
        found = {}
        for path in (self.outside, *sorted(self.outside.rglob("*"))):
            about = path.lstat()
            text = path.read_text() if path.is_file() else ""
            found[str(path)] = f"{about.st_mode} {about.st_mtime_ns} {about.st_ctime_ns} {text}"
        return found


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path)
    yield made
    os.close(made.root)


@contextlib.contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Exchange two names without end."""
    libc = ctypes.CDLL(None, use_errno=True)
    stop, begun = threading.Event(), threading.Event()
    failures = []

    def swap() -> None:
        names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
        while not stop.is_set():
            if libc.renameat2(*names, _RENAME_EXCHANGE) < 0:
                failures.append(os.strerror(ctypes.get_errno()))
                break
            begun.set()
        begun.set()

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        assert begun.wait(30)
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []


def led_by_path(path: Path, words: set[str]) -> set[str]:
    """The control: who goes by the path alone is led to each of these places."""
    found: set[str] = set()
    for _ in range(1_000_000):
        with contextlib.suppress(OSError):
            found.add(path.read_text())
        if found >= words:
            break
    return found


def rounds_until(seen: set[str], wanted: set[str]) -> Iterator[int]:
    """ROUNDS, and more until all that is wanted was seen: a busy host may swap seldom."""
    deadline = time.monotonic() + 60
    for n in itertools.count():
        if n >= ROUNDS and (wanted <= seen or time.monotonic() > deadline):
            return
        yield n


@pytest.mark.parametrize("path", ["place/word", "place/below/word"])
def test_a_parent_that_is_a_link_every_other_moment_leads_nobody_out(tree: Tree, path: str) -> None:
    before = tree.state()
    texts, codes = set(), set()
    with swapping(tree.inside / "place", tree.inside / "link"):
        assert led_by_path(tree.inside / path, {"own", "foreign"}) == {"own", "foreign"}
        for n in rounds_until(codes, {"", "denied"}):
            answer = tree.do("read", path, limit=100)
            codes.add(answer.get("code", ""))
            if "content" in answer:
                texts.add(base64.b64decode(answer["content"]).decode())
            parent = os.path.dirname(path)
            for op, fields in (
                ("write", {"path": f"{parent}/n{n}"}),
                ("mkdir", {"path": f"{parent}/d{n}/e"}),
                ("rename", {"path": f"{parent}/n{n}", "new": f"{parent}/m{n}", "overwrite": True}),
                ("remove", {"path": f"{parent}/m{n}", "recursive": True}),
                ("remove", {"path": f"{parent}/d{n}", "recursive": True}),
                ("list", {"path": "place", "depth": 5}),
            ):
                done = tree.write(fields["path"], "new") if op == "write" else tree.do(op, **fields)
                codes.add(done.get("code", ""))
                assert not any("foreign" in str(e) for e in done.get("entries", ()))
    assert texts == {"own"}
    # Both happened: it went well, and it met the link.
    assert {"", "denied"} <= codes <= {"", "denied", "not_found", "conflict"}
    assert tree.state() == before


def test_a_file_that_is_a_link_every_other_moment_is_never_followed(tree: Tree) -> None:
    (tree.inside / "word").write_text("own")
    (tree.inside / "other").symlink_to(tree.outside / "word")
    before = tree.state()
    texts, codes = set(), set()
    with swapping(tree.inside / "word", tree.inside / "other"):
        assert led_by_path(tree.inside / "word", {"own", "foreign"}) == {"own", "foreign"}
        for _ in rounds_until(codes, {"", "denied"}):
            answer = tree.do("read", "word", limit=100)
            codes.add(answer.get("code", ""))
            if "content" in answer:
                texts.add(base64.b64decode(answer["content"]).decode())
    assert texts == {"own"}
    assert codes == {"", "denied"}
    assert tree.state() == before


def test_a_link_that_takes_a_files_name_is_replaced_and_not_followed(tree: Tree) -> None:
    target = tree.outside / "word"
    inside, other = tree.inside / "word", tree.inside / "other"
    codes: set[str] = set()
    inside.write_text("own")
    other.symlink_to(target)
    before = tree.state()
    with swapping(inside, other):
        for _ in rounds_until(codes, {""}):
            codes.add(tree.write("word", "new").get("code", ""))
            if not (inside.is_symlink() or other.is_symlink()):
                break  # it was replaced, as rename(2) does; nothing is left to follow
    assert codes <= {"", "denied"}
    assert "" in codes
    assert tree.state() == before
    # The control: opening by path does write through such a link.
    with contextlib.suppress(FileNotFoundError):
        inside.unlink()
    inside.symlink_to(target)
    inside.write_text("led")
    assert target.read_text() == "led"


def test_magic_links_and_fifos_hold_nobody_up(tree: Tree) -> None:
    (tree.inside / "magic").symlink_to("/proc/self/root/etc")
    assert tree.do("list", "magic", depth=1)["code"] in ("denied", "conflict")
    assert tree.do("read", "magic/hostname", limit=10)["code"] == "denied"
    os.mkfifo(tree.inside / "fifo")  # an open for reading would wait for a writer
    assert tree.do("read", "fifo", limit=10)["code"] == "conflict"


def test_a_listing_has_a_bound(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(12):
        (tree.inside / f"n{n}").touch()
    whole = tree.do("list", "", depth=1)
    assert (len(whole["entries"]), whole["truncated"]) == (14, False)
    monkeypatch.setattr(fileops, "MAX_ENTRIES", 5)
    part = tree.do("list", "", depth=1)
    assert (len(part["entries"]), part["truncated"]) == (5, True)


def test_a_removal_has_bounds(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(12):
        (tree.inside / f"many/n{n}").mkdir(parents=True)
    monkeypatch.setattr(fileops, "MAX_REMOVED", 5)
    refused = tree.do("remove", "many", recursive=True)
    assert (refused["code"], "more than 5 entries" in refused["why"]) == ("conflict", True)
    assert len(list((tree.inside / "many").iterdir())) == 7
    monkeypatch.undo()
    assert tree.do("remove", "many", recursive=True) == {"removed": 8}
    (tree.inside / "/".join(["d"] * 120)).mkdir(parents=True)
    deep = tree.do("remove", "d", recursive=True)
    assert "in one another" in deep["why"]


def test_a_file_over_the_limit_is_refused_whole(tree: Tree) -> None:
    assert tree.write("sized", "12345") == {"written": 1}
    assert base64.b64decode(tree.do("read", "sized", limit=5)["content"]) == b"12345"
    refused = tree.do("read", "sized", limit=4)
    assert (refused["code"], "4 bytes" in refused["why"]) == ("invalid", True)


def test_names_that_are_not_utf8_are_told_as_such(tree: Tree) -> None:
    (tree.inside / os.fsdecode(b"a\xff")).touch()
    entries = tree.do("list", "", depth=1)["entries"]
    odd = next(e for e in entries if "problem" in e)
    assert (odd["path"], odd["problem"]) == ("a\ufffd", "its name is not UTF-8")


def test_the_first_of_several_files_that_fails_is_named(tree: Tree) -> None:
    rows = [{"path": p, "content": "", "mode": None} for p in ("one", "place", "three")]
    refused = tree.do("write", "one", files=rows)
    assert (refused["path"], refused["done"], refused["code"]) == ("place", 1, "conflict")
    assert (tree.inside / "one").exists()
    assert not (tree.inside / "three").exists()
