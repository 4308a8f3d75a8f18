"""Writing, trying and running tools as their author does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.paths import shipped
from sandboxd.policy import load_config

if TYPE_CHECKING:
    from cli_support import Ctl

MANIFEST = """\
version: 1
name: probe
description: asks for what it is told to
program: /bin/sh
argv: ["-c", "{script}"]
input: {type: object, required: [script], properties: {script: {type: string}}}
secrets: [{variable: PROBE_KEY}]
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    return write(tmp_path, "")


def write(tmp_path: Path, more: str) -> Path:
    folder = tmp_path / "config" / "tools" / "probe"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tool.yaml").write_text(MANIFEST + more)
    return folder


def tried(ctl: Ctl, script: str, *options: str, status: int = 0) -> dict[str, Any]:
    arguments = json.dumps({"script": script})
    got: dict[str, Any] = ctl.json(
        "tools", "test", "probe", "--args", arguments, *options, status=status
    )
    return got


def refused(got: dict[str, Any]) -> dict[str, str]:
    return {f["what"]: f["line"] for f in got["findings"] if f["refused"]}


def test_the_lines_that_a_test_names_allow_what_was_refused(
    alone: Ctl, probe: Path, tmp_path: Path
) -> None:
    # A directory that hosts have, and no sandbox shows.
    data = next(p for p in map(Path, ("/srv", "/media", "/mnt", "/opt")) if p.is_dir())
    script = f"ls {data}; cd /workspace && echo x > made; exit 0"
    first = tried(alone, script)
    assert first["outcome"] == "ok"
    lines = refused(first)
    assert lines[str(data)] == f"mounts: [{{source: {data}, target: {data}}}]"
    assert lines["/workspace"] == "workspace: ro"
    write(tmp_path, f"{lines[str(data)]}\nworkspace: rw\n")
    second = tried(alone, script)
    assert not refused(second)
    assert {"did": "wrote", "what": "/workspace/made", "refused": "", "line": ""} in second[
        "findings"
    ]


def test_a_workspace_is_copied_and_stays_as_it_was(alone: Ctl, tmp_path: Path) -> None:
    write(tmp_path, "workspace: rw\n")
    own = tmp_path / "project"
    own.mkdir()
    (own / "file").write_text("kept")
    got = tried(
        alone, "cat /workspace/file && echo gone > /workspace/file", "--workspace", str(own)
    )
    assert got["stdout"] == "kept"
    assert not refused(got)
    assert (own / "file").read_text() == "kept"


def test_variables_are_dummies_unless_they_are_given(
    alone: Ctl, probe: Path, tmp_path: Path
) -> None:
    script = 'case "$PROBE_KEY" in dummy-*) echo dummy;; *) echo "given $PROBE_KEY";; esac'
    assert tried(alone, script)["stdout"] == "dummy\n"
    (tmp_path / "env").write_text("PROBE_KEY=a-real-value-9421\n")
    got = alone(
        "tools",
        "test",
        "probe",
        "--args",
        json.dumps({"script": script}),
        "--env-file",
        str(tmp_path / "env"),
    )
    assert got.stdout.startswith("given [redacted:PROBE_KEY]\n")
    assert "9421" not in got.stdout + got.stderr


def test_a_failing_tool_fails_its_test(alone: Ctl, probe: Path) -> None:
    got = tried(alone, "echo why >&2; exit 3", status=1)
    assert (got["outcome"], got["exit_code"], got["stderr"]) == ("failed", 3, "why\n")


def test_mistakes_are_told_of_the_author_s_own_file(alone: Ctl, tmp_path: Path) -> None:
    folder = write(tmp_path, "timeout: soon\n")
    got = alone("tools", "test", str(folder), status=2)
    assert f"{folder}/tool.yaml:8" in got.stderr
    assert "sbx-" not in got.stderr
    assert "there is no such tool" in alone("tools", "test", "nothing", status=3).stderr


def test_a_server_is_told_from_a_tool(alone: Ctl, tmp_path: Path) -> None:
    folder = tmp_path / "config" / "tools" / "files"
    folder.mkdir(parents=True)
    (folder / "tool.yaml").write_text(
        "version: 1\nkind: mcp\nname: files\ndescription: a server\nprogram: /bin/cat\n"
    )
    got = alone("tools", "test", "files", status=2)
    assert "files is an MCP server" in got.stderr
    assert "sandboxctl tools accept files" in got.stderr


