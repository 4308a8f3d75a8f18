"""``sandboxctl keys``: API keys of applications and operators who come in over HTTP."""

from __future__ import annotations

import argparse
from typing import Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, Parser, command, group
from sandboxd.cli.reading import read_input
from sandboxd.errors import Invalid

__all__ = ["add", "say_ended", "shown_on_stdin"]

_ROLES = ("owner", "operator", "developer", "viewer")

_ONCE = (
    "The key is printed once, on standard output and nowhere else; only a keyed hash of it is "
    "kept. Everything else is printed on standard error, so that a pipe gets the key alone."
)


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(
        commands,
        name,
        help=line,
        description="An API key lets an application or a person in over HTTP, for one team, with "
        "one role. It is named by its id (key_...) or by the beginning that lists show "
        "(an_sk_...); the key itself never goes on a command line.",
    )
    parser = command(
        nouns,
        "create",
        create,
        help="make a key and print it once",
        description="Make an API key of one team. An owner manages keys; an operator runs "
        "sessions, answers approvals and makes tokens; a developer sets variables of the agents "
        "that are named; a viewer reads.\n\n" + _ONCE,
        examples=[
            (
                "sandboxctl keys create --role operator --label 'web shop' > shop.key",
                "for a server",
            ),
            (
                "sandboxctl keys create --role developer --label ann --agent reporter",
                "for a person, for the variables of one agent",
            ),
            ("sandboxctl keys create --role viewer --label board --expires 90d", "for a while"),
        ],
    )
    parser.add_argument("--role", choices=_ROLES, required=True, help="what it may do")
    parser.add_argument("--label", metavar="TEXT", required=True, help="where it is used")
    _with_team(parser)
    _with_agents(parser, "only for this agent; may be given again")
    parser.add_argument("--expires", metavar="TIME", help="end it by itself: 12h, 90d")
    parser = command(
        nouns,
        "list",
        list_,
        help="keys by their beginning, label, creator, last use and end",
        examples=[("sandboxctl keys list --active", "only those that work")],
    )
    _with_team(parser)
    parser.add_argument("--active", action="store_true", help="only keys that work now")
    _with_key(
        command(
            nouns,
            "show",
            show,
            help="one key, and the sessions that rest on it",
            examples=[("sandboxctl keys show - < found.key", "which key this is")],
        )
    )
    _with_key(
        command(
            nouns,
            "deactivate",
            deactivate,
            help="end a key at once, with all that rests on it",
            description="Refuse the key and every token that was made with it, and end every "
            "session and request that rests on it. When the command returns, all of that is done "
            "and on disk. It can't be taken back.",
            examples=[
                ("sandboxctl keys deactivate key_0123456789ab", "by its id"),
                ("sandboxctl keys deactivate - < found.key", "a key that was found somewhere"),
            ],
        )
    )
    parser = _with_key(
        command(
            nouns,
            "rotate",
            rotate,
            help="replace a key, both working for a while",
            description="Make a key with the same team, role and agents in the place of another, "
            "which goes on working for the overlap and then ends: its tokens are refused and its "
            "sessions are ended, so choose an overlap that is longer than they live. Without an "
            "overlap (--overlap 0) the old one is deactivated at once.\n\n" + _ONCE,
            examples=[
                ("sandboxctl keys rotate key_0123456789ab --overlap 7d > shop.key", "next week"),
                ("sandboxctl keys rotate key_0123456789ab --overlap 0 > shop.key", "it leaked"),
            ],
        )
    )
    parser.add_argument(
        "--overlap", metavar="TIME", default="1d", help="how long the old one goes on (1d)"
    )
    parser.add_argument("--expires", metavar="TIME", help="end the new one by itself: 90d")


