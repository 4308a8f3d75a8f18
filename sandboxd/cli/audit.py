"""``sandboxctl audit``: read the log and check that nobody changed it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command, group
from sandboxd.errors import Invalid, StoreError

__all__ = ["add"]

#: Fields with a column of their own, and those that only the verification needs.
_SHOWN_APART = {"seq", "at", "event", "prev", "mac"}


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(
        commands,
        name,
        help=line,
        description="The audit log has one record per decision, launch, exit and operator action, "
        "each chained to the one before by a keyed hash. It names what was injected, never values.",
    )
    parser = command(
        nouns,
        "tail",
        tail,
        help="print the last records",
        description="Print the last records, oldest first; with -f go on with new ones as they are "
        "written.",
        examples=[
            ("sandboxctl audit tail -n 50", "the last 50 records"),
            ("sandboxctl audit tail -f --json | jq 'select(.decision == \"deny\")'", "denials"),
        ],
    )
    parser.add_argument(
        "-n", dest="count", metavar="N", type=int, default=20, help="how many (default 20)"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new records")
    command(
        nouns,
        "verify",
        verify,
        help="check the whole chain",
        description="Check every record against the key: one that was removed, changed, moved, cut "
        "off or added without the key is found, and the first bad one is named. Exits with 7 then.",
        examples=[("sandboxctl audit verify", "for a nightly check")],
    )


def tail(args: argparse.Namespace) -> int:
    if args.count < 0:
        raise Invalid("-n takes a number of records, 0 or more")
    with connect(args) as daemon:
        for record in daemon.stream("audit.tail", n=args.count, follow=args.follow):
            if args.json:
                output.print_json(record, line=True)
            else:
                print(_line(record), flush=True)
    return 0


def verify(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("audit.verify")
    if args.json:
        output.print_json(got)
        return 0 if got["ok"] else StoreError.exit_code
    if not got["ok"]:
        raise StoreError(
            f"the audit log fails to verify: {_problem(got.get('problem'))}",
            hint="keep a copy of the log directory before anything else writes to it",
        )
    print(f"{output.amount(got['records'], 'record')}, every one as it was written")
    return 0


def _problem(problem: Any) -> str:
    if isinstance(problem, dict):
        return " ".join(f"{key} {value}" for key, value in problem.items())
    return str(problem)


def _line(record: dict[str, Any]) -> str:
    rest = "  ".join(
        f"{key}={_value(value)}" for key, value in record.items() if key not in _SHOWN_APART
    )
    event = str(record.get("event", ""))
    name = {"allow": "green", "deny": "red"}.get(str(record.get("decision", "")), "bold")
    shown = output.colour(output.clean(event), name)
    return (
        f"{record.get('seq', '')}  {output.when(record.get('at'))}  {shown}  {output.clean(rest)}"
    )


def _value(value: Any) -> str:
    if isinstance(value, str) and value and not any(c.isspace() for c in value):
        return value
    return json.dumps(value, ensure_ascii=False)
