"""Options of the commands that start a session."""

from __future__ import annotations

import argparse
from typing import Any

from sandboxd.cli.parser import Parser
from sandboxd.durations import duration
from sandboxd.errors import Invalid

__all__ = ["add_options", "options"]


def add_options(parser: Parser) -> None:
    """``--env`` and ``--lifetime``."""
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a plain variable for the agent, in this session alone; may be given again. The agent "
        "reads it, so never a secret: those are set with 'sandboxctl env set', for its tools",
    )
    parser.add_argument(
        "--lifetime",
        metavar="TIME",
        help="stop the session after this time: 90, 90s, 15m, 8h or 2d; 31 days at most",
    )


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters that they become. Raises Invalid, which repeats no value of a variable."""
    found: dict[str, Any] = {}
    if args.env:
        found["environment"] = _environment(args.env)
    if args.lifetime is not None:
        found["lifetime"] = duration(args.lifetime, name="--lifetime")
    return found


def _environment(given: list[str]) -> dict[str, str]:
    from sandboxd.names import variable_name

    values: dict[str, str] = {}
    for number, item in enumerate(given, 1):
        name, equals, value = item.partition("=")
        if not equals:
            raise Invalid(
                f"--env number {number} is not NAME=VALUE", hint="quote a value that has spaces"
            )
        variable_name(name)
        if name in values:
            raise Invalid(f"{name} is given twice")
        values[name] = value
    return values