def test_a_shipped_tool_can_be_tried(alone: Ctl) -> None:
    arguments = json.dumps({"command": "echo $((6 * 7))"})
    got = alone("tools", "test", "shell", "--args", arguments)
    assert got.stdout.startswith("42\n")


def test_a_new_tool_loads_and_runs_as_it_is(alone: Ctl, tmp_path: Path) -> None:
    made = alone.json("tools", "new", "weather", "--secret", "WEATHER_KEY")
    wrapped = alone.json("tools", "new", "say", "--program", "/bin/echo", "--description", "Says")
    assert [Path(file).name for file in made["files"]] == ["tool.yaml", "program.py"]
    assert [Path(file).name for file in wrapped["files"]] == ["tool.yaml"]
    config = load_config(
        tmp_path / "config", shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )
    assert config.tools["weather"].secrets[0].variable == "WEATHER_KEY"
    assert config.tools["say"].description == "Says"
    got = alone.json("tools", "test", "weather", "--args", '{"text": "Wien"}')
    assert json.loads(got["stdout"])["text"] == "Wien"
    assert got["dummies"] == ["WEATHER_KEY"]
    again = alone("tools", "new", "weather", status=5)
    assert "is there already" in again.stderr
    assert "absolute path" in alone("tools", "new", "x", "--program", "jq", status=2).stderr
    assert "no program" in alone("tools", "new", "x", "--program", "/no/such", status=3).stderr
    assert not (tmp_path / "config" / "tools" / "x").exists()


def test_an_operator_calls_a_tool_in_an_agent_s_place(daemon: Ctl) -> None:
    arguments = '{"command": "echo out; echo err >&2"}'
    got = daemon("tools", "run", "shell", "--agent", "sh", "--args", arguments)
    assert (got.stdout, got.stderr) == ("out\n", "err\n")
    records = daemon("audit", "tail", "-n", "4", "--json").stdout.splitlines()
    events = [json.loads(line) for line in records]
    assert [event["event"] for event in events] == [
        "tools.run",
        "call.decided",
        "call.launched",
        "call.ended",
    ]
    assert {event["session"] for event in events} == {events[0]["session"]}
    assert (events[0]["agent"], events[0]["tool"]) == ("sh", "shell")
    assert events[0]["by"]
    failed = daemon.json(
        "tools", "run", "shell", "--agent", "sh", "--args", '{"command": "exit 7"}', status=1
    )
    assert (failed["outcome"], failed["exit_code"]) == ("failed", 7)


def test_an_operator_s_call_is_decided_like_any_other(daemon: Ctl) -> None:
    got = daemon("tools", "run", "git", "--agent", "sh", status=4)
    assert "this agent has no tool 'git'" in got.stderr
    assert "rule: agents/sh.yaml:5 tools" in got.stderr
    assert "one of --agent and --session" in daemon("tools", "run", "shell", status=2).stderr
    assert (
        "JSON object"
        in daemon("tools", "run", "shell", "--agent", "sh", "--args", "[]", status=2).stderr
    )


def test_a_call_in_a_live_session_is_that_session_s(daemon: Ctl) -> None:
    id = daemon("session", "start", "sh", "--", "-c", "echo there > /workspace/f; sleep 1000")
    session = id.stdout.strip()
    try:
        arguments = '{"command": "until cat f; do sleep 0.1; done"}'
        got = daemon.json("tools", "run", "shell", "--session", session, "--args", arguments)
        assert (got["session"], got["stdout"]) == (session, "there\n")
    finally:
        daemon("session", "stop", "--grace", "0", session)


def test_leaving_cancels_an_operator_s_call(daemon: Ctl) -> None:
    before = daemon.json("audit", "tail", "-n", "1")["seq"]
    call = daemon.start(
        "tools", "run", "shell", "--agent", "sh", "--args", '{"command": "sleep 1000"}'
    )
    follow = daemon.start("audit", "tail", "-f", "-n", "0", "--json")
    assert follow.stdout is not None
    try:
        while daemon.json("status")["calls"] == 0:
            pass
        call.kill()
        call.communicate()
        ended = next(
            record
            for record in map(json.loads, follow.stdout)
            if record["event"] == "call.ended" and record["seq"] > before
        )
        assert ended["outcome"] == "cancelled"
    finally:
        follow.kill()
        follow.communicate()
        call.kill()
