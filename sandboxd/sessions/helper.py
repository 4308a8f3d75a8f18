"""One question to a program of ours that works on an agent's files, in a sandbox of its own.

The sandbox shows it what the question is about and nothing else, as the files' owner, without a
network: what an agent planted can mislead nobody with more power than that. The request is one
JSON object on standard input, the answer one on standard output.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import marshal
import os
import signal
import sys
from importlib.resources import files
from importlib.util import MAGIC_NUMBER
from typing import Any

import trio

from sandboxd.isolation.client import Launcher
from sandboxd.isolation.runtime import python_mounts
from sandboxd.isolation.wire import FileSpec, LaunchSpec, Limits, MountSpec

__all__ = ["ask"]

_log = logging.getLogger(__name__)

#: Seconds that a program has to end when nobody waits for its answer any more.
_GRACE = 1.0

_LIBRARY = "/run/sandboxd/changes"
#: What the sandbox gets of this package: standard library only, all of it.
_MODULES = ("fileops", "landing", "overlay", "trees")


async def ask(
    launcher: Launcher,
    module: str,
    request: bytes,
    *,
    mounts: tuple[MountSpec, ...],
    uid: int,
    namespace: int | None,
    patience: float,
    max_answer: int,
    memory: int = 1 << 30,
) -> dict[str, Any] | None:
    """What ``module``'s main() answers; None when it gives no whole answer in ``patience`` s.

    ``namespace``: the mount namespace that shared ``mounts`` come from. No process is left when
    this returns, however it does. Raises KernelError or Unavailable when nothing can be launched.
    """
    boot = (
        f"import sys; sys.path.append({_LIBRARY!r}); "
        f"from sandboxd.sessions.{module} import main; main()"
    )
    spec = LaunchSpec(
        id="changes",
        argv=(os.fsencode(sys.executable), b"-I", b"-S", b"-B", b"-c", boot.encode()),
        env=((b"LANG", b"C.UTF-8"), (b"PATH", b"/usr/bin:/bin")),
        uid=uid,
        user="review",
        mounts=(*python_mounts(), *mounts),
        files=_library(),
        limits=Limits(memory=memory, processes=16, cpu_seconds=max(1, int(patience))),
    )
    with contextlib.ExitStack() as given:
        stdin = _memory(given, request)
        stdout, stderr = _memory(given), _memory(given)
        extra = []
        if namespace is not None:  # our own: the session may end and close its one
            extra.append(os.dup(namespace))
            given.callback(os.close, extra[0])
        process = await launcher.launch(
            spec, stdin=stdin, stdout=stdout, stderr=stderr, extra=extra
        )
        done = False
        try:
            with trio.move_on_after(patience):
                await process.wait()
                done = True
        finally:
            with trio.CancelScope(shield=True):
                if not done:  # time to take away what is half written
                    await process.signal(signal.SIGTERM)
                    with trio.move_on_after(_GRACE):
                        await process.wait()
                await process.kill()
                ended = await process.wait()
        answer = _parsed(os.pread(stdout, max_answer, 0)) if ended.code == 0 else None
        if answer is None:
            said = os.pread(stderr, 65536, 0).decode(errors="replace").strip().splitlines()
            _log.error("work on an agent's files ended with %s: %s", ended, said[-1:])
        return answer


def _memory(given: contextlib.ExitStack, data: bytes = b"") -> int:
    """A file in memory: with ``data`` to be read, or empty to be written."""
    fd = os.memfd_create("sandboxd-review", os.MFD_CLOEXEC)
    given.callback(os.close, fd)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(data)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


@functools.cache
def _library() -> tuple[FileSpec, ...]:
    """The programs and what they import, as files of the sandbox: compiled once, for all runs."""
    here = files("sandboxd.sessions")
    modules = {"__init__": b"", "sessions/__init__": b""} | {
        f"sessions/{name}": here.joinpath(f"{name}.py").read_bytes() for name in _MODULES
    }
    return tuple(
        FileSpec(f"{_LIBRARY}/sandboxd/{name}.pyc", _compiled(name, text), 0o444)
        for name, text in modules.items()
    )


def _compiled(name: str, text: bytes) -> bytes:
    """What a .pyc without its source holds: magic number, no flags, no time, no size (PEP 552)."""
    code = compile(text, f"sandboxd/{name}.py", "exec", dont_inherit=True)
    return MAGIC_NUMBER + bytes(12) + marshal.dumps(code)
