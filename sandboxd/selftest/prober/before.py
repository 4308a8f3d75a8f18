"""What one call leaves for the next of its tool, where both run in one sandbox, one after another.

The first call of the tool leaves something wherever a program can, and the probes of the second
look for it. Their control: the first had made it, and in the very sandbox in which they look.
"""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH103, PTH110, PTH115, PTH120, PTH123, PTH208

from __future__ import annotations

import json
import os
import resource
import signal
import socket
from collections.abc import Callable
from functools import partial

from sandboxd.selftest.prober.kernel import checked, libc
from sandboxd.selftest.prober.probe import TOOL, Plan, add, word_for

__all__ = ["leave"]

_THREAT = "Secret: what the call before left"
_NOTES = "/workspace/before.json"
_KEY = 0x5EF7
_CREATE = 0o1600
_NAME = "left-by-the-call-before"
_PLACES = ("/tmp", "HOME", "/dev/shm")  # noqa: S108


def leave() -> int:
    """Leave all of it, and a note of what worked."""
    made = {}
    for name, (make, _) in _MARKS.items():
        try:
            make()
        except OSError as failure:
            made[name] = word_for(failure)
        else:
            made[name] = "ok"
    with open(_NOTES, "w") as notes:
        json.dump({"sandbox": _sandbox(), "made": made}, notes)
    return 0


def _sandbox() -> str:
    return os.readlink("/proc/self/ns/pid") + os.readlink("/proc/self/ns/mnt")


def _path(place: str) -> str:
    return f"{os.environ['HOME'] if place == 'HOME' else place}/{_NAME}"


def _file(place: str) -> None:
    os.makedirs(f"{_path(place)}/below")
    with open(f"{_path(place)}/below/file", "w") as file:
        file.write("left")


def _nameless(place: str) -> None:
    """Memory that no name leads to, held by a process that stays."""
    held = os.open(os.path.dirname(_path(place)), os.O_TMPFILE | os.O_RDWR)
    os.write(held, b"left" * 100_000)
    _stay()
    os.close(held)


def _stay() -> None:
    """A process that its parent has forgotten."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(1)
            os.close(2)
            signal.pause()
        os._exit(0)
    os.wait()


def _room(place: str) -> str:
    now = os.statvfs(os.path.dirname(_path(place)))
    return "ok" if now.f_bfree < now.f_blocks else "all free"


def _is_there(place: str) -> str:
    return "ok" if os.path.exists(_path(place)) else "nothing"


def _made(kind: str, *operands: int) -> None:
    checked(getattr(libc, kind)(_KEY, *operands))


def _listen() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0{_NAME}")
        listener.listen()
        _stay()


def _connect() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(f"\0{_NAME}")


def _stranger() -> str:
    """A process that is neither the init nor ours: ours all have our ancestors."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        pid, seen = int(name), set()
        while pid > 1 and pid != os.getppid() and pid not in seen:
            seen.add(pid)
            pid = _parent(pid)
        if pid == 1 and int(name) not in (1, os.getppid()) and seen:
            return "ok"
    return "nothing"


def _parent(pid: int) -> int:
    """0 when it has just ended: then it was no process that stays."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _weaken() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))


def _weakened() -> str:
    return "ok" if resource.getrlimit(resource.RLIMIT_NOFILE)[1] <= 100 else "nothing"


_Mark = tuple[Callable[[], object], Callable[[], object]]
_MARKS: dict[str, _Mark] = {
    **{f"its files in {p}": (partial(_file, p), partial(_is_there, p)) for p in _PLACES},
    "memory of its deleted files": (partial(_nameless, "/tmp"), partial(_room, "/tmp")),  # noqa: S108
    "its process": (_stay, _stranger),
    "its abstract socket": (_listen, _connect),
    "its System V segment": (
        partial(_made, "shmget", 4096, _CREATE),
        partial(_made, "shmget", 0, 0),
    ),
    "its System V queue": (partial(_made, "msgget", _CREATE), partial(_made, "msgget", 0)),
    "its System V semaphores": (
        partial(_made, "semget", 1, _CREATE),
        partial(_made, "semget", 0, 0),
    ),
    "its own limits": (_weaken, _weakened),
}


def _look(look: Callable[[], object]) -> Callable[[Plan], object]:
    return lambda plan: look()


def _was_made(name: str) -> Callable[[Plan], str]:
    def control(plan: Plan) -> str:
        with open(_NOTES) as file:
            notes = json.load(file)
        if notes["sandbox"] != _sandbox():
            return "it had another sandbox"
        return str(notes["made"][name])

    return control


_ABSENT = {"its abstract socket": "ECONNREFUSED", "memory of its deleted files": "all free"}
for _name, (_, _find) in _MARKS.items():
    add(f"call before: {_name}", _THREAT, _look(_find),
        _ABSENT.get(_name, "ENOENT" if "System V" in _name else "nothing"),
        inside=_was_made(_name), places=(TOOL,),
        says="the call before made it in this same sandbox")  # fmt: skip
