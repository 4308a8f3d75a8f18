"""``sandboxctl completion``: scripts for bash, zsh and fish, made from the command tree.

Commands, options and what their values are is written into the script. Names of agents, tools,
sessions and variables are asked for when they are needed, through the hidden command
``__complete``, which prints one a line and nothing at all when no daemon answers.

What a value is, the *kind*: ``=a b`` for one of these words, ``files``, ``directories``, ``places``
(``SESSION:PATH`` or a file), what ``__complete`` looks up, or nothing for what nobody can know.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sandboxd.cli import parser as tree
from sandboxd.cli.completion_scripts import BASH, FISH, ZSH
from sandboxd.cli.parser import Commands, Parser, command
from sandboxd.errors import SandboxdError

__all__ = ["Node", "add", "nodes"]

#: Seconds that a prompt waits for a server far away.
_PATIENCE = 2.0

#: Kinds that values of options have by their metavar.
_METAVARS = {
    "FILE": "files",
    "PATH": "files",
    "DIR": "directories",
    "AGENT": "agents",
    "TOOL": "tools",
    "KEY": "keys",
}

_KINDS = ("agents", "tools", "servers", "sessions", "variables", "approvals", "keys")


@dataclass(frozen=True)
class Node:
    """One command: its words, what may follow as (word, explanation), what its arguments are."""

    words: tuple[str, ...]
    commands: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str], ...]
    valued: tuple[tuple[str, str], ...]  # options that take a value, with its kind
    arguments: tuple[str, ...]  # a kind per position
    repeats: bool  # whether the last argument may be given again


def add(commands: Commands, name: str, line: str) -> None:
    if name == "completion":
        parser = command(
            commands,
            name,
            print_script,
            help=line,
            description="Print a script that completes commands, options and their values, and the "
            "names of agents, tools, sessions and variables.",
            examples=[
                ("source <(sandboxctl completion bash)", "for this shell; or in ~/.bashrc"),
                (
                    "sandboxctl completion zsh > /usr/local/share/zsh/site-functions/_sandboxctl",
                    "for every zsh",
                ),
                (
                    "sandboxctl completion fish > ~/.config/fish/completions/sandboxctl.fish",
                    "for fish",
                ),
            ],
        )
        parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
        return
    parser = commands.add_parser(name)
    tree._add_shared(parser)
    parser.set_defaults(run=print_names, parser=parser)
    parser.add_argument("kind", choices=_KINDS)
    parser.add_argument("agent", nargs="?")


def print_script(args: argparse.Namespace) -> int:
    found = list(nodes(tree.build()))
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](found), end="")
    return 0


def print_names(args: argparse.Namespace) -> int:
    from sandboxd.cli.daemon import connect

    try:
        with connect(args, timeout=_PATIENCE) as daemon:
            if args.kind == "agents":
                names = [row["slug"] for row in daemon.call("agents.list")["agents"]]
            elif args.kind == "tools":
                names = [row["name"] for row in daemon.call("tools.list")["tools"]]
            elif args.kind == "servers":
                names = [row["server"] for row in daemon.call("tools.pins")["servers"]]
            elif args.kind == "sessions":
                names = [row["id"] for row in daemon.call("session.list", all=False)["sessions"]]
            elif args.kind == "approvals":
                names = [row["id"] for row in daemon.call("approvals.list")["approvals"]]
            elif args.kind == "keys":
                names = [row["id"] for row in daemon.call("keys.list", all=False)["keys"]]
            elif args.agent:
                rows = daemon.call("env.list", agent=args.agent)["variables"]
                names = [row["name"] for row in rows]
            else:
                names = []
    except SandboxdError:
        return 0  # a prompt is no place for an error message
    for name in names:
        print(name)
    return 0


def nodes(parser: Parser, words: tuple[str, ...] = ()) -> Iterator[Node]:
    """The command tree, parents before children, without hidden commands."""
    commands: list[tuple[str, str]] = []
    options: list[tuple[str, str]] = []
    valued: list[tuple[str, str]] = []
    arguments: list[str] = []
    repeats = False
    below: list[tuple[str, Parser]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                commands.append((choice.dest, choice.help or ""))
                below.append((choice.dest, action.choices[choice.dest]))
        elif action.option_strings:
            options += [(option, action.help or "") for option in action.option_strings]
            if action.nargs != 0:
                valued += [(option, _kind(parser, action)) for option in action.option_strings]
        else:
            arguments.append(_kind(parser, action))
            repeats = action.nargs in ("+", "*")
    yield Node(words, tuple(commands), tuple(options), tuple(valued), tuple(arguments), repeats)
    for name, child in below:
        yield from nodes(child, (*words, name))


def _kind(parser: Parser, action: argparse.Action) -> str:
    if action.dest in parser.lookups:
        return parser.lookups[action.dest]
    if action.choices:
        return "=" + " ".join(map(str, action.choices))
    return _METAVARS.get(str(action.metavar), "") if action.option_strings else ""


def _bash(found: list[Node]) -> str:
    cases = [
        f"        {_quoted(' '.join(node.words))})\n"
        f"            commands={_quoted(' '.join(w for w, _ in node.commands))}\n"
        f"            options={_quoted(' '.join(w for w, _ in node.options))}\n"
        f"            valued={_quoted(';'.join(map(' '.join, node.valued)))}\n"
        f"            arguments={_quoted(';'.join(node.arguments))}\n"
        f"            repeats={'x' if node.repeats else ''} ;;"
        for node in found
    ]
    return _filled(BASH, cases)


def _zsh(found: list[Node]) -> str:
    def pairs(words: tuple[tuple[str, str], ...]) -> str:
        return " ".join(_quoted(f"{w}:{what}") for w, what in words)

    cases = [
        f"        {_quoted(' '.join(node.words))})\n"
        f"            commands=({pairs(node.commands)})\n"
        f"            options=({pairs(node.options)})\n"
        f"            valued={_quoted(';'.join(map(' '.join, node.valued)))}\n"
        f"            arguments={_quoted(';'.join(node.arguments))}\n"
        f"            repeats={'x' if node.repeats else ''} ;;"
        for node in found
    ]
    return _filled(ZSH, cases)


def _fish(found: list[Node]) -> str:
    def pairs(words: tuple[tuple[str, str], ...]) -> str:
        return " ".join(_fish_quoted(f"{w}\t{what}") for w, what in words)

    cases = [
        f"        case {_fish_quoted(' '.join(node.words))}\n"
        f"            set __sandboxctl_commands {pairs(node.commands)}\n"
        f"            set __sandboxctl_options {pairs(node.options)}\n"
        f"            set __sandboxctl_valued {_fish_list(node.valued)}\n"
        f"            set __sandboxctl_arguments {' '.join(map(_fish_quoted, node.arguments))}\n"
        f"            set __sandboxctl_repeats {'x' if node.repeats else ''}"
        for node in found
    ]
    return _filled(FISH.replace("@SHARED_KINDS@", _fish_list(_shared_kinds())), cases)


def _fish_list(pairs: Iterable[tuple[str, str]]) -> str:
    return " ".join(_fish_quoted(f"{option} {kind}") for option, kind in pairs)


def _filled(script: str, cases: list[str]) -> str:
    shared = " ".join(option for option, _, _ in tree.SHARED)
    kinds = ";".join(map(" ".join, _shared_kinds()))
    made = script.replace("@CASES@", "\n".join(cases))
    return made.replace("@SHARED@", shared).replace("@SHARED_KINDS@", kinds)


def _shared_kinds() -> list[tuple[str, str]]:
    return [(option, _METAVARS.get(value, "")) for option, value, _ in tree.SHARED]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
