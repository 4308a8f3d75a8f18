"""The demo's stage: one temporary directory, a real configuration in it, and a real daemon."""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipapp
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sandboxd.demo.hostile.hunt import decoy
from sandboxd.errors import SandboxdError, Unavailable
from sandboxd.paths import Paths
from sandboxd.secret import Secret
from sandboxd.vault.custody import create_key_file

__all__ = ["AGENT", "VARIABLE", "Stage", "open_stage", "until_interrupted"]

AGENT = "hostile"
VARIABLE = "BANK_TOKEN"
TOOLS = ("pay", "report", "greet")

#: Whom the broker becomes when root runs the demo: a uid that no account has.
_BROKER_UID = 1_899_999_999
_START_SECONDS = 30.0
_STOP_SECONDS = 15.0
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ARCHIVE = "/opt/demo/agent.pyz"
_HERE = Path(__file__).parent


@dataclass
class Stage:
    """``secret`` is what the agent wants; ``opened`` looks the same, in a file it may read."""

    top: Path
    secret: Secret = field(default_factory=lambda: Secret(_new_value()))
    opened: str = field(default_factory=lambda: _new_value().decode())
    since: float = field(default_factory=lambda: time.time() - 2)
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

    @property
    def open_file(self) -> Path:
        """Mounted into the agent's sandbox at its own path: the control for all the others."""
        return self.top / "open"

    def start(self, bank_port: int) -> None:
        """Write the configuration, start the daemon, and wait until it serves.

        Raises Unavailable when it can't on this host.
        """
        self._write(bank_port)
        self.daemon = self._spawn()

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

    def _write(self, bank_port: int) -> None:
        zipapp.create_archive(
            _HERE,
            self.top / "agent.pyz",
            main="hostile.agent:main",
            filter=lambda path: path.parts[0] == "hostile" and path.suffix == ".py",
        )
        self.open_file.write_text(self.opened)
        for name, text in configuration(self, bank_port).items():
            path = self.paths.config / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for tool in TOOLS:
            shutil.copyfile(
                _HERE / "programs" / f"{tool}.py", self.paths.config / "tools" / tool / "program.py"
            )
        # Whatever the umask: the broker reads it, and nobody else may write it.
        for folder, _, files in os.walk(self.top):
            for name in files:
                Path(folder, name).chmod(0o644)
            if folder != str(self.top):
                Path(folder).chmod(0o755)
        if os.geteuid() == 0:
            self.top.chmod(0o755)
        create_key_file(self.key)

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start the daemon as a service manager would, and hear it say that it is ready."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(self.top / "n"))
            with self.log.open("wb") as log:
                daemon = subprocess.Popen(
                    self._command(),
                    env=self._environment(),
                    cwd=_HERE.parent.parent,  # where -m finds a package that isn't installed
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is ours to handle
                )
            try:
                self._wait_until_ready(daemon, notify)
            except BaseException:
                daemon.kill()
                daemon.wait()
                raise
        return daemon

    def _command(self) -> list[str]:
        where = self.paths
        command = [
            *daemon_program(),
            f"--config={where.config}",
            f"--state={where.state}",
            f"--runtime={where.runtime}",
            "--log-level=debug",  # the more it says, the more there is to search
        ]
        return [*command, f"--user={_BROKER_UID}"] if os.geteuid() == 0 else command

    def _environment(self) -> dict[str, str]:
        """Ours, and a bait: nothing of the daemon's environment may reach an agent or a tool."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SANDBOXD_", "LISTEN_"))}
        return {**own, "NOTIFY_SOCKET": str(self.top / "n"), "BAIT": decoy().decode()}

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
        message = f"the demo's daemon did not start: {complaint}"
        if status in (Unavailable.exit_code, 8):
            return Unavailable(message, hint="see what this host lacks: sandboxctl doctor")
        return SandboxdError(
            message, hint="keep its directory to look into: sandboxctl demo --keep"
        )


@contextmanager
def open_stage(*, keep: bool = False) -> Iterator[Stage]:
    """A stage that is gone afterwards, however the block ends; only ``keep`` leaves its files."""
    _check_root()
    base = tempfile.gettempdir()
    # A socket's path has 107 bytes at most (unix(7)), and ours adds about 50 to the directory's.
    # Root's own directory may be closed to the broker, which gives up root.
    if os.geteuid() == 0 or len(base) > 40:
        base = "/tmp"  # noqa: S108
    top = Path(tempfile.mkdtemp(prefix="sbx-", dir=base))
    stage = Stage(top.resolve())

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


def configuration(stage: Stage, bank_port: int) -> dict[str, str]:
    """The daemon's whole configuration: each file's name and text."""
    quoted = json.dumps
    return {
        "sandboxd.yaml": f"""\
version: 1
key:
  file: {quoted(str(stage.key))}
""",
        f"agents/{AGENT}.yaml": f"""\
version: 1
description: an agent that wants the bank token
command: [{quoted(sys.executable)}, -I, {_ARCHIVE}]
args_allowed: true
policy: demo
tools: [pay, report, greet]
mounts:
  - source: {quoted(str(stage.top / "agent.pyz"))}
    target: {_ARCHIVE}
  - source: {quoted(str(stage.open_file))}
    target: {quoted(str(stage.open_file))}
""",
        "policies/demo.yaml": """\
version: 1
description: tools may reach the network where their manifest says so, the agent may not
network: host
agent_network: none
rules:
  - allow: "*"
    reason: the tool is in the agent's list
""",
        "tools/pay/tool.yaml": f"""\
version: 1
name: pay
description: Pay an amount to a payee
program: program.py
runtime: python
argv: ["--amount={{amount}}", "--memo={{memo}}", "{{payee}}"]
input:
  type: object
  additionalProperties: false
  required: [amount, payee]
  properties:
    amount: {{type: integer, minimum: 1}}
    payee: {{type: string, minLength: 1, maxLength: 100}}
    memo: {{type: string, maxLength: 100}}
environment:
  BANK_URL: "http://127.0.0.1:{bank_port}/payments"
secrets:
  - variable: {VARIABLE}
network: host
workspace: rw
timeout: 60s
""",
        "tools/report/tool.yaml": f"""\
version: 1
name: report
description: Print a report that holds everything, as careless programs do
program: program.py
runtime: python
argv: ["{{title}}"]
input:
  type: object
  additionalProperties: false
  required: [title]
  properties:
    title: {{type: string, maxLength: 100}}
secrets:
  - variable: {VARIABLE}
timeout: 30s
""",
        "tools/greet/tool.yaml": f"""\
version: 1
name: greet
description: Say hello, and print the environment
program: program.py
runtime: python
input:
  type: object
  additionalProperties: false
environment:
  DECOY: {quoted(stage.opened)}
timeout: 30s
""",
    }


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


def _check_root() -> None:
    """Unavailable for the root of a container that can't become the user the broker needs."""
    if os.geteuid() != 0:
        return
    maps = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if not any(int(first) <= _BROKER_UID < int(first) + int(size) for first, _, size in maps):
        raise Unavailable(
            f"root of this container can't become uid {_BROKER_UID}, which it has no mapping for",
            hint="run the demo as an ordinary user, or see: sandboxctl doctor",
        )


def _new_value() -> bytes:
    return b"sk_demo_" + secrets.token_hex(16).encode()
