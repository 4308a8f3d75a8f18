"""Files of live sessions' workspaces, by a real daemon: used as the session's agent uses them."""

from __future__ import annotations

import base64
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_daemon import RealDaemon, directories, until

from sandboxd.errors import Conflict, Invalid, NotFound, SandboxdError

#: Waits for a file, says what it sees of it, and changes it.
AGENT = """
echo mine > own
ln -s /etc/passwd link
ln -s /workspace/sub inner
mkdir -p sub/deep && echo below > sub/deep/file
mkfifo fifo
printf 'a\\000\\377' > binary
echo ready > ready
while [ ! -e go ]; do sleep 0.05; done
stat -c '%U %a' given > seen
cat given >> seen
echo more >> given && rm -r tree
echo done > finished
exec sleep 1000
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealDaemon]:
    with directories() as daemon:
        daemon.agent("worker", AGENT)
        daemon.agent("copier", AGENT, workspace="{mode: overlay}")
        daemon.agent("bounded", AGENT, workspace="{mode: overlay, quota: 1M}")
        daemon.agent("reader", "exec sleep 1000", workspace="{mode: ro}")
        daemon.agent("without", "exec sleep 1000", workspace="{mode: none}")
        daemon.start()
        yield daemon


class Workspace:
    """The files of one session, as its operator has them."""

    def __init__(self, daemon: RealDaemon, agent: str) -> None:
        self.daemon, self.agent = daemon, agent
        self.id: str = daemon.call("session.start", agent=agent)["id"]

    def call(self, op: str, **params: Any) -> Any:
        return self.daemon.call(f"session.files.{op}", id=self.id, **params)

    def read(self, path: str) -> str:
        return str(self.call("read", path=path)["content"])

    def write(self, path: str, content: str, **fields: Any) -> None:
        row = {"path": path, "content": content, **fields}
        assert self.call("write", files=[row]) == {"written": 1}

    def exists(self, path: str) -> bool:
        return bool(self.call("exists", path=path)["exists"])

    def refused(self, op: str, **params: Any) -> SandboxdError:
        with pytest.raises(SandboxdError) as caught:
            self.call(op, **params)
        return caught.value

    @property
    def host(self) -> Path:
        return self.daemon.paths.workspaces / self.agent


@pytest.fixture(params=["worker", "copier", "bounded"])
def fresh(request: pytest.FixtureRequest, daemon: RealDaemon) -> Iterator[Workspace]:
    """A workspace whose agent has begun: shared, copied on disk, copied in memory."""
    yield from begun(daemon, request.param)


@pytest.fixture(scope="module")
def workspace(daemon: RealDaemon) -> Iterator[Workspace]:
    """One for the tests that look at it, or leave it as they found it."""
    yield from begun(daemon, "copier")


def begun(daemon: RealDaemon, agent: str) -> Iterator[Workspace]:
    for path in (daemon.paths.workspaces / agent).glob("*"):  # of an earlier test
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    made = Workspace(daemon, agent)
    until(lambda: made.exists("ready"))
    yield made
    daemon.call("session.stop", id=made.id, grace=0)


def test_the_agent_has_what_was_written_and_the_other_way_round(fresh: Workspace) -> None:
    fresh.write("given", "hello\n")
    fresh.write("tree/of/files", "x")
    fresh.write("/workspace/go", "")
    until(lambda: fresh.exists("finished"))
    assert fresh.read("seen") == "agent 644\nhello\n"
    assert fresh.read("/workspace/given") == "hello\nmore\n"
    assert not fresh.exists("tree")
    # Where the workspace is shared it is on disk, its owner's; else it is not there at all.
    if fresh.agent == "worker":
        given = (fresh.host / "given").stat()
        assert (given.st_uid, given.st_gid) == (
            fresh.host.stat().st_uid,
            fresh.host.stat().st_gid,
        )
    else:
        assert list(fresh.host.iterdir()) == []


def test_listing_information_and_existence(workspace: Workspace) -> None:
    found = workspace.call("list", path="/workspace")
    assert found["truncated"] is False
    assert {e["path"]: e["type"] for e in found["entries"]} == {
        "binary": "file",
        "fifo": "special",
        "inner": "symlink",
        "link": "symlink",
        "own": "file",
        "ready": "file",
        "sub": "directory",
    }
    deeper = workspace.call("list", path="sub", depth=2)["entries"]
    assert [e["path"] for e in deeper] == ["sub/deep", "sub/deep/file"]
    info = workspace.call("info", path="sub/deep/file")
    assert (info["name"], info["type"], info["size"], info["mode"]) == ("file", "file", 6, 0o644)
    assert info["modified"].endswith("Z")
    assert workspace.call("info", path="link")["target"] == "/etc/passwd"
    assert workspace.call("info", path="")["type"] == "directory"
    there = {p: workspace.exists(p) for p in ("own", "link", "nothing", "own/below", "sub/deep/")}
    assert there == {
        "own": True,
        "link": True,
        "nothing": False,
        "own/below": False,
        "sub/deep/": True,
    }


def test_text_and_bytes(workspace: Workspace) -> None:
    assert "not text" in workspace.refused("read", path="binary").message
    got = workspace.call("read", path="binary", encoding="base64")
    assert base64.b64decode(got["content"]) == b"a\0\xff"
    assert got["entry"]["size"] == 3
    workspace.write("bytes", base64.b64encode(b"\xfe\0").decode(), encoding="base64")
    got = workspace.call("read", path="bytes", encoding="base64")
    assert base64.b64decode(got["content"]) == b"\xfe\0"
    refused = workspace.refused(
        "write", files=[{"path": "x", "content": "a*b", "encoding": "base64"}]
    )
    assert isinstance(refused, Invalid)
    assert not workspace.exists("x")
    workspace.call("remove", path="bytes")


def test_a_file_keeps_its_mode_unless_told(workspace: Workspace) -> None:
    workspace.write("script", "#!/bin/sh\n", mode=0o755)
    workspace.write("script", "#!/bin/sh\necho\n")
    assert workspace.call("info", path="script")["mode"] == 0o755
    workspace.write("script", "x", mode=0o600)
    assert workspace.call("info", path="script")["mode"] == 0o600
    workspace.call("remove", path="script")
    assert len(workspace.call("list")["entries"]) == 7  # nothing half written is left


def test_directories_are_made_moved_and_removed(fresh: Workspace) -> None:
    assert fresh.call("mkdir", path="a/b/c") == {"created": True}
    assert fresh.call("mkdir", path="a/b/c") == {"created": False}
    assert isinstance(fresh.refused("mkdir", path="own"), Conflict)
    fresh.write("a/b/c/file", "x")
    fresh.call("rename", old="a/b", new="moved")
    assert fresh.read("moved/c/file") == "x"
    assert isinstance(fresh.refused("rename", old="moved/c/file", new="own"), Conflict)
    assert fresh.read("own") == "mine\n"
    fresh.call("rename", old="moved/c/file", new="own", overwrite=True)
    assert fresh.read("own") == "x"
    missing = fresh.refused("rename", old="nothing", new="other")
    assert isinstance(missing, NotFound)
    assert "/workspace/nothing" in missing.message
    assert "not empty" in fresh.refused("remove", path="sub").message
    assert fresh.call("remove", path="sub", recursive=True) == {"removed": 3}
    assert fresh.call("remove", path="link") == {"removed": 1}
    assert isinstance(fresh.refused("remove", path="link"), NotFound)


@pytest.mark.parametrize("path", ["link", "inner/deep/file", "fifo", "sub"])
def test_what_is_no_plain_file_is_neither_read_nor_written(workspace: Workspace, path: str) -> None:
    read = workspace.refused("read", path=path)
    written = workspace.refused("write", files=[{"path": path, "content": "x"}])
    expected = "symbolic link" if path in ("link", "inner/deep/file") else "directory"
    assert expected in read.message
    assert expected in written.message
    assert {read.code, written.code} == {"denied" if expected == "symbolic link" else "conflict"}
    assert workspace.read("sub/deep/file") == "below\n"


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/passwd", "/workspace/../etc/passwd", "/workspaces/x", "a\0b"],
)
def test_a_path_that_leads_out_is_refused_before_anything_is_done(
    daemon: RealDaemon, path: str
) -> None:
    reader = Workspace(daemon, "reader")
    before = len(daemon.audit())
    for op, params in (
        ("read", {"path": path}),
        ("write", {"files": [{"path": path, "content": ""}]}),
        ("remove", {"path": path}),
        ("list", {"path": path}),
        ("info", {"path": path}),
        ("exists", {"path": path}),
        ("mkdir", {"path": path}),
        ("rename", {"old": path, "new": "x"}),
        ("rename", {"old": "x", "new": path}),
    ):
        assert isinstance(reader.refused(op, **params), Invalid), op
    assert len(daemon.audit()) == before
    daemon.call("session.stop", id=reader.id, grace=0)


def test_a_read_only_workspace_is_read_only(daemon: RealDaemon) -> None:
    reader = Workspace(daemon, "reader")
    path = reader.host / "there"
    path.write_text("text")
    os.chown(path, reader.host.stat().st_uid, reader.host.stat().st_gid)
    assert reader.read("there") == "text"
    for op, params in (
        ("write", {"files": [{"path": "there", "content": "x"}]}),
        ("remove", {"path": "there"}),
        ("mkdir", {"path": "new"}),
        ("rename", {"old": "there", "new": "new"}),
    ):
        refused = reader.refused(op, **params)
        assert (refused.code, "read-only" in refused.message) == ("denied", True), op
    assert [p.name for p in reader.host.iterdir()] == ["there"]
    daemon.call("session.stop", id=reader.id, grace=0)


def test_without_a_workspace_there_are_no_files(daemon: RealDaemon) -> None:
    without = Workspace(daemon, "without")
    for op in ("list", "exists"):
        refused = without.refused(op, path="")
        assert (refused.code, "no workspace" in refused.message) == ("not_found", True)
    daemon.call("session.stop", id=without.id, grace=0)
    assert isinstance(without.refused("list"), NotFound)  # nor where there is no session


def test_sizes_and_numbers_are_bounded(daemon: RealDaemon) -> None:
    worker = Workspace(daemon, "copier")
    many = [{"path": f"f{n}", "content": ""} for n in range(257)]
    assert "1 to 256 files" in worker.refused("write", files=many).message
    assert "1 to 256 files" in worker.refused("write", files=[]).message
    large = [{"path": "large", "content": "x" * ((8 << 20) + 1)}]
    assert "8,388,608 bytes" in worker.refused("write", files=large).message
    worker.write("large", "x" * (8 << 20))
    assert worker.call("read", path="large")["entry"]["size"] == 8 << 20
    long = worker.refused("read", path="x" * 256)
    assert isinstance(long, Invalid)
    deep = worker.refused("list", depth=33)
    assert isinstance(deep, Invalid)
    daemon.call("session.stop", id=worker.id, grace=0)


def test_a_workspace_in_memory_takes_no_more_than_its_quota(daemon: RealDaemon) -> None:
    bounded = Workspace(daemon, "bounded")
    until(lambda: bounded.exists("ready"))
    full = bounded.refused("write", files=[{"path": "large", "content": "x" * (2 << 20)}])
    assert "no space is left" in full.message
    assert not bounded.exists("large")
    assert bounded.read("own") == "mine\n"
    daemon.call("session.stop", id=bounded.id, grace=0)


def test_what_was_done_is_recorded_by_whom_and_where(daemon: RealDaemon) -> None:
    copier = Workspace(daemon, "copier")
    copier.call("write", files=[{"path": "a", "content": "1"}, {"path": "b/c", "content": "2"}])
    copier.read("a")
    copier.call("rename", old="a", new="d")
    told = [r for r in daemon.audit() if r["event"] == "session.files"]
    told = [r for r in told if r["session"] == copier.id]
    assert [(r["op"], r["paths"]) for r in told] == [
        ("write", ["'a'", "'b/c'"]),
        ("read", ["'a'"]),
        ("rename", ["'a'", "'d'"]),
    ]
    assert {r["agent"] for r in told} == {"copier"}
    assert all(r["by"] for r in told)
    daemon.call("session.stop", id=copier.id, grace=0)
    changed = {c["path"] for c in daemon.call("session.diff", id=copier.id)["changes"]}
    assert {"d", "b", "b/c"} <= changed  # what an operator wrote lands by review, too


#: Exchanges a directory and a link to the host's /etc without end; renameat2(2), RENAME_EXCHANGE.
SWAPPING = """
import ctypes, os
os.makedirs("/workspace/place/ssl")
with open("/workspace/place/passwd", "w") as file:
    file.write("own")
