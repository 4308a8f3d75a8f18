"""``sandboxctl agents`` and ``sandboxctl tools``."""

from __future__ import annotations

import argparse

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    if name == "agents":
        command(
            commands,
            name,
            agents,
            help=line,
            description="List the configured agents with their policy, tools and how many "
            "variables and live sessions each has.",
            examples=[("sandboxctl agents --json | jq -r '.agents[].slug'", "just the slugs")],
        )
        return
    parser = command(
        commands,
        name,
        tools,
        help=line,
        description="List the tools with the variables that each is given, its network and its "
        "workspace. With AGENT, only what that agent may call.",
        examples=[
            ("sandboxctl tools", "every tool, shipped or configured"),
            ("sandboxctl tools reporter", "what the agent 'reporter' sees"),
        ],
    )
    parser.add_argument("agent", metavar="AGENT", nargs="?", help="show this agent's tools")
    parser.lookups["agent"] = "agents"


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
                _first_line(agent["description"]),
            )
            for agent in got["agents"]
        ),
        ("AGENT", "POLICY", "TOOLS", "VARIABLES", "SESSIONS", "DESCRIPTION"),
        empty="no agents are configured; sandboxctl init writes an example",
    )
    return 0


def tools(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("tools.list", **({"agent": args.agent} if args.agent else {}))
    if args.json:
        output.print_json(got)
        return 0
    output.table(
        (
            (
                tool["name"],
                ",".join(_secret(secret) for secret in tool["secrets"]) or "-",
                tool["network"],
                tool["workspace"],
                f"{tool['timeout']:g}s",
                _first_line(tool["description"]),
            )
            for tool in got["tools"]
        ),
        ("TOOL", "SECRETS", "NETWORK", "WORKSPACE", "TIMEOUT", "DESCRIPTION"),
        empty=f"{args.agent} has no tools" if args.agent else "there are no tools",
    )
    return 0


def _secret(secret: object) -> str:
    return str(secret["variable"]) if isinstance(secret, dict) else str(secret)


def _first_line(text: str) -> str:
    first, _, more = text.strip().partition("\n")
    return f"{first} …" if more else first
