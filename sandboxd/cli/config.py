"""``sandboxctl config check``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect, paths
from sandboxd.cli.parser import Commands, command, group
from sandboxd.errors import Unavailable

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(commands, name, help=line)
    parser = command(
        nouns,
        "check",
        check,
        help="check the configuration without applying it",
        description="Check every configuration file and report each mistake with its file, line, "
        "column and what was expected. The daemon checks its own directory, with its own rights; "
        "with DIR, or when no daemon runs, sandboxctl checks the directory itself. "
        "Exits with 2 when anything is wrong.",
        examples=[
            ("sandboxctl config check", "before sandboxctl reload"),
            ("sandboxctl config check ./config", "a directory in a repository, in CI"),
        ],
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", help="check this one, here")
    parser.lookups["directory"] = "directories"


def check(args: argparse.Namespace) -> int:
    got = _locally(Path(args.directory)) if args.directory else _by_daemon(args)
    if args.json:
        output.print_json(got)
        return 0
    for warning in got.get("warnings", ()):
        output.note(f"warning: {warning}")
    print(f"the configuration is valid ({got['generation'][:12]})")
    return 0


def _by_daemon(args: argparse.Namespace) -> dict[str, Any]:
    try:
        with connect(args) as daemon:
            got: dict[str, Any] = daemon.call("config.check")
            return got
    except Unavailable:
        return _locally(paths(args).config)


def _locally(directory: Path) -> dict[str, Any]:
    from sandboxd.paths import shipped
    from sandboxd.policy import load_config

    loaded = load_config(
        directory.absolute(), shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )
    return {"generation": loaded.generation, "warnings": list(loaded.warnings)}
