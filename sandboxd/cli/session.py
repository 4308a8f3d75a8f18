"""``sandboxctl session``: sessions that run on their own, and what all of them do."""

from __future__ import annotations

import argparse
import base64
import os
import signal
import sys
from typing import Any

from sandboxd.cli import beside, changes, copying, output, sessions
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, Parser, command, group
from sandboxd.durations import duration
from sandboxd.errors import Invalid

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(
        commands,
        name,
        help=line,
        description="A session is one run of an agent: its sandbox, its own socket for tool calls, "
        "and the versions of its variables that were current when it started.",
    )
    parser = command(
        nouns,
        "start",
        start,
        help="start an agent in the background",
        description="Start an agent that nobody is attached to, and print the session's id. Its "
        "output is recorded: see 'sandboxctl session logs'.",
        examples=[
            ("sandboxctl session start reporter", "start it"),
            ("sandboxctl session start reporter -- --since yesterday", "with arguments of its own"),
        ],
        usage="sandboxctl session start [options] AGENT [-- ARG ...]",
    )
    parser.add_argument("agent", metavar="AGENT", help="the agent's slug")
    parser.lookups["agent"] = "agents"
    sessions.add_options(parser)
    parser = command(
        nouns,
        "list",
        list_,
        help="list live sessions, or all of them",
        examples=[("sandboxctl session list --all", "ended ones too")],
    )
    parser.add_argument("-a", "--all", action="store_true", help="ended sessions too")
    _with_session(
        command(
            nouns,
            "show",
            show,
            help="everything about one session",
            description="Show one session: its variables' versions, its tools, and each layer of "
            "its isolation.",
            examples=[("sandboxctl session show s-0123", "the beginning of the id is enough")],
        )
    )
    parser = command(
        nouns,
        "stop",
        stop,
        help="end sessions",
        description="Ask the agent to end with SIGTERM, and kill its whole process tree after the "
        "grace time. Returns when it is gone.",
        examples=[
            ("sandboxctl session stop s-0123456789abcdef", "end one"),
            ("sandboxctl session stop --grace 0 s-0123456789abcdef", "kill it at once"),
        ],
    )
    parser.add_argument("id", metavar="SESSION", nargs="+", help="the session's id")
    parser.lookups["id"] = "sessions"
    parser.add_argument(
        "--grace",
        metavar="TIME",
        help="how long to wait before killing: 0, 30s, 5m; an hour at most (default 5s)",
    )
    parser = _with_session(
        command(
            nouns,
            "logs",
            logs,
            help="print what a background agent printed",
            description="Print the recorded output of a session that 'session start' began. On a "
            "terminal, control characters are made visible, because an agent may print anything; "
            "in a pipe every byte arrives as it was written.",
            examples=[
                ("sandboxctl session logs -f s-0123456789abcdef", "follow it"),
                ("sandboxctl session logs s-0123456789abcdef > out.log", "byte for byte"),
            ],
        )
    )
    parser.add_argument("-f", "--follow", action="store_true", help="until the session ends")
    parser.add_argument("--raw", action="store_true", help="every byte as it is, on a terminal too")
    beside.add(nouns)
    copying.add(nouns)
    changes.add(nouns)


def start(args: argparse.Namespace) -> int:
    own = sessions.options(args)
    with connect(args) as daemon:
        got = daemon.call(
            "session.start", agent=args.agent, args=args.rest or [], **own, tty=False, attach=False
        )
    if args.json:
        output.print_json(got)
    else:
        print(got["id"])
    return 0


