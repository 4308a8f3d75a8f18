"""``sandboxctl session diff|apply|discard``: what an agent changed, reviewed before it lands."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, Parser, command
from sandboxd.errors import SandboxdError

__all__ = ["add"]


def add(nouns: Commands) -> None:
    """The commands about changes, added to those of ``session``."""
    parser = command(
        nouns,
        "diff",
        diff,
        help="show what an agent changed in its copy-on-write workspace",
        description="Compare what a session wrote (workspace mode: overlay) with the workspace as "
        "it is now, whether the session still runs or has ended. Nothing is changed. Control "
        "characters are made visible on a terminal.",
        examples=[
            ("sandboxctl session diff s-0123", "everything"),
            ("sandboxctl session diff s-0123 src", "what is in one directory"),
            ("sandboxctl session diff --names s-0123", "paths only"),
        ],
    )
    _session_and_paths(parser)
    parser.add_argument("--names", action="store_true", help="only what changed, not how")
    parser = command(
        nouns,
        "apply",
        apply,
        help="land an agent's changes in the workspace",
        description="Make the workspace what the ended session saw, or only the named paths. "
        "Each file is replaced whole and keeps the workspace's owner. Where the workspace changed "
        "after the session began, nothing is done and every such path is told, unless --force.",
        examples=[
            ("sandboxctl session apply s-0123", "everything"),
            ("sandboxctl session apply s-0123 src/app.py docs", "a file and a directory"),
        ],
    )
    _session_and_paths(parser)
    parser.add_argument("--force", action="store_true", help="over changes made meanwhile, too")
    parser = command(
        nouns,
        "discard",
        discard,
        help="throw an agent's changes away",
        description="Remove what an ended session wrote. The workspace stays as it is.",
        examples=[("sandboxctl session discard s-0123", "for good")],
    )
    parser.add_argument("id", metavar="SESSION", help="the session's id")
    parser.lookups["id"] = "sessions"


def diff(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("session.diff", id=args.id, paths=args.path, text=not args.names)
    if args.json:
        output.print_json(got)
        return 0
    for change in got["changes"]:
        print(output.colour(f"{change['change']:<7}", "bold"), _line(change))
        if text := change.get("text"):
            print("\n".join("  " + _text(line) for line in text.removesuffix("\n").split("\n")))
    if missing := got["total"] - len(got["changes"]):
        output.note(f"{output.amount(missing, 'more change')} not shown; name paths to see them")
    if not got["total"]:
        output.note("nothing changed")
    return 0


def apply(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("session.apply", id=args.id, paths=args.path, force=args.force)
    if args.json:
        output.print_json(got)
    else:
        print(", ".join(f"{got[kind]:,} {kind}" for kind in ("added", "changed", "deleted")))
        for failure in got["failed"]:
            output.note(f"not applied: {failure['path']}: {failure['why']}")
        if got["remaining"]:
            left = output.amount(got["remaining"], "change")
            output.note(f"{left} left; see: sandboxctl session diff {args.id}")
    return SandboxdError.exit_code if got["failed"] else 0


def discard(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("session.discard", id=args.id)
    if args.json:
        output.print_json(got)
    else:
        print(f"{got['session']} discarded")
    return 0


def _session_and_paths(parser: Parser) -> None:
    parser.add_argument("id", metavar="SESSION", help="the session's id")
    parser.lookups["id"] = "sessions"
    parser.add_argument(
        "path", metavar="PATH", nargs="*", help="relative to the workspace; a directory with all"
    )


def _line(change: dict[str, Any]) -> str:
    """A path with everything about it that its text doesn't tell."""
    path = output.clean(change["path"]) + ("/" if _is_directory(change) else "")
    facts = []
    if "target" in change:
        facts.append(f"a link to {output.clean(change['target'])}")
    kind, old_kind = change.get("kind"), change.get("old_kind")
    if kind and old_kind and kind != old_kind:
        facts.append(f"a {kind}, was a {old_kind}")
    mode, old_mode = change.get("mode"), change.get("old_mode")
    if kind != "symlink" and mode is not None and mode != old_mode:
        facts.append(f"mode {mode:04o}" + (f", was {old_mode:04o}" if old_mode else ""))
    if change.get("binary"):
        facts.append(f"binary, {change.get('size', 0):,} bytes")
    facts += [change[key] for key in ("omitted", "note") if key in change]
    facts += [f"CONFLICT: {change['conflict']}"] if "conflict" in change else []
    facts += [f"can't be applied: {change['problem']}"] if "problem" in change else []
    return path + (f"  ({'; '.join(map(output.clean, facts))})" if facts else "")


def _is_directory(change: dict[str, Any]) -> bool:
    return bool((change.get("kind") or change.get("old_kind")) == "directory")


def _text(line: str) -> str:
    if not sys.stdout.isatty():
        return line
    shown = "".join(c if c == "\t" else output.clean(c) for c in line)
    names = {"+": "green", "-": "red"}
    return output.colour(shown, names[line[0]]) if line[:1] in names else shown
