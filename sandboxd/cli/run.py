"""``sandboxctl run``: an agent in the foreground, as if it were an ordinary program."""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import os
import select
import signal
import stat
from typing import Any

from sandboxd.admin.client import AdminClient, Client
from sandboxd.cli import output, sessions
from sandboxd.cli.daemon import connect, connect_here, server_of
from sandboxd.cli.parser import Commands, command
from sandboxd.errors import Invalid, KernelError, SandboxdError

__all__ = ["FAILED", "add", "could_not_execute"]

#: What `run` exits with when the failure is sandboxd's and not the agent's, as in timeout(1).
FAILED = 125
CANNOT_EXECUTE = 126
NOT_FOUND = 127


def add(commands: Commands, name: str, line: str) -> None:
    parser = command(
        commands,
        name,
        run,
        help=line,
        description="Start an agent and stay attached: its output comes out here, what comes in "
        "here goes to its standard input, and INT, TERM, HUP, QUIT, USR1 and USR2 sent to "
        "sandboxctl are sent on to it. With -t the agent has a terminal of its own, and keys, "
        "Ctrl-C included, and changes of the window's size go straight to it. When sandboxctl "
        "ends, however it does, the session ends too.\n\n"
        "With --server the agent has neither a terminal nor standard input, and both of its "
        "outputs come out here as one; signals and the exit status are as without.",
        usage="sandboxctl run [options] AGENT [-- ARG ...]",
        examples=[
            ("sandboxctl run -t coder", "work with an interactive agent"),
            ("sandboxctl run reporter < question.txt > answer.txt", "in a pipeline"),
            ("sandboxctl run reporter -- --since yesterday", "with arguments of its own"),
        ],
    )
    parser.usage_status = FAILED
    parser.epilog = (parser.epilog or "") + (
        "\n\nexit status: the agent's own; 128+N after signal N; 125 when sandboxd failed, 126 "
        "when\nthe agent's program can't be executed, 127 when it isn't found"
    )
    parser.set_defaults(failed_status=FAILED)
    parser.add_argument("agent", metavar="AGENT", help="the agent's slug")
    parser.lookups["agent"] = "agents"
    parser.add_argument("-t", "--tty", action="store_true", help="give the agent a terminal")
    sessions.add_options(parser)


def run(args: argparse.Namespace) -> int:
    if server_of(args):
        return _run_there(args)
    if args.tty and not os.isatty(0):
        raise Invalid(
            "-t needs standard input to be a terminal", hint="leave -t away in a pipe or a job"
        )
    from sandboxd.cli import terminal

    own = sessions.options(args)
    size = terminal.window_size(0) if args.tty else (24, 80)
    with connect_here(args) as daemon:
        try:
            started, fds = daemon.call_with_fds(
                "session.start",
                agent=args.agent,
                args=args.rest or [],
                **own,
                tty=args.tty,
                attach=True,
                rows=size[0],
                cols=size[1],
                term=os.environ.get("TERM", "") if args.tty else "",
            )
        except KernelError as error:
            args.failed_status = could_not_execute(error)
            raise
        ended = _attend(daemon, started["id"], fds, args.tty)
    return _status(ended)


def _run_there(args: argparse.Namespace) -> int:
    """Over HTTP: no terminal and no standard input, both outputs in one, the rest as here."""
    from sandboxd.cli import terminal

    if args.tty:
        raise Invalid(
            "an agent over HTTP has no terminal: -t needs the daemon's own host",
            hint="leave -t away, or log in there and run it without --server",
        )
    own = sessions.options(args)
    if _brings_input():
        output.note("sandboxctl: standard input is not sent: over HTTP an agent has none")
    with connect(args) as daemon, terminal.signals(terminal.FORWARDED) as wakeup:
        try:
            request = daemon.follow("session.run", agent=args.agent, args=args.rest or [], **own)
            ended = _follow(daemon, request, wakeup)
        except KernelError as error:
            args.failed_status = could_not_execute(error)
            raise
    return _status(ended)


def _follow(daemon: Client, request: int, wakeup: int) -> dict[str, Any]:
    """Print and pass signals on until the session ends; returns how it did."""
    id = ""
    while True:
        ready, _, _ = select.select([daemon.fileno(), wakeup], [], [])
        for item in daemon.arrived(request):
            if "ended" in item:
                ended: dict[str, Any] = item["ended"]
                return ended
            id = item.get("id", id)
            _print(base64.b64decode(item.get("data", "")))
        for number in os.read(wakeup, 64) if wakeup in ready else b"":
            if not id:
                raise KeyboardInterrupt  # nothing has started yet: let go of the request
            with contextlib.suppress(SandboxdError):  # it ended before the signal came
                daemon.call("session.signal", id=id, signal=number)


def _print(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def _brings_input() -> bool:
    """Whether somebody seems to mean standard input for the agent."""
    try:
        kind = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISREG(kind) or stat.S_ISSOCK(kind)


def _status(ended: dict[str, Any]) -> int:
    """The exit status that says how the session ended, with a note where it isn't the agent's."""
    if ended.get("reason") not in (None, "", "exited", "killed"):
        output.note(f"sandboxctl: the session ended: {ended['reason']}")
    if ended.get("exit_code") is not None:
        return int(ended["exit_code"])
    if ended.get("signal") is not None:
        return 128 + int(ended["signal"])
    return FAILED


def _attend(daemon: AdminClient, id: str, fds: list[int], tty: bool) -> dict[str, Any]:
    """Copy and pass signals on until the session ends; returns how it did."""
    from sandboxd.cli import terminal

    waiting = daemon.submit("session.wait", id=id)
    forwarded: list[int] = []
    caught = [*terminal.FORWARDED]
    screen = terminal.raw_terminal(0) if tty else None
    if screen is not None:
        caught += [signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT]
        terminal.window_size(0, fds[0])  # it may have changed since we asked

    def on_control() -> bool:
        for request in [request for request in forwarded if daemon.ready(request)]:
            forwarded.remove(request)
            with contextlib.suppress(SandboxdError):  # it ended before the signal came
                daemon.result(request)
        return daemon.ready(waiting)

    def on_signals(numbers: bytes) -> None:
        for number in numbers:
            if screen is not None and number == signal.SIGTSTP:
                screen.suspend()
            elif screen is not None and number in (signal.SIGWINCH, signal.SIGCONT):
                if number == signal.SIGCONT:
                    screen.enter()
                terminal.window_size(0, fds[0])
            else:
                forwarded.append(daemon.submit("session.signal", id=id, signal=number))

    with terminal.signals(caught) as wakeup:
        if screen is not None:
            screen.enter()
        try:
            terminal.copy(
                fds,
                control=daemon.fileno(),
                on_control=on_control,
                wakeup=wakeup,
                on_signals=on_signals,
            )
        finally:
            if screen is not None:
                screen.leave()
        result: dict[str, Any] = daemon.result(waiting)
        return result


def could_not_execute(error: KernelError) -> int:
    """The exit status of a shell whose program can't be executed (POSIX, 2.8.2)."""
    if not error.syscall.startswith("exec"):
        return FAILED
    return NOT_FOUND if error.errno == errno.ENOENT else CANNOT_EXECUTE
