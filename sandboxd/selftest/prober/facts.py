"""What a sandbox must not learn of its host: its name, and since when it has been running."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH123

from __future__ import annotations

import os
import time
from collections.abc import Callable

from sandboxd.selftest.prober.probe import HOST, Plan, add

_THREAT = "Escape: facts of the host"
#: An agent's host name, and of the tool that probes its own.
_GENERIC = ("sandbox", "probe")
_TIME = "time namespace"
#: Seconds by which two clocks may differ that tell the same.
_NEAR = 2.0
_SAME = "outside they tell it"


def _named(asked: Callable[[], str]) -> Callable[[Plan], str]:
    """The name that every sandbox has, which a host may happen to have as well."""

    def attack(plan: Plan) -> str:
        name = asked()
        if plan.inside and name in _GENERIC:
            return "generic"
        return "ok" if name == plan.hostname else name

    return attack


def _by_knob() -> str:
    with open("/proc/sys/kernel/hostname") as name:
        return name.read().strip()


def _told(moment: Callable[[], float]) -> Callable[[Plan], tuple[str, str]]:
    """Whether a moment of boot is the host's."""

    def attack(plan: Plan) -> tuple[str, str]:
        apart = moment() - plan.booted
        return ("ok" if abs(apart) < _NEAR else "another"), f"{apart:+.0f} s"

    return attack


def _by_uptime() -> float:
    with open("/proc/uptime") as uptime:
        return time.time() - float(uptime.read().split()[0])


def _by_statistics() -> float:
    with open("/proc/stat") as statistics:
        return float(next(line.split()[1] for line in statistics if line.startswith("btime ")))


def _by_first_process() -> float:
    """Process 1 of the host starts with it; that of a sandbox as well."""
    with open("/proc/self/stat", "rb") as stat:
        ticks = int(stat.read().rpartition(b")")[2].split()[19])
    started = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - started - ticks / os.sysconf("SC_CLK_TCK")


for _words, _attack in (("uname", lambda: os.uname().nodename), ("/proc/sys", _by_knob)):
    add(f"the host's name by {_words}", _THREAT, _named(_attack), "generic", outside=HOST,
        says="outside it is told")  # fmt: skip
for _words, _moment in (
    ("the boot-time clock", lambda: time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)),
    ("the monotonic clock", lambda: time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)),
    ("the raw clock", lambda: time.time() - time.clock_gettime(time.CLOCK_MONOTONIC_RAW)),
    ("/proc/uptime", _by_uptime),
    ("/proc/stat", _by_statistics),
    ("the age of a process", _by_first_process),
):
    add(f"when the host was started, by {_words}", _THREAT, _told(_moment), "another",
        needs=_TIME, outside=HOST, fallback=lambda plan: time.clock_gettime(4) and None,
        says=_SAME)  # fmt: skip
