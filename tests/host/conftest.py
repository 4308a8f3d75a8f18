"""A real Debian 12 host with systemd, booted in a container, with the project's wheel installed.

Three layers, the first two cached under /var/tmp/sandboxd-host-HASH (delete them at will):
``root`` is what debootstrap made, ``deps`` adds a virtual environment with the dependencies, and
each boot gets a fresh copy of that with today's wheel. The container has no network: everything
installs from files, as on a host without a way out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SUITE = "bookworm"
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
    """The cache directory with its two layers, built when missing."""
    if os.geteuid() != 0:
        pytest.skip("booting a host needs root")
    for program in ("systemd-nspawn", "debootstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: apt-get install systemd-container debootstrap")
    if sys.version_info[:2] != (3, 11):
        pytest.skip(f"{SUITE} has Python 3.11, and wheels are built by the Python that runs this")
    directory = Path(f"/var/tmp/sandboxd-host-{_hash(SUITE, *PACKAGES, str(RECIPE))}")
    directory.mkdir(mode=0o700, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build_root(directory)
        _build_deps(directory)
    return directory


@pytest.fixture(scope="session")
def wheel(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Today's wheel of the project."""
    to = tmp_path_factory.mktemp("wheel")
    _do(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(to), str(PROJECT))
    (built,) = to.glob("sandboxd-*.whl")
    return built


@pytest.fixture(scope="module")
def image(cache: Path, wheel: Path) -> Iterator[Path]:
    """A throw-away root filesystem with the wheel installed in /opt/sandboxd, not booted."""
    with copied(cache) as root:
        shutil.copy(wheel, root / "opt")
        _chroot(
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
        _do("cp", "-a", f"{_deps(cache)}/.", str(scratch))
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _build_root(cache: Path) -> None:
    if (cache / "root").is_dir():
        return
    building = cache / "root.building"
    shutil.rmtree(building, ignore_errors=True)
    _do(
        "debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE,
        str(building), "http://deb.debian.org/debian",
    )  # fmt: skip
    shutil.rmtree(building / "var/cache/apt/archives", ignore_errors=True)
    building.rename(cache / "root")


def _dependencies() -> list[str]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return list(project["dependencies"])


def _deps(cache: Path) -> Path:
    return cache / f"deps-{_hash(*_dependencies())}"


def _build_deps(cache: Path) -> None:
    layer = _deps(cache)
    if layer.is_dir():
        return
    for stale in cache.glob("deps-*"):
        shutil.rmtree(stale)
    building = cache / "building"
    shutil.rmtree(building, ignore_errors=True)
    _do("cp", "-a", str(cache / "root"), str(building))
    wheels = building / "opt/wheels"
    _do(sys.executable, "-m", "pip", "wheel", "-q", "-w", str(wheels), *_dependencies())
    _chroot(building, "python3", "-m", "venv", "/opt/sandboxd")
    _chroot(
        building, "/opt/sandboxd/bin/pip", "install", "-q", "--no-index",
        "--find-links=/opt/wheels", *_dependencies(),
    )  # fmt: skip
    shutil.rmtree(wheels)
    building.rename(layer)


def _chroot(root: Path, *command: str) -> None:
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"}
    _do("chroot", str(root), *command, env=environ)


def _do(*command: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
