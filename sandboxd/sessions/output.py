"""What a detached agent printed: kept on disk within bounds, readable while it still runs."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import trio

from sandboxd.errors import NotFound

__all__ = ["MAX_LOG", "OUTPUT", "Recorder", "read_log"]

_log = logging.getLogger(__name__)

#: A log file of this size becomes ``output.1.log``, so that at most twice as much is kept.
MAX_LOG = 8 << 20


#: What a session's directory holds of its output, oldest first.
OUTPUT = ("output.1.log", "output.log")


class Recorder:
    """Copies a pipe into ``directory/output.log`` until it ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.changed = trio.Condition()
        #: Whether there is something to read, or never will be.
        self.begun = self.done = False
        self._path = directory / "output.log"
        self._log = -1
        self._size = 0

    async def record(self, fd: int) -> None:
        """Copy ``fd``, which is closed at the end. A full disk ends the log, not the agent."""
        try:
            async with trio.lowlevel.FdStream(fd) as pipe:
                self._try(self._open)
                self.begun = True
                await self._tell()
                async for chunk in pipe:  # also without a log: a full pipe would stop the agent
                    self._try(self._write, chunk)
                    await self._tell()
        finally:
            self._close()
            self.begun = self.done = True
            with trio.CancelScope(shield=True):
                await self._tell()

    def _try(self, action: Callable[..., None], *args: bytes | bytearray) -> None:
        try:
            action(*args)
        except OSError as failure:
            _log.error("%s: recording ends: %s", self._path, failure.strerror)
            self._close()

    def _open(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._log, self._size = os.open(self._path, flags, 0o600), 0

    def _write(self, chunk: bytes | bytearray) -> None:
        if self._log < 0:
            return
        if self._size + len(chunk) > MAX_LOG:
            self._path.rename(self.directory / "output.1.log")
            self._close()
            self._open()
        self._size += os.write(self._log, chunk)

    def _close(self) -> None:
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()


async def read_log(
    directory: Path, recorder: Recorder | None, *, follow: bool
) -> AsyncGenerator[bytes, None]:
    """The recorded output, oldest first; with ``follow`` on and on until the session ends.

    NotFound when nothing was recorded (an attached session's output went to its operator).
    """
    while follow and recorder is not None and not recorder.begun:
        async with recorder.changed:
            if not recorder.begun:
                await recorder.changed.wait()
    paths = [path for name in OUTPUT if (path := directory / name).exists()]
    if not paths and recorder is None:
        raise NotFound(
            "there is no recorded output",
            hint="only detached sessions are recorded; an attached one printed to its operator",
        )
    for path in paths[:-1]:
        yield path.read_bytes()
    if not paths:
        return
    current = paths[-1]
    log = current.open("rb")
    try:
        while True:
            done = recorder is None or recorder.done
            while chunk := log.read(65536):
                yield chunk
            if done or not follow or recorder is None:
                return
            if os.fstat(log.fileno()).st_ino != _inode(current):
                log.close()
                log = current.open("rb")
                continue
            with trio.move_on_after(1):  # a wake-up lost between read and wait costs a second
                async with recorder.changed:
                    await recorder.changed.wait()
    finally:
        log.close()


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0
