"""``sandboxctl config check|schema``, and the configuration as the files say it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect, paths
from sandboxd.cli.parser import Commands, command, group
from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from sandboxd.policy import Config

__all__ = ["add", "add_check", "load_files"]


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(commands, name, help=line)
    add_check(nouns, "config")
    parser = command(
        nouns,
        "schema",
        schema,
        help="print the JSON Schema of a configuration file, for an editor",
        description="Print the JSON Schema (2020-12) of one kind of configuration file. Editors "
        "complete and check by it; what spans files or depends on the host is said by "
        "sandboxctl policy check alone.",
        examples=[
            ("sandboxctl config schema tool > tool.schema.json", "of tool.yaml"),
        ],
    )
    parser.add_argument(
        "kind", choices=("sandboxd", "agent", "tool", "policy"), help="the kind of file"
    )


def add_check(nouns: Commands, noun: str) -> None:
    """Add ``check`` to ``config`` and ``policy``: a policy can't be checked without the rest."""
    parser = command(
        nouns,
        "check",
        check,
        help="check the configuration without applying it",
        description="Check every configuration file and report each mistake with its file, line, "
        "column and what was expected; warn about what works and can hardly be meant, such as "
        "a rule that never decides. The daemon checks its own directory, with its own rights; "
        "with DIR, or when no daemon runs, sandboxctl checks the directory itself. "
        "Exits with 2 when anything is wrong.",
        examples=[
            (f"sandboxctl {noun} check", "before sandboxctl reload"),
            (f"sandboxctl {noun} check ./config", "a directory in a repository, in CI"),
        ],
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", help="check this one, here")
    parser.lookups["directory"] = "directories"


def check(args: argparse.Namespace) -> int:
    got = _summary(load_files(Path(args.directory))) if args.directory else _by_daemon(args)
    if args.json:
        output.print_json(got)
        return 0
    for warning in got.get("warnings", ()):
        output.note(f"warning: {warning}")
    print(f"the configuration is valid ({got['generation'][:12]})")
    return 0


def schema(args: argparse.Namespace) -> int:
    from sandboxd.paths import shipped

    print((shipped("schemas") / f"{args.kind}.json").read_text(), end="")
    return 0


def load_files(directory: Path) -> Config:
    """The configuration in ``directory``, read here and now. Raises ConfigErrors."""
    from sandboxd.paths import shipped
    from sandboxd.policy import load_config

    return load_config(
        directory.absolute(), shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )


def _by_daemon(args: argparse.Namespace) -> dict[str, Any]:
    try:
        with connect(args) as daemon:
            got: dict[str, Any] = daemon.call("config.check")
            return got
    except Unavailable:
        return _summary(load_files(paths(args).config))


def _summary(loaded: Config) -> dict[str, Any]:
    return {"generation": loaded.generation, "warnings": list(loaded.warnings)}
