"""``sandboxctl env``: an agent's secret variables. Values go in and never come out."""

from __future__ import annotations

import argparse
import base64
import os
import sys
from typing import TYPE_CHECKING, Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, Parser, command, group
from sandboxd.cli.reading import read_input
from sandboxd.errors import ConfigError, Invalid, Unavailable

if TYPE_CHECKING:
    from sandboxd.dotenv import Entry

__all__ = ["add", "ask", "checked_name", "read_entries"]

#: Which is not worth a word: most hosts have no other.
DEFAULT_TEAM = "default"

#: Most characters that a terminal delivers as one line (N_TTY_BUF_SIZE less its end, termios(3)).
_TERMINAL_LINE = 4095

_MASKED = (
    "Where a tool's output holds a value, its name is shown instead. A value that any output may "
    "hold (a word, a short number) is warned about, and one of fewer than 4 characters refused "
    "unless --force; not if the tools that take it say redact: false."
)

_WHEN = (
    "A new version takes effect on the agent's next session; sessions that are running keep the "
    "one they started with, unless --now takes it from them and ends the tool calls that hold it."
)


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(
        commands,
        name,
        help=line,
        description="Variables are sealed in the daemon's store and given to the tools that "
        "declare them, never to the agent. No command prints a value: list shows a fingerprint "
        "that tells whether two values are the same.",
    )
    parser = _with_agent(
        command(
            nouns,
            "list",
            list_,
            help="names, versions and fingerprints; never a value",
            examples=[("sandboxctl env list reporter", "what the agent's tools can be given")],
        )
    )
    _with_team(parser)
    parser = _with_agent(
        command(
            nouns,
            "set",
            set_,
            help="set variables",
            description="Set one variable, or several at once: then all are set or none. With "
            "only a NAME the value is asked for, twice and hidden. " + _WHEN + "\n\n"
            "A value on the command line can be read by every user of this host in 'ps' and stays "
            "in the shell's history: prefer the prompt, --stdin or --file. A single line that is "
            "read from there loses its final newline; several lines are kept as they are.\n\n"
            + _MASKED,
            usage="sandboxctl env set [options] AGENT NAME\n"
            "       sandboxctl env set [options] AGENT NAME (--stdin | --file PATH)\n"
            "       sandboxctl env set [options] AGENT NAME VALUE\n"
            "       sandboxctl env set [options] AGENT NAME=VALUE ...",
            examples=[
                ("sandboxctl env set reporter API_TOKEN", "ask for the value"),
                ("pass show api/token | sandboxctl env set reporter API_TOKEN --stdin", "pipe it"),
                ("sandboxctl env set reporter DEPLOY_KEY --file id_ed25519", "from a file"),
                ("sandboxctl env set reporter DB_USER=reporting DB_NAME=sales-2026", "two at once"),
                ("sandboxctl env set --now reporter API_TOKEN", "replace one that leaked"),
            ],
        )
    )
    parser.secret_arguments = True
    parser.add_argument(
        "items", metavar="NAME[=VALUE]", nargs="+", help="what to set; see the forms above"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--stdin", action="store_true", help="read the value from standard input")
    source.add_argument("--file", metavar="PATH", help="read the value from a file")
    parser.add_argument(
        "--keep-newline", action="store_true", help="keep the final newline of a single line too"
    )
    _with_force(parser)
    _with_now(parser)
    parser = _with_agent(
        command(
            nouns,
            "remove",
            remove,
            help="remove variables",
            description="Remove variables: all that are named, or none when one of them does not "
            "exist. Running sessions keep what they started with unless --now is given.",
            examples=[("sandboxctl env remove --now reporter OLD_TOKEN", "everywhere, at once")],
        )
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="the variable")
    parser.lookups["names"] = "variables"
    _with_team(parser)
    _with_now(parser)
    parser = _with_agent(
        command(
            nouns,
            "revoke",
            revoke,
            help="take replaced values from live sessions",
            description="Take every version of these variables but the newest from live sessions, "
            "and end the tool calls that hold one: what set --now would have done at once.",
            examples=[("sandboxctl env revoke reporter API_TOKEN", "after env set without --now")],
        )
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="the variable")
    parser.lookups["names"] = "variables"
    parser = _with_agent(
        command(
            nouns,
            "import",
            import_,
            help="set variables from a .env file",
            description="Set every variable of a .env file in one transaction. Quotes, comments, "
            "'export' and values over several lines are understood; $NAME is not expanded. When "
            "anything in the file is wrong, every mistake is listed with its line and nothing is "
            "set. " + _WHEN + "\n\n" + _MASKED,
            examples=[
                ("sandboxctl env import reporter .env --dry-run", "look first"),
                ("sops -d secrets.env | sandboxctl env import reporter -", "from standard input"),
            ],
        )
    )
    parser.add_argument("file", metavar="FILE", help="the file; - reads standard input")
    parser.lookups["file"] = "files"
    parser.add_argument("--dry-run", action="store_true", help="show what would be set")
    _with_force(parser)
    _with_now(parser)


def list_(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("env.list", agent=args.agent, **_team(args))
    if args.json:
        output.print_json(got)
        return 0
    output.table(
        (
            (
                row["name"],
                str(row["version"]),
                output.when(row["set_at"]),
                row["set_by"],
                output.when(row["last_used_at"]),
                row["fingerprint"],
                output.amount(row["size"], "byte"),
            )
            for row in got["variables"]
        ),
        ("NAME", "VERSION", "SET", "BY", "LAST USED", "FINGERPRINT", "SIZE"),
        empty=f"{args.agent} has no variables"
        + (f" in team {got['team']}" if got["team"] != DEFAULT_TEAM else ""),
    )
    if got["elsewhere"]:
        output.note(f"it has others in team {', '.join(got['elsewhere'])}: --team shows them")
    return 0


def set_(args: argparse.Namespace) -> int:
    _check_agent(args.agent)
    return _send(args, _values(args))


def remove(args: argparse.Namespace) -> int:
    from sandboxd.names import variable_name

    for name in args.names:
        variable_name(name)
    with connect(args) as daemon:
        got = daemon.call(
            "env.remove", agent=args.agent, names=args.names, now=args.now, **_team(args)
        )
    if args.json:
        output.print_json(got)
        return 0
    for name, version in got["versions"].items():
        print(f"removed {name} (it was version {version})")
    _say_when(args, got)
    return 0


def revoke(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("env.revoke", agent=args.agent, names=args.names)
    if args.json:
        output.print_json(got)
        return 0
    sessions, calls = len(got["sessions"]), got["cancelled_calls"]
    lost = "none" if not sessions else output.amount(sessions, "live session")
    print(f"older values are revoked: {lost} had one; {output.amount(calls, 'tool call')} ended")
    return 0


def import_(args: argparse.Namespace) -> int:
    entries = read_entries(args.file, otherwise="nothing was set")
    if not args.dry_run:
        return _send(args, {entry.name: entry.value for entry in entries})
    from sandboxd.maskable import weakness

    known = _known(args)
    rows = [
        {
            "line": entry.line,
            "name": entry.name,
            "size": len(entry.value),
            "replaces_version": None if known is None else known.get(entry.name),
            "weakness": weakness(entry.value) if entry.value else "",
        }
        for entry in entries
    ]
    if args.json:
        output.print_json({"agent": args.agent, "dry_run": True, "variables": rows})
        return 0
    output.table(
        (
            (
                str(row["line"]),
                str(row["name"]),
                output.amount(int(row["size"] or 0), "byte"),
                _effect(row["replaces_version"], known is None),
            )
            for row in rows
        ),
        ("LINE", "NAME", "SIZE", "WOULD"),
        empty="",
    )
    for row in rows:
        if row["weakness"]:
            output.note(f"warning: the value of {row['name']} {row['weakness']}")
    output.note("nothing was set: this was a dry run")
    return 0


def read_entries(path: str, *, otherwise: str) -> list[Entry]:
    """The assignments of a ``.env`` file, ``-`` for standard input.

    Raises Invalid with every mistake and its line; ``otherwise`` is what that means.
    """
    from sandboxd import dotenv

    shown = "standard input" if path == "-" else path
    entries, problems = dotenv.parse(read_input(path, shown))
    if problems:
        errors = [ConfigError(f"{shown}:{p.line}: {p.message}") for p in problems]
        raise _Problems(f"{otherwise}: {output.amount(len(errors), 'mistake')}", errors)
    if not entries:
        raise Invalid(f"{shown} sets no variable")
    return entries


class _Problems(Invalid):
    def __init__(self, message: str, errors: list[ConfigError]) -> None:
        super().__init__(message)
        self.errors = errors


def _check_agent(slug: str) -> None:
    """Refuse what is no slug without repeating it: the agent may have been forgotten."""
    from sandboxd.names import agent_slug

    try:
        agent_slug(slug)
    except Invalid as error:
        forgotten = "=" in slug
        raise Invalid(
            "the first argument is the agent's slug, and this is none",
            hint="sandboxctl env set AGENT NAME=VALUE" if forgotten else error.hint,
        ) from None


def _values(args: argparse.Namespace) -> dict[str, bytes]:
    """What to set, from arguments, a pipe, a file or the prompt. Raises Invalid, quoting none."""
    items: list[str] = args.items
    if args.stdin or args.file is not None:
        option = "--stdin" if args.stdin else "--file"
        if len(items) != 1 or "=" in items[0]:
            raise Invalid(f"{option} takes exactly one NAME, without a value")
        name = checked_name(items[0], "the name")
        data = read_input("-" if args.stdin else args.file, "the file that --file names")
        return {name: _one_value(name, data, option, args.keep_newline)}
    if len(items) == 1 and "=" not in items[0]:
        return {(name := checked_name(items[0], "the name")): _checked(name, ask(name))}
    if len(items) == 2 and "=" not in items[0]:
        name = checked_name(items[0], "the name")
        return {name: _checked(name, os.fsencode(items[1]))}
    values: dict[str, bytes] = {}
    for number, item in enumerate(items, 1):
        text, equals, value = item.partition("=")
        if not equals:
            # What it says may be (part of) a value that lost its quotes.
            raise Invalid(
                f"argument {number} after the agent is not NAME=VALUE",
                hint="several variables are NAME=VALUE each; quote a value that has spaces",
            )
        name = checked_name(text, f"argument {number} after the agent")
        if name in values:
            raise Invalid(f"{name} is given twice")
        values[name] = _checked(name, os.fsencode(value))
    return values


def checked_name(text: str, what: str) -> str:
    """A name that can be stored; Invalid, which quotes nothing, calls it ``what``."""
    from sandboxd.names import loader_reason, variable_name

    try:
        variable_name(text)
    except Invalid as error:
        raise Invalid(f"{what} is not a variable name", hint=error.hint) from None
    if reason := loader_reason(text):
        raise Invalid(
            f"{text} is refused: {reason}",
            hint="store the value under another name; a tool's manifest can rename it with 'as'",
        )
    return text


def _checked(name: str, value: bytes) -> bytes:
    from sandboxd.names import variable_value

    return variable_value(name, value)


def _one_value(name: str, data: bytes, option: str, keep_newline: bool) -> bytes:
    if not data:
        raise Invalid(
            f"{option} gave an empty value: did the command before it fail?",
            hint=f"to set an empty value on purpose: {name}=",
        )
    # `echo token |` adds a newline that nobody means; a key file needs its last one.
    line = data.removesuffix(b"\n").removesuffix(b"\r")
    if not keep_newline and b"\n" not in line and line != data:
        data = line
    return _checked(name, data)


def ask(name: str) -> bytes:
    """A value from the terminal, typed twice and hidden. Raises Invalid without a terminal."""
    if not sys.stdin.isatty():
        raise Invalid(
            f"there is no terminal to ask for the value of {name}",
            hint="pipe it in with --stdin, or name a file with --file",
        )
    import getpass

    value = getpass.getpass(f"value of {name} (hidden): ", sys.stderr)
    if len(value) >= _TERMINAL_LINE:
        raise Invalid(
            f"a terminal line ends at {_TERMINAL_LINE:,} characters, so the value may be cut",
            hint="use --stdin or --file",
        )
    if getpass.getpass("once more: ", sys.stderr) != value:
        raise Invalid("the two values differ; nothing was set")
    return os.fsencode(value)


def _send(args: argparse.Namespace, values: dict[str, bytes]) -> int:
    encoded = {name: base64.b64encode(value).decode() for name, value in values.items()}
    with connect(args) as daemon:
        got = daemon.call(
            "env.set", agent=args.agent, values=encoded, now=args.now, force=args.force
        )
    if args.json:
        output.print_json(got)
        return 0
    for name, version in got["versions"].items():
        print(f"set {name} (version {version})")
    for warning in got.get("warnings", ()):
        output.note(f"warning: {warning}")
    _say_when(args, got)
    return 0


def _say_when(args: argparse.Namespace, got: dict[str, Any]) -> None:
    if args.now:
        ended = output.amount(got.get("cancelled_calls", 0), "tool call")
        print(f"in force now: live sessions lost the old value; {ended} ended")
    else:
        print("takes effect on the agent's next session")
    live = got.get("live_sessions") or []
    if live:
        print(f"live sessions that keep the old value: {', '.join(live)}")
        if not args.now:
            output.note("to take it from them as well, add --now")


def _known(args: argparse.Namespace) -> dict[str, int] | None:
    """Versions that are set now, or None when no daemon can tell."""
    try:
        with connect(args) as daemon:
            got = daemon.call("env.list", agent=args.agent)
    except Unavailable as error:
        output.note(f"not compared with what is set: {error.message}")
        return None
    return {row["name"]: row["version"] for row in got["variables"]}


def _effect(version: Any, unknown: bool) -> str:
    if unknown:
        return "be set"
    return "be new" if version is None else f"replace version {version}"


def _with_agent(parser: Parser) -> Parser:
    parser.add_argument("agent", metavar="AGENT", help="the agent's slug")
    parser.lookups["agent"] = "agents"
    return parser


def _with_team(parser: Parser) -> None:
    parser.add_argument(
        "--team",
        metavar="TEAM",
        help="of this team: what an agent left there when it moved, or one that is no more",
    )


def _team(args: argparse.Namespace) -> dict[str, str]:
    return {"team": args.team} if args.team else {}


def _with_force(parser: Parser) -> None:
    parser.add_argument(
        "--force", action="store_true", help="also values that are too short to be masked"
    )


def _with_now(parser: Parser) -> None:
    parser.add_argument(
        "--now", action="store_true", help="take the old value from live sessions as well"
    )
