"""A program from the order to start it until its whole tree is dead and its output read.

Most programs end sooner than anything could be arranged for them. So nothing is: what a program
printed that has ended when its start is reported waits in its pipes, and is taken from there. Only
for one that stays there are tasks that read, tell of progress and watch the clock.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import trio

from sandboxd.broker import descriptors
from sandboxd.broker.capture import Capture, Stream
from sandboxd.broker.launch import Prepared
from sandboxd.egress.outlet import Outlet
from sandboxd.errors import Unavailable
from sandboxd.isolation.client import Exit, Launcher, Process

__all__ = ["REAP", "Tree", "attend"]

#: Seconds that output may still take once the tree is dead: more means that a descriptor escaped.
_DRAIN = 2.0
#: Seconds that a killed tree may take to be reaped.
REAP = 10.0

#: The streams of a program, and our ends of their pipes.
_Output = tuple[tuple[Stream, int], ...]


@dataclass(eq=False, kw_only=True)
class Tree:
    """The processes of a call: whether they are alive, how they ended, why somebody ended them."""

    alive: bool = False
    exit: Exit | None = None
    reason: str = ""


async def attend(
    launcher: Launcher,
    prepared: Prepared,
    tree: Tree,
    *,
    capture: Callable[[], Capture],
    overlay: int,
    way_out: AbstractContextManager[Outlet],
    started: Callable[[int], int],
    stays: Callable[[int], Awaitable[None]],
    ended: trio.CancelScope,
    grace: float,
) -> Capture:
    """Start the program and stay with it until its tree is dead and its output read.

    ``capture`` makes what takes the output, while the program is being started. ``started`` is told
    the sandbox's pid, and ``stays``, for a program that does, what it returned; where one fails the
    program is killed. Cancelling ``ended`` ends it too. ``overlay`` is the namespace that a launch
    may bring along, ``way_out`` what leads out of the sandbox. Raises what these and the launch
    raise, and Unavailable when the launcher is gone. ``tree.alive`` is false afterwards unless
    something could not be killed.
    """
    with contextlib.ExitStack() as ours:
        taken: list[Capture] = []
        with contextlib.ExitStack() as given:
            outlet = given.enter_context(way_out)
            leads_out = bool(outlet.fds)
            stdout, stdout_end = descriptors.pipe(ours, given)
            stderr, stderr_end = descriptors.pipe(ours, given)
            process = await launcher.launch(
                outlet.complete(prepared.spec),
                stdin=descriptors.standard_input(prepared, given),
                stdout=stdout_end,
                stderr=stderr_end,
                extra=[
                    *(descriptors.memory(data, given) for data in prepared.descriptors),
                    *([overlay] if prepared.spec.brings_namespace else ()),
                    *outlet.fds,
                ],
                meanwhile=lambda: taken.append(capture()),
            )
            try:
                outlet.take()
            except BaseException:  # nothing of it may run on that nobody attends to
                await _end(tree, process, 0.0)
                raise
            ours.callback(outlet.close)
        captured = taken[-1]
        tree.alive = True
        try:
            number = started(process.pid)
            output: _Output = (("stdout", stdout), ("stderr", stderr))
            ended_at_once = process.exit is not None and not leads_out
            if not ended_at_once or not all(captured.take(*each) for each in output):
                beside = (partial(stays, number), outlet.serve, captured.report)
                await _stay(tree, process, captured, output, ended, grace, beside)
        finally:
            await _end(tree, process, 0.0 if captured.overflowed else grace)
    captured.finish()
    return captured


async def _stay(
    tree: Tree,
    process: Process,
    capture: Capture,
    output: _Output,
    ended: trio.CancelScope,
    grace: float,
    beside: Iterable[Callable[[], Awaitable[None]]],
) -> None:
    """Read what a program prints that runs for a while, and see to its end; tasks ``beside``."""
    async with trio.open_nursery() as nursery, descriptors.reading(grace) as scopes:
        done = [trio.Event() for _ in output]
        for (stream, pipe), event, scope in zip(output, done, scopes, strict=True):
            nursery.start_soon(_read, capture, stream, pipe, event, scope)
        for task in beside:
            nursery.start_soon(task)
        try:
            with ended:
                tree.exit = await process.wait()
        finally:
            await _end(tree, process, 0.0 if capture.overflowed else grace)
        with trio.move_on_after(_DRAIN):
            for event in done:
                await event.wait()
        nursery.cancel_scope.cancel()


async def _read(
    capture: Capture, name: Stream, pipe: int, done: trio.Event, scope: trio.CancelScope
) -> None:
    with scope:
        await capture.read(name, pipe)
    done.set()


async def _end(tree: Tree, process: Process, grace: float) -> None:
    """Kill what is left of the tree and wait for its end, cancelled or not.

    A program with ``grace`` gets SIGTERM and that many seconds first, unless an operator ends it.
    """
    if process.exit is not None:
        tree.exit, tree.alive = process.exit, False
        return
    with trio.move_on_after(REAP + grace, shield=True):
        try:
            if grace and tree.exit is None and not tree.reason:
                await process.signal(signal.SIGTERM)
                with trio.move_on_after(grace):
                    await process.wait()
            await process.kill()
            tree.exit = await process.wait()
        except Unavailable:  # the launcher is gone, and as its children every tree with it
            tree.alive = False
            raise
        tree.alive = False
