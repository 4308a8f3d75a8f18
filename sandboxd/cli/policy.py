"""``sandboxctl policy``: check the rules, explain one call, and see what a reload would change."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sandboxd.admin import protocol
from sandboxd.cli import output
from sandboxd.cli.config import add_check, load_files
from sandboxd.cli.daemon import connect, paths
from sandboxd.cli.parser import Commands, command, group
from sandboxd.errors import Conflict, Denied, Unavailable

__all__ = ["add", "read_arguments"]


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(commands, name, help=line)
    add_check(nouns, name)
    parser = command(
        nouns,
        "explain",
        explain,
        help="decide about a tool call without running it",
        description="Decide about a call exactly as a live one would be: the verdict, the rule "
        "that made it with its file and line, the command line that would run, the variables that "
        "it would be given by name and way of delivery, its limits, network and workspace and the "
        "line that each comes from. The daemon decides by the configuration in force; with "
        "--files, or when no daemon runs, sandboxctl does by the files. Exits with 4 when the call "
        "would be denied, with 5 when it would wait for an operator.",
        examples=[
            (
                "sandboxctl policy explain reporter http_request "
                """'{"url": "https://api.example.com/"}'""",
                "would this be allowed?",
            ),
            ("sandboxctl policy explain reporter sql_query - < call.json", "arguments from a file"),
            (
                "sandboxctl policy explain --files --config ./config reporter shell "
                """'{"command": "id"}'""",
                "by a directory in a repository, without a daemon",
            ),
        ],
    )
    parser.add_argument("agent", metavar="AGENT", help="the agent that would call")
    parser.add_argument("tool", metavar="TOOL", help="the tool")
    parser.add_argument(
        "arguments", metavar="JSON", nargs="?", default="{}", help="its arguments; - reads stdin"
    )
    parser.add_argument(
        "--files", action="store_true", help="decide by the files as they are, not by the daemon's"
    )
    parser.lookups.update(agent="agents", tool="tools")
    parser = command(
        nouns,
        "egress",
        egress,
        help="show what an agent or a tool may reach, and decide about one destination",
        description="List the hosts and relays that an agent's own process, or with --tool one of "
        "its tools, may reach, and what bounds them. With HOST:PORT decide about it as the proxy "
        "would, by its name; the addresses of a name are decided when it is resolved. Exits with 4 "
        "when it would be refused.",
        examples=[
            ("sandboxctl policy egress reporter", "all that it may reach"),
            ("sandboxctl policy egress reporter api.example.com:443", "would this be allowed?"),
            (
                "sandboxctl policy egress --tool fetch --method POST reporter example.com:80",
                "a request that one of its tools would make",
            ),
        ],
    )
    parser.add_argument("agent", metavar="AGENT", help="the agent")
    parser.add_argument("target", metavar="HOST:PORT", nargs="?", default="", help="a destination")
    parser.add_argument("--method", metavar="METHOD", default="", help="of a plain HTTP request")
    parser.add_argument("--tool", metavar="TOOL", help="one of its tools rather than the agent")
    parser.lookups.update(agent="agents", tool="tools")
    parser = command(
        nouns,
        "diff",
        diff,
        help="show what a reload would change, for each agent and tool",
        description="Compare the configuration in force with the files, and say what would change "
        "for whom: verdicts and the rules behind them, limits, network, workspace, isolation, the "
        "variables that are injected, the programs that run. Nothing is applied. Sessions that run "
        "keep what they started with. With DIR the files there are compared, else the daemon's "
        "own; in DIR an MCP server stands for its tools, for what was accepted of it is known to "
        "the daemon alone. Exits with 2 when the files can't be loaded.",
        examples=[
            ("sandboxctl policy diff && sandboxctl reload", "look first, then apply"),
            ("sandboxctl policy diff ./config", "what would this directory change?"),
            (
                "sandboxctl policy diff --exit-code --json",
                "for a script: status 1 when anything changes",
            ),
        ],
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", help="compare the files here")
    parser.add_argument(
        "--exit-code", action="store_true", help="exit with 1 when anything would change"
    )
    parser.lookups["directory"] = "directories"


def explain(args: argparse.Namespace) -> int:
    arguments = read_arguments(args.arguments)
    got = _explained(args, arguments)
    status = {"allow": 0, "ask": Conflict.exit_code}.get(got["verdict"], Denied.exit_code)
    if args.json:
        output.print_json(got)
        return status
    waits, by = got["approval_timeout"], got["set_by"]
    shown = [
        ("verdict", got["verdict"]),
        ("rule", got["rule"] or "-"),
        ("reason", got["reason"] or "-"),
        ("policy", got["policy"]),
    ]
    if got["hint"]:
        shown.append(("hint", got["hint"]))
    if got["verdict"] != "deny":
        limits = {**got["limits"], "timeout": got["timeout"], "output_limit": got["output_limit"]}
        shown += [
            ("program", got["program"]),
            ("arguments", json.dumps(got["argv"], ensure_ascii=False)),
            ("stdin", got["stdin"]),
            ("injects", [_injected(item, got) for item in got["inject"]]),
            *([("waits", f"for an operator, {waits:g} s at most")] if waits else []),
            ("network", _with_place(got["network"], by.get("network"))),
            *([("egress", got["egress"])] if got["egress"] else []),
            ("workspace", _with_place(got["workspace"], by.get("workspace"))),
            (
                "limits",
                [
                    _with_place(output.bound(name, value), by.get(name))
                    for name, value in limits.items()
                    if value is not None
                ],
            ),
            ("isolation", [_layer(layer) for layer in got.get("isolation") or got["lowered"]]),
        ]
    output.fields(shown)
    return status


def egress(args: argparse.Namespace) -> int:
    with connect(args) as daemon:
        got = daemon.call(
            "policy.egress",
            agent=args.agent,
            tool=args.tool,
            target=args.target,
            method=args.method,
        )
    denied = got.get("verdict") == "deny"
    status = Denied.exit_code if denied else 0
    if args.json:
        output.print_json(got)
        return status
    nothing = "everything: network: host" if got["network"] == "host" else "nothing"
    shown = [("allows", got["allows"] or [nothing])]
    if args.target:
        shown = [
            ("verdict", f"{got['verdict']} {got['destination']}"),
            ("rule", got["rule"]),
            *([("reason", got["reason"])] if denied else []),
            *shown,
        ]
    output.fields(shown)
    return status


def diff(args: argparse.Namespace) -> int:
    from sandboxd.policy.explain import differences, outlook

    with connect(args) as daemon:
        old = daemon.call("policy.outlook", servers=args.directory is not None)
        if args.directory is None:
            new = daemon.call("policy.outlook", files=True)
    if args.directory is not None:
        config = load_files(Path(args.directory))
        new = {
            "generation": config.generation,
            "outlook": json.loads(json.dumps(outlook(config, servers=True))),
            "warnings": list(config.warnings),
        }
    changes = differences(old["outlook"], new["outlook"])
    status = 1 if changes and args.exit_code else 0
    if args.json:
        output.print_json(
            {
                "old": old["generation"],
                "new": new["generation"],
                "changes": changes,
                "warnings": new["warnings"],
            }
        )
        return status
    for warning in new["warnings"]:
        output.note(f"warning: {warning}")
    if old["generation"] == new["generation"]:
        output.note("the files are those in force")
    elif not changes:
        output.note("the files differ, and nothing changes for any agent")
    for line in _change_lines(changes):
        print(output.clean(line))
    return status


def _explained(args: argparse.Namespace, arguments: Any) -> dict[str, Any]:
    if not args.files:
        try:
            with connect(args) as daemon:
                got: dict[str, Any] = daemon.call(
                    "policy.explain", agent=args.agent, tool=args.tool, arguments=arguments
                )
                return got
        except Unavailable:
            output.note(f"no daemon runs: decided by the files in {paths(args).config}")
    from sandboxd.policy.explain import agent_named, explain_call

    config = load_files(paths(args).config)
    return explain_call(config, agent_named(config, args.agent), args.tool, arguments)


def _change_lines(changes: list[dict[str, Any]]) -> list[str]:
    """A heading for each agent and tool, and below it what was and what will be."""
    lines: list[str] = []
    heading = ""
    for change in changes:
        at = f"{change['agent']} {change['tool'] or '(its own process)'}"
        if at != heading:
            lines.append(at)
            heading = at
        if change["change"] != "changed":
            verdict = (change["new"] or change["old"]).get("verdict", "")
            lines.append(f"  {change['change']}" + (f": {verdict}" if verdict else ""))
            continue
        old, new = change["old"], change["new"]
        if isinstance(old, dict) and isinstance(new, dict):
            for name in (*old, *(n for n in new if n not in old)):
                if old.get(name) != new.get(name):
                    before, after = _value(old.get(name)), _value(new.get(name))
                    lines.append(f"  {change['what']} {name}: {before} -> {after}")
        elif isinstance(old, list) and isinstance(new, list):
            lines.append(f"  {change['what']}:")
            lines += [f"    - {_value(item)}" for item in old if item not in new]
            lines += [f"    + {_value(item)}" for item in new if item not in old]
            if sorted(map(str, old)) == sorted(map(str, new)):
                lines.append(f"    order: {', '.join(map(_value, new))}")
        else:
            lines.append(f"  {change['what']}: {_value(old)} -> {_value(new)}")
    return lines


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_place(text: str, place: str | None) -> str:
    return f"{text} ({place})" if place else text


def read_arguments(text: str) -> Any:
    """A tool's arguments as an operator gives them: JSON, or ``-`` for standard input.

    Raises Invalid for what is no JSON, and for a key that stands twice in one object.
    """
    text = sys.stdin.read() if text == "-" else text
    return protocol.read_arguments(
        text, """quote the whole object for the shell: '{"url": "https://example.com/"}'"""
    )


def _injected(item: dict[str, Any], got: dict[str, Any]) -> str:
    shown = "" if item["redact"] else ", shown in output"
    optional = "" if item["required"] else ", optional"
    name = f"{item['variable']} as {item['as']} ({item['delivery']}{optional}{shown})"
    if "version" not in item:  # decided without a store
        return name
    if item["version"] is not None:
        return f"{name}: version {item['version']}"
    hint = f"sandboxctl env set {got['agent']} {item['variable']}"
    return f"{name}: not set" + (f", so the call is denied; {hint}" if item["required"] else "")


def _layer(layer: Any) -> str:
    """One layer of isolation, with the reason where it isn't on."""
    if not isinstance(layer, dict):
        return str(layer)
    remark = f" ({layer['remark']})" if layer["state"] != "on" and layer.get("remark") else ""
    return f"{layer['layer']}: {layer['state']}{remark}"
