"""The reference part of docs/sandboxctl.md, made from the command tree.

``python -m sandboxd.cli.manual docs/sandboxctl.md`` writes it anew below the marker line; a test
compares, so the two can't drift apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from sandboxd.cli.parser import Parser, build

__all__ = ["MARKER", "reference", "renewed"]

MARKER = "<!-- Below is made by: python -m sandboxd.cli.manual docs/sandboxctl.md -->"

_SHARED = "options of every command"


def reference() -> str:
    """Every command with its usage, arguments, options and examples, in Markdown."""
    return "\n".join(_sections(build())).rstrip() + "\n"


def renewed(document: str) -> str:
    """The document with its reference made anew. ValueError when it has no marker."""
    above, marker, _ = document.partition(MARKER)
    if not marker:
        raise ValueError(f"no line {MARKER!r}")
    return f"{above}{MARKER}\n\n{reference()}"


def _sections(parser: Parser) -> Iterator[str]:
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        for choice in action._choices_actions:
            yield from _command(action.choices[choice.dest])


def _command(parser: Parser) -> Iterator[str]:
    below = list(_sections(parser))
    if below:
        yield from below
        return
    name = parser.prog.removeprefix("sandboxctl ")
    usage = (parser.usage or parser.simple_usage()).splitlines()
    yield f"### {name}\n"
    yield "```"
    yield from (line.strip() for line in usage)
    yield "```\n"
    for paragraph in (parser.description or "").split("\n\n"):
        yield paragraph.replace("\n", " ").replace("<", "\\<") + "\n"
    rows = [
        f"| `{_spelling(action)}` | {_cell(action.help)} |"
        for group in parser._action_groups
        if group.title != _SHARED
        for action in group._group_actions
        if action.dest != "help"
    ]
    if rows:
        yield "| argument | meaning |\n|---|---|"
        yield from rows
        yield ""
    if parser.examples:
        yield "```sh"
        for line, what in parser.examples:
            yield f"{line}  # {what}"
        yield "```\n"


def _spelling(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar or "|".join(map(str, action.choices or (action.dest,))))
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return ", ".join(action.option_strings) + value


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(renewed(target.read_text()))
