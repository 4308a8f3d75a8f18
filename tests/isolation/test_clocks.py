"""A sandbox's clocks begin with it, and waiting by them works as everywhere."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from isolation_support import Box, changed_launcher

from sandboxd.errors import KernelError
from sandboxd.isolation import clocks
from sandboxd.sessions.layers import layers, provided

PROJECT = Path(__file__).resolve().parents[2]

#: Every way by which a program learns how long its machine has been running.
PROBE = """
import time
ticks = os.sysconf("SC_CLK_TCK")
def started():
    return int(open("/proc/self/stat").read().rpartition(")")[2].split()[19]) / ticks
class Info(ctypes.Structure):
    _fields_ = [("uptime", ctypes.c_long), ("rest", ctypes.c_long * 30)]
info = Info()
libc.sysinfo(ctypes.byref(info))
tell(
    monotonic=time.monotonic(), boottime=time.clock_gettime(time.CLOCK_BOOTTIME),
    raw=time.clock_gettime(time.CLOCK_MONOTONIC_RAW),
    uptime=float(open("/proc/uptime").read().split()[0]),
    sysinfo=info.uptime, started=started(),
    booted=time.time() - next(int(l.split()[1]) for l in open("/proc/stat") if l[:6] == "btime "),
)
"""
LONG = 600.0  # a loaded machine may take long, but not this long


def own(launcher_time: bool) -> None:
    if not launcher_time:
        pytest.skip("this kernel has no time namespaces")


async def test_the_clocks_begin_with_the_sandbox(
    box: Box, outside: Callable[..., dict[str, Any]]
) -> None:
    own(box.launcher.time)
    seen = await box.probe(PROBE)
    assert {
        name: value for name, value in seen.items() if not -2 <= value - clocks.START <= LONG
    } == {}
    host = time.clock_gettime(time.CLOCK_BOOTTIME)
    control = outside(PROBE)
    assert {name: v for name, v in control.items() if not -2 <= v - host <= LONG} == {}


async def test_timers_and_waiting_go_by_the_sandboxs_clocks(box: Box) -> None:
    """The kernel translates what is absolute inside; else these would not end, or at once."""
    seen = await box.probe(
        """
import threading, time
class Spec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]
def until(clock):
    now = time.clock_gettime_ns(clock)
    end = now + 20_000_000
    spec = Spec(end // 10**9, end % 10**9)
    code = libc.clock_nanosleep(clock, 1, ctypes.byref(spec), None)  # TIMER_ABSTIME
    return code == 0 and time.clock_gettime_ns(clock) >= end
event = threading.Event()
begun = time.monotonic()
came = event.wait(0.02)  # a futex, or a semaphore, with an absolute end
tell(monotonic=until(time.CLOCK_MONOTONIC), boottime=until(time.CLOCK_BOOTTIME),
     waited=not came and time.monotonic() - begun >= 0.02)
"""
    )
    assert seen == {"monotonic": True, "boottime": True, "waited": True}


async def test_nobody_inside_can_set_the_offsets(
    box: Box, outside: Callable[..., dict[str, Any]]
) -> None:
    own(box.launcher.time)
    probe = """
def write():
    with open("/proc/self/timens_offsets", "w") as file:
        file.write("monotonic 5 0\\n")
tell(write=attempt(write), unshare=call("unshare", 0x80))
"""
    seen = await box.probe(probe)
    assert seen["write"] == ("EACCES" if box.launcher.landlock else "EPERM")
    assert seen["unshare"] == "EPERM"
    control = """
libc.unshare(0x10000080)  # with a user namespace, as anybody may
def write():
    with open("/proc/self/timens_offsets", "w") as file:
        file.write("monotonic 5 0\\n")
tell(write=attempt(write))
"""
    assert outside(control, user=box.user) == {"write": "ok"}


async def test_a_kernel_without_has_sandboxes_all_the_same_and_says_so() -> None:
    async with changed_launcher("clocks.available = lambda: False") as box:
        assert box.launcher.time is False
        seen = await box.probe("tell(ns=os.readlink('/proc/self/ns/time'))")
        assert seen == {"ns": os.readlink("/proc/self/ns/time")}
        assert "time_namespace" not in provided("none", box.launcher)
        told = {layer["layer"]: layer for layer in layers("none", box.launcher)}
        assert told["time namespace"]["state"] == "missing"


async def test_a_namespace_that_can_t_be_had_after_all_starts_nothing() -> None:
    refusing = "clocks.available = lambda: True; clocks.kernel.CLONE_NEWTIME = 1 << 31"
    async with changed_launcher(refusing) as box:
        with pytest.raises(KernelError) as refused:
            await box.run("/bin/true")
    assert (refused.value.syscall, refused.value.errno) == ("unshare", errno.EINVAL)


def test_it_is_tried_for_real(outside: Callable[..., dict[str, Any]]) -> None:
    code = (
        f"import sys; sys.path.append({str(PROJECT)!r})\n"
        + """
from sandboxd.isolation import clocks, kernel
works = clocks.available()
clocks._Tried.works = None
clocks._OFFSETS = (("no clock", 1),)
tell(works=works, broken=clocks.available())
"""
    )
    assert outside(code) == {"works": os.path.exists("/proc/self/ns/time"), "broken": False}
