"""A real Debian 12 host with systemd, booted in a container, with the project's wheel installed.

Three layers, the first two cached under /var/tmp/sandboxd-host-HASH (delete them at will):
``root`` is what debootstrap made, ``deps`` adds a virtual environment with the dependencies, and
each boot gets a fresh copy of that with today's wheel. The container has no network: everything
installs from files, as on a host without a way out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import debian
import pytest

PACKAGES = [
    "ca-certificates", "dbus", "git", "libpam-systemd", "procps", "python3", "python3-venv",
    "systemd", "systemd-sysv",
]  # fmt: skip
#: Raise it when the recipe below changes.
RECIPE = 2
BOOT_SECONDS = 90


class Host:
    """The booted container: run commands in it, read and write its files."""

    def __init__(self, root: Path, leader: int) -> None:
        self.root, self.leader = root, leader

    def argv(self, *command: str) -> list[str]:
        namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
        return ["nsenter", f"--target={self.leader}", *namespaces, "--wdns=/", "--", *command]

    def run(
        self, *command: str, check: bool = True, timeout: float = 60, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the container's root; with ``check``, its failure fails the test."""
        environ = {
            "PATH": "/opt/sandboxd/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
        }
        done = subprocess.run(
            self.argv(*command),
            capture_output=True,
            text=True,
            env=environ,
            input=stdin,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(
                f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}\n"
                f"{self.journal()}"
            )
        return done

    def out(self, *command: str, **options: object) -> str:
        return self.run(*command, **options).stdout.strip()  # type: ignore[arg-type]

    def property(self, unit: str, name: str) -> str:
        return self.out("systemctl", "show", "--value", f"--property={name}", unit)

    def journal(self, lines: int = 60) -> str:
        done = self.run("journalctl", "--no-pager", f"--lines={lines}", "-o", "cat", check=False)
        return "the journal's end:\n" + done.stdout

    def processes_of(self, unit: str) -> list[str]:
        """What still runs in the unit's cgroup and below, by any hierarchy."""
        script = (
            'grep -ls "$0" /proc/[0-9]*/cgroup | while read -r file; do '
            'tr "\\0" " " < "${file%cgroup}cmdline"; echo; done'
        )
        return self.out("sh", "-c", script, f"/{unit}").splitlines()

    def write(self, path: str, content: str, mode: int = 0o644) -> None:
        at = self.root / path.lstrip("/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(content)
        at.chmod(mode)


@pytest.fixture(scope="session")
def cache() -> Path:
    """The directory with the two layers, built when missing."""
    if os.geteuid() != 0:
        pytest.fail("booting a host needs root", pytrace=False)
    debian.need(("systemd-nspawn", "systemd-container"), ("debootstrap", "debootstrap"))
    with debian.cache("host", *PACKAGES, str(RECIPE)) as directory:
        _build_root(directory)
        _build_deps(directory)
    return directory


@pytest.fixture(scope="session")
def wheel(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Today's wheel of the project."""
    return debian.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def image(cache: Path, wheel: Path) -> Iterator[Path]:
    """A throw-away root filesystem with the wheel installed in /opt/sandboxd, not booted."""
    with copied(cache) as root:
        shutil.copy(wheel, root / "opt")
        debian.chroot(
            root, "/opt/sandboxd/bin/pip", "install", "-q", "--no-index", "--no-deps",
            f"/opt/{wheel.name}",
        )  # fmt: skip
        (root / "opt" / wheel.name).unlink()
        yield root


@pytest.fixture(scope="module")
def host(image: Path) -> Iterator[Host]:
    """The image, booted."""
    with boot(image) as host:
        yield host


@pytest.fixture(scope="session")
def boot_host() -> Callable[..., contextlib.AbstractContextManager[Host]]:
    """:func:`boot`, for a test that boots by itself."""
    return boot


@contextlib.contextmanager
def boot(root: Path, *, cgroups: str = "as here") -> Iterator[Host]:
    """Boot ``root`` with systemd-nspawn; the end powers it off, or kills it after a while.

    ``cgroups`` is what the container sees: this machine's tree, or a ``unified`` one (v2 only).
    """
    # nspawn's own system call filter is switched off: it knows no Landlock, a real host has it.
    environ = dict(os.environ, SYSTEMD_SECCOMP="0")
    if cgroups == "unified":
        environ["SYSTEMD_NSPAWN_UNIFIED_HIERARCHY"] = "1"
    with tempfile.TemporaryFile() as console:
        nspawn = subprocess.Popen(
            [
                "systemd-nspawn", "--quiet", f"--directory={root}", "--boot", "--register=no",
                "--keep-unit", "--private-network", "--console=pipe", "--hostname=sandboxd-host",
            ],
            stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, env=environ,
        )  # fmt: skip
        try:
            host = Host(root, _leader(nspawn))
            _wait_booted(host, nspawn)
            yield host
        except _NotBooted as error:
            console.seek(0)
            pytest.fail(f"{error}\n{console.read().decode(errors='replace')[-4000:]}")
        finally:
            nspawn.send_signal(signal.SIGTERM)  # an orderly halt
            try:
                nspawn.wait(60)
            except subprocess.TimeoutExpired:
                nspawn.kill()
                nspawn.wait()


class _NotBooted(Exception):
    pass


def _leader(nspawn: subprocess.Popen[bytes]) -> int:
    """The host's pid of the container's init, once it has become systemd."""
    deadline = time.monotonic() + BOOT_SECONDS
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    while time.monotonic() < deadline and nspawn.poll() is None:
        for child in children.read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
        time.sleep(0.05)
    raise _NotBooted("the container's init never came up")


def _wait_booted(host: Host, nspawn: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    said = ""
    while time.monotonic() < deadline and nspawn.poll() is None:
        said = host.run("systemctl", "is-system-running", check=False).stdout.strip()
        if said == "running":
            return
        if said in ("degraded", "maintenance"):
            break
        time.sleep(0.1)
    raise _NotBooted(f"the container is {said!r}: {host.out('systemctl', '--failed', check=False)}")


@contextlib.contextmanager
def copied(cache: Path) -> Iterator[Path]:
    """A throw-away copy of the second layer.

    A copy and not an overlay: overlayfs has no idmapped mounts, and a real host's disk does.
    """
    scratch = Path(tempfile.mkdtemp(prefix="run-", dir=cache))
    scratch.chmod(0o755)
    try:
        debian.do("cp", "-a", f"{_deps(cache)}/.", str(scratch))
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _build_root(cache: Path) -> None:
    root = cache / "root"
    if not root.is_dir():
        with debian.building(root) as made:
            debian.debootstrap(made, PACKAGES)


def _deps(cache: Path) -> Path:
    return cache / f"deps-{debian.digest(*debian.dependencies())}"


def _build_deps(cache: Path) -> None:
    layer = _deps(cache)
    if layer.is_dir():
        return
    for stale in cache.glob("deps-*"):
        shutil.rmtree(stale)
    with debian.building(layer) as made:
        debian.do("cp", "-a", str(cache / "root"), str(made))
        debian.install_dependencies(made)
