"""The barest way to start a program and wait for it, here or behind a covered directory.

``python -m bench.spawning DIRECTORY`` is that second place: it covers the directory in a mount
namespace of its own, then starts what it is told to and tells how long that took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import proc
from sandboxd.isolation import kernel

__all__ = ["Covered", "spawn"]


def spawn(argv: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Start it with no input and no output; seconds until it was reaped, and its exit status."""
    actions = [
        (os.POSIX_SPAWN_DUP2, _null(), 0),
        (os.POSIX_SPAWN_DUP2, _null(), 1),
        (os.POSIX_SPAWN_DUP2, _null(), 2),
    ]
    began = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, environment, file_actions=actions)
    _, status = os.waitpid(pid, 0)
    return time.perf_counter() - began, os.waitstatus_to_exitcode(status)


class Covered:
    """A process that starts programs where ``directory`` is covered. A context manager.

    For crun, which refuses to run where both versions of cgroups are mounted: with the second one
    covered it takes the first. Raises RuntimeError where a directory can't be covered.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Covered:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.spawning", str(self._directory)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            _, complaint = self._process.communicate()
            lines = complaint.strip().splitlines() or ["no reason given"]
            raise RuntimeError(f"{self._directory} can't be covered: {lines[-1]}")
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()

    def spawn(self, argv: list[str], environment: dict[str, str]) -> tuple[float, int]:
        answer = self._ask(argv, environment, output=False)
        return float(answer["seconds"]), int(answer["status"])

    def output(self, argv: list[str], environment: dict[str, str]) -> str:
        """What it prints. RuntimeError when it fails."""
        answer = self._ask(argv, environment, output=True)
        if answer["status"] != 0:
            last = (answer["stderr"].strip().splitlines() or [f"status {answer['status']}"])[-1]
            raise RuntimeError(f"does not run here: {last[:200]}")
        return str(answer["stdout"])

    def cpu(self) -> float:
        """CPU seconds used so far by this process and what it started."""
        return proc.cpu_seconds([self._process.pid])

    def _ask(self, argv: list[str], environment: dict[str, str], *, output: bool) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"argv": argv, "environment": environment, "output": output}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


_opened: list[int] = []


def _null() -> int:
    if not _opened:
        _opened.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    return _opened[0]


def _cover(directory: str) -> None:
    """An empty file system over ``directory``, in a mount namespace that nobody else has."""
    if os.geteuid() == 0:
        kernel.unshare(kernel.CLONE_NEWNS)
    else:
        uid, gid = os.geteuid(), os.getegid()
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(text)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", directory, "tmpfs", 0)


def main() -> None:
    """Serve orders until standard input ends."""
    _cover(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any]
        if order["output"]:
            done = subprocess.run(
                order["argv"],
                env=order["environment"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            answer = {"status": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        else:
            seconds, status = spawn(order["argv"], order["environment"])
            answer = {"seconds": seconds, "status": status}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
