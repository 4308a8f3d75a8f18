"""A stage: one temporary directory, a configuration in it, and a real daemon that serves it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sandboxd.errors import SandboxdError, Unavailable
from sandboxd.paths import Paths
from sandboxd.vault.custody import create_key_file

__all__ = ["BROKER_UID", "Stage", "daemon_program", "open_stage", "until_interrupted"]

#: Whom the broker becomes when root runs this: a uid that no account has.
BROKER_UID = 1_899_999_999
#: Generous: a daemon that can't start says so at once, and one on an emulated host takes a while.
_START_SECONDS = 150.0
_STOP_SECONDS = 15.0
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ROOT = Path(__file__).parents[2]


@dataclass
class Stage:
    """``what`` is what an error calls it: the demo, the selftest."""

    top: Path
    what: str = "stage"
    daemon: subprocess.Popen[bytes] | None = None

    @property
    def paths(self) -> Paths:
        return Paths(config=self.top / "c", state=self.top / "s", runtime=self.top / "r")

    @property
    def key(self) -> Path:
        return self.top / "key"

    @property
    def log(self) -> Path:
        return self.top / "daemon.log"

    def configure(self, files: Mapping[str, str]) -> None:
        """Write a configuration and a key. Whatever the umask: the broker reads it, and nobody
        else may write it."""
        for name, text in files.items():
            path = self.paths.config / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for folder, _, names in os.walk(self.top):
            for name in names:
                Path(folder, name).chmod(0o644)
            if folder != str(self.top):
                Path(folder).chmod(0o755)
        if os.geteuid() == 0:
            self.top.chmod(0o755)
        create_key_file(self.key)

    def serve(self, environment: Mapping[str, str]) -> None:
        """Start the daemon with ``environment`` added to ours, and wait until it is ready.

        Raises Unavailable when it can't run on this host.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(self.top / "n"))
            with self.log.open("wb") as log:
                self.daemon = subprocess.Popen(
                    self._command(),
                    env=self._environment(environment),
                    cwd=_ROOT,  # where -m finds a package that isn't installed
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is ours to handle
                )
            try:
                self._wait_until_ready(self.daemon, notify)
            except BaseException:
                self.daemon.kill()
                self.daemon.wait()
                raise

    def stop(self) -> None:
        """End the daemon and all below it. Idempotent."""
        if self.daemon is None:
            return
        self.daemon.terminate()
        try:
            self.daemon.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()

    def _command(self) -> list[str]:
        where = self.paths
        command = [
            *daemon_program(),
            f"--config={where.config}",
            f"--state={where.state}",
            f"--runtime={where.runtime}",
            "--log-level=debug",  # the more it says, the more there is to search
        ]
        return [*command, f"--user={BROKER_UID}"] if os.geteuid() == 0 else command

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SANDBOXD_", "LISTEN_"))}
        return {**own, **more, "NOTIFY_SOCKET": str(self.top / "n")}

    def _wait_until_ready(self, daemon: subprocess.Popen[bytes], notify: socket.socket) -> None:
        ended = os.pidfd_open(daemon.pid)
        deadline = time.monotonic() + _START_SECONDS
        try:
            while (left := deadline - time.monotonic()) > 0:
                ready, _, _ = select.select([notify.fileno(), ended], [], [], left)
                if notify.fileno() in ready and b"READY=1" in notify.recv(4096).split(b"\n"):
                    return
                if ended in ready:
                    raise self._failed(daemon.wait())
        finally:
            os.close(ended)
        raise Unavailable(f"the daemon was not ready within {_START_SECONDS:.0f} s")

    def _failed(self, status: int) -> SandboxdError:
        text = self.log.read_text(errors="replace").strip()
        complaint = next(
            (line for line in text.splitlines() if line.startswith("sandboxd: ")),
            text[-500:],
        ).removeprefix("sandboxd: ")
        message = f"the {self.what}'s daemon did not start: {complaint}"
        if status in (Unavailable.exit_code, 8):
            return Unavailable(message, hint="see what this host lacks: sandboxctl doctor")
        return SandboxdError(
            message, hint=f"keep its directory to look into: sandboxctl {self.what} --keep"
        )


AnyStage = TypeVar("AnyStage", bound=Stage)


@contextmanager
def open_stage(make: Callable[[Path], AnyStage], *, keep: bool = False) -> Iterator[AnyStage]:
    """A stage that is gone afterwards, however the block ends; only ``keep`` leaves its files."""
    base = tempfile.gettempdir()
    # A socket's path has 107 bytes at most (unix(7)), and ours adds about 50 to the directory's.
    # Root's own directory may be closed to the broker, which gives up root.
    if os.geteuid() == 0 or len(base) > 40:
        base = "/tmp"  # noqa: S108
    top = Path(tempfile.mkdtemp(prefix="sbx-", dir=base))
    stage = make(top.resolve())
    _check_root(stage.what)

    def clean() -> None:
        with _undisturbed():
            stage.stop()
            if not keep:
                shutil.rmtree(top, ignore_errors=True)

    try:
        yield stage
    finally:
        try:
            clean()
        finally:
            clean()  # once more, should the one interrupt that we take have come right before


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the block as Ctrl-C does, and only the first of all these."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: object) -> None:
        for each in _INTERRUPTS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, interrupt) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def daemon_program() -> list[str]:
    """The ``sandboxd`` command, by module: it need not be on PATH."""
    return [sys.executable, "-m", "sandboxd.main"]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Cleaning up goes on when somebody presses Ctrl-C again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_root(what: str) -> None:
    """Unavailable for the root of a container that can't become the user the broker needs."""
    if os.geteuid() != 0:
        return
    maps = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if not any(int(first) <= BROKER_UID < int(first) + int(size) for first, _, size in maps):
        raise Unavailable(
            f"root of this container can't become uid {BROKER_UID}, which it has no mapping for",
            hint=f"run the {what} as an ordinary user, or see: sandboxctl doctor",
        )
