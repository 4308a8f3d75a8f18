"""A real daemon on directories of its own, for tests: configured, started, asked, killed."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sandboxd.admin.client import AdminClient
from sandboxd.errors import Unavailable
from sandboxd.paths import Paths
from sandboxd.vault.custody import create_key_file

#: As root the broker runs as this uid, which nothing else on the host uses.
BROKER_UID = 1_899_999_999


def until(
    condition: Callable[[], bool], seconds: float = 20.0, told: Callable[[], object] = str
) -> None:
    """Wait for something that another process does; an AssertionError when it never comes.

    The error says what ``told`` then gives.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain {told()}"
        time.sleep(0.02)


class RealDaemon:
    """One daemon. ``base`` has a short name: socket paths are limited to 107 bytes."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.paths = Paths(base / "config", base / "state", base / "run")
        self.process: subprocess.Popen[str] | None = None
        self.log = base / "daemon.log"
        self.wrapper: tuple[str, ...] = ()
        for name in ("agents", "tools", "policies"):
            (self.paths.config / name).mkdir(parents=True)
        create_key_file(self.paths.config / "master.key")

    def write(self, name: str, text: str) -> Path:
        """A configuration file, dedented, at ``name`` below the configuration directory."""
        path = self.paths.config / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"))
        path.chmod(0o644)
        return path

    def agent(self, slug: str, script: str, **keys: Any) -> None:
        """An agent that runs ``script`` with /bin/sh; ``keys`` are more lines of its file."""
        self._write_agent(slug, ("/bin/sh", "-c"), script, keys)

    def python_agent(self, slug: str, source: str, **keys: Any) -> None:
        """An agent that runs ``source`` with this Python, given arguments or not."""
        command = (sys.executable, "-I", "-c")
        self._write_agent(slug, command, source, {"args_allowed": "true", **keys})

    def _write_agent(
        self, slug: str, command: Sequence[str], script: str, keys: Mapping[str, Any]
    ) -> None:
        lines = [
            "version: 1",
            f"description: agent {slug} of a test",
            "command:",
            *(f"  - {word}" for word in command),
            "  - |",
            *("    " + line for line in textwrap.dedent(script).strip().splitlines()),
            *(f"{key}: {value}" for key, value in keys.items()),
        ]
        self.write(f"agents/{slug}.yaml", "\n".join(lines) + "\n")

    def tool(self, name: str, program: str, manifest: str) -> None:
        """A tool whose program is the text ``program``; ``manifest`` is the rest of its file."""
        script = self.write(f"tools/{name}/program", program)
        script.chmod(0o755)
        head = f"version: 1\nname: {name}\ndescription: tool {name} of a test\nprogram: program\n"
        self.write(f"tools/{name}/tool.yaml", head + textwrap.dedent(manifest).lstrip("\n"))

    @property
    def command(self) -> list[str]:
        user = ["--user", str(BROKER_UID)] if os.geteuid() == 0 else []
        return [
            *(*self.wrapper, sys.executable, "-m", "sandboxd.main"),
            *("--config", str(self.paths.config)),
            *("--state", str(self.paths.state)),
            *("--runtime", str(self.paths.runtime), *user),
        ]

    def start(self) -> None:
        """Start it and wait until it answers; the log is in the error when it doesn't."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
            )
        for _ in range(3000):  # two minutes and more, for an emulated host
            if self.process.poll() is not None:
                break
            try:
                with self.client() as client:
                    client.call("status")
                return
            except Unavailable:
                time.sleep(0.05)
        raise AssertionError(f"the daemon did not start:\n{self.log.read_text()}")

    def fail_to_start(self) -> subprocess.CompletedProcess[str]:
        """Run it expecting that it refuses to start."""
        return subprocess.run(self.command, capture_output=True, text=True, timeout=60, check=False)

    def http(self, settings: str = "listen: 127.0.0.1:0") -> None:
        """Serve HTTP, on a free port, once it starts; ``settings`` are the lines below ``http``."""
        file = self.paths.config / "sandboxd.yaml"
        before = file.read_text() if file.exists() else "version: 1\n"
        lines = textwrap.indent(textwrap.dedent(settings).strip(), "  ")
        self.write("sandboxd.yaml", f"{before}http:\n{lines}\n")

    @property
    def url(self) -> str:
        """Where the running daemon serves HTTP."""
        url = self.call("status")["http"]
        assert isinstance(url, str), "this daemon serves no HTTP: call http() before start()"
        return url

    def client(self) -> AdminClient:
        return AdminClient.connect(self.paths)

    def call(self, method: str, **params: Any) -> Any:
        with self.client() as client:
            return client.call(method, **params)

    def set(self, agent: str, now: bool = False, **values: str) -> Any:
        encoded = {k: base64.b64encode(v.encode()).decode() for k, v in values.items()}
        return self.call("env.set", agent=agent, values=encoded, now=now)

    def audit(self) -> list[dict[str, Any]]:
        with self.client() as client:
            return list(client.stream("audit.tail", n=10_000, follow=False))

    def ctl(self, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """sandboxctl, as a user would run it."""
        command = [
            *(sys.executable, "-m", "sandboxd.cli"),
            *("--config", str(self.paths.config)),
            *("--state", str(self.paths.state)),
            *("--runtime", str(self.paths.runtime), *args),
        ]
        options.setdefault("timeout", 60)
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    def run(self, agent: str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """``sandboxctl run AGENT -- ARGS``."""
        return self.ctl("run", agent, *(("--", *args) if args else ()), **options)

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Signal the daemon and wait for its end; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(timeout=60)


@contextmanager
def directories() -> Iterator[RealDaemon]:
    """A daemon that is not started yet; killed and removed at the end."""
    base = Path(tempfile.mkdtemp(prefix="sbx", dir="/tmp"))
    base.chmod(0o755)
    daemon = RealDaemon(base)
    try:
        yield daemon
    finally:
        if daemon.process is not None:
            with contextlib.suppress(ProcessLookupError):
                daemon.process.kill()
            daemon.process.wait()
        shutil.rmtree(base, ignore_errors=True)
