"""The command tree: every noun, the options that all commands share, and how mistakes read."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sandboxd import __version__

__all__ = ["NOUNS", "SHARED", "Commands", "Parser", "build", "command", "group", "parse"]

#: What each top-level command is in: its module, and its line in the overview. Order is the help's.
NOUNS: dict[str, tuple[str, str]] = {
    "status": ("status", "what the daemon is, where it lives and how it does"),
    "run": ("run", "start an agent here: its output on this terminal, its exit status returned"),
    "session": ("session", "start, list, show and stop sessions, and read their output"),
    "env": ("env", "set, list and remove an agent's secret variables"),
    "agents": ("agents", "list and show the agents that are configured"),
    "tools": ("tools", "the tools that agents can call: list, check, write, try and run them"),
    "policy": ("policy", "check policies, explain a decision, see what a reload would change"),
    "approvals": ("approvals", "tool calls that wait for an operator: show, approve, deny, watch"),
    "keys": ("keys", "API keys, for who comes in over HTTP: make, list, rotate, deactivate"),
    "tokens": ("tokens", "short-lived tokens for an application's users: make, revoke"),
    "dashboard": ("dashboard", "a link that signs a browser in to the dashboard"),
    "audit": ("audit", "read and verify the audit log"),
    "config": ("config", "check the configuration, print its schemas"),
    "reload": ("status", "apply a changed configuration"),
    "doctor": ("host", "what this host offers for isolation, and what is missing"),
    "demo": ("host", "show the whole promise on real processes, in a temporary directory"),
    "selftest": ("selftest", "try every way out of a sandbox, and show what is refused"),
    "init": ("init", "write a configuration directory that works, and a master key"),
    "install": ("host", "install the systemd service"),
    "uninstall": ("host", "remove the systemd service"),
    "completion": ("completion", "print a completion script for bash, zsh or fish"),
    "__complete": ("completion", ""),
}

#: Options of every command that take a value: option, what stands for it, what it means.
SHARED: tuple[tuple[str, str, str], ...] = (
    ("--config", "DIR", "configuration directory"),
    ("--state", "DIR", "state directory"),
    ("--runtime", "DIR", "directory of the daemon's sockets"),
    ("--server", "URL", "ask this server over HTTP: https://HOST[:PORT] or unix:/PATH"),
    ("--key-file", "FILE", "file with the API key for --server, mode 0600"),
    ("--ca", "FILE", "certificates to trust for --server instead of the system's"),
)

EXIT_STATUS = """\
exit status:
  0    done
  1    unexpected failure
  2    wrong usage, invalid value or configuration
  3    no such agent, tool, session or variable
  4    denied by policy, custody or credentials
  5    not possible in this state: already running, locked or ended
  6    the daemon or a host feature is not available
  7    the store or the audit log can't be trusted or written
  8    the kernel refused
  130  interrupted; 141 the reader of the output went away
  run  exits with the agent's own status: 128+N after signal N, 125 when sandboxd itself failed,
       126 when the agent's program can't be executed, 127 when it isn't found"""

_EPILOG = f"""\
first steps:
  sandboxctl demo                        see what sandboxd does, without setting anything up
  sandboxctl doctor                      see whether this host is ready
  sandboxctl init                        write a configuration to start from
  sandboxd &                             start the daemon
  sandboxctl env set example API_TOKEN   set a secret; the value is asked for
  sandboxctl run -t example              run the agent

{EXIT_STATUS}

environment:
  SANDBOXD_CONFIG, SANDBOXD_STATE, SANDBOXD_RUNTIME  as --config, --state, --runtime
  SANDBOXD_SERVER                                    as --server
  SANDBOXD_API_KEY                                   the API key itself, where no --key-file is
  NO_COLOR                                           no colours

Every command takes --help, which shows examples, and --json, which prints what a program reads:
one JSON object, or one object a line for commands that follow; errors on standard error as
{{"error": {{"code": ..., "message": ..., "hint": ...}}}}."""

#: The type that argparse has no public name for.
Commands = Any


