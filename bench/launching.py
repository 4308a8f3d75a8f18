"""Launch only: from the order to start a program until it is reaped, with no output.

Beside a bare posix_spawn(3) of the same program, and beside other programs that isolate.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from bench import proc, stage
from bench.measure import Variant, interleave, ratio, row, timed
from bench.peers import NAMES, Peers
from bench.spawning import spawn
from bench.walls import PROBE, holes, own_namespaces, weaker
from sandboxd.broker.launch import prepare
from sandboxd.isolation.client import Launcher, open_launcher
from sandboxd.isolation.launcher import fork_launcher
from sandboxd.isolation.runtime import python_argv, python_mounts
from sandboxd.isolation.wire import LaunchSpec
from sandboxd.paths import shipped
from sandboxd.policy import load_config
from sandboxd.policy.decide import decide
from sandboxd.secret import Secret
from sandboxd.sessions.layers import layers

__all__ = ["BARE", "OURS", "Sandboxes", "measure", "open_sandboxes"]

OURS, BARE = "sandboxd", "posix_spawn"
_SESSION = "s-bench"
_ENVIRONMENT = {**stage.ENVIRONMENT, "TOKEN": "x" * 40}
#: Rounds between two runs of what takes tens or hundreds of milliseconds.
_EVERY = {"crun": 2, "nsjail": 2, "runc": 8, "firejail": 8, "srt": 20}


class Sandboxes:
    """Launches of one program, as the broker launches a tool call under the shipped policy."""

    def __init__(self, launcher: Launcher, top: Path, tool: str = "plain") -> None:
        self.launcher, self.tool = launcher, tool
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for name, text in stage.configuration(top).items():
            path = top / "c" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o644)
        self._config = load_config(
            top / "c", shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
        )
        self._uids = itertools.count(1_900_000_000)
        self._free: list[int] = []
        self._decided = decide(self._config, _agent(self._config, tool), tool, {})
        if not self._decided.allowed:
            raise SystemExit(f"the policy denies what is to be measured: {self._decided.reason}")

    def spec(self) -> LaunchSpec:
        """What the broker would launch now, with a uid that nothing else runs as."""
        if not self._free:
            privileged = self.launcher.privileged
            self._free.append(next(self._uids) if privileged else os.geteuid())
        secrets = [(each, Secret("x" * 40)) for each in self._decided.inject]
        return prepare(
            self._decided,
            secrets,
            call="c-bench",
            uid=self._free.pop(),
            workspace=None,
            template=_SESSION,
        ).spec

    async def one(self) -> None:
        """One launch to its end. SystemExit when the program fails."""
        spec = self.spec()
        null = self._null
        process = await self.launcher.launch(spec, stdin=null, stdout=null, stderr=null)
        ended = await process.wait()
        self._free.append(spec.uid)
        if ended.code != 0:
            raise SystemExit(f"the program ended with {ended}")

    def free(self, uid: int) -> None:
        """Nothing runs as it any more."""
        self._free.append(uid)

    async def look(
        self, wait: int | None = None, looked: trio.Event | None = None
    ) -> dict[str, Any]:
        """What a program sees of the walls around it. It stays until ``wait`` is at its end."""
        spec = self.spec()
        argv = (*python_argv("-")[:-1], b"-S", b"-c", os.fsencode(PROBE))
        argv += (b"wait",) if wait is not None else ()
        read, write = os.pipe2(os.O_CLOEXEC)
        with os.fdopen(read, "rb") as output:
            process = await self.launcher.launch(
                replace(spec, argv=argv, mounts=(*spec.mounts, *python_mounts())),
                stdin=self._null if wait is None else wait,
                stdout=write,
                stderr=self._null,
            )
            os.close(write)
            told = await trio.to_thread.run_sync(output.readline)
            if looked is not None:
                looked.set()
            ended = await process.wait()
        self._free.append(spec.uid)
        if not told:
            raise SystemExit(f"the probe ended with {ended}")
        found: dict[str, Any] = json.loads(told)
        return found

    async def lacking(self) -> list[str]:
        """In what these sandboxes are less than what is shipped: must be nothing."""
        seen: list[dict[str, Any]] = []
        read, write = os.pipe2(os.O_CLOEXEC)
        looked = trio.Event()

        async def look() -> None:
            seen.append(await self.look(read, looked))

        # Two that are alive at once: a namespace's number may be given again after its end.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await looked.wait()
            try:
                seen.append(await self.look())
            finally:
                os.close(write)
        os.close(read)
        outside = own_namespaces()
        found = weaker(layers("none", self.launcher))
        return found + holes(seen[0], outside, seen[1]) + holes(seen[1], outside, seen[0])

    def cpu(self) -> float:
        """Seconds used by the launcher, and by all that it started and reaped or keeps."""
        return proc.cpu_seconds([self.launcher.pid])


@asynccontextmanager
async def open_sandboxes() -> AsyncIterator[Sandboxes]:
    """A launcher of this process's own."""
    with TemporaryDirectory(prefix="sbx-", dir="/tmp") as name:
        top = Path(name)
        top.chmod(0o755)
        async with open_launcher(fork_launcher()) as launcher:
            yield Sandboxes(launcher, top)


async def measure(rounds: int, *, peers: Sequence[str] = NAMES) -> dict[str, Any]:
    """All variants, interleaved."""
    program = stage.program("true")
    async with open_sandboxes() as ours:
        with Peers(program, names=peers) as others:
            variants = [Variant(BARE, _bare(program)), Variant(OURS, timed(ours.one), ours.cpu)]
            variants[1].about["walls"] = "all of ours"
            for peer in others.here:
                about = {"version": peer.version, "walls": peer.walls}
                every = _EVERY.get(peer.name, 1)
                variants.append(Variant(peer.name, peer.run, peer.cpu, every=every, about=about))
            lacking = await ours.lacking()
            await interleave(variants, rounds)
            lacking += [f"afterwards: {what}" for what in await ours.lacking()]
    by_name = {variant.name: variant.times for variant in variants}
    return {
        "program": program,
        "variants": [row(variant) for variant in variants],
        "absent": others.absent,
        "ratios": {name: ratio(by_name[OURS], times) for name, times in by_name.items()},
        "lacking": lacking,
        "layers": layers("none", ours.launcher),
    }


def _bare(program: str) -> Any:
    async def run() -> float:
        seconds, status = spawn([program], _ENVIRONMENT)
        if status != 0:
            raise SystemExit(f"{program} ended with {status}")
        return seconds

    return run


def _agent(config: Any, tool: str) -> Any:
    """The agent ``caller``, to whom the tool is given too."""
    import attrs

    return attrs.evolve(config.agents["caller"], tools=(tool,))
