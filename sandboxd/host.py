"""Installing the daemon as a systemd service: ``sandboxctl install`` and ``uninstall``.

An installation is a list of steps. Each knows whether it is still needed and how to carry itself
out, so that a dry run is the same list looked at, a second run changes nothing, and every step is
printed. Files go below /usr/local/lib, where systemd looks for what an administrator installed
outside of the package manager (systemd.unit(5), sysusers.d(5), tmpfiles.d(5)).
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandboxd.errors import Denied, Invalid, NotFound, SandboxdError, Unavailable
from sandboxd.paths import shipped

__all__ = ["FILES", "add_install_arguments", "add_uninstall_arguments", "install", "uninstall"]

#: What is installed: the path below ``systemd/`` of the project, and below /usr/local/lib.
FILES = (
    ("sysusers.d/sandboxd.conf", "sysusers.d/sandboxd.conf"),
    ("tmpfiles.d/sandboxd.conf", "tmpfiles.d/sandboxd.conf"),
    ("sandboxd.service", "systemd/system/sandboxd.service"),
    ("sandboxd.socket", "systemd/system/sandboxd.socket"),
)
_UNITS = ("sandboxd.service", "sandboxd.socket")
_LIB = Path("usr/local/lib")
_USER = "sandboxd"
#: Where the shipped unit expects the programs; an installation puts its own directory there.
_SHIPPED_BIN = "/opt/sandboxd/bin/"
_PROGRAMS = ("sandboxd", "sandboxctl")


def add_install_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sandboxctl install``."""
    _add_common(parser)
    parser.add_argument(
        "--enable", action="store_true", help="also enable the units, so that they start at boot"
    )


