"""``sandboxctl tools import``: an ``mcpServers`` file becomes manifests, its keys stored variables.

All of it or nothing: everything is checked before the first change, and what was changed is taken
back when a later step fails. Values go from the file to the daemon, and nowhere else.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command
from sandboxd.cli.reading import read_input
from sandboxd.errors import ConfigError, Conflict, Invalid, SandboxdError

if TYPE_CHECKING:
    from sandboxd.admin.client import Client
    from sandboxd.authoring.mcpfile import Entry

__all__ = ["add", "manifest_text"]

_MAX_FILE = 4 << 20
#: Keys of a manifest whose values need no quotes.
_PLAIN = ("kind", "name", "runtime", "lifetime", "idle", "workspace", "network")
#: Where servers are looked for that the file fetches with npx or uvx.
_PACKAGES = "/opt/mcp"


def add(nouns: Commands) -> None:
    """Add the command to the noun ``tools``."""
    parser = command(
        nouns,
        "import",
        import_,
        help="turn an mcpServers file into manifests, and its keys into stored variables",
        description="Read the file in which desktop and coding agents keep their MCP servers, "
        "write a manifest for each into the configuration directory, move the keys that stand in "
        "its env and args into the agent's variables, and print the file without them. No value "
        "is printed. When anything can't be imported, every reason is listed and nothing is "
        "changed.\n\n"
        "Servers are started by their path: what the file fetches with npx or uvx has to be "
        "installed first, in a directory that --packages names (npm install --prefix DIR, or a "
        f"virtual environment DIR or DIR/PACKAGE); the default is {_PACKAGES}.\n\n"
        "Their tools are offered to nobody before they are accepted: sandboxctl tools accept.",
        examples=[
            (
                "sandboxctl tools import claude_desktop_config.json --agent helper --dry-run",
                "look first",
            ),
            (
                "sandboxctl tools import .mcp.json --agent helper > .mcp.clean.json",
                "import, and keep the cleaned file",
            ),
            (
                "sandboxctl tools import .mcp.json --agent helper --only files --only git",
                "some of them",
            ),
        ],
    )
    parser.add_argument("file", metavar="FILE", help="the file; - reads standard input")
    parser.lookups["file"] = "files"
    parser.add_argument("--agent", metavar="AGENT", required=True, help="whose variables they get")
    parser.add_argument("--prefix", metavar="TEXT", default="", help="put before every name")
    parser.add_argument(
        "--packages",
        metavar="DIR",
        action="append",
        default=[],
        help="where npm packages or virtual environments are; again for more",
    )
    parser.add_argument(
        "--only", metavar="NAME", action="append", default=[], help="this server; again for more"
    )
    parser.add_argument(
        "--plain",
        metavar="VARIABLE",
        action="append",
        default=[],
        help="a variable in env that is a setting, not a key; again for more",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be done")


def import_(args: argparse.Namespace) -> int:
    from sandboxd.authoring.mcpfile import convert

    source = "standard input" if args.file == "-" else Path(args.file).name
    data = read_input(
        args.file, "standard input" if args.file == "-" else args.file, most=_MAX_FILE
    )
    with connect(args) as daemon:
        known = daemon.call("env.list", agent=args.agent)["variables"]
        directory = Path(daemon.call("status")["config"])
        tools = {row["name"] for row in daemon.call("tools.list")["tools"]}
        entries, problems = convert(
            data,
            source=source,
            packages=[Path(p).absolute() for p in args.packages or [_PACKAGES]],
            prefix=args.prefix,
            only=args.only,
            taken={row["name"] for row in known},
            plain=args.plain,
            reserved=[name for name in tools if not (directory / "tools" / name).exists()],
        )
        errors = [ConfigError(f"{p.server}: {p.message}", hint=p.hint) for p in problems]
        tools |= {row["server"] for row in daemon.call("tools.pins")["servers"]}
        errors += [
            ConfigError(
                f"{entry.original}: there is a tool {entry.name} already",
                hint="import it under another name: --prefix TEXT",
            )
            for entry in entries
            if entry.name in tools or os.path.lexists(directory / "tools" / entry.name)
        ]
        if errors:
            raise _Problems(errors)
        if not entries:
            raise Invalid(f"{source} has no servers")
        with _staged(directory, entries) as staged:
            if not args.dry_run:
                _apply(daemon, args.agent, directory, staged, entries)
    _report(args, entries, directory)
    return 0


class _Problems(Invalid):
    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__(f"nothing was imported: {output.amount(len(errors), 'problem')}")
        self.errors = list(errors)


@contextlib.contextmanager
def _staged(directory: Path, entries: Sequence[Entry]) -> Any:
    """The manifests in a hidden folder beside the others, checked; removed at the end."""
    from sandboxd.paths import shipped
    from sandboxd.policy.loader import lint_tools

    (directory / "tools").mkdir(mode=0o755, exist_ok=True)
    staged = directory / "tools" / f".import-{secrets.token_hex(6)}"
    staged.mkdir(mode=0o755)
    try:
        for entry in entries:
            folder = staged / entry.name
            folder.mkdir(mode=0o755)
            path = folder / "tool.yaml"
            path.write_text(manifest_text(entry), encoding="utf-8")
            path.chmod(0o644)
        _, problems = lint_tools(staged, shipped_tools=shipped("tools"))
        if problems.errors:
            told = [
                ConfigError(str(e).replace(f"{staged}/", ""), hint=e.hint) for e in problems.errors
            ]
            raise _Problems(told)
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _apply(
    daemon: Client, agent: str, directory: Path, staged: Path, entries: Sequence[Entry]
) -> None:
    """Store the keys, put the manifests in place, load them; or leave everything as it was."""
    values = {
        name: base64.b64encode(value.reveal()).decode()
        for entry in entries
        for name, value in entry.values.items()
    }
    placed: list[Path] = []
    stored = False
    try:
        if values:
            daemon.call("env.set", agent=agent, values=values, now=False)
            stored = True
        for entry in entries:
            folder = directory / "tools" / entry.name
            if os.path.lexists(folder):
                raise Conflict(f"{folder} is there already")
            (staged / entry.name).rename(folder)
            placed.append(folder)
        daemon.call("reload")
    except BaseException as failure:
        for folder in placed:
            shutil.rmtree(folder, ignore_errors=True)
        if stored:
            daemon.call("env.remove", agent=agent, names=sorted(values), now=False)
        if isinstance(failure, OSError):
            raise Invalid(f"nothing was imported: {directory}: {failure.strerror}") from None
        if isinstance(failure, SandboxdError):
            output.note("nothing was imported")
        raise


def manifest_text(entry: Entry) -> str:
    """A manifest: block style on top, JSON for the values, which YAML takes as it is."""
    lines = []
    for key, value in entry.manifest.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{key}:")
            lines += [f"  - {json.dumps(item, ensure_ascii=False)}" for item in value]
        elif key in _PLAIN and value not in ("null", "true", "false"):
            lines.append(f"{key}: {value}")
        else:
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _report(args: argparse.Namespace, entries: Sequence[Entry], directory: Path) -> None:
    cleaned = {"mcpServers": {entry.original: entry.cleaned for entry in entries}}
    if args.json:
        output.print_json(
            {
                "agent": args.agent,
                "dry_run": args.dry_run,
                "servers": [
                    {
                        "name": entry.name,
                        "was": entry.original,
                        "manifest": str(directory / "tools" / entry.name / "tool.yaml"),
                        "variables": sorted(entry.values),
                        "unset": list(entry.unset),
                        "notes": list(entry.notes),
                    }
                    for entry in entries
                ],
                "cleaned": cleaned,
            }
        )
        return
    output.print_json(cleaned)
    would = "would be " if args.dry_run else ""
    for entry in entries:
        output.note(f"{entry.name}: {would}written to {directory}/tools/{entry.name}/tool.yaml")
        if entry.values:
            output.note(f"  {would}stored for {args.agent}: {', '.join(sorted(entry.values))}")
        for name in entry.unset:
            output.note(f"  still to be set: sandboxctl env set {args.agent} {name}")
        for text in entry.notes:
            output.note(f"  {text}")
    if args.dry_run:
        output.note("nothing was changed: this was a dry run")
        return
    names = ", ".join(entry.name for entry in entries)
    output.note(f"next: add to tools in agents/{args.agent}.yaml: {names}")
    output.note("then: sandboxctl reload")
    for entry in entries:
        output.note(f"      sandboxctl tools accept {entry.name}")
