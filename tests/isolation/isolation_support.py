"""A box to try things in: programs and small Python probes, run in real sandboxes.

A probe is Python source that calls ``tell(name=value, ...)`` once. The same source runs outside a
sandbox too (``outside``), which is how a test shows that its probe works where nothing forbids it.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from sandboxd.isolation.client import Exit, Launcher, Process, open_launcher
from sandboxd.isolation.runtime import python_mounts
from sandboxd.isolation.wire import LaunchSpec

ORDINARY_UID = 64123

#: A Python that sandboxes see without a mount of its own, or else the one that runs the tests.
_SYSTEM_PYTHONS = [
    path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(path).exists()
]
PYTHON = _SYSTEM_PYTHONS[0] if _SYSTEM_PYTHONS else sys.executable
_PYTHON_MOUNTS = () if _SYSTEM_PYTHONS else python_mounts()

PRELUDE = """
import ctypes, errno, json, os, resource, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(action, *args, **options):
    try:
        action(*args, **options)
    except OSError as failure:
        return errno.errorcode[failure.errno]
    return "ok"
def call(function, *args):
    done = getattr(libc, function)(*args)
    return "ok" if done >= 0 else errno.errorcode[ctypes.get_errno()]
def status(field, pid="self"):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(field + ":"):
            return line.split(":")[1].split()
def tell(**facts):
    json.dump(facts, sys.stdout)
    sys.stdout.flush()
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def read(path: str | Path) -> str:
    """A small file of this host."""
    return Path(path).read_text(errors="surrogateescape")


def status(pid: int, field: str) -> list[str]:
    """The words of one field of /proc/PID/status."""
    lines = read(f"/proc/{pid}/status").splitlines()
    return next(line.split()[1:] for line in lines if line.startswith(field + ":"))


def children(pid: int) -> list[int]:
    """The live and dead children of a process, whichever of its threads started them."""
    lists = [thread / "children" for thread in Path(f"/proc/{pid}/task").iterdir()]
    return [int(word) for listed in lists for word in _read_if_there(listed).split()]


