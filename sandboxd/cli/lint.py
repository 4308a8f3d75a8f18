"""``sandboxctl tools lint`` and ``show``: what a manifest says, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.cli import output
from sandboxd.cli.config import load_files
from sandboxd.cli.daemon import connect, paths
from sandboxd.cli.parser import Commands, command
from sandboxd.errors import ConfigError, NotFound, Unavailable

if TYPE_CHECKING:
    from sandboxd.policy.problems import Problems

__all__ = ["add"]


def add(nouns: Commands) -> None:
    parser = command(
        nouns,
        "show",
        show,
        help="show all that a tool's manifest says",
        description="Show a tool with what its manifest leaves out filled in: program and digest, "
        "arguments, secrets, network, workspace, limits, and the agents that may call it. From "
        "the daemon; with --files, or when no daemon runs, from the files.",
        examples=[
            ("sandboxctl tools show http_request", "one tool"),
            ("sandboxctl tools show git --json | jq .input", "the schema of its arguments"),
        ],
    )
    parser.add_argument("tool", metavar="TOOL", help="the tool")
    parser.add_argument("--files", action="store_true", help="show what the files say")
    parser.lookups["tool"] = "tools"
    parser = command(
        nouns,
        "lint",
        lint,
        help="check tool manifests, without a daemon",
        description="Check manifests and their programs, and report each problem as "
        "FILE:LINE:COLUMN. Needs no daemon and no other configuration. PATH is a tool.yaml, a "
        "tool's folder, a folder of such folders or a configuration directory (default: "
        "--config). Exits with 2 when anything is wrong, with --strict also for warnings, with 3 "
        "when there is no manifest. What agents and policies make of the tools is said by "
        "sandboxctl policy check.",
        examples=[
            ("sandboxctl tools lint", "every tool of the configuration"),
            ("sandboxctl tools lint --strict tools/weather", "one tool, in CI"),
            ("sandboxctl tools lint --json tools/weather/tool.yaml", "for an editor"),
        ],
    )
    parser.add_argument("path", metavar="PATH", nargs="?", help="what to check")
    parser.add_argument("--strict", action="store_true", help="let warnings fail, too")
    parser.lookups["path"] = "files"


def lint(args: argparse.Namespace) -> int:
    from sandboxd.paths import shipped
    from sandboxd.policy import lint_tools

    directory, only = _place(Path(args.path)) if args.path else (paths(args).config / "tools", "")
    tools, problems = lint_tools(directory, shipped_tools=shipped("tools"), only=only)
    found = _found(problems)
    errors = sum(item["severity"] == "error" for item in found)
    status = ConfigError.exit_code if errors or (args.strict and found) else 0
    names = sorted(tool.name for tool in tools)
    if args.json:
        output.print_json({"tools": names, "problems": found})
        return status
    for item in found:
        where = f"{item['file']}:{item['line']}:{item['column']}" if item["line"] else item["file"]
        print(output.clean(f"{where}: {item['severity']}: {item['message']}"))
        if item["hint"]:
            print(output.clean(f"  hint: {item['hint']}"))
    warnings = len(found) - errors
    said = [output.amount(errors, "error")] if errors else []
    said += [output.amount(warnings, "warning")] if warnings else []
    output.note(
        f"{output.amount(len(names), 'tool')} valid" + "".join(f", {word}" for word in said)
    )
    return status


def show(args: argparse.Namespace) -> int:
    got = _described(args)
    if args.json:
        output.print_json(got)
        return 0
    each = got["concurrency"]
    output.fields(
        [
            ("name", got["name"]),
            ("description", got["description"].strip().splitlines()),
            ("source", got["source"] + (" (shipped)" if got["shipped"] else "")),
            ("program", got["program"]),
            ("runtime", got["runtime"]),
            ("sha256", got["digest"]),
            ("argv", [json.dumps(element, ensure_ascii=False) for element in got["argv"]]),
            ("stdin", got["stdin"]),
            ("input", json.dumps(got["input"], ensure_ascii=False)),
            ("output", json.dumps(got["output"], ensure_ascii=False) if got["output"] else "-"),
            ("format", got["output_format"]),
            ("environment", [f"{name}={value}" for name, value in got["environment"].items()]),
            ("secrets", [_secret(item) for item in got["secrets"]]),
            ("workspace", got["workspace"]),
            ("mounts", [f"{m['source']} at {m['target']} ({m['mode']})" for m in got["mounts"]]),
            ("network", got["network"]),
            ("timeout", f"{got['timeout']:g}s" + (f" + {got['grace']:g}s" if got["grace"] else "")),
            ("output limit", f"{output.size(got['output_limit'])}, then {got['on_overflow']}"),
            ("limits", [output.bound(k, v) for k, v in got["limits"].items() if v is not None]),
            ("concurrency", [f"{k}: {v}" for k, v in each.items() if v is not None]),
            ("approval", got["approval"]),
            ("annotations", [f"{k}: {v}" for k, v in got["annotations"].items()]),
            ("agents", got["agents"]),
        ]
    )
    return 0


def _described(args: argparse.Namespace) -> dict[str, Any]:
    if not args.files:
        try:
            with connect(args) as daemon:
                got: dict[str, Any] = daemon.call("tools.show", tool=args.tool)
                return got
        except Unavailable:
            output.note(f"no daemon runs: from the files in {paths(args).config}")
    from sandboxd.policy.explain import describe_tool, tool_named

    config = load_files(paths(args).config)
    return describe_tool(config, tool_named(config, args.tool))


def _secret(item: dict[str, Any]) -> str:
    shown = "" if item["redact"] else ", shown in output"
    optional = "" if item["required"] else ", optional"
    return f"{item['variable']} as {item['as']} ({item['delivery']}{optional}{shown})"


def _place(path: Path) -> tuple[Path, str]:
    """The folder of tool folders to look through, and the only one of them, if it is one.

    Raises NotFound where there is no manifest.
    """
    path = path.absolute()
    if path.is_file():
        if path.name != "tool.yaml":
            raise NotFound(f"{path} is no manifest", hint="a tool's manifest is named tool.yaml")
        path = path.parent
    if (path / "tool.yaml").exists():
        return path.parent, path.name
    if (path / "tools").is_dir():
        path = path / "tools"
    if not any(path.glob("*/tool.yaml")):
        raise NotFound(
            f"there is no tool.yaml in {path}", hint="write a tool with: sandboxctl tools new NAME"
        )
    return path, ""


def _found(problems: Problems) -> list[dict[str, Any]]:
    items = [("error", error) for error in problems.errors]
    items += [("warning", warning) for warning in problems.warned]
    items.sort(key=lambda item: (item[1].file, item[1].line, item[1].column, item[0]))
    return [
        {
            "file": error.file,
            "line": error.line,
            "column": error.column,
            "severity": severity,
            "message": error.message.removeprefix(error.where),
            "hint": error.hint,
        }
        for severity, error in items
    ]