def add_uninstall_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sandboxctl uninstall``."""
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done and change nothing"
    )
    parser.add_argument(
        "--prefix",
        metavar="DIR",
        help="work on the root filesystem below DIR instead of this host's (for images)",
    )
    parser.add_argument("--json", action="store_true", help="print the steps as JSON")


def install(args: argparse.Namespace) -> int:
    """Install units, user and directories; say every step; return 0.

    Raises :class:`Denied` for anybody but root and where another user could change what root would
    run, :class:`NotFound` when the programs aren't installed, :class:`Unavailable` without
    systemd's tools. Nothing is started, and nothing enabled without ``--enable``.
    """
    target = _Target.of(args)
    target.check_may_write("install", args)
    bindir = target.inside(Path(getattr(args, "bindir", None) or sysconfig.get_path("scripts")))
    _check_programs(target, bindir)
    files = [_WriteFile(target.root / _LIB / to, _rendered(source, bindir)) for source, to in FILES]
    steps: list[_Step] = [
        *files,
        _Run(
            ("systemd-sysusers", *target.root_option, "-"),
            stdin=_rendered(FILES[0][0], bindir),
            needed=lambda: not target.has_user(),
        ),
        _Run(
            ("systemd-tmpfiles", *target.root_option, "--create", "-"),
            stdin=_rendered(FILES[1][0], bindir),
            needed=lambda: not target.directories_right(),
        ),
    ]
    if target.booted:
        changed = any(step.needed() for step in files)
        steps.append(_Run(("systemctl", "daemon-reload"), needed=lambda: changed))
    if args.enable:
        steps.append(
            _Run(
                ("systemctl", *target.root_option, "enable", *_UNITS),
                needed=lambda: not target.enabled(),
            )
        )
    then = []
    if target.booted:
        then = ["sandboxctl init", "systemctl enable --now sandboxd.socket sandboxd.service"]
        if args.enable:
            then[1] = "systemctl start sandboxd"
    _carry_out(steps, args, then)
    return 0


def uninstall(args: argparse.Namespace) -> int:
    """Stop and disable the service and remove what :func:`install` copied; return 0.

    Configuration, store, audit log and user stay: removing them is the operator's decision.
    Raises as :func:`install` does.
    """
    target = _Target.of(args)
    target.check_may_write("uninstall", args)
    files = [_RemoveFile(target.root / _LIB / to) for _, to in reversed(FILES)]
    there = any(step.needed() for step in files)
    now = ("--now",) if target.booted else ()
    steps: list[_Step] = [
        _Run(
            ("systemctl", *target.root_option, "disable", *now, *_UNITS),
            needed=lambda: there and (target.booted or target.enabled()),
        ),
        *files,
    ]
    if target.booted:
        steps.append(_Run(("systemctl", "daemon-reload"), needed=lambda: there))
    kept = [str(target.root / path) for path in ("etc/sandboxd", "var/lib/sandboxd")]
    _carry_out(steps, args, [f"rm -r {' '.join(kept)}   # only if nothing of it is wanted"])
    return 0


@dataclass(frozen=True)
class _Target:
    """The root filesystem that is worked on: this host's, or an image's below a directory."""

    root: Path

    @classmethod
    def of(cls, args: argparse.Namespace) -> _Target:
        given = getattr(args, "prefix", None)
        root = Path(given or "/").absolute()
        if not root.is_dir():
            raise NotFound(f"{root} is not a directory", hint="create it first")
        return cls(root.resolve())

    @property
    def is_host(self) -> bool:
        return self.root == Path("/")

    @property
    def booted(self) -> bool:
        """Whether systemd runs here and now (sd_booted(3))."""
        return self.is_host and Path("/run/systemd/system").is_dir()

    @property
    def root_option(self) -> tuple[str, ...]:
        return () if self.is_host else (f"--root={self.root}",)

    def inside(self, path: Path) -> Path:
        """``path`` as a program inside the root sees it."""
        return Path("/") / path.relative_to(self.root) if path.is_relative_to(self.root) else path

    def outside(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def check_may_write(self, verb: str, args: argparse.Namespace) -> None:
        if os.geteuid() != 0 and not args.dry_run:
            raise Denied(
                f"only root may {verb} the service",
                hint=f"sudo sandboxctl {verb}, or see what it would do: "
                f"sandboxctl {verb} --dry-run",
            )

    def has_user(self) -> bool:
        return self._ids() is not None

    def directories_right(self) -> bool:
        """Whether tmpfiles.d's directories exist as it describes them."""
        ids = self._ids()
        if ids is None:
            return False
        for line in _source("tmpfiles.d/sandboxd.conf").splitlines():
            if not line.startswith("d "):
                continue
            _, path, mode, user, group, *_ = line.split()
            try:
                at = self.outside(Path(path)).lstat()
            except OSError:
                return False
            wanted = (int(mode, 8), 0 if user == "root" else ids[0], ids[1])
            if not stat.S_ISDIR(at.st_mode) or group != _USER:
                return False
            if (stat.S_IMODE(at.st_mode), at.st_uid, at.st_gid) != wanted:
                return False
        return True

    def enabled(self) -> bool:
        wants = self.root / "etc/systemd/system"
        return all(
            (wants / f"{by}.wants" / unit).is_symlink()
            for by, unit in zip(("multi-user.target", "sockets.target"), _UNITS, strict=True)
        )

    def _ids(self) -> tuple[int, int] | None:
        """The user's uid and gid, if there is such a user."""
        if self.is_host:
            try:
                entry = pwd.getpwnam(_USER)
            except KeyError:
                return None
            return entry.pw_uid, entry.pw_gid
        try:
            lines = (self.root / "etc/passwd").read_text().splitlines()
        except OSError:
            return None
        for line in lines:
            if line.startswith(f"{_USER}:"):
                fields = line.split(":")
                return int(fields[2]), int(fields[3])
        return None


class _Step:
    """One thing to do. ``needed`` looks, ``apply`` does; ``action`` and ``what`` say it."""

    action = ""

    @property
    def what(self) -> str:
        raise NotImplementedError

    def needed(self) -> bool:
        raise NotImplementedError

    def apply(self) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class _WriteFile(_Step):
    path: Path
    content: str
    action = "write"

    @property
    def what(self) -> str:
        return str(self.path)

    def needed(self) -> bool:
        try:
            at = self.path.lstat()
            same = self.path.read_text() == self.content
        except (OSError, UnicodeDecodeError):
            return True
        return not (stat.S_ISREG(at.st_mode) and stat.S_IMODE(at.st_mode) == 0o644 and same)

    def apply(self) -> None:
        """Write beside the target and rename: a reader never sees half a unit."""
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(fd, "w") as file:
                file.write(self.content)
                os.fchmod(file.fileno(), 0o644)
            os.replace(name, self.path)  # noqa: PTH105 (mkstemp gives a str)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@dataclass(frozen=True)
