"""From the order to start a session until its agent says its first word, beside a cold bwrap."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from typing import Any

from bench import bubblewrap, stage
from bench.measure import Variant, interleave, ratio, row
from bench.walls import weaker
from sandboxd.isolation.wire import LaunchSpec

__all__ = ["BWRAP", "OURS", "first_word", "measure"]

OURS, BWRAP = "sandboxd session", "bwrap --unshare-all + seccomp"
_WORD = b"here\n"
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "TOKEN": "x" * 40}
#: Seconds before each start, in which nothing is timed: what was started before ends, and the
#: daemon makes a sandbox ready, as it does on a host where sessions don't follow at once.
_PAUSE = 0.05


async def measure(rounds: int) -> dict[str, Any]:
    """Both, interleaved; no ratio where bwrap is missing."""
    with stage.open_stage() as on, ExitStack() as given:

        async def session() -> float:
            return first_word(on)

        variants = [Variant(OURS, session, ours=False)]
        bwrap = shutil.which("bwrap")
        if bwrap is not None:
            opened = bubblewrap.filters(given)
            variants.append(Variant(BWRAP, lambda: _cold(bwrap, opened)))
        lacking = weaker(_layers(on))
        await interleave(variants, rounds)
    return {
        "variants": [row(variant) for variant in variants],
        "absent": {} if bwrap else {BWRAP: "not installed: python -m bench install"},
        "ratios": {v.name: ratio(variants[0].times, v.times) for v in variants},
        "lacking": lacking,
    }


def first_word(on: stage.Stage) -> float:
    """Seconds from the order to start a session until its agent says something, after a pause."""
    time.sleep(_PAUSE)
    began = time.perf_counter()
    started, fds = on.client.call_with_fds(
        "session.start", agent="brief", args=[], tty=False, attach=True
    )
    said = os.read(fds[1], 64)
    seconds = time.perf_counter() - began
    for fd in fds:
        os.close(fd)
    ended = on.client.call("session.wait", id=started["id"])
    if said != _WORD or ended["exit_code"] != 0:
        raise SystemExit(f"the agent said {said!r} and ended with {ended}")
    return seconds


async def _cold(bwrap: str, opened: list[int]) -> float:
    spec = LaunchSpec(
        id="bench",
        argv=(os.fsencode(stage.program("echo")), b"here"),
        env=(),
        uid=0,
        cwd="/tmp",  # noqa: S108 - the sandbox's own
    )
    with ExitStack() as given:
        own = []
        for fd in opened:  # read to its end, so each run needs one of its own
            own.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
            given.callback(os.close, own[-1])
        words, inherited = bubblewrap.arguments(bwrap, spec, own, given)
        read, write = os.pipe2(os.O_CLOEXEC)
        given.callback(os.close, read)
        actions = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherited]
        actions.append((os.POSIX_SPAWN_DUP2, write, 1))
        time.sleep(_PAUSE)
        began = time.perf_counter()
        pid = os.posix_spawn(bwrap, words, _ENVIRONMENT, file_actions=actions)
        os.close(write)
        said = os.read(read, 64)
        seconds = time.perf_counter() - began
        _, status = os.waitpid(pid, 0)
    if said != _WORD or status != 0:
        raise SystemExit(f"bwrap's program said {said!r} and ended with {status}")
    return seconds


def _layers(on: stage.Stage) -> list[dict[str, str]]:
    """The layers of an agent's sandbox, as a living session's are shown."""
    started = on.client.call("session.start", agent="idle", args=[], tty=False, attach=False)
    shown: dict[str, Any] = on.client.call("session.show", id=started["id"])
    on.client.call("session.stop", id=started["id"], grace=0)
    layers: list[dict[str, str]] = shown["isolation"]
    return layers
