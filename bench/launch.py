"""Variants of starting a program, from nothing around it to a whole sandbox."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from sandboxd.isolation.client import Launcher, open_launcher
from sandboxd.isolation.launcher import fork_launcher
from sandboxd.isolation.runtime import python_mounts
from sandboxd.isolation.wire import LaunchSpec

__all__ = ["Sandboxes", "Variant", "measure", "table"]

_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "TOKEN": "x" * 40}
_TICK = os.sysconf("SC_CLK_TCK")

#: What a program tells of the walls around it.
_PROBE = """
import json, os
fields = ("CapEff", "CapPrm", "CapBnd", "NoNewPrivs", "Seccomp", "Uid", "Groups")
status = dict(line.rstrip().split(":", 1) for line in open("/proc/self/status"))
spaces = {n: os.readlink("/proc/self/ns/" + n)
          for n in ("mnt", "pid", "ipc", "uts", "net", "user", "cgroup")}
print(json.dumps([{n: status[n].split() for n in fields}, spaces]))
"""


@dataclass
class Variant:
    """One way to start the program; ``one`` returns once it is reaped."""

    name: str
    one: Callable[[], Awaitable[None]]
    #: CPU seconds spent so far by processes that are not this one.
    elsewhere: Callable[[], float] = lambda: 0.0
    times: list[float] = field(default_factory=list)
    own_cpu: float = 0.0
    cpu: float = 0.0

    async def run(self) -> None:
        cpu, began = time.process_time(), time.perf_counter()
        await self.one()
        self.times.append(time.perf_counter() - began)
        self.own_cpu += time.process_time() - cpu


class Sandboxes:
    """Launches of one program, each in a sandbox, by a launcher of their own."""

    def __init__(self, launcher: Launcher, program: str, template: str) -> None:
        self.launcher, self.program, self.template = launcher, program, template
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._uids = itertools.count(1_900_000_000 if launcher.privileged else os.geteuid())
        self._free: list[int] = []

    def spec(self, *argv: str, **more: Any) -> LaunchSpec:
        if not self._free:
            self._free.append(next(self._uids) if self.launcher.privileged else os.geteuid())
        return LaunchSpec(
            id="bench",
            argv=tuple(os.fsencode(word) for word in argv),
            env=tuple((k.encode(), v.encode()) for k, v in _ENVIRONMENT.items()),
            uid=self._free.pop(),
            template=self.template,
            **more,
        )

    async def one(self) -> None:
        spec = self.spec(self.program)
        process = await self.launcher.launch(
            spec, stdin=self._null, stdout=self._null, stderr=self._null
        )
        ended = await process.wait()
        self._free.append(spec.uid)
        if ended.code != 0:
            raise SystemExit(f"{self.program} ended with {ended}")

    async def walls(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """What is around a program in here."""
        read, write = os.pipe2(os.O_CLOEXEC)
        spec = self.spec(sys.executable, "-I", "-S", "-c", _PROBE, mounts=python_mounts())
        process = await self.launcher.launch(
            spec, stdin=self._null, stdout=write, stderr=self._null
        )
        os.close(write)
        await process.wait()
        self._free.append(spec.uid)
        with os.fdopen(read) as output:
            status, namespaces = json.load(output)
        return status, namespaces

    def cpu(self) -> float:
        """Seconds used by the launcher, and by all that it started and reaped or keeps."""
        root = self.launcher.pid
        return sum(_cpu(pid) for pid in (root, *_children(root)))


async def measure(program: str, runs: int, callers: int) -> dict[str, Any]:
    """All variants of this host, interleaved; then the throughput of each."""
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(_sandboxes(program, ""))
        ready = await stack.enter_async_context(_sandboxes(program, "bench"))
        variants = [
            Variant("posix_spawn", _spawner([program])),
            Variant("template", ready.one, ready.cpu),
            Variant("made for each", made.one, made.cpu),
        ]
        if bwrap := shutil.which("bwrap"):
            argv = [bwrap, "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc"]
            argv += ["/proc", "--tmpfs", "/tmp", "--die-with-parent", program]  # noqa: S108
            variants.insert(2, Variant("bwrap --unshare-all", _spawner(argv)))
        lacking = await _lacking(made, ready)
        for variant in variants:
            for _ in range(10):
                await variant.one()
        before = [variant.elsewhere() for variant in variants]
        children = [0.0] * len(variants)
        for _ in range(runs):
            for index, variant in enumerate(variants):
                reaped = os.times()
                await variant.run()
                now = os.times()
                children[index] += now.children_user + now.children_system
                children[index] -= reaped.children_user + reaped.children_system
        for index, variant in enumerate(variants):
            elsewhere = variant.elsewhere() - before[index]
            variant.cpu = (variant.own_cpu + children[index] + elsewhere) / runs
        rates = {v.name: await _rate(v, runs, callers) for v in variants}
    base = variants[0]
    return {
        "program": program,
        "runs": runs,
        "callers": callers,
        "valid": not lacking,
        "lacking": lacking,
        "variants": [
            {
                "name": variant.name,
                "median_ms": statistics.median(variant.times) * 1e3,
                "p95_ms": _p95(variant.times) * 1e3,
                "ratio": statistics.median(variant.times) / statistics.median(base.times),
                "p95_ratio": _p95(variant.times) / _p95(base.times),
                "cpu_ms": variant.cpu * 1e3,
                "calls_per_second": rates[variant.name],
            }
            for variant in variants
        ],
    }


def table(figures: dict[str, Any]) -> str:
    rows = [
        f"{figures['program']}, {figures['runs']} runs of each, interleaved",
        f"{'':22}{'median ms':>10}{'p95 ms':>9}{'x bare':>8}{'p95 x':>7}{'CPU ms':>8}"
        f"{'calls/s with ' + str(figures['callers']):>17}",
    ]
    for row in figures["variants"]:
        rows.append(
            f"{row['name']:22}{row['median_ms']:10.2f}{row['p95_ms']:9.2f}{row['ratio']:8.2f}"
            f"{row['p95_ratio']:7.2f}{row['cpu_ms']:8.2f}{row['calls_per_second']:17.0f}"
        )
    rows += [f"INVALID: a template's walls differ: {what}" for what in figures["lacking"]]
    return "\n".join(rows)


@asynccontextmanager
async def _sandboxes(program: str, template: str) -> AsyncIterator[Sandboxes]:
    async with open_launcher(fork_launcher()) as launcher:
        yield Sandboxes(launcher, program, template)


async def _lacking(made: Sandboxes, ready: Sandboxes) -> list[str]:
    """In what a template is weaker than a sandbox made for one launch. It must be in nothing."""
    (walls, spaces), (found, ours) = await made.walls(), await ready.walls()
    own = {name: os.readlink(f"/proc/self/ns/{name}") for name in spaces}
    differing = [f"{n}: {found[n]} for {walls[n]}" for n in walls if found[n] != walls[n]]
    shared = [f"the host's {n} namespace" for n in ours if ours[n] == own[n] != spaces[n]]
    return differing + shared


async def _rate(variant: Variant, runs: int, callers: int) -> float:
    """Calls per second with so many callers at once."""
    left = itertools.count()

    async def caller() -> None:
        while next(left) < runs:
            await variant.one()

    async with trio.open_nursery() as nursery:  # warm: what is kept ready is made now
        for _ in range(callers):
            nursery.start_soon(variant.one)
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(caller)
    return runs / (time.perf_counter() - began)


def _spawner(argv: list[str]) -> Callable[[], Awaitable[None]]:
    async def one() -> None:
        pid = os.posix_spawn(argv[0], argv, _ENVIRONMENT)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            raise SystemExit(f"{argv[0]} failed")

    return one


def _p95(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.95)]


def _cpu(pid: int) -> float:
    """Of a process and of those it reaped (proc(5), stat, fields 14 to 17)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(word) for word in words[11:15]) / _TICK


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