class _RemoveFile(_Step):
    path: Path
    action = "remove"

    @property
    def what(self) -> str:
        return str(self.path)

    def needed(self) -> bool:
        return os.path.lexists(self.path)

    def apply(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Run(_Step):
    argv: tuple[str, ...]
    needed: Callable[[], bool]
    stdin: str = ""
    action = "run"

    @property
    def what(self) -> str:
        return " ".join(self.argv)

    def apply(self) -> None:
        program = shutil.which(self.argv[0], path="/usr/bin:/bin:/usr/sbin:/sbin")
        if program is None:
            raise Unavailable(
                f"{self.argv[0]} is not on this host",
                hint="sandboxctl install is for hosts with systemd; "
                "elsewhere start sandboxd from your own service manager (docs/systemd.md)",
            )
        done = subprocess.run(
            (program, *self.argv[1:]), input=self.stdin, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise SandboxdError(
                f"{self.what} failed with status {done.returncode}"
                + (f": {said[-1]}" if said else ""),
                hint="nothing is undone; solve this and run the same command again",
            )


def _carry_out(steps: Sequence[_Step], args: argparse.Namespace, then: Sequence[str]) -> None:
    """Apply what is needed and say every step, also when one of them fails."""
    report: list[dict[str, str]] = []
    try:
        for step in steps:
            if not step.needed():
                state = "unchanged"
            elif args.dry_run:
                state = "planned"
            else:
                try:
                    step.apply()
                except OSError as error:
                    raise SandboxdError(
                        f"can't {step.action} {step.what}: {error.strerror or error}",
                        hint="nothing is undone; solve this and run the same command again",
                    ) from None
                state = "done"
            report.append({"action": step.action, "what": step.what, "state": state})
            if not args.json:
                print(f"{state:<9}  {step.action:<6}  {step.what}")
    finally:
        if args.json:
            print(json.dumps({"dry_run": args.dry_run, "steps": report, "then": list(then)}))
    if not args.json and then and not args.dry_run:
        print("\nthen:")
        for line in then:
            print(f"  {line}")


def _source(name: str) -> str:
    return (shipped("systemd") / name).read_text()


def _rendered(name: str, bindir: Path) -> str:
    return _source(name).replace(_SHIPPED_BIN, f"{bindir}/")


def _check_programs(target: _Target, bindir: Path) -> None:
    """Refuse programs that are missing, or that anybody but root can change."""
    if not re.fullmatch(r"[A-Za-z0-9/._+-]+", str(bindir)):
        raise Invalid(
            f"the path {bindir} has characters that mean something in a unit file",
            hint="install sandboxd at a plain path, such as /opt/sandboxd",
        )
    for name in _PROGRAMS:
        program = target.outside(bindir / name)
        if not program.is_file() or not os.access(program, os.X_OK):
            raise NotFound(
                f"there is no program {program}",
                hint="install it first: python3 -m venv /opt/sandboxd && "
                "/opt/sandboxd/bin/pip install sandboxd",
            )
    for name in (*_PROGRAMS, "python"):
        if (program := target.outside(bindir / name)).exists():
            _check_custody(target, program)
    if target.is_host:
        _check_custody(target, Path(__file__).resolve())


def _check_custody(target: _Target, program: Path) -> None:
    """Every directory down to ``program``, and it itself: root's own, nobody else's to write.

    Looked at twice, as the path is spelled and as its links resolve.
    """
    ways = [*_lineage(target, program), *_lineage(target, program.resolve())]
    for path in dict.fromkeys(ways):
        at = path.lstat()
        writable = at.st_mode & 0o022
        if stat.S_ISLNK(at.st_mode) or (stat.S_ISDIR(at.st_mode) and at.st_mode & stat.S_ISVTX):
            # A link has no mode of its own, and in a sticky directory only the owner of an entry
            # replaces it (unlink(2)); the entry is looked at next.
            writable = 0
        if at.st_uid != 0 or writable:
            raise Denied(
                f"{path} can be changed by somebody other than root, and root would run it",
                hint="install sandboxd as root where only root writes: "
                "python3 -m venv /opt/sandboxd",
            )


def _lineage(target: _Target, path: Path) -> list[Path]:
    """``path`` and the directories above it, from the top, as far as they belong to the target.

    An image's own directory is no part of the image; this host's / is part of the host.
    """
    if not path.is_relative_to(target.root):
        return []
    lineage = [*reversed(path.parents), path]
    return [
        p for p in lineage if target.is_host or (p != target.root and p.is_relative_to(target.root))
    ]
