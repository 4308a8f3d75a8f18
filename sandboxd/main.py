"""The ``sandboxd`` command: everything that must happen, in order, before the event loop starts.

1. read and forget what the service manager said; 2. no core dumps, no ptrace; 3. fork the
launcher, while this process is small, single-threaded and holds no secret; 4. read the settings
and the master key; 5. make the directories, take the lock; 6. give up root; 7. run the daemon.

Modules of the broker are imported after step 3, so that the launcher carries none of them.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import __version__
from sandboxd.errors import Conflict, Invalid, SandboxdError, Unavailable
from sandboxd.isolation.launcher import fork_launcher
from sandboxd.paths import Paths, shipped
from sandboxd.privileges import (
    Identity,
    become,
    harden,
    identity,
    make_reachable,
    raise_file_limit,
    refuse_unreachable,
)
from sandboxd.service import Service

if TYPE_CHECKING:
    from sandboxd.http.listen import Listening
    from sandboxd.policy import Settings
    from sandboxd.secret import Secret
    from sandboxd.vault.custody import KeySource

__all__ = ["main"]

#: Descriptors for a thousand sessions and calls; systemd's unit asks for the same.
_OPEN_FILES = 65536

#: What libraries load where it is installed, and do without where it isn't: a web server, HTTP/2,
#: models of an older kind. The broker uses none of it, and it would be 6 MB for good.
_UNUSED = ("h2", "pydantic.v1", "uvicorn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon in the foreground until SIGTERM. Returns the exit status (docs/errors.md)."""
    arguments = _parser().parse_args(argv)
    try:
        return _start(arguments)
    except SandboxdError as failure:
        _complain(failure)
        return failure.exit_code


def _start(arguments: argparse.Namespace) -> int:
    paths = Paths.resolve(config=arguments.config, state=arguments.state, runtime=arguments.runtime)
    paths.check_sockets()
    service = Service.from_environ()
    harden()
    launcher = fork_launcher()
    for name in _UNUSED:
        # Importing it fails from now on as if it were not there (the import system, 5.3.1).
        sys.modules[name] = None  # type: ignore[assignment]

    from sandboxd.broker.signing import signing_key
    from sandboxd.daemon import run
    from sandboxd.policy import load_settings
    from sandboxd.running import Boot
    from sandboxd.vault.custody import load_master_key

    _check_directory(paths.config, "configuration", "sandboxctl init")
    settings = load_settings(paths.config)
    _log_to_stderr(arguments.log_level or settings.log_level)
    raise_file_limit(_OPEN_FILES)
    who = identity(arguments.user or settings.user) if os.geteuid() == 0 else None
    for directory, mode in ((paths.state, 0o700), (paths.runtime, 0o755)):
        _own_directory(directory, mode, who)
    lock = _lock(paths.lock, who)
    source = _key_source(settings, paths)
    key = load_master_key(source, ask=_ask)
    webhook_key = signing_key(settings.approvals.webhook)
    http = _listening(settings, unix=False)
    if who is not None:
        for directory in (paths.state, paths.runtime):
            refuse_unreachable(directory, who)
        covered = make_reachable([*_needed_paths(), paths.config], who)
        if covered:
            logging.getLogger("sandboxd").info(
                "the broker sees %s covered: its Python lives below", ", ".join(covered)
            )
        become(who)
    http = http or _listening(settings, unix=True)
    boot = Boot(
        paths=paths,
        settings=settings,
        key=key,
        custody=source.kind,
        launcher=launcher,
        service=service,
        identity=who,
        lock=lock,
        webhook_key=webhook_key,
        http=http,
    )
    return run(boot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sandboxd",
        description="Run the sandbox manager in the foreground. Stop it with SIGTERM, reload its "
        "configuration with SIGHUP or 'sandboxctl reload'.",
        epilog="Everything else is done with sandboxctl: sandboxctl --help",
    )
    parser.add_argument("--config", metavar="DIR", help="default /etc/sandboxd, or XDG's")
    parser.add_argument("--state", metavar="DIR", help="default /var/lib/sandboxd, or XDG's")
    parser.add_argument("--runtime", metavar="DIR", help="default /run/sandboxd, or XDG's")
    parser.add_argument("--user", metavar="NAME", help="whom the broker becomes when run by root")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--version", action="version", version=f"sandboxd {__version__}")
    return parser