def _read_if_there(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
        return ""


@dataclass(frozen=True)
class Result:
    exit: Exit
    out: bytes
    err: bytes


class Running:
    """A started program with its output read as it comes."""

    def __init__(self, process: Process, out: int, err: int, stdin: int = -1) -> None:
        self.process, self._stdin = process, stdin
        self._out, self._err = trio.lowlevel.FdStream(out), trio.lowlevel.FdStream(err)

    async def ready(self, word: bytes = b"ready\n") -> bytes:
        """Wait until the program has printed ``word``; everything printed so far."""
        seen = b""
        while word not in seen:
            chunk = await self._out.receive_some()
            assert chunk, f"ended before it was ready: {seen!r} {await self._rest(self._err)!r}"
            seen += chunk
        return seen

    async def finish(self) -> Result:
        """Let the program that waits on its standard input go on, to its end."""
        os.write(self._stdin, b"\n")
        return await self.end()

    async def end(self) -> Result:
        """Wait for the end; the output that is left, up to the closing of both pipes."""
        exited = await self.process.wait()
        return Result(exited, await self._rest(self._out), await self._rest(self._err))

    @staticmethod
    async def _rest(stream: trio.lowlevel.FdStream) -> bytes:
        return b"".join([chunk async for chunk in stream])

    async def aclose(self) -> None:
        await self._out.aclose()
        await self._err.aclose()
        if self._stdin >= 0:
            os.close(self._stdin)


@asynccontextmanager
async def changed_launcher(change: str) -> AsyncIterator[Box]:
    """A box whose launcher has run ``change`` first: a layer less, or what an older kernel has.

    It runs as whoever runs the tests.
    """
    boot = f"""
import sys
sys.path.append(sys.argv[2])
from sandboxd.isolation import clocks, kernel, landlock, launcher, sandbox, seccomp
{change}
launcher.main()
"""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        fd = theirs.fileno()
        argv = [sys.executable, "-I", "-S", "-c", boot, str(fd), str(Path(__file__).parents[2])]
        await trio.run_process(argv, pass_fds=[fd], env={})
    async with open_launcher(ours) as launcher:
        yield Box(launcher)


class Box:
    """Runs programs in sandboxes of one launcher: made for each, or those of ``template``."""

    _uids = itertools.count(1_900_000_100)

    def __init__(self, launcher: Launcher, template: str = "") -> None:
        self.launcher, self.template = launcher, template
        self._free: list[int] = []

    @property
    def user(self) -> int:
        """The host uid of whoever owns what a sandbox in mode ``user`` may touch."""
        return ORDINARY_UID if os.geteuid() == 0 else os.geteuid()

    def uid(self) -> int:
        return next(self._uids) if self.launcher.privileged else self.user

    def spec(self, argv: Sequence[str | bytes], env: Iterable[str] = (), **more: Any) -> LaunchSpec:
        more.setdefault("uid", self.uid())
        more.setdefault("template", self.template)
        pairs = [os.fsencode(item).split(b"=", 1) for item in env]
        return LaunchSpec(
            id="test",
            argv=tuple(os.fsencode(word) for word in argv),
            env=tuple((name, value) for name, value in pairs),
            **more,
        )

    @asynccontextmanager
    async def start(
        self, *argv: str | bytes, extra: Sequence[int] = (), stdin: bool = False, **more: Any
    ) -> AsyncIterator[Running]:
        """Start a program; killed at the end of the block if it still runs.

        It reads an empty standard input, or one that :meth:`Running.finish` writes to.
        """
        # As the daemon does, so that one template serves one launch after another.
        reused = self._free.pop() if self.template and self._free else self.uid()
        uid = more.setdefault("uid", reused)
        null, writer = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), -1
        if stdin:
            os.close(null)
            null, writer = os.pipe2(os.O_CLOEXEC)
        out, out_end = os.pipe2(os.O_CLOEXEC)
        err, err_end = os.pipe2(os.O_CLOEXEC)
        try:
            process = await self.launcher.launch(
                self.spec(argv, **more), stdin=null, stdout=out_end, stderr=err_end, extra=extra
            )
        except BaseException:
            os.close(out)
            os.close(err)
            self._free.append(uid)
            raise
        finally:
            for fd in (null, out_end, err_end):
                os.close(fd)
        running = Running(process, out, err, writer)
        try:
            yield running
        finally:
            with trio.CancelScope(shield=True):
                if not self.launcher.gone.is_set():
                    await process.kill()
                    await process.wait()
                await running.aclose()
            self._free.append(uid)

    async def run(self, *argv: str | bytes, **more: Any) -> Result:
        async with self.start(*argv, **more) as running:
            return await running.end()

    async def sh(self, script: str, **more: Any) -> Result:
        more.setdefault("env", ["PATH=/usr/bin:/bin:/usr/sbin:/sbin"])
        return await self.run("/bin/sh", "-c", script, **more)

    async def settle(self) -> None:
        """End what is kept ready, until the launcher has no child left."""
        await self.launcher.retire(self.template)
        with trio.fail_after(10):
            while children(self.launcher.pid):  # noqa: ASYNC110
                await trio.sleep(0.01)

    def python(self, code: str, **more: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The program that runs probe ``code``, and the spec's other fields."""
        more["mounts"] = (*_PYTHON_MOUNTS, *more.get("mounts", ()))
        return (PYTHON, "-I", "-S", "-c", PRELUDE + code), more

    async def probe(self, code: str, **more: Any) -> dict[str, Any]:
        """What ``code`` tells from inside a sandbox."""
        argv, more = self.python(code, **more)
        result = await self.run(*argv, **more)
        assert result.exit.code == 0, (result.exit, result.err.decode())
        facts: dict[str, Any] = json.loads(result.out)
        return facts
