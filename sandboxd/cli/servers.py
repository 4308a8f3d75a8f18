"""``sandboxctl tools pins|accept|forget``: the tools of MCP servers, which operators accept."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command
from sandboxd.errors import Conflict, Invalid

__all__ = ["add"]

_MARKS = {"new": "+", "changed": "!", "same": " "}


def add(nouns: Commands) -> None:
    """Add the commands to the noun ``tools``."""
    command(
        nouns,
        "pins",
        pins,
        help="list MCP servers and what was accepted of them",
        description="List the MCP servers that are configured, with the state of their tools: not "
        "accepted, accepted, or changed since. A changed tool is refused until it is accepted.",
        examples=[("sandboxctl tools pins", "is there anything to accept?")],
    )
    parser = command(
        nouns,
        "accept",
        accept,
        help="look at what an MCP server offers, and accept it",
        description="Start the server in its sandbox, list its tools with all that an agent's "
        "model would read, compared with what was accepted before, and ask whether to accept "
        "them. Agents can call what was accepted and nothing else: a definition that changes "
        "later is refused until it is accepted again. Sessions that run keep what they began "
        "with.\n\n"
        "Without a terminal nothing is accepted unless --digest names what is expected, or --yes "
        "takes whatever there is.",
        examples=[
            ("sandboxctl tools accept files", "look, and answer yes or no"),
            ("sandboxctl tools accept files --agent helper", "started with helper's variables"),
            ("sandboxctl tools accept files --json", "the whole definitions; accepts nothing"),
            ("sandboxctl tools accept files --digest sha256:2c26b46b...", "what was reviewed"),
        ],
    )
    parser.add_argument("server", metavar="SERVER", help="the server's name")
    parser.lookups["server"] = "servers"
    parser.add_argument(
        "--agent", metavar="AGENT", help="whose variables and policy it is started with"
    )
    answer = parser.add_mutually_exclusive_group()
    answer.add_argument("--digest", metavar="DIGEST", help="accept exactly these definitions")
    answer.add_argument("--yes", action="store_true", help="accept without asking")
    parser = command(
        nouns,
        "forget",
        forget,
        help="take the acceptance of an MCP server's tools back",
        description="Accept nothing of the server any more: sessions that start from now on have "
        "none of its tools. Sessions that run keep what they began with.",
        examples=[("sandboxctl tools forget files", "until it is accepted again")],
    )
    parser.add_argument("server", metavar="SERVER", help="the server's name")
    parser.lookups["server"] = "servers"


def pins(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("tools.pins")
    if args.json:
        output.print_json(got)
        return 0
    output.table(
        (
            (
                row["server"],
                row["state"],
                str(len(row["tools"])),
                ",".join(row["agents"]) or "-",
                str(row["running"]),
                (row["digest"] or "-")[:19],
                row["accepted_by"] or "-",
                output.when(row["accepted_at"], never="-"),
            )
            for row in got["servers"]
        ),
        ("SERVER", "STATE", "TOOLS", "AGENTS", "RUNNING", "DIGEST", "ACCEPTED BY", "AT"),
        empty="no MCP servers are configured",
    )
    for row in got["servers"]:
        if row["changes"]:
            output.note(f"{row['server']}: {', '.join(row['changes'])}")
            output.note(f"  hint: look at the change: sandboxctl tools accept {row['server']}")
    return 0


def accept(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        about = {"agent": args.agent} if args.agent else {}
        seen = daemon.call("tools.inspect", server=args.server, **about)
        if not args.json:
            _show(seen)
        if args.digest and args.digest != seen["digest"]:
            raise Conflict(
                f"{args.server} offers {seen['digest']}, not {args.digest}",
                hint="nothing was accepted; look at what it offers now",
            )
        wanted = bool(args.digest or args.yes) or (not args.json and _asked(seen))
        if wanted:
            done = daemon.call("tools.accept", server=args.server, digest=seen["digest"])
            seen["accepted"] = done["digest"]
    if args.json:
        output.print_json({**seen, "done": wanted})
        return 0
    if wanted:
        print(f"accepted {output.amount(len(seen['tools']), 'tool')} of {args.server}")
        print("takes effect in sessions that start from now on")
    return 0 if wanted or _is_accepted(seen) else 5


def forget(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("tools.forget", server=args.server)
    if args.json:
        output.print_json(got)
        return 0
    print(f"nothing of {args.server} is accepted any more")
    return 0


def _is_accepted(seen: dict[str, Any]) -> bool:
    return bool(seen["accepted"] == seen["digest"])


def _show(seen: dict[str, Any]) -> None:
    """All that a model would read, in a form in which nothing can hide."""
    for tool in seen["tools"]:
        about = tool["definition"]
        keys = f"  ({', '.join(tool['changed_keys'])})" if tool["state"] == "changed" else ""
        print(f"{_MARKS[tool['state']]} {output.clean(tool['exposed'])}{keys}")
        _paragraph(about.get("description") or "(no description)")
        if tool["was"] is not None:
            print("    it was:")
            _paragraph(tool["was"].get("description") or "(no description)")
            for key in tool["changed_keys"]:
                if key != "description":
                    print(f"    {key} was: {_compact(tool['was'].get(key))}")
                    print(f"    {key} is:  {_compact(about.get(key))}")
        if about.get("annotations"):
            print(f"    hints: {_compact(about['annotations'])}")
        parameters = about["inputSchema"].get("properties")
        if isinstance(parameters, dict) and parameters:
            print(f"    arguments: {output.clean(', '.join(map(str, parameters)))}")
        if tool["unchecked"]:
            print(f"    left to the server to check: {output.clean(', '.join(tool['unchecked']))}")
    for name in seen["gone"]:
        print(f"- {output.clean(name)} is not offered any more")
    for problem in seen["problems"]:
        output.note(f"not offered: {problem}")
    print(f"digest {seen['digest']}")
    print("(the same as accepted)" if _is_accepted(seen) else "(not accepted)")


def _paragraph(text: str) -> None:
    for line in text.splitlines():
        print(f"    {output.clean(line)}")


def _compact(value: Any) -> str:
    return output.clean(json.dumps(value, ensure_ascii=False, sort_keys=True))


def _asked(seen: dict[str, Any]) -> bool:
    if _is_accepted(seen):
        return False
    if not sys.stdin.isatty():
        raise Invalid(
            f"nothing was accepted of {seen['server']}: there is no terminal to ask on",
            hint=f"if this is right: sandboxctl tools accept {seen['server']} "
            f"--digest {seen['digest']}",
        )
    print(f"accept these tools of {output.clean(seen['server'])}? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