os.symlink("/etc", "/workspace/link")
open("/workspace/ready", "w").close()
libc = ctypes.CDLL(None)
while True:
    libc.renameat2(-100, b"/workspace/place", -100, b"/workspace/link", 2)
"""
#: The control, in the same sandbox: who goes by the path is led to both, sooner or later.
LED = """
found = set()
while len(found) < 2:
    try:
        with open("/workspace/place/passwd") as file:
            found.add(file.read() == "own")
    except OSError:
        pass
print("both")
"""


def test_an_agent_that_swaps_directories_for_links_leads_nobody_out(daemon: RealDaemon) -> None:
    daemon.python_agent("swapper", SWAPPING)
    daemon.call("reload")
    swapper = Workspace(daemon, "swapper")
    until(lambda: swapper.exists("ready"))
    control = daemon.call(
        "session.exec", id=swapper.id, argv=[sys.executable, "-I", "-c", LED], timeout=60
    )
    assert base64.b64decode(control["stdout"]) == b"both\n"
    said = set()
    for n in range(8):
        for op, params in (
            ("read", {"path": "place/passwd"}),
            ("write", {"files": [{"path": f"place/n{n}", "content": "x"}]}),
            ("list", {"path": "place"}),
        ):
            try:
                answer = swapper.call(op, **params)
            except SandboxdError as refused:
                said.add(refused.code)
            else:
                said.add(answer.get("content", op))
                names = {entry["name"] for entry in answer.get("entries", ())}
                assert not names - {"passwd", "ssl", *(f"n{m}" for m in range(8))}
    # Never anything of /etc; and it both went well and met the link.
    assert said - {"list"} <= {"own", "write", "denied"}
    assert "denied" in said
    assert said & {"own", "write"}
    daemon.call("session.stop", id=swapper.id, grace=0)


#: What the agent of AGENT makes before it waits.
COPIED = {"binary", "fifo", "inner", "link", "own", "ready", "sub", "sub/deep", "sub/deep/file"}


def test_operations_end_with_their_session(daemon: RealDaemon) -> None:
    """However far they are: what was asked is answered, and nothing of it is left."""
    copier = Workspace(daemon, "copier")
    until(lambda: copier.exists("ready"))
    outcomes: list[str] = []

    def work(name: str) -> None:
        try:
            for _ in range(1000):
                copier.write(name, "x" * (1 << 20))
                outcomes.append("")
        except SandboxdError as refused:
            outcomes.append(refused.code)

    threads = [threading.Thread(target=work, args=(f"n{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(outcomes) >= 4)
    daemon.call("session.stop", id=copier.id, grace=0)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    # Under way when it ended: conflict. Asked for afterwards: there is no such session.
    assert set(outcomes) <= {"", "conflict", "not_found"}
    assert outcomes.count("") == len(outcomes) - 4
    changes = daemon.call("session.diff", id=copier.id, text=False)["changes"]
    written = {c["path"]: c.get("size") for c in changes if c["path"] not in COPIED}
    assert set(written) <= {"n0", "n1", "n2", "n3"}
    assert set(written.values()) == {1 << 20}
