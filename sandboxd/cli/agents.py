"""``sandboxctl agents``."""

from __future__ import annotations

import argparse
from typing import Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command, group

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(
        commands,
        name,
        help=line,
        description="Agents are configured by files, agents/NAME.yaml below the configuration "
        "directory. Without a command they are listed.",
        otherwise=list_,
    )
    command(
        nouns,
        "list",
        list_,
        help="all agents",
        description="List the configured agents with their team, policy, tools and how many "
        "variables and live sessions each has. 'sandboxctl agents' does the same.",
        examples=[("sandboxctl agents list --json | jq -r '.agents[].slug'", "just the slugs")],
    )
    parser = command(
        nouns,
        "show",
        show,
        help="everything about one agent",
        description="Show one agent: its team and policy, its tools, the names of its variables "
        "with the tools that get them, which of them are still to be set, and its live sessions.",
        examples=[("sandboxctl agents show reporter", "what it can do, and what it lacks")],
    )
    parser.add_argument("agent", metavar="AGENT", help="the agent's slug")
    parser.lookups["agent"] = "agents"
    parser = command(
        nouns,
        "delete",
        delete,
        help="take an agent away, with its sessions and variables",
        description="Delete an agent whose file belongs to the daemon's own user: its file is kept "
        "under a name that is not read, the configuration is reloaded, its sessions are stopped "
        "and its variables removed for good. Where the file belongs to root, remove it yourself "
        "and reload.",
        examples=[("sandboxctl agents delete reporter", "and all that is its")],
    )
    parser.add_argument("agent", metavar="AGENT", help="the agent's slug")
    parser.lookups["agent"] = "agents"


def list_(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("agents.list")
    if args.json:
        output.print_json(got)
        return 0
    output.table(
        (
            (
                agent["slug"],
                agent["team"],
                agent["policy"],
                ",".join(agent["tools"]) or "-",
                str(agent["variables"]),
                str(agent["sessions"]),
                output.first_line(agent["description"]),
            )
            for agent in got["agents"]
        ),
        ("AGENT", "TEAM", "POLICY", "TOOLS", "VARIABLES", "SESSIONS", "DESCRIPTION"),
        empty="no agents are configured; sandboxctl init writes an example",
    )
    return 0


def show(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("agents.show", agent=args.agent)
    if args.json:
        output.print_json(got)
        return 0
    team = f"{got['team']} ({got['team_name']})" if got["team_name"] else got["team"]
    variables = got["variables"]
    output.fields(
        [
            ("agent", got["slug"]),
            ("description", output.first_line(got["description"])),
            ("team", team),
            ("policy", got["policy"]),
            ("file", got["source"]),
            ("tools", got["tools"]),
            (
                "variables",
                ["not shown"] if variables is None else [_variable(v) for v in variables],
            ),
            ("environment", got["environment"]),
            ("workspace", got["workspace"]),
            ("network", got["network"]),
            ("lowered", got["lowered"]),
            ("sessions", [_session(session) for session in got["sessions"]]),
        ]
    )
    return 0


def delete(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("agents.delete", agent=args.agent)
    if args.json:
        output.print_json(got)
        return 0
    output.fields(
        [
            ("deleted", got["slug"]),
            ("its file", f"kept as agents/{got['kept']}"),
            ("ended sessions", got["ended_sessions"]),
            ("removed variables", got["removed_variables"]),
        ]
    )
    return 0


def _variable(row: dict[str, Any]) -> str:
    """A name, its version or that it has none, and where it goes."""
    told = "not set" if row["version"] is None else f"version {row['version']}"
    if row["version"] is None and row["required"]:
        told += ", and needed"
    goes = f"for {', '.join(row['tools'])}" if row["tools"] else "no tool uses it"
    return f"{row['name']} ({told}; {goes})"


def _session(row: dict[str, Any]) -> str:
    return f"{row['id']} ({row['state']} since {output.when(row['started_at'])}, by {row['by']})"
