"""sandboxctl policy and tools lint|show: with a daemon and without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cli_support import Ctl

MANIFEST = """\
version: 1
name: weather
description: The weather in a city
program: run
argv: ["{city}"]
input:
  type: object
  additionalProperties: false
  properties: {city: {type: string}}
"""


@pytest.fixture
def there(alone: Ctl) -> Ctl:
    """A configuration that no daemon runs on, with one tool of its own."""
    config = alone.directory / "config"
    alone("init", str(config))
    folder = config / "tools" / "weather"
    folder.mkdir(mode=0o755)
    (folder / "tool.yaml").write_text(MANIFEST)
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)
    (folder / "tool.yaml").chmod(0o644)
    return alone


@pytest.fixture
def extra(daemon: Ctl) -> Iterator[Path]:
    """A policy file of the daemon's configuration that goes away again."""
    agent = daemon.directory / "config/agents/sh.yaml"
    before = agent.read_text()
    policy = daemon.directory / "config/policies/mine.yaml"
    yield policy
    policy.unlink(missing_ok=True)
    agent.write_text(before)


# --- tools lint and show ------------------------------------------------------------------------


def test_a_valid_manifest_is_clean_by_whatever_path_it_is_named(there: Ctl) -> None:
    folder = there.directory / "config/tools/weather"
    for path in ([], [str(folder / "tool.yaml")], [str(folder)], [str(folder.parents[1])]):
        done = there("tools", "lint", *path)
        assert (done.stdout, done.stderr) == ("", "1 tool valid\n")


def test_each_problem_of_a_manifest_has_its_line_and_column(there: Ctl) -> None:
    manifest = there.directory / "config/tools/weather/tool.yaml"
    manifest.write_text(MANIFEST.replace("{city}", "{town}") + "timeout: soon\nextra: 1\n")
    done = there("tools", "lint", status=2)
    assert done.stdout.splitlines() == [
        f"{manifest}:10:10: error: timeout: expected a duration, found the text 'soon'",
        "  hint: write 500ms, 30s, 5m or 2h",
        f"{manifest}:11:1: error: unknown key 'extra'",
        *[line for line in done.stdout.splitlines() if line.startswith("  hint: known:")],
    ]
    assert done.stderr == "0 tools valid, 2 errors\n"
    manifest.write_text(MANIFEST.replace("{city}", "{town}"))
    got = json.loads(there("tools", "lint", "--json", str(manifest), status=2).stdout)
    assert got["tools"] == []
    assert got["problems"][0] == {
        "file": str(manifest),
        "line": 5,
        "column": 7,
        "severity": "error",
        "message": "argv uses 'town', which input has no property for",
        "hint": "known: city",
    }


def test_a_warning_fails_only_when_it_shall(there: Ctl) -> None:
    manifest = there.directory / "config/tools/weather/tool.yaml"
    manifest.write_text(MANIFEST.replace('argv: ["{city}"]', "argv: []"))
    done = there("tools", "lint")
    assert done.stdout == (
        f"{manifest}:9:16: warning: the argument 'city' is in neither argv nor stdin: "
        "the program never sees it\n"
    )
    assert there("tools", "lint", "--strict", status=2).stdout == done.stdout


def test_what_is_no_manifest_is_not_found(there: Ctl) -> None:
    assert "no tool.yaml in" in there("tools", "lint", "/usr/lib", status=3).stderr
    assert "is no manifest" in there("tools", "lint", "/etc/passwd", status=3).stderr


def test_the_shipped_tools_are_clean(alone: Ctl) -> None:
    from sandboxd.paths import shipped

    done = alone("tools", "lint", "--strict", str(shipped("tools")))
    assert done.stderr == "4 tools valid\n"


def test_a_tool_is_shown_by_the_daemon_or_from_the_files(daemon: Ctl, there: Ctl) -> None:
    assert daemon.json("tools", "show", "shell")["argv"] == ["-c", "--", "{command}"]
    done = there("tools", "show", "weather")
    assert done.stderr.startswith("no daemon runs: from the files in ")
    assert 'argv          "{city}"' in done.stdout
    missing = daemon("tools", "show", "shel", status=3)
    assert "did you mean 'shell'?" in missing.stderr


