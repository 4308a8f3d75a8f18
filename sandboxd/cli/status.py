"""``sandboxctl status`` and ``sandboxctl reload``."""

from __future__ import annotations

import argparse

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    if name == "status":
        command(
            commands,
            name,
            status,
            help=line,
            description="Say whether the daemon runs, how isolated it can make things, which "
            "configuration is in force, and what it warns about. Exits with 6 when none runs.",
            examples=[
                ("sandboxctl status", "the daemon of this user, or of the host"),
                ("sandboxctl status --json | jq .generation", "one field, for a script"),
                (
                    "sandboxctl status --server https://sandboxd.example --key-file key",
                    "a daemon elsewhere, as far as the key's team goes",
                ),
            ],
        )
    else:
        command(
            commands,
            name,
            reload,
            help=line,
            description="Load the configuration again and put it in force at once and whole. "
            "When anything in it is wrong, every mistake is listed with its file and line, the "
            "old configuration stays in force, and the exit status is 2. Running sessions keep "
            "the configuration that they started with.",
            examples=[
                ("sandboxctl config check && sandboxctl reload", "look first, then apply"),
            ],
        )


def status(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("status")
    if args.json:
        output.print_json(got)
        return 0
    if "pid" not in got:  # what a team's key is told
        output.fields(
            [
                ("version", got["version"]),
                ("running since", output.when(got["started_at"])),
                ("you are", f"{got['name']} ({got['role']} of team {got['team']})"),
                ("sessions", got["sessions"]),
                ("calls running", got["calls"]),
                ("calls to approve", got["approvals"]),
            ]
        )
        return 0
    output.fields(
        [
            ("version", got["version"]),
            ("pid", got["pid"]),
            ("user", f"{got['user']} (uid {got['uid']})"),
            ("launcher", got["mode"]),
            ("running since", output.when(got["started_at"])),
            ("config", got["config"]),
            ("state", got["state"]),
            ("runtime", got["runtime"]),
            ("http", got.get("http") or "not served"),
            ("generation", got["generation"][:12]),
            ("master key", got["key_custody"]),
            ("sessions", got["sessions"]),
            ("calls running", got["calls"]),
            ("calls to approve", got["approvals"]),
            ("warnings", got["warnings"]),
        ]
    )
    return 0


def reload(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("reload")
    if args.json:
        output.print_json(got)
        return 0
    if got.get("changed", True):
        print(f"configuration {got['generation'][:12]} is in force")
    else:
        print(f"nothing changed: configuration {got['generation'][:12]} stays in force")
    for warning in got.get("warnings", ()):
        output.note(f"warning: {warning}")
    return 0
