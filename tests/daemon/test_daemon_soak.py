"""Ten thousand calls through a real daemon's own socket, ended in every way: nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_daemon import BROKER_UID, RealDaemon, directories, until

pytestmark = pytest.mark.soak
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="it looks into the launcher")

WARM_UP, CALLS = 500, 10_000
#: Bytes that daemon and launcher may hold more of afterwards, each: what a leak of one KiB a call
#: would be over, and what allocators keep for themselves is not.
GROWTH = 8 << 20

#: How call number N ends: by N modulo the length.
ENDS = ("ok",) * 13 + ("failed", "overflow", "timeout", "games", "cancel", "leave", "missing")

#: Each of eight threads has a connection of its own and makes its part of argument 1's calls.
CALLER = """
import collections, json, os, socket, sys, threading
count, ends = int(sys.argv[1]), json.loads(sys.argv[2])
seen, guard = collections.Counter(), threading.Lock()
class Client:
    def __init__(self):
        self.last = 0
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(os.environ["SANDBOXD_SOCKET"])
        self.file = self.sock.makefile("rwb")
        about = {"name": "soak", "version": "1"}
        self.ask("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=about)
        self.say(method="notifications/initialized")
    def say(self, **message):
        self.file.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\\n")
        self.file.flush()
    def begin(self, method, **params):
        self.last += 1
        self.say(id=self.last, method=method, params=params)
    def answer(self):
        while True:
            told = json.loads(self.file.readline())
            if told.get("id") == self.last:
                return told
    def ask(self, method, **params):
        self.begin(method, **params)
        return self.answer()
    def close(self):
        self.file.close()
        self.sock.close()
    def call(self, tool):
        told = self.ask("tools/call", name=tool, arguments={})
        if "error" in told:
            return "unknown"
        return told["result"]["_meta"]["sandboxd/outcome"]
    def printing(self):
        # A call that runs and has printed something.
        self.begin("tools/call", name="long", arguments={}, _meta={"progressToken": self.last})
        while json.loads(self.file.readline()).get("method") != "notifications/progress":
            pass
def one(client, end):
    if end == "cancel":
        client.printing()
        client.say(method="notifications/cancelled", params={"requestId": client.last})
        return "alive" if "result" in client.ask("ping") else "lost"
    if end == "leave":
        other = Client()
        other.printing()
        other.close()
        return "left"
    came = client.call(end)
    # A session is denied a hundred and twenty calls a minute, then it is put off.
    return "refused" if end == "missing" and came in ("unknown", "busy") else came
def work(numbers):
    client = Client()
    for number in numbers:
        end = ends[number % len(ends)]
        came = one(client, end)
        with guard:
            seen[f"{end}: {came}"] += 1
    client.close()
threads = [threading.Thread(target=work, args=(range(n, count, 8),)) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(seen))
"""
OUTCOMES = {
    "ok": "ok",
    "failed": "failed",
    "overflow": "overflow",
    "timeout": "timeout",
    "games": "ok",
    "cancel": "alive",
    "leave": "left",
    "missing": "refused",
}
TOOLS = {
    "ok": ("echo fine with ${#TOKEN}", ""),
    "failed": ("echo wrong >&2; exit 3", ""),
    "overflow": ("exec yes", "output_limit: 64K\non_overflow: kill\n"),
    "timeout": ("trap '' TERM; sleep 301 & sleep 301", "timeout: 200ms\n"),
    # Deaf, in sessions of their own, with the pipes in their hands, one of them stopped.
    "games": (
        "(trap '' TERM HUP; setsid sh -c 'sleep 301 & kill -STOP $$' &) ; setsid sleep 301 & "
        "mkdir /tmp/left; echo > /tmp/left/file; echo done",
        "",
    ),
    "long": ("echo begun; setsid sleep 301 & sleep 301", "timeout: 60s\n"),
}


@pytest.fixture(scope="module")
def soaked() -> Iterator[RealDaemon]:
    with directories() as daemon:
        daemon.python_agent("caller", CALLER, tools=f"[{', '.join(TOOLS)}]")
        for name, (script, more) in TOOLS.items():
            secret = "secrets: [{variable: TOKEN}]\n" if name == "ok" else ""
            daemon.tool(
                name,
                f"#!/bin/sh\n{script}\n",
                f"input: {{type: object, additionalProperties: false}}\n{more}{secret}",
            )
        daemon.agent("idle", "sleep 3600")
        daemon.start()
        daemon.set("caller", TOKEN="a-value-of-the-soak")
        yield daemon


@dataclass(frozen=True)
class Holdings:
    """What the daemon, its launcher and everything below them hold."""

    processes: Counter[str]
    zombies: int
    threads: int
    descriptors: Counter[str]
    mounts: int
    cgroups: int
    files: Counter[str]

    def grown(self, since: Holdings) -> dict[str, Any]:
        """What there is more of than there was; empty when nothing is left behind."""
        return {
            name: more
            for name, more in {
                "processes": self.processes - since.processes,
                "zombies": self.zombies,
                "threads": max(0, self.threads - since.threads),
                "descriptors": self.descriptors - since.descriptors,
                "mounts": max(0, self.mounts - since.mounts),
                "cgroups": max(0, self.cgroups - since.cgroups),
                "files": self.files - since.files,
            }.items()
            if more
        }


@dataclass(frozen=True)
class Watched:
    """The daemon, and what a living session of it shows of where it is."""

    daemon: RealDaemon
    launcher: int
    places: frozenset[Path]

    @classmethod
    def of(cls, daemon: RealDaemon, session: str) -> Watched:
        init = daemon.call("session.show", id=session)["pid"]
        return cls(daemon, psutil.Process(init).ppid(), frozenset(groups(init)))

    def family(self) -> list[psutil.Process]:
        """The daemon, the launcher, which isn't its child, and all below them."""
        assert self.daemon.process is not None
        tops = [psutil.Process(pid) for pid in (self.daemon.process.pid, self.launcher)]
        return [*tops, *(child for top in tops for child in top.children(recursive=True))]


def calm(watched: Watched) -> Holdings:
    """What is held once nothing changes any more: a next session's sandbox is built beside."""
    last = holdings(watched)
    deadline = time.monotonic() + 60
    while True:
        time.sleep(1)
        now = holdings(watched)
        if not now.grown(last) and not last.grown(now):
            return now
        assert time.monotonic() < deadline, now.grown(last)
        last = now


def holdings(watched: Watched) -> Holdings:
    """Counted anew when something ended in the middle of it."""
    for _ in range(50):
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            return _holdings(watched)
    return _holdings(watched)


def _holdings(watched: Watched) -> Holdings:
    members = watched.family()
    descriptors: Counter[str] = Counter()
    mounts = 0
    for member in members:
        at = Path(f"/proc/{member.pid}")
        for fd in (at / "fd").iterdir():
            target = os.readlink(fd)
            descriptors[target.partition(":")[0] if ":[" in target else target] += 1
        mounts += len((at / "mountinfo").read_text().splitlines())
    return Holdings(
        processes=Counter(member.name() for member in members),
        zombies=sum(member.status() == psutil.STATUS_ZOMBIE for member in members),
        threads=sum(member.num_threads() for member in members),
        descriptors=descriptors,
        mounts=mounts,
        cgroups=sum(1 for place in watched.places for path in place.rglob("*") if path.is_dir()),
        # Sessions come and go, each with an id of its own.
        files=Counter(re.sub("s-[0-9a-f]{16}", "s-*", path) for path in left(watched.daemon)),
    )


def left(daemon: RealDaemon) -> Iterator[str]:
    """Files of the daemon's, also in /tmp. Its store and its logs are left out: they may grow."""
    for path in daemon.base.rglob("*"):
        logs = any(path.is_relative_to(at) for at in (daemon.paths.audit, daemon.paths.logs))
        if not logs and "store.sqlite" not in path.name:
            yield str(path)
    for shared in ("/tmp", "/var/tmp", "/dev/shm"):
        for entry in os.scandir(shared):
            if os.geteuid() == 0 and entry.stat(follow_symlinks=False).st_uid == BROKER_UID:
                yield entry.path


def groups(pid: int) -> set[Path]:
    """The daemon's places in the host's cgroups, by the one of a sandbox."""
    points: dict[str, tuple[str, str]] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        if after.startswith("cgroup2 "):
            points[""] = (root, point)
        elif after.startswith("cgroup "):
            points |= dict.fromkeys(after.split()[-1].split(","), (root, point))
    found = set()
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            if "/sandboxd-" in path and name in points:
                root, point = points[name]
                found.add(Path(point, os.path.relpath(path, root)).parent)
    return found


def call(daemon: RealDaemon, count: int) -> None:
    """So many calls by an agent in a session of its own, each with the end that it should have."""
    done = daemon.run("caller", str(count), json.dumps(ENDS), timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = Counter(ENDS[number % len(ENDS)] for number in range(count))
    assert json.loads(done.stdout) == {
        f"{end}: {OUTCOMES[end]}": number for end, number in expected.items()
    }


@needs_root
def test_ten_thousand_calls_leave_nothing_behind(soaked: RealDaemon) -> None:
    bystander = soaked.call("session.start", agent="idle")["id"]
    watched = Watched.of(soaked, bystander)
    call(soaked, WARM_UP)
    before = calm(watched)
    memory = {member.pid: member.memory_info().rss for member in watched.family()}
    call(soaked, CALLS)

    def grown() -> dict[str, Any]:
        return holdings(watched).grown(before)

    # Threads that wait for work leave after ten seconds, and the last cgroup goes after its end.
    until(lambda: not grown(), 60, told=grown)
    living_on = {pid: size for pid, size in memory.items() if psutil.pid_exists(pid)}
    more = {pid: psutil.Process(pid).memory_info().rss - size for pid, size in living_on.items()}
    assert soaked.process is not None
    assert {soaked.process.pid, watched.launcher} <= set(more)
    print(f"\nmemory grew by, in KiB: {[size >> 10 for size in more.values()]}")
    assert all(size < GROWTH for size in more.values()), more
    (living,) = soaked.call("session.list")["sessions"]
    assert (living["id"], living["state"]) == (bystander, "running")
    assert soaked.call("audit.verify")["ok"]


@needs_root
def test_the_count_would_notice(soaked: RealDaemon) -> None:
    """The control: a session more is a process, descriptors, mounts and a cgroup more."""
    watched = Watched.of(soaked, soaked.call("session.start", agent="idle")["id"])
    before = calm(watched)
    second = soaked.call("session.start", agent="idle")["id"]
    (soaked.base / "left").touch()
    wanted = {"processes", "threads", "descriptors", "mounts", "files"}
    until(lambda: wanted <= set(holdings(watched).grown(before)))
    grown = calm(watched).grown(before)
    assert wanted <= set(grown)
    assert ("cgroups" in grown) == bool(watched.places)
    (soaked.base / "left").unlink()
    soaked.call("session.stop", id=second, grace=0)
    until(lambda: not holdings(watched).grown(before))