def _check_directory(path: Path, what: str, command: str) -> None:
    if not path.is_dir():
        raise Unavailable(
            f"the {what} directory {path} does not exist", hint=f"create it with: {command}"
        )


def _own_directory(path: Path, mode: int, who: Identity | None) -> None:
    """Make ``path`` for the broker, or refuse one that belongs to somebody else."""
    uid = who.uid if who is not None else os.geteuid()
    try:
        if not path.exists():
            path.mkdir(mode=mode, parents=True)
            path.chmod(mode)
            if who is not None:
                os.chown(path, who.uid, who.gid)
        status = path.stat()
    except OSError as failure:
        raise Unavailable(
            f"{path} can't be made: {failure.strerror}",
            hint="choose other directories with --state and --runtime",
        ) from None
    name = who.name if who is not None else "you"
    if not stat.S_ISDIR(status.st_mode):
        raise Invalid(f"{path} is not a directory")
    if status.st_uid != uid:
        raise Conflict(
            f"{path} belongs to uid {status.st_uid}, not to {name}",
            hint=f"chown {name if who else '$(id -un)'} {path}, or choose another directory",
        )
    if not status.st_mode & stat.S_IWUSR:
        raise Conflict(f"{path} is not writable", hint=f"chmod u+w {path}")
    if mode == 0o700 and status.st_mode & 0o077:
        raise Conflict(f"{path} is open to other users", hint=f"chmod 700 {path}")


def _lock(path: Path, who: Identity | None) -> int:
    """The state directory's lock, held as long as the descriptor is (flock(2))."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as failure:
        raise Unavailable(f"{path} can't be opened: {failure.strerror}") from None
    status = os.fstat(fd)
    if status.st_nlink != 1 or status.st_uid not in (os.geteuid(), who.uid if who else -1):
        # Root gives this file to the broker: it must be nobody's other file by a second name.
        raise Conflict(f"{path} is not this daemon's own file", hint=f"look at it: ls -l {path}")
    if who is not None:
        os.fchown(fd, who.uid, who.gid)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        raise Conflict(
            f"another sandboxd (pid {holder or 'unknown'}) uses {path.parent}",
            hint="stop it first, or give this one another --state directory",
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _listening(settings: Settings, *, unix: bool) -> Listening | None:
    """The HTTP API's socket: a port while root's ports and files can still be had; a Unix socket
    afterwards, as root must not touch names in a directory of the broker's.
    """
    if settings.http is None or settings.http.listen.startswith("unix:") is not unix:
        return None
    from sandboxd.http.listen import open_listening

    return open_listening(settings.http)


def _key_source(settings: Settings, paths: Paths) -> KeySource:
    """Where sandboxd.yaml says the master key is; CONFIG/master.key when it says nothing."""
    from sandboxd.vault.custody import KeySource

    key = settings.key
    if key is None or key.kind == "file":
        named = key.file if key is not None else None
        return KeySource("file", path=Path(named or paths.config / "master.key"))
    if key.kind == "credential":
        return KeySource("credential", name=key.credential or "")
    path = Path(key.passphrase_file) if key.passphrase_file is not None else None
    return KeySource("passphrase", path=path, state=paths.state)


def _ask(prompt: str) -> Secret:
    """A passphrase from the terminal; Unavailable where there is none."""
    from getpass import getpass

    from sandboxd.secret import Secret

    if not sys.stdin.isatty():
        raise Unavailable(
            "the passphrase of the master key is needed, and there is no terminal to ask on",
            hint="name a file that holds it: key: {passphrase_file: PATH} in sandboxd.yaml",
        )
    return Secret(getpass(prompt))


def _needed_paths() -> list[str]:
    """What the broker reads after it gave up root: its Python and its own files."""
    from sandboxd.isolation.runtime import python_prefixes

    package = Path(__file__).resolve().parent
    kinds = (shipped("tools"), shipped("policies"))
    return [*python_prefixes(), str(package), *(str(path) for path in kinds)]


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(levelname)s %(name)s: %(message)s"
    )


def _complain(failure: SandboxdError) -> None:
    print(f"sandboxd: {failure.message}", file=sys.stderr)
    parts = [part for part in getattr(failure, "errors", ()) if part.message != failure.message]
    for part in parts:
        print(f"  {part.message}", file=sys.stderr)
        if part.hint:
            print(f"    hint: {part.hint}", file=sys.stderr)
    if failure.hint:
        print(f"  hint: {failure.hint}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