def list_(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("session.list", all=args.all)
    if args.json:
        output.print_json(got)
        return 0
    output.table(
        (
            (
                row["id"],
                row["agent"],
                row["policy"],
                _state(row),
                _calls(row),
                ",".join(row.get("lowered") or ()) or "-",
                output.when(row["started_at"]),
                output.when(row["ended_at"], never="-"),
                row["by"],
            )
            for row in got["sessions"]
        ),
        ("SESSION", "AGENT", "POLICY", "STATE", "CALLS", "LOWERED", "STARTED", "ENDED", "BY"),
        empty="no sessions" if args.all else "no live sessions",
    )
    return 0


def show(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call("session.show", id=args.id)
    if args.json:
        output.print_json(got)
        return 0
    variables = got.get("variables") or {}
    servers = [
        f"{row['server']} (pid {row['pid']}, {output.amount(row['calls'], 'call')}, "
        f"since {output.when(row['started_at'])})"
        for row in got.get("servers") or []
    ]
    output.fields(
        [
            ("session", got["id"]),
            ("agent", got["agent"]),
            *([("team", got["team"])] if got["team"] != "default" else []),
            ("policy", got["policy"]),
            ("state", _state(got)),
            ("pid", got.get("pid") or "-"),
            ("started", f"{output.when(got['started_at'])} by {got['by']}"),
            ("ended", output.when(got["ended_at"], never="-")),
            *([("ends", output.when(got["ends_at"]))] if got.get("ends_at") else []),
            *([("key", got["key"])] if got.get("key") else []),
            *([("for", got["subject"])] if got.get("subject") else []),
            ("calls", _calls(got)),
            ("workspace", got.get("workspace") or "none"),
            *([("changes", got["changes"])] if got.get("changes") else []),
            ("network", got.get("network") or "-"),
            *([("egress", got["egress"])] if got.get("egress") else []),
            ("tools", got.get("tools") or []),
            *([("servers", servers)] if servers else []),
            *([("environment", got["environment"])] if got.get("environment") else []),
            ("variables", [f"{name} (version {number})" for name, number in variables.items()]),
            ("isolation", [_layer(layer) for layer in got.get("isolation") or []]),
            ("lowered", got.get("lowered") or []),
        ]
    )
    return 0


def stop(args: argparse.Namespace) -> int:
    grace = {}
    if args.grace is not None:
        grace["grace"] = duration(args.grace, zero=True, name="--grace")
        if grace["grace"] > 3600:
            raise Invalid("--grace takes an hour at most")
    with connect(args) as daemon:
        for id in args.id:
            got = daemon.call("session.stop", id=id, **grace)
            if args.json:
                output.print_json(got, line=True)
            else:
                print(f"{got['id']} {output.clean(_state(got))}")
    return 0


def logs(args: argparse.Namespace) -> int:
    visible = sys.stdout.isatty() and not args.raw and not args.json
    with connect(args) as daemon:
        for item in daemon.stream("session.logs", id=args.id, follow=args.follow):
            if args.json:
                output.print_json(item, line=True)
                continue
            data = base64.b64decode(item["data"])
            _write(output.visible(data) if visible else data)
    return 0


def _with_session(parser: Parser) -> Parser:
    parser.add_argument("id", metavar="SESSION", help="the session's id")
    parser.lookups["id"] = "sessions"
    return parser


def _state(row: dict[str, Any]) -> str:
    if row.get("exit_signal") is not None:
        how = f"by {_signal_name(row['exit_signal'])}"
    elif row.get("exit_code") is not None:
        how = f"with {row['exit_code']}"
    else:
        how = ""
    reason = row.get("reason") or ""
    if reason and reason not in ("exited", "killed"):
        how = f"{how}: {reason}" if how else f": {reason}"
    return f"{row['state']} {how}".rstrip().replace(" :", ":")


def _calls(row: dict[str, Any]) -> str:
    """How many run; and how many don't because nobody approved them yet."""
    waiting = row.get("calls_waiting") or 0
    asked = f" ({waiting} to approve)" if waiting else ""
    return f"{row.get('calls_running') or 0}{asked}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _layer(layer: Any) -> str:
    """One layer of isolation, with the reason where it isn't on."""
    if not isinstance(layer, dict):
        return str(layer)
    remark = f" ({layer['remark']})" if layer["state"] != "on" and layer.get("remark") else ""
    return f"{layer['layer']}: {layer['state']}{remark}"


def _write(data: bytes) -> None:
    sys.stdout.flush()
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
