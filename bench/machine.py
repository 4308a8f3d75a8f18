"""What a run's figures depend on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["describe"]


def describe() -> dict[str, object]:
    """Processors, kernel, Python, who runs it, and how busy the machine was."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processors": f"{len(os.sched_getaffinity(0))} x {model}",
        "kernel": f"Linux {platform.release()} {platform.machine()}",
        "python": f"Python {platform.python_version()}",
        "user": "root" if os.geteuid() == 0 else "an ordinary user",
        "load": f"load {os.getloadavg()[0]:.1f}",
    }