def create(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call(
            "keys.create",
            role=args.role,
            label=args.label,
            **_given(team=args.team, agents=args.agents, expires_in=args.expires),
        )
    return _print_once(args, got)


def list_(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("keys.list", all=not args.active, **_given(team=args.team))
    if args.json:
        output.print_json(got)
        return 0
    output.table(
        (
            (
                key["id"],
                key["prefix"] + "…",
                key["label"],
                key["team"],
                key["role"],
                ",".join(key["agents"]) if key["agents"] is not None else "all",
                key["state"],
                key["created_by"],
                output.when(key["created_at"]),
                output.when(key["last_used_at"]),
                output.when(key["expires_at"]),
            )
            for key in got["keys"]
        ),
        (
            *("ID", "KEY", "LABEL", "TEAM", "ROLE", "AGENTS", "STATE"),
            *("CREATED BY", "CREATED", "LAST USED", "EXPIRES"),
        ),
        empty="no API keys; make one with sandboxctl keys create",
    )
    return 0


def show(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        key = daemon.call("keys.show", key=shown_on_stdin(args.key))
    if args.json:
        output.print_json(key)
        return 0
    output.fields(
        [
            ("id", key["id"]),
            ("key", key["prefix"] + "…"),
            ("label", key["label"]),
            ("team", key["team"]),
            ("role", key["role"]),
            ("agents", key["agents"] if key["agents"] is not None else "all of the team"),
            ("state", key["state"]),
            ("created", f"{output.when(key['created_at'])} by {key['created_by']}"),
            ("last used", output.when(key["last_used_at"])),
            ("expires", output.when(key["expires_at"])),
            *(
                [
                    (
                        "deactivated",
                        f"{output.when(key['deactivated_at'])} by {key['deactivated_by']}",
                    )
                ]
                if key["deactivated_at"]
                else []
            ),
            *([("replaces", key["replaces"])] if key["replaces"] else []),
            ("made keys", key["made_keys"]),
            ("sessions", key["sessions"]),
        ]
    )
    return 0


def deactivate(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("keys.deactivate", key=shown_on_stdin(args.key))
    if args.json:
        output.print_json(got)
        return 0
    print(f"deactivated {got['key']['id']} ({got['key']['label']})")
    say_ended(got)
    if got["key"]["made_keys"]:
        output.note(f"keys that it made still work: {', '.join(got['key']['made_keys'])}")
    return 0


def rotate(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call(
            "keys.rotate",
            key=shown_on_stdin(args.key),
            overlap=args.overlap,
            **_given(expires_in=args.expires),
        )
    return _print_once(args, got)


def say_ended(got: dict[str, Any]) -> None:
    """Which sessions ended with it."""
    ended = got["ended_sessions"]
    print(f"ended {output.amount(len(ended), 'session')}{': ' if ended else ''}{', '.join(ended)}")


def shown_on_stdin(named: str) -> str:
    """What names a key or token; for ``-`` the key or token itself, from standard input."""
    if named != "-":
        return named
    text = read_input("-", "standard input", most=1 << 16).decode("ascii", "replace").strip()
    if not text:
        raise Invalid("standard input is empty", hint="- reads the key or token from there")
    return text


def _print_once(args: argparse.Namespace, got: dict[str, Any]) -> int:
    if args.json:
        output.print_json(got)
        return 0
    key = got["key"]
    print(got["secret"], flush=True)
    output.note(f"made {key['id']} ({key['label']}): {key['role']} of team {key['team']}")
    if replaced := got.get("replaced"):
        end = "is deactivated" if replaced["state"] == "deactivated" else "works until "
        output.note(f"{replaced['id']} {end}{replaced['expires_at'] if end[-1] == ' ' else ''}")
        if got["ended_sessions"]:
            output.note(f"ended with it: {', '.join(got['ended_sessions'])}")
    output.note("this is the only time that it is shown")
    return 0


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _with_team(parser: Parser) -> None:
    parser.add_argument("--team", metavar="TEAM", help="the team (default)")


def _with_agents(parser: Parser, help: str) -> None:
    parser.add_argument("--agent", metavar="AGENT", dest="agents", action="append", help=help)


def _with_key(parser: Parser) -> Parser:
    # Who puts a key there by mistake must not find it in an error message as well.
    parser.secret_arguments = True
    parser.add_argument(
        "key", metavar="KEY", help="its id or beginning; - reads the key itself from standard input"
    )
    parser.lookups["key"] = "keys"
    return parser
