"""The shipped manifests as the daemon loads them, and the shell as they make it run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sandboxd.policy import Config, Decision, decide, load_config

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("git", "http_request", "shell", "sql_query")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration with one agent that has every shipped tool."""
    directory = tmp_path_factory.mktemp("config")
    (directory / "agents").mkdir()
    listed = "".join(f"  - {name}\n" for name in TOOLS)
    (directory / "agents" / "all.yaml").write_text(
        f"version: 1\ndescription: has every tool\ncommand: [/bin/true]\ntools:\n{listed}"
    )
    return load_config(directory, shipped_policies=ROOT / "policies", shipped_tools=ROOT / "tools")


@pytest.fixture
def judge(config: Config) -> Any:
    def run(tool: str, arguments: Any) -> Decision:
        return decide(config, config.agents["all"], tool, arguments)

    return run


def test_every_shipped_tool_loads_without_a_warning(config: Config) -> None:
    assert sorted(config.tools) == sorted(TOOLS)
    assert config.warnings == ()


def test_each_tool_gets_its_own_secrets_and_no_more_network_than_it_needs(config: Config) -> None:
    got = {
        name: (tool.network, tool.workspace, [secret.variable for secret in tool.secrets])
        for name, tool in config.tools.items()
    }
    assert got == {
        "git": (
            "host",
            "rw",
            ["REPOSITORY_TOKEN", "REPOSITORY_HOSTS", "REPOSITORY_USERNAME"],
        ),
        "http_request": (
            "host",
            "none",
            ["HTTP_REQUEST_TOKEN", "HTTP_REQUEST_HOSTS", "HTTP_REQUEST_HEADER"],
        ),
        "shell": ("none", "rw", []),
        "sql_query": ("host", "rw", ["DATABASE_URL", "SQL_QUERY_MODE"]),
    }


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("http_request", {"url": "https://api.example.com/", "json": {"a": [1]}}),
        ("sql_query", {"sql": "SELECT $1", "parameters": ["a", 1, None, True]}),
        ("git", {"operation": "clone", "url": "https://github.com/a/b", "directory": "b"}),
        ("git", {"operation": "push", "force": True}),
    ],
)
def test_arguments_that_fit_are_allowed(judge: Any, tool: str, arguments: Any) -> None:
    assert judge(tool, arguments).allowed
    assert not judge(tool, arguments | {"unknown": 1}).allowed


@pytest.mark.parametrize("name", TOOLS)
def test_manifest_and_program_know_the_same_arguments_and_secrets(
    config: Config, name: str
) -> None:
    tool = config.tools[name]
    readme = (tool.directory / "README.md").read_text()
    for secret in tool.secrets:
        assert secret.variable in readme
        assert f'"{secret.variable}"' in tool.program.read_text()
    if tool.runtime == "python":
        words = tool.program.read_text()
        for argument in tool.input_schema["properties"]:
            assert f'"{argument}"' in words
    manual = (ROOT / "docs" / "tools.md").read_text()
    assert re.search(rf"^## `{name}`", manual, re.MULTILINE)


def test_the_manuals_examples_load_and_decide_as_it_says(tmp_path: Path) -> None:
    manual = (ROOT / "docs" / "tools.md").read_text()
    for path, text in re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", manual, re.MULTILINE | re.DOTALL):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    agent = tmp_path / "agents" / "helper.yaml"
    words = agent.read_text()
    assert "tools: [http_request, shell]" in words
    agent.write_text(
        words.replace("shell]", "shell, weather, git]") + "policy: careful\n",
    )
    loaded = load_config(tmp_path, shipped_policies=ROOT / "policies", shipped_tools=ROOT / "tools")
    assert loaded.warnings == ()
    helper = loaded.agents["helper"]
    assert decide(loaded, helper, "git", {"operation": "push"}).allowed
    denied = decide(loaded, helper, "git", {"operation": "push", "force": True})
    assert denied.reason == "nobody rewrites history here"
    weather = loaded.tools["weather"]
    assert [secret.variable for secret in weather.secrets] == ["WEATHER_KEY"]


# --- shell ---


@pytest.fixture
def shell(config: Config, judge: Any, tmp_path: Path) -> Any:
    def run(command: str) -> subprocess.CompletedProcess[str]:
        decision = judge("shell", {"command": command})
        assert decision.allowed, decision.reason
        program = config.tools["shell"].program
        return subprocess.run(
            [program, *decision.argv],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_shell_runs_in_its_folder_and_passes_its_status(shell: Any, tmp_path: Path) -> None:
    ran = shell("pwd; echo problem >&2; echo data > file; exit 7")
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, f"{tmp_path}\n", "problem\n")
    assert (tmp_path / "file").read_text() == "data\n"


def test_a_command_is_one_argument_whatever_it_holds(shell: Any) -> None:
    assert shell('echo \'a  b\' "$#" "$0"').stdout.startswith("a  b 0 ")
    assert shell("printf %s '{command} {{x}}'").stdout == "{command} {{x}}"


def test_a_command_cannot_be_an_option(judge: Any) -> None:
    assert not judge("shell", {"command": "-i"}).allowed
    assert judge("shell", {"command": " -i"}).allowed
