"""``sandboxctl approvals``: tool calls that wait for an operator, and the operator's answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from sandboxd import visible
from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, Parser, command, group

__all__ = ["add", "details", "ended"]

#: Lines of arguments that are shown unless all are asked for.
MAX_LINES = 200
MAX_DESCRIPTION = 60


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(
        commands,
        name,
        help=line,
        description="Where a policy says ask, or a manifest says approval: ask, a call waits "
        "until an operator approves or denies it. Nobody's answer in time is a denial.",
    )
    command(
        nouns,
        "list",
        list_,
        help="the calls that wait",
        examples=[("sandboxctl approvals list", "oldest first")],
    )
    parser = command(
        nouns,
        "show",
        show,
        help="everything about one call that waits",
        description="Show who calls what, with which arguments, and what it would be given. "
        "Arguments are the agent's own words: every character that isn't printable ASCII is "
        "written as \\uXXXX, long texts are cut and their digest told.",
        examples=[
            ("sandboxctl approvals show c-0123", "the beginning of the id is enough to look"),
            ("sandboxctl approvals show --full c-0123456789abcdef", "with nothing cut"),
        ],
    )
    _with_id(parser)
    parser.add_argument("--full", action="store_true", help="cut neither texts nor lines")
    parser = command(
        nouns,
        "approve",
        approve,
        help="let a call run",
        description="Approve the call of this id, and no other: an id belongs to one call with "
        "fixed arguments. With --session the same tool with exactly these arguments runs unasked "
        "for the rest of the session.",
        examples=[
            ("sandboxctl approvals approve c-0123456789abcdef", "this one call"),
            ("sandboxctl approvals approve --session c-0123456789abcdef", "and its repetitions"),
        ],
    )
    _with_answer(parser)
    parser = command(
        nouns,
        "deny",
        deny,
        help="refuse a call",
        description="Deny the call of this id. Its agent is told the reason.",
        examples=[
            ("sandboxctl approvals deny c-0123456789abcdef --reason 'not on a Friday'", "say why"),
        ],
    )
    _with_answer(parser)
    parser.add_argument("--reason", metavar="TEXT", default="", help="what the agent is told")
    command(
        nouns,
        "watch",
        watch,
        help="see calls as they ask, and answer them",
        description="Show each call that waits and each that comes, until interrupted. On a "
        "terminal every one is asked about: y approves it, s approves it for its session, n denies "
        "it (n REASON tells the agent why), l leaves it waiting, q quits. What was typed before "
        "a call was shown does not count. In a pipe, or with --json, it only tells.",
        examples=[
            ("sandboxctl approvals watch", "answer at a prompt"),
            ("sandboxctl approvals watch --json | jq -c .event", "one object a line, for programs"),
        ],
    )


def list_(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("approvals.list")
    if args.json:
        output.print_json(got)
        return 0
    output.table(
        (
            (
                row["id"],
                row["agent"],
                row["session"],
                row["tool"],
                row["rule"],
                output.when(row["asked_at"]),
                output.when(row["expires_at"]),
            )
            for row in got["approvals"]
        ),
        ("CALL", "AGENT", "SESSION", "TOOL", "RULE", "ASKED", "UNTIL"),
        empty="no call waits for approval",
    )
    return 0


def show(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("approvals.show", id=args.id)
    if args.json:
        output.print_json(got, ascii=True)
    else:
        print("\n".join(details(got, full=args.full)))
    return 0


def approve(args: argparse.Namespace) -> int:
    return _answer(args, "approvals.approve")


def deny(args: argparse.Namespace) -> int:
    return _answer(args, "approvals.deny", reason=args.reason)


def watch(args: argparse.Namespace) -> int:
    asks = sys.stdin.isatty() and sys.stdout.isatty() and not args.json
    with connect(args) as daemon:
        if asks:
            from sandboxd.cli.desk import Desk

            return Desk(daemon).run()
        for item in daemon.stream("approvals.watch"):
            if args.json:
                output.print_json(item, line=True, ascii=True)
            elif item["event"] == "asked":
                print("\n".join(details(item)), end="\n\n", flush=True)
            else:
                print(ended(item), flush=True)
    return 0


def details(approval: dict[str, Any], *, full: bool = False) -> Iterator[str]:
    """What an operator reads before an answer, as lines that no argument can add to or hide."""
    secrets = [
        f"{s['variable']} (version {s['version']}) as {s['as']} ({s['delivery']})"
        for s in approval["secrets"]
    ]
    pairs: list[tuple[str, Any]] = [
        ("call", approval["id"]),
        ("agent", approval["agent"]),
        ("session", approval["session"]),
        ("tool", f"{approval['tool']}: {_first_line(approval['description'])}"),
        ("program", f"{approval['program']} (sha256 {approval['program_digest']})"),
        ("rule", approval["rule"]),
        ("reason", approval["reason"]),
        ("secrets", secrets),
        ("network", approval["network"]),
        ("workspace", approval["workspace"]),
        ("lowered", approval["lowered"]),
        ("runs for", f"{approval['timeout']:g} s at most"),
        ("asked", output.when(approval["asked_at"])),
        ("until", output.when(approval["expires_at"])),
        ("digest", approval["digest"]),
    ]
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        for place, item in enumerate((value or ["none"]) if isinstance(value, list) else [value]):
            label = output.colour((name if place == 0 else "").ljust(width), "bold")
            yield f"{label}  {output.clean(str(item))}"
    yield from _value("arguments", approval["arguments"], full)
    if approval["argv"]:
        yield from _value("command line", approval["argv"], full)
    elif approval["argv"] is None:
        length = output.amount(approval["argv_length"], "character")
        yield f"{output.colour('command line', 'bold')}  {length}, too many to show"
    if approval["stdin"] is not None:
        stdin = approval["stdin"]
        label = output.colour("standard input", "bold")
        yield f"{label}  {stdin['bytes']:,} bytes, sha256 {stdin['sha256']}"


def ended(item: dict[str, Any]) -> str:
    """How a question ended, in one line."""
    by = f" by {output.clean(item['by'])}" if item.get("by") else ""
    why = f": {output.clean(item['reason'])}" if item.get("reason") else ""
    return f"{item['id']} {item['outcome']}{by}{why}"


def _first_line(description: str) -> str:
    """A description's beginning: it may be a server's, and long enough to look like more."""
    line, _, more = description.strip().partition("\n")
    whole = not more and len(line) <= MAX_DESCRIPTION
    return line if whole else f"{line[:MAX_DESCRIPTION]} ..."


def _value(name: str, value: Any, full: bool) -> Iterator[str]:
    yield output.colour(name, "bold")
    width = output.columns() if sys.stdout.isatty() else 0
    limit = None if full else visible.MAX_TEXT
    left = 0
    for count, line in enumerate(visible.json_lines(value, limit=limit)):
        if count >= MAX_LINES and not full:
            left += 1
        else:
            yield from visible.wrapped(line, width)
    if left:
        yield f"{output.amount(left, 'more line')} not shown; see all of it with: show --full"


def _answer(args: argparse.Namespace, method: str, **more: Any) -> int:
    if args.digest is not None:
        more["digest"] = args.digest
    with connect(args) as daemon:
        got = daemon.call(method, id=args.id, scope=args.scope, **more)
    if args.json:
        output.print_json(got)
    else:
        how = " for this session" if got["scope"] == "session" else ""
        print(f"{got['id']} {got['outcome']}{how}: {got['tool']} of {got['agent']}")
    return 0


def _with_answer(parser: Parser) -> None:
    _with_id(parser)
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument(
        "--once",
        dest="scope",
        action="store_const",
        const="once",
        default="once",
        help="this call only (the default)",
    )
    scope.add_argument(
        "--session",
        dest="scope",
        action="store_const",
        const="session",
        help="also this tool with exactly these arguments, until the session ends",
    )
    parser.add_argument(
        "--digest", metavar="SHA256", help="only if this is what would run, as show prints it"
    )


def _with_id(parser: Parser) -> None:
    parser.add_argument("id", metavar="CALL", help="the call's id")
    parser.lookups["id"] = "approvals"
