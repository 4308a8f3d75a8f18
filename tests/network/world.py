"""Two hosts of the project's own, as network namespaces: one runs sandboxd, one is the internet.

They are joined by one pair of interfaces and reach nothing else. The first resolves names by a
small server on its loopback, which keeps what it was asked (resolv.conf(5), network_namespaces(7)).
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Addresses of the internet's hosts. They are public ones, within these namespaces alone.
WEB, MIRROR, DATABASE, METADATA = "93.184.216.34", "151.101.0.223", "10.1.2.3", "169.254.169.254"
#: A public address of the host that sandboxd runs on.
OURS = "93.184.216.99"
#: What the name server knows.
NAMES = {
    "api.example.com": WEB,
    "git.example.com": WEB,
    "pypi.test.example": MIRROR,
    "npm.test.example": MIRROR,
    "db.internal": DATABASE,
    "rebound.example.com": METADATA,
    "other.example.org": WEB,
    "ours.example.com": OURS,
}

_HERE = Path(__file__).parent


@dataclass
class World:
    """``host`` and ``internet`` are the pids that hold the namespaces."""

    host: int
    internet: int
    folder: Path
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)

    @property
    def wrapper(self) -> tuple[str, ...]:
        """Before a command that is to run on the host."""
        return ("nsenter", "--target", str(self.host), "--net", "--mount", "--")

    def inside(self, pid: int, *command: str | Path, **options: Any) -> subprocess.Popen[Any]:
        """A program on one of the hosts, ended with the world."""
        words = ["nsenter", "--target", str(pid), "--net", "--mount", "--", *map(str, command)]
        process = subprocess.Popen(words, **options)
        self.processes.append(process)
        return process

    def asked(self) -> list[str]:
        """The names that the name server was asked for, in order."""
        log = self.folder / "asked"
        return log.read_text().split() if log.exists() else []


@contextmanager
def world(folder: Path, content: Path, certificate: Path) -> Iterator[World]:
    """Both hosts with their servers: names, and ``content`` over HTTP and HTTPS."""
    with ExitStack() as ending:
        host, internet = (ending.enter_context(_namespace()) for _ in range(2))
        found = World(host, internet, folder)
        ending.callback(_end, found)
        _join(host, internet)
        resolver = folder / "resolv.conf"
        resolver.write_text("nameserver 127.0.0.1\noptions timeout:2 attempts:1\n")
        in_host = ["nsenter", "--target", str(host), "--mount", "--"]
        target = str(Path("/etc/resolv.conf").resolve())
        subprocess.run([*in_host, "mount", "--bind", str(resolver), target], check=True)
        names = ",".join(f"{name}={address}" for name, address in NAMES.items())
        _ready(found.inside(
            host, sys.executable, "-I", _HERE / "name_server.py", names, folder / "asked",
            stdout=subprocess.PIPE, text=True,
        ))  # fmt: skip
        _ready(found.inside(
            internet, sys.executable, "-I", _HERE / "web_server.py", content, certificate,
            ",".join((WEB, MIRROR, METADATA)), stdout=subprocess.PIPE, text=True,
        ))  # fmt: skip
        yield found


@contextmanager
def _namespace() -> Iterator[int]:
    """A network and a mount namespace; yields the pid that holds them."""
    hold = "import sys; print('ready', flush=True); sys.stdin.read()"
    command = ["unshare", "--net", "--mount", "--", sys.executable, "-I", "-c", hold]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        _ready(holder)
        yield holder.pid


def _join(host: int, internet: int) -> None:
    def run(pid: int, *words: str) -> None:
        subprocess.run(["nsenter", "--target", str(pid), "--net", "--", "ip", *words], check=True)

    command = ["ip", "link", "add", "out", "netns", str(host), "type", "veth", "peer", "name", "in",
               "netns", str(internet)]  # fmt: skip
    subprocess.run(command, check=True)
    for pid, name, address in ((host, "out", "192.168.9.1"), (internet, "in", "192.168.9.2")):
        run(pid, "link", "set", "lo", "up")
        run(pid, "addr", "add", f"{address}/24", "dev", name)
        run(pid, "link", "set", name, "up")
    run(host, "addr", "add", f"{OURS}/32", "dev", "lo")
    for address in (WEB, MIRROR, DATABASE, METADATA):
        run(internet, "addr", "add", f"{address}/32", "dev", "lo")
    run(host, "route", "add", "default", "via", "192.168.9.2")


def _ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "ready\n", line


def _end(found: World) -> None:
    for process in found.processes:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def wait_for(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Until ``command`` succeeds: a server that takes a moment to start."""
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(command, check=True, capture_output=True, env=environment)
            return
        assert time.monotonic() < deadline, command
        time.sleep(0.1)
