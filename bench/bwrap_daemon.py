"""``sandboxd`` with one thing changed: tool calls are launched through bwrap.

``python -m bench.bwrap_daemon`` takes the options of ``sandboxd``. Policy, vault, audit, capture,
redaction and protocol are the broker's own; agents run in sandboxes of the real launcher. Started
as cheaply as can be: posix_spawn(3), and a pidfd that the event loop waits for.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any, cast

import trio

from bench import bubblewrap
from sandboxd import daemon, main
from sandboxd.isolation.client import Exit, Launcher, Process, open_launcher
from sandboxd.isolation.wire import LaunchSpec

__all__ = ["Bubblewrap"]


class _Process:
    """What the broker needs of a running sandbox."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self.exit: Exit | None = None
        self._waiting = trio.Lock()

    async def wait(self) -> Exit:
        async with self._waiting:
            if self.exit is None:
                await trio.lowlevel.wait_readable(self._pidfd)
                _, status, used = os.wait4(self.pid, 0)
                os.close(self._pidfd)
                code = os.waitstatus_to_exitcode(status)
                cpu = round((used.ru_utime + used.ru_stime) * 1000)
                self.exit = Exit(
                    code if code >= 0 else None, -code if code < 0 else None, cpu, used.ru_maxrss
                )
        return self.exit

    async def signal(self, signum: int) -> None:
        if self.exit is None:
            signal.pidfd_send_signal(self._pidfd, signum)

    async def kill(self) -> None:
        if self.exit is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class Bubblewrap:
    """A launcher for tools; for everything else it is the real one."""

    def __init__(self, real: Launcher, bwrap: str, given: ExitStack) -> None:
        self._real, self._bwrap = real, bwrap
        self._filters = bubblewrap.filters(given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def launch(
        self,
        spec: LaunchSpec,
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        extra: Sequence[int] = (),
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Process:
        if spec.user != "tool":
            return await self._real.launch(
                spec, stdin=stdin, stdout=stdout, stderr=stderr, extra=extra, meanwhile=meanwhile
            )
        with ExitStack() as given:
            # bwrap reads a filter's descriptor to its end, and an offset is shared by all copies.
            own = [_anew(fd, given) for fd in self._filters]
            words, inherited = bubblewrap.arguments(self._bwrap, spec, own, given)
            streams = [
                (os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate((stdin, stdout, stderr))
            ]
            kept = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherited]
            environment = dict(spec.env)
            pid = os.posix_spawn(self._bwrap, words, environment, file_actions=[*streams, *kept])
        meanwhile()
        return cast(Process, _Process(pid))


def _anew(fd: int, given: ExitStack) -> int:
    copy = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    given.callback(os.close, copy)
    return copy


@asynccontextmanager
async def _open(sock: socket.socket) -> AsyncIterator[Launcher]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SystemExit("bwrap is not installed")
    with ExitStack() as given:
        async with open_launcher(sock) as real:
            yield cast(Launcher, Bubblewrap(real, bwrap, given))


if __name__ == "__main__":
    # Read by the daemon when it starts; the launcher that it forks is the real one.
    setattr(daemon, "open_launcher", _open)  # noqa: B010 - no exported name of it
    sys.exit(main.main())
