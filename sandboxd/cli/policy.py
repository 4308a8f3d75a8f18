"""``sandboxctl policy explain``: the decision about a call, without making it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect
from sandboxd.cli.parser import Commands, command, group
from sandboxd.errors import Conflict, Denied, Invalid

__all__ = ["add", "read_arguments"]


def add(commands: Commands, name: str, line: str) -> None:
    nouns = group(commands, name, help=line)
    parser = command(
        nouns,
        "explain",
        explain,
        help="decide about a tool call without running it",
        description="Decide about a call exactly as a live one would be: the verdict, the rule "
        "that made it with its file and line, the command line that would run, and the names of "
        "the variables that it would be given. Exits with 4 when the call would be denied, with 5 "
        "when it would wait for an operator.",
        examples=[
            (
                "sandboxctl policy explain reporter http_request "
                """'{"url": "https://api.example.com/"}'""",
                "would this be allowed?",
            ),
            ("sandboxctl policy explain reporter sql_query - < call.json", "arguments from a file"),
        ],
    )
    parser.add_argument("agent", metavar="AGENT", help="the agent that would call")
    parser.add_argument("tool", metavar="TOOL", help="the tool")
    parser.add_argument(
        "arguments", metavar="JSON", nargs="?", default="{}", help="its arguments; - reads stdin"
    )
    parser.lookups.update(agent="agents", tool="tools")


def explain(args: argparse.Namespace) -> int:
    arguments = read_arguments(args.arguments)
    with connect(args) as daemon:
        got = daemon.call("policy.explain", agent=args.agent, tool=args.tool, arguments=arguments)
    status = {"allow": 0, "ask": Conflict.exit_code}.get(got["verdict"], Denied.exit_code)
    if args.json:
        output.print_json(got)
        return status
    waits = got.get("approval_timeout")
    output.fields(
        [
            ("verdict", got["verdict"]),
            ("rule", got.get("rule") or "-"),
            ("reason", got.get("reason") or "-"),
            ("runs", json.dumps(got.get("argv") or [], ensure_ascii=False)),
            ("injects", [_injected(item) for item in got.get("inject") or []]),
            *([("waits", f"for an operator, {waits:g} s at most")] if waits else []),
            ("network", got.get("network") or "-"),
            (
                "limits",
                [f"{k}: {v}" for k, v in (got.get("limits") or {}).items() if v is not None],
            ),
            ("isolation", [_layer(layer) for layer in got.get("isolation") or []]),
        ]
    )
    return status


def read_arguments(text: str) -> Any:
    """A tool's arguments as an operator gives them: JSON, or ``-`` for standard input.

    Raises Invalid for what is no JSON, and for a key that stands twice in one object.
    """
    text = sys.stdin.read() if text == "-" else text

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Invalid("the arguments have the same key twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise Invalid("the arguments are nested too deeply") from None
    except ValueError as error:
        raise Invalid(
            f"the arguments are not valid JSON: {error}",
            hint="""quote the whole object for the shell: '{"url": "https://example.com/"}'""",
        ) from None


def _limits(limits: dict[str, Any]) -> list[str]:
    return [f"{name}: {value}" for name, value in limits.items() if value is not None]


def _injected(item: dict[str, Any]) -> str:
    name, delivery = item.get("as") or item["variable"], item.get("delivery", "env")
    shown = "" if item.get("redact", True) else ", shown in output"
    return f"{item['variable']} as {name} ({delivery}{shown})"


def _layer(layer: Any) -> str:
    """One layer of isolation, with the reason where it isn't on."""
    if not isinstance(layer, dict):
        return str(layer)
    remark = f" ({layer['remark']})" if layer["state"] != "on" and layer.get("remark") else ""
    return f"{layer['layer']}: {layer['state']}{remark}"
