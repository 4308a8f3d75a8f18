"""``sandboxctl init``: a configuration directory that works, and a master key."""

from __future__ import annotations

import argparse
import os
import pwd
from pathlib import Path

from sandboxd.cli import output
from sandboxd.cli.daemon import paths
from sandboxd.cli.parser import Commands, command
from sandboxd.errors import Conflict, Denied, Invalid, SandboxdError

__all__ = ["FILES", "add", "skeleton"]

#: What is written: the name in the configuration directory, and in ``skeleton/``.
FILES = {
    "sandboxd.yaml": "sandboxd.yaml",
    "agents/example.yaml": "agents/example.yaml",
    "policies/example.yaml": "policies/example.yaml",
    "tools/README.md": "tools/README.md",
    ".gitignore": "gitignore",
}

_KEY = "master.key"


def add(commands: Commands, name: str, line: str) -> None:
    parser = command(
        commands,
        name,
        init,
        help=line,
        description="Write a commented configuration with an example agent, and a new master key "
        "beside it. Nothing that exists is changed: where a configuration is already, only a "
        "missing key is made, and with nothing missing the exit status is 5.",
        examples=[
            ("sandboxctl init", "in /etc/sandboxd as root, in ~/.config/sandboxd otherwise"),
            ("sandboxctl init ./config && sandboxd --config ./config", "somewhere else"),
        ],
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", help="default: --config")
    parser.lookups["directory"] = "directories"


def init(args: argparse.Namespace) -> int:
    directory = Path(args.directory).absolute() if args.directory else paths(args).config
    existing = [name for name in FILES if (directory / name).exists()]
    in_use = bool(existing) or any((directory / "agents").glob("*.yaml"))
    key = directory / _KEY
    if in_use:
        key = _key_of(directory) or key
    if in_use and key.exists():
        raise Conflict(
            f"{directory} holds a configuration and a key already; nothing was changed",
            hint="to check it: sandboxctl config check " + (args.directory or ""),
        )
    made: list[Path] = []
    try:
        if not in_use:
            for name, source in FILES.items():
                _write(directory / name, skeleton(source), made)
        if not key.exists():
            _make_key(key)
            made.append(key)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    kept = [] if key in made else [str(key)]
    if args.json:
        created = [str(path) for path in made]
        output.print_json({"directory": str(directory), "created": created, "kept": kept})
        return 0
    for path in made:
        print(f"created {path}")
    for name in kept:
        print(f"kept    {name}")
    _say_next(args, directory, in_use)
    return 0


def skeleton(name: str) -> bytes:
    """The shipped text of one file of a new configuration."""
    return (Path(__file__).parent / "skeleton" / name).read_bytes()


def _key_of(directory: Path) -> Path | None:
    """The key file that an existing configuration names, None for the default one."""
    from sandboxd.policy import load_settings

    key = load_settings(directory).key
    if key is None:
        return None
    if key.kind != "file" or key.file is None:
        raise Conflict(
            f"{directory} holds a configuration whose key is a {key.kind}; nothing was changed",
            hint="sandboxctl init makes key files only",
        )
    return Path(key.file)


def _make_key(path: Path) -> None:
    from sandboxd.vault.custody import create_key_file

    create_key_file(path)


def _write(path: Path, content: bytes, made: list[Path]) -> None:
    try:
        # World-readable whatever the umask: the broker, which is another user, reloads it.
        for directory in reversed([d for d in path.parents if not d.exists()]):
            directory.mkdir()
            directory.chmod(0o755)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        made.append(path)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o644)
            file.write(content)
    except PermissionError:
        raise Denied(
            f"may not write {path}", hint="choose a directory of yours: sandboxctl init DIR"
        ) from None
    except NotADirectoryError:
        raise Invalid(f"{path.parent} is not a directory") from None
    except OSError as error:
        raise SandboxdError(f"can't write {path}: {error.strerror}") from None


def _say_next(args: argparse.Namespace, directory: Path, in_use: bool) -> None:
    default = directory == paths(args).config
    option = "" if default and not args.config else f" --config {directory}"
    steps = [
        ("sandboxctl doctor", "see whether this host is ready"),
        (f"sandboxd{option}", "start the daemon, in another terminal"),
    ]
    if os.geteuid() == 0 and not _has_user("sandboxd"):
        steps.insert(1, ("sandboxctl install", "create the user that the broker becomes"))
    if not in_use:
        steps += [
            ("sandboxctl env set example HTTP_REQUEST_TOKEN", "set a secret"),
            ("sandboxctl run -t example", "run the example agent"),
        ]
    width = max(len(line) for line, _ in steps)
    print("\nnext:")
    for line, what in steps:
        print(f"  {line.ljust(width)}  {what}")
    print("\nkeep a copy of the master key apart from the state: without it, nothing opens again")


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
