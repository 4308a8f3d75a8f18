"""``sandboxctl agents``."""

from __future__ import annotations

import argparse

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    command(
        commands,
        name,
        agents,
        help=line,
        description="List the configured agents with their policy, tools and how many "
        "variables and live sessions each has.",
        examples=[("sandboxctl agents --json | jq -r '.agents[].slug'", "just the slugs")],
    )


def agents(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("agents.list")
    if args.json:
        output.print_json(got)
        return 0
    output.table(
        (
            (
                agent["slug"],
                agent["policy"],
                ",".join(agent["tools"]) or "-",
                str(agent["variables"]),
                str(agent["sessions"]),
                output.first_line(agent["description"]),
            )
            for agent in got["agents"]
        ),
        ("AGENT", "POLICY", "TOOLS", "VARIABLES", "SESSIONS", "DESCRIPTION"),
        empty="no agents are configured; sandboxctl init writes an example",
    )
    return 0
