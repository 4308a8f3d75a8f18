"""``sandboxctl session exec``: one more program in a session's sandbox."""

from __future__ import annotations

import argparse
import base64
import sys
from typing import Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command
from sandboxd.cli.run import FAILED, could_not_execute
from sandboxd.durations import duration
from sandboxd.errors import Invalid, KernelError

__all__ = ["add"]

#: What timeout(1) exits with.
TIMED_OUT = 124
_MOST_STDIN = 4 << 20


def add(nouns: Commands) -> None:
    parser = command(
        nouns,
        "exec",
        run,
        help="run a program beside an agent",
        description="Run one more program in the sandbox of a live session, confined exactly as "
        "its agent is: to look at files, run the tests, install a package. It gets the agent's "
        "plain environment and never a variable of the vault. What it prints comes out when it "
        "has ended. When its time is over, or sandboxctl is interrupted, it ends with all that it "
        "started; what it leaves in the background by itself goes on until the session ends.",
        usage="sandboxctl session exec [options] SESSION -- COMMAND [ARG ...]",
        examples=[
            ("sandboxctl session exec s-0123456789abcdef -- ls -la", "look into its workspace"),
            ("sandboxctl session exec --cwd src s-0123 -- make test", "in a directory of it"),
        ],
    )
    parser.usage_status = FAILED
    parser.epilog = (parser.epilog or "") + (
        "\n\nexit status: the program's own; 128+N after signal N; 124 when its time was over, 125 "
        "when\nsandboxd failed, 126 when the program can't be executed, 127 when it isn't found"
    )
    parser.set_defaults(failed_status=FAILED)
    parser.add_argument("id", metavar="SESSION", help="the session's id")
    parser.lookups["id"] = "sessions"
    parser.add_argument(
        "--cwd", metavar="DIR", default="", help="where it runs, seen from where the agent began"
    )
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a plain variable for it (nothing secret: others see command lines)",
    )
    parser.add_argument(
        "--timeout", metavar="TIME", help="end it after so long: 90, 90s, 15m (default 60s)"
    )
    parser.add_argument(
        "-i", "--stdin", action="store_true", help="pass standard input to it, 4 MiB at most"
    )


def run(args: argparse.Namespace) -> int:
    if not args.rest:
        raise Invalid(
            "there is no program to run",
            hint="sandboxctl session exec SESSION -- COMMAND [ARG ...]",
        )
    params: dict[str, Any] = {"id": args.id, "argv": args.rest, "cwd": args.cwd}
    params["environment"] = dict(map(_pair, args.env))
    if args.timeout is not None:
        params["timeout"] = duration(args.timeout, name="--timeout")
    if args.stdin:
        data = sys.stdin.buffer.read(_MOST_STDIN + 1)
        if len(data) > _MOST_STDIN:
            raise Invalid("standard input has more than 4 MiB", hint="write a file instead")
        params["stdin"] = base64.b64encode(data).decode()
    with connect(args) as daemon:
        try:
            got = daemon.call("session.exec", **params)
        except KernelError as error:
            args.failed_status = could_not_execute(error)
            raise
    if args.json:
        output.print_json(got)
    else:
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            data = base64.b64decode(got[name])
            stream.flush()
            stream.buffer.write(output.visible(data) if stream.isatty() else data)
            stream.flush()
        if got["truncated"]:
            output.note("sandboxctl: it printed more than is kept")
    if got["timed_out"]:
        output.note("sandboxctl: its time was over, and it was ended")
        return TIMED_OUT
    if got["exit_code"] is not None:
        return int(got["exit_code"])
    return 128 + int(got["signal"])


def _pair(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not equals:
        raise Invalid("--env takes NAME=VALUE")
    return name, value
