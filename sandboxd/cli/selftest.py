"""``sandboxctl selftest``: needs no running daemon, it starts its own."""

from __future__ import annotations

import argparse

from sandboxd.cli.parser import Commands, command

__all__ = ["add"]


def add(commands: Commands, name: str, line: str) -> None:
    parser = command(
        commands,
        name,
        selftest,
        help=line,
        description="Start a real daemon in a temporary directory and try every way out of a "
        "sandbox that we know of, from inside an agent's and from inside a tool's, on this very "
        "kernel. Each attempt has the denials that are right, and a control that shows that it "
        "works where it is allowed. Prints what deviates and a summary. Needs no root and no "
        "configuration; run it as the user who runs sandboxd. Exits with 1 when anything got "
        "through or a control failed.",
        examples=[
            ("sandboxctl selftest", "before trusting a host, and after a kernel update"),
            ("sandboxctl selftest -v", "every attempt with its control"),
            ("sandboxctl selftest --threat network -v", "only the network"),
            ("sandboxctl selftest --json", "the same for programs"),
        ],
    )
    parser.add_argument(
        "--threat",
        action="append",
        default=[],
        metavar="WORD",
        help="only probes for threats that contain WORD; may be repeated",
    )
    parser.add_argument(
        "--patience",
        type=factor,
        default=1.0,
        metavar="FACTOR",
        help="multiply every limit of time: 4 for an emulated host (default 1, at most 20)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print every row")


def factor(text: str) -> float:
    """A number from 1 to 20."""
    number = float(text)
    if not 1 <= number <= 20:  # not a number is refused as well
        raise argparse.ArgumentTypeError("from 1 to 20")
    return number


def selftest(args: argparse.Namespace) -> int:
    from sandboxd.selftest import main

    return main(args)