class Parser(argparse.ArgumentParser):
    """argparse with our errors: lower case, a hint, nothing abbreviated, values never quoted."""

    #: A mistake exits with this; `run` has another one, so that it isn't taken for the agent's.
    usage_status = 2
    #: Whether the arguments may hold a secret, which an error message must not repeat.
    secret_arguments = False
    #: Positional arguments that a completion can look up: dest -> kind.
    lookups: dict[str, str]

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Formatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)
        self.lookups = {}
        self.examples: tuple[tuple[str, str], ...] = ()

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument COMMAND: invalid choice: "):
            given = message.split("'")[1] if "'" in message else ""
            message = f"there is no command '{given}'"
        elif self.secret_arguments:
            message = "wrong arguments" if "required" not in message else message
        message = message.replace("the following arguments are required", "missing")
        print(f"sandboxctl: {message}", file=sys.stderr)
        print(f"  hint: see {self.prog} --help", file=sys.stderr)
        sys.exit(self.usage_status)

    def format_usage(self) -> str:
        self._state_usage()
        return super().format_usage()

    def format_help(self) -> str:
        self._state_usage()
        return super().format_help()

    def simple_usage(self) -> str:
        """The command and its arguments, with the options left to their own list."""
        words = [self.prog, "[options]"]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                words += ["COMMAND", "..."]
            elif not action.option_strings:
                name = str(action.metavar or action.dest)
                if action.choices:
                    name = "|".join(map(str, action.choices))
                words.append({"?": f"[{name}]", "+": f"{name} ..."}.get(str(action.nargs), name))
        return " ".join(words)

    def _state_usage(self) -> None:
        if self.usage is None:
            self.usage = self.simple_usage().replace("%", "%%")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def build(only: str | None = None) -> Parser:
    """The parser, with every command or with the arguments of just one of them."""
    parser = Parser(
        prog="sandboxctl",
        usage="sandboxctl [options] COMMAND ...",
        description="Operate sandboxd: isolated agents, brokered tool calls, secrets that the "
        "agent never sees.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"sandboxctl {__version__}")
    _add_shared(parser)
    parser.set_defaults(**{_dest(option): None for option, _, _ in SHARED})
    parser.set_defaults(json=False, rest=None)
    commands = parser.add_subparsers(
        title="commands",
        prog="sandboxctl",
        metavar="COMMAND",
        dest="command",
        parser_class=Parser,
        required=True,
    )
    for name, (module, line) in NOUNS.items():
        if only is None or name == only:
            importlib.import_module(f"sandboxd.cli.{module}").add(commands, name, line)
        elif line:
            commands.add_parser(name, help=line)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of one command, with ``run`` the function that carries it out.

    What stands after ``--`` in ``run``, ``session start`` and ``session exec`` is another
    program's and becomes ``rest``.
    Exits with a message when they make no sense.
    """
    words = _command_words(argv)
    rest: list[str] | None = None
    passes_on = words[:1] == ["run"] or words[:2] in (["session", "start"], ["session", "exec"])
    if passes_on and "--" in argv:
        cut = argv.index("--")
        argv, rest = argv[:cut], argv[cut + 1 :]
    name = words[0] if words else None
    parser = build(name if name in NOUNS else "")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(args, unknown)
    args.rest = rest
    return args


def command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str = "",
    examples: Sequence[tuple[str, str]] = (),
    **options: Any,
) -> Parser:
    """Add a command that ``run`` carries out; examples are (command line, what it does)."""
    epilog = "\n".join(f"  {line}\n      {what}" for line, what in examples)
    made: Parser = commands.add_parser(
        name,
        help=help,
        description=_wrapped(description or help[:1].upper() + help[1:] + "."),
        epilog=f"examples:\n{epilog}" if examples else None,
        **options,
    )
    made.examples = tuple(examples)
    _add_shared(made)
    made.set_defaults(run=run, parser=made)
    return made


def group(
    commands: Commands,
    name: str,
    *,
    help: str,
    description: str = "",
    otherwise: Callable[[argparse.Namespace], int] | None = None,
) -> Commands:
    """Add a noun with commands of its own; returns what :func:`command` adds to.

    ``otherwise`` carries out the noun alone.
    """
    made: Parser = commands.add_parser(name, help=help, description=_wrapped(description))
    if otherwise is not None:
        _add_shared(made)
        made.set_defaults(run=otherwise, parser=made)
    return made.add_subparsers(
        title="commands",
        metavar="COMMAND",
        dest="subcommand",
        parser_class=Parser,
        required=otherwise is None,
    )


def _add_shared(parser: argparse.ArgumentParser) -> None:
    shared = parser.add_argument_group("options of every command")
    for option, value, what in SHARED:
        shared.add_argument(
            option, dest=_dest(option), metavar=value, default=argparse.SUPPRESS, help=what
        )
    shared.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _dest(option: str) -> str:
    """Where its value is. "server" alone is what commands about MCP servers call those."""
    return "server_url" if option == "--server" else option[2:].replace("-", "_")


def _wrapped(text: str) -> str:
    import textwrap

    return "\n\n".join(textwrap.fill(part, 96) for part in text.split("\n\n"))


def _command_words(argv: Sequence[str]) -> list[str]:
    """The first two words of a command line that are neither options nor values of shared ones."""
    words: list[str] = []
    takes_value = False
    for word in argv:
        if word == "--" or len(words) == 2:
            break
        if takes_value:
            takes_value = False
        elif word.startswith("-"):
            takes_value = any(word == option for option, _, _ in SHARED)
        else:
            words.append(word)
    return words


def _refuse(args: argparse.Namespace, unknown: list[str]) -> NoReturn:
    parser: Parser = args.parser
    if parser.secret_arguments:
        parser.error("wrong arguments")
    from sandboxd.names import shown

    first = shown(unknown[0])
    if parser.usage_status == 125 and not unknown[0].startswith("-"):
        parser.error(f"unexpected {first}; the agent's own arguments come after --")
    parser.error(f"unexpected {first}")
