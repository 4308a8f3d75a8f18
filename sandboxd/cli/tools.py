"""``sandboxctl tools``: what there is."""

from __future__ import annotations

import argparse
from typing import Any

from sandboxd.cli import authoring, lint, mcpimport, output, servers
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command, group

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(commands, name, help=line)
    parser = command(
        nouns,
        "list",
        list_,
        help="list the tools with what each is given",
        description="List the tools with the variables that each is given, its network and its "
        "workspace. Plain settings, which output may show, are in parentheses. With AGENT, only "
        "what that agent may call.",
        examples=[
            ("sandboxctl tools list", "every tool, shipped or configured"),
            ("sandboxctl tools list reporter", "what the agent 'reporter' sees"),
        ],
    )
    parser.add_argument("agent", metavar="AGENT", nargs="?", help="show this agent's tools")
    parser.lookups["agent"] = "agents"
    lint.add(nouns)
    authoring.add(nouns)
    servers.add(nouns)
    mcpimport.add(nouns)


def list_(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("tools.list", **({"agent": args.agent} if args.agent else {}))
    if args.json:
        output.print_json(got)
        return 0
    output.table(
        (
            (
                tool["name"],
                ",".join(_secret(secret, tool) for secret in tool["secrets"]) or "-",
                tool["network"],
                tool["workspace"],
                f"{tool['timeout']:g}s",
                output.first_line(tool["description"]),
            )
            for tool in got["tools"]
        ),
        ("TOOL", "SECRETS", "NETWORK", "WORKSPACE", "TIMEOUT", "DESCRIPTION"),
        empty=f"{args.agent} has no tools" if args.agent else "there are no tools",
    )
    return 0


def _secret(secret: object, tool: dict[str, Any]) -> str:
    """Its name; in parentheses that of a plain setting, which output may show."""
    name = str(secret["variable"]) if isinstance(secret, dict) else str(secret)
    return f"({name})" if name in tool.get("shown", ()) else name