# --- policy -------------------------------------------------------------------------------------


def test_the_whole_configuration_is_checked_and_every_problem_told(there: Ctl) -> None:
    assert "the configuration is valid" in there("policy", "check").stdout
    policies = there.directory / "config/policies"
    (policies / "a.yaml").write_text("version: 1\ndescription: d\nrules: [{allow: nope}]\n")
    (policies / "b.yaml").write_text("version: 1\ndescription: d\nextends: nobody\n")
    done = there("policy", "check", status=2)
    assert "a.yaml:3:17: no tool 'nope'" in done.stderr
    assert "b.yaml:3:10: no policy 'nobody'" in done.stderr


def test_a_call_is_explained_without_a_daemon(there: Ctl) -> None:
    call = ("example", "shell", '{"command": "id"}')
    done = there("policy", "explain", *call)
    assert done.stderr.startswith("no daemon runs: decided by the files in ")
    assert "rule       policies/default.yaml:" in done.stdout
    got = there.json("policy", "explain", "--files", *call)
    assert (got["verdict"], got["argv"]) == ("allow", ["-c", "--", "id"])
    assert got["set_by"]["workspace"].startswith("tools/shell/tool.yaml:")
    denied = there("policy", "explain", "--files", "example", "shell", "{}", status=4)
    assert "rule     tools/shell/tool.yaml:" in denied.stdout
    assert "missing 'command'" in denied.stdout
    assert "no agent 'exampel'" in there("policy", "explain", "exampel", "shell", status=3).stderr


def test_the_daemon_says_which_variables_a_call_would_lack(daemon: Ctl) -> None:
    call = ("sh", "http_request", '{"url": "https://a.example/"}')
    got = daemon.json("policy", "explain", *call)
    by_name = {item["variable"]: item for item in got["inject"]}
    assert by_name["HTTP_REQUEST_TOKEN"]["version"] is None
    assert [by_name[f"HTTP_REQUEST_{n}"]["redact"] for n in ("TOKEN", "HOSTS")] == [True, False]
    assert got["isolation"]
    said = daemon("policy", "explain", *call).stdout
    assert "so the call is denied; sandboxctl env set sh HTTP_REQUEST_TOKEN" in said
    assert "network    host (tools/http_request/tool.yaml:" in said
    assert "HTTP_REQUEST_HOSTS as HTTP_REQUEST_HOSTS (env, shown in output" in said


def test_a_diff_tells_what_a_reload_would_change(daemon: Ctl, extra: Path) -> None:
    assert daemon("policy", "diff", "--exit-code").stdout == ""
    extra.write_text(
        "version: 1\ndescription: d\nextends: default\nlimits: {memory: 64M}\n"
        "rules:\n  - {deny: http_request}\n"
    )
    extra.chmod(0o644)
    agent = daemon.directory / "config/agents/sh.yaml"
    agent.write_text(agent.read_text() + "policy: mine\n")
    done = daemon("policy", "diff", "--exit-code", status=1)
    assert done.stdout.splitlines() == [
        "sh (its own process)",
        "  policy: default -> mine",
        "sh http_request",
        "  verdict: allow -> deny",
        "  rules:",
        "    - allow",
        "    + deny",
        "  limits memory: 536870912 -> 67108864",
        "sh shell",
        "  limits memory: 1073741824 -> 67108864",
    ]
    got = daemon.json("policy", "diff", str(daemon.directory / "config"))
    assert {c["tool"] for c in got["changes"]} == {None, "http_request", "shell"}
    assert daemon.json("status")["generation"] == got["old"] != got["new"]
    agent.write_text("version: 1\n")
    assert "sh.yaml:1:1: missing key" in daemon("policy", "diff", status=2).stderr


def test_a_diff_needs_the_daemon(there: Ctl) -> None:
    assert there("policy", "diff", status=6).returncode == 6
