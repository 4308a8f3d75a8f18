"""``sandboxctl tools new``, ``test`` and ``run``: for whoever writes a tool, or checks one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.cli import output
from sandboxd.cli.daemon import connect, paths
from sandboxd.cli.parser import Commands, Parser, command
from sandboxd.errors import Invalid, NotFound

if TYPE_CHECKING:
    from sandboxd.admin.client import Client
    from sandboxd.authoring.findings import Finding
    from sandboxd.secret import Secret

__all__ = ["add"]

#: What a call's outcome means for our own exit status; see the manual.
_STATUS = {"ok": 0, "denied": 4, "busy": 5}


def add(nouns: Commands) -> None:
    _add_new(nouns)
    _add_test(nouns)
    _add_run(nouns)


def _add_new(nouns: Commands) -> None:
    parser = command(
        nouns,
        "new",
        new,
        help="write a tool's folder to start from",
        description="Write a commented manifest that loads, and a program that runs: a Python "
        "program, or with --program the manifest alone, around a program of this host.",
        examples=[
            ("sandboxctl tools new weather --secret WEATHER_KEY", "a Python tool with one secret"),
            ("sandboxctl tools new jq --program /usr/bin/jq", "a program that is there already"),
        ],
    )
    parser.add_argument("name", metavar="NAME", help="the tool's name, and its folder's")
    parser.add_argument("--program", metavar="PATH", help="an absolute path of this host")
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME", help="a variable that it is given"
    )
    parser.add_argument("--description", metavar="TEXT", default="", help="what agents read")
    parser.add_argument(
        "--directory", metavar="DIR", help="where its folder goes (default: tools/ of --config)"
    )


def new(args: argparse.Namespace) -> int:
    from sandboxd.authoring.scaffold import write_tool
    from sandboxd.cli.env import checked_name

    for secret in args.secret:
        checked_name(secret, "--secret")
    directory = Path(args.directory) if args.directory else paths(args).config / "tools"
    made = write_tool(
        directory,
        args.name,
        description=args.description,
        program=args.program,
        secrets=args.secret,
    )
    if args.json:
        output.print_json({"name": args.name, "files": [str(path) for path in made]})
        return 0
    for path in made:
        print(f"wrote {path}")
    output.note(f"try it: sandboxctl tools test {made[0].parent}")
    return 0


def _add_test(nouns: Commands) -> None:
    parser = command(
        nouns,
        "test",
        test,
        help="run a tool in its sandbox and show what it used and was refused",
        description="Call a tool once, in the sandbox that a real call would have, on a daemon of "
        "its own in a temporary directory; no running daemon and no store is touched. Shows the "
        "output as an agent would get it, the files, programs and addresses that it used, and "
        "what it was refused, each with the manifest's line that would allow it. Variables have "
        "dummy values unless they are given. Exits with 1 when the tool failed.",
        examples=[
            ("""sandboxctl tools test weather --args '{"text": "Wien"}'""", "with a dummy key"),
            ("sandboxctl tools test ./weather --secret WEATHER_KEY", "asks for the real one"),
            (
                "sandboxctl tools test ./weather --env-file .env --workspace ./project",
                "real values from a file, and a copy of a workspace",
            ),
        ],
    )
    parser.add_argument("tool", metavar="TOOL", help="a tool's name, or its folder")
    _add_arguments(parser)
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="ask for this variable's value, hidden",
    )
    parser.add_argument(
        "--env-file", metavar="FILE", help="take variables' values from a .env file"
    )
    parser.add_argument("--workspace", metavar="DIR", help="copy this as the agent's workspace")
    parser.lookups["tool"] = "tools"


def test(args: argparse.Namespace) -> int:
    from sandboxd.authoring.trial import try_tool

    arguments = _arguments(args)
    given = _given(args)
    workspace = _directory(args.workspace) if args.workspace else None
    if not args.json and sys.stderr.isatty():
        output.note("starting a daemon of its own for the tool ...")
    got = try_tool(_folder(args), arguments, given=given, workspace=workspace)
    if args.json:
        output.print_json(
            {
                **got.ended,
                "stdout": got.stdout.decode(errors="replace"),
                "stderr": got.stderr.decode(errors="replace"),
                "dummies": list(got.dummies),
                "findings": [finding.as_dict() for finding in got.findings],
            }
        )
        return 0 if got.ok else 1
    _show_output(got.stdout, got.stderr)
    _show_end(got.ended, got.tool)
    _show_findings("it used", [f for f in got.findings if not f.refused])
    _show_findings("it was refused", [f for f in got.findings if f.refused])
    if got.dummies:
        output.note(f"dummy values: {', '.join(got.dummies)}; for real ones: --secret NAME")
    return 0 if got.ok else 1


def _add_run(nouns: Commands) -> None:
    parser = command(
        nouns,
        "run",
        run,
        help="call a tool as an agent would, with its stored variables",
        description="Make a real call through the running daemon: policy, audit record, the "
        "agent's variables, sandbox, redaction. It is made as the agent's next session would make "
        "it, or in a live session with --session. Output goes to the same streams. Exits with 4 "
        "when it is denied, 5 when the daemon is busy, 1 when the tool failed.",
        examples=[
            (
                """sandboxctl tools run http_request --agent reporter """
                """--args '{"url": "https://api.example.com/"}'""",
                "does the key work?",
            ),
        ],
    )
    parser.add_argument("tool", metavar="TOOL", help="the tool")
    parser.add_argument("--agent", metavar="AGENT", help="whose variables and policy")
    parser.add_argument("--session", metavar="ID", help="a live session to call it in")
    _add_arguments(parser)
    parser.lookups.update(tool="tools", session="sessions")


def run(args: argparse.Namespace) -> int:
    from sandboxd.authoring.calling import run_tool

    if (args.agent is None) == (args.session is None):
        raise Invalid("give one of --agent and --session", hint="see: sandboxctl agents")
    arguments = _arguments(args)
    place = {"session": args.session} if args.session else {"agent": args.agent}
    with connect(args) as daemon:
        _tell_of_waiting(daemon, args, arguments)
        stdout, stderr, ended = run_tool(daemon, tool=args.tool, arguments=arguments, **place)
    if args.json:
        output.print_json(
            {
                **ended,
                "stdout": stdout.decode(errors="replace"),
                "stderr": stderr.decode(errors="replace"),
            }
        )
    else:
        _show_output(stdout, stderr)
        _show_end(ended, args.tool)
    return _STATUS.get(ended["outcome"], 1)


def _tell_of_waiting(daemon: Client, args: argparse.Namespace, arguments: dict[str, Any]) -> None:
    """Say it beforehand when the call will wait: nothing comes until somebody answers."""
    agent = args.agent or daemon.call("session.show", id=args.session)["agent"]
    asked = daemon.call("policy.explain", agent=agent, tool=args.tool, arguments=arguments)
    if asked["verdict"] == "ask":
        output.note(f"waits for an operator's approval, {asked['approval_timeout']:g} s at most")
        output.note("  hint: in another terminal: sandboxctl approvals watch")


def _add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--args",
        dest="arguments",
        metavar="JSON",
        default="{}",
        help="its arguments, a JSON object; - reads standard input",
    )


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    from sandboxd.cli.policy import read_arguments

    found = read_arguments(args.arguments)
    if not isinstance(found, dict):
        raise Invalid("--args is a JSON object", hint="""such as '{"text": "hello"}'""")
    return found


def _given(args: argparse.Namespace) -> dict[str, Secret]:
    """Real values for a test: from a file, then from the terminal."""
    from sandboxd.cli.env import ask, checked_name, read_entries
    from sandboxd.secret import Secret

    found = {}
    if args.env_file:
        for entry in read_entries(args.env_file, otherwise="nothing was run"):
            found[entry.name] = Secret(entry.value)
    for name in args.secret:
        found[checked_name(name, "--secret")] = Secret(ask(name))
    return found


def _folder(args: argparse.Namespace) -> Path:
    """The folder of a tool that is configured or shipped, or of one anywhere."""
    from sandboxd.paths import shipped

    given = args.tool
    places = [Path(given)] if os.sep in given else []
    if not places:
        places = [paths(args).config / "tools" / given, shipped("tools") / given, Path(given)]
    for place in places:
        if (place / "tool.yaml").is_file():
            return Path(os.path.realpath(place))
    looked = ", ".join(str(place) for place in places)
    raise NotFound(
        "there is no such tool",
        hint=f"looked for tool.yaml in {looked}; to write one: sandboxctl tools new NAME",
    )


def _directory(path: str) -> Path:
    if not Path(path).is_dir():
        raise NotFound(f"{path} is not a directory")
    return Path(path)


def _show_output(stdout: bytes, stderr: bytes) -> None:
    """As the tool printed it: this is its output, not ours."""
    for stream, data in ((sys.stdout, stdout), (sys.stderr, stderr)):
        if stream.isatty():
            text = data.decode(errors="replace")
            stream.write("\n".join(output.clean(line) for line in text.split("\n")))
            if text and not text.endswith("\n"):
                stream.write("\n")
        else:
            stream.flush()
            stream.buffer.write(data)
        stream.flush()


def _show_end(ended: dict[str, Any], tool: str) -> None:
    message = ended["message"]
    if message or ended["outcome"] != "ok":
        output.note(f"{message or tool + ' ' + ended['outcome']}")
    if ended["hint"]:
        output.note(f"  hint: {ended['hint']}")
    if ended["outcome"] == "denied" and ended["rule"]:
        output.note(f"  rule: {ended['rule']}")


def _show_findings(title: str, found: Sequence[Finding]) -> None:
    if not found:
        return
    print(output.colour(title, "bold"))
    for finding in found:
        why = f": {finding.refused}" if finding.refused else ""
        print(f"  {finding.did:<9} {output.clean(finding.what)}{why}")
        if finding.line:
            print(f"            in tool.yaml: {output.colour(output.clean(finding.line), 'green')}")
