"""Loading: every refusal with file, line and column; all of them at once; names across files."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from sandboxd.errors import SandboxdError
from sandboxd.paths import shipped
from sandboxd.policy import ConfigErrors, load_config, load_settings

ROOT = os.geteuid() == 0


def test_a_small_configuration_loads(config: Any) -> None:
    loaded = config.load()
    agent = loaded.agents["coder"]
    assert agent.slug == "coder"
    assert agent.source == "agents/coder.yaml"
    assert agent.policy == "default"
    assert set(loaded.tools) >= {"echo", "shell", "git", "http_request", "sql_query"}
    assert set(loaded.policies) == {"default", "strict", "agent"}
    assert loaded.tools["echo"].program == config.path / "tools/echo/run"


def test_an_empty_directory_has_the_shipped_tools_and_policies(tmp_path: Path) -> None:
    loaded = load_config(
        tmp_path, shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )
    assert not loaded.agents
    assert loaded.tools["shell"].shipped
    assert loaded.policies["strict"].shipped


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("tmeout: 3\n", "5:1: unknown key 'tmeout'"),
        ("polcy: default\n", "5:1: unknown key 'polcy'"),
        ("policy: 3\n", "5:9: policy: expected text, found a number or a truth value"),
        ("policy: Default\n", "5:9: policy: 'Default' is not a slug"),
        ("args_allowed: 1\n", "5:15: args_allowed: expected true or false, found the number 1"),
        ("args_allowed: yes\n", "5:15: args_allowed: expected true or false, found the text 'yes'"),
        ("network: hots\n", "5:10: network: expected none or host, found the text 'hots'"),
        ("network: allowlist\n", "5:10: network: expected none or host"),
        ("policy:\n", "5:1: policy has no value"),
        ("workspace: /srv/x\n", "5:12: workspace: expected a mapping, found the text '/srv/x'"),
        ("workspace: {path: srv/x}\n", "5:19: workspace.path: expected an absolute path"),
        ("workspace: {path: ~/x}\n", "5:19: workspace.path: expected an absolute path"),
        ("workspace: {path: /a/../b}\n", "5:19: workspace.path: the path '/a/../b' is not in its"),
        ("workspace: {path: /a/}\n", "5:19: workspace.path: the path '/a/' is not in its plain"),
        ("workspace: {quota: 1G}\n", "5:20: a workspace of mode rw has no quota"),
        ("workspace: {mode: overlay, quota: 1K}\n", "5:35: expected a quota of at least 1M"),
        ("workspace: {mod: rw}\n", "5:13: unknown key 'mod' in workspace"),
        ("limits: {memory: 64Q}\n", "5:18: limits.memory: expected a size, found the text '64Q'"),
        ("limits: {memory: true}\n", "5:18: limits.memory: expected a size, found true"),
        ("limits: {memory: 1.5}\n", "5:18: limits.memory: expected a size, found the number 1.5"),
        ("limits: {memory: 0}\n", "5:18: limits.memory: expected a size from 1"),
        ("limits: {memory: -1}\n", "5:18: limits.memory: expected a size from 1"),
        ("limits: {processes: true}\n", "5:21: limits.processes: expected a whole number"),
        ("limits: {processes: '3'}\n", "5:21: limits.processes: expected a whole number"),
        ("limits: {processes: 0}\n", "5:21: limits.processes: expected a whole number from 1"),
        ("limits: {cpu: 3 minutes}\n", "5:15: limits.cpu: expected a duration"),
        ("limits: {cpu: 0s}\n", "5:15: limits.cpu: expected a duration over zero"),
        ("limits: {cpu: 400d}\n", "5:15: limits.cpu: expected a duration over zero and at most"),
        ("limits: {cpus: true}\n", "5:16: limits.cpus: expected a number of processors, found t"),
        ("limits: {cpus: '2'}\n", "5:16: limits.cpus: expected a number of processors, found the"),
        ("limits: {cpus: 0}\n", "5:16: limits.cpus: expected a number of processors from 0.01"),
        ("limits: {cpus: .nan}\n", "5:16: limits.cpus: expected a number of processors, found the"),
        ("limits: {cpus: 5000}\n", "5:16: limits.cpus: expected a number of processors from 0.01"),
        ("environment: [A]\n", "5:14: environment: expected a mapping, found a list"),
        ("environment: {A: 1}\n", "5:18: environment.A: expected text, found a number"),
        ("environment: {1A: x}\n", "5:15: '1A' is not a variable name"),
        ("environment: {LD_PRELOAD: /x}\n", "5:15: LD_PRELOAD is refused: the dynamic loader"),
        ("environment: {SANDBOXD_X: x}\n", "5:15: SANDBOXD_X is set by sandboxd alone"),
        ("allow_environment: {PATH: x}\n", "5:21: PATH is not in environment"),
        ("mounts: [{source: /srv}]\n", "5:10: missing key 'target' in mounts[0]"),
        ("mounts: [{source: /sys, target: /x}]\n", "5:19: /sys of the host is never mounted"),
        ("mounts: [{source: /proc/1, target: /x}]\n", "5:19: /proc/1 of the host is never"),
        ("mounts: [{source: /srv, target: /proc/x}]\n", "5:33: /proc/x belongs to the sandbox"),
        ("mounts: [{source: /srv, target: /run/secrets}]\n", "5:33: /run/secrets belongs"),
        ("mounts: [{source: /srv, target: /workspace}]\n", "5:33: /workspace belongs to"),
        ("mounts: {source: /srv}\n", "5:9: mounts: expected a list, found a mapping"),
        ("version: 1\n", "5:1: the key 'version' is here twice, first in line 1"),
    ],
)
def test_a_mistake_in_an_agent_is_told_with_its_place(config: Any, more: str, problem: str) -> None:
    config.agent(more)
    assert config.problem().startswith(f"agents/coder.yaml:{problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1:1: expected a mapping, found an empty file"),
        ("# nothing\n", "1:1: expected a mapping, found an empty file"),
        ("- a\n", "1:1: expected a mapping, found a list"),
        ("description: d\ncommand: [sh]\n", "1:1: missing key 'version'"),
        ("version: 0\ndescription: d\ncommand: [sh]\n", "1:10: expected version 1, found the nu"),
        (
            "version: 2\nnew: x\n",
            "1:10: version 2 is newer than this sandboxd, ",
        ),
        ("version: true\ndescription: d\ncommand: [sh]\n", "1:10: expected version 1, found tr"),
        ("version: '1'\ndescription: d\ncommand: [sh]\n", "1:10: expected version 1, found the t"),
        ("version: 1\ndescription: d\n", "1:1: missing key 'command'"),
        ("version: 1\ndescription: d\ncommand: []\n", "3:10: expected at least a program"),
        ("version: 1\ndescription: d\ncommand: sh\n", "3:10: command: expected a list, found the"),
        ("version: 1\ndescription: d\ncommand: [sh, 1]\n", "3:15: command[1]: expected text"),
        ("version: 1\ndescription: ' '\ncommand: [sh]\n", "2:14: description: expected some tex"),
        ('version: 1\ndescription: "a\\u202eb"\ncommand: [sh]\n', "2:14: description: a control"),
        ("version: 1\ndescription: d\ncommand: [sh]\ntools: [nope]\n", "4:9: no tool 'nope'"),
        ("version: 1\ndescription: d\ncommand: [sh]\ntools: [git, git]\n", "4:14: the tool 'git'"),
        ("version: 1\ndescription: d\ncommand: [sh]\npolicy: nope\n", "4:9: no policy 'nope'"),
    ],
)
def test_a_broken_agent_file_is_told_with_its_place(config: Any, text: str, problem: str) -> None:
    config.write("agents/other.yaml", text)
    assert config.problem().startswith(f"agents/other.yaml:{problem}")


def test_hints_name_what_was_probably_meant(config: Any) -> None:
    config.agent("netwrok: none\n")
    assert config.hint() == "did you mean 'network'?"
    config.agent("network: hosts\n")
    assert config.hint() == "did you mean 'host'?"
    config.agent(tools="[ehco]")
    assert config.hint() == "did you mean 'echo'?"
    config.agent("policy: strct\n")
    assert config.hint() == "did you mean 'strict'?"


def test_every_problem_of_every_file_is_reported_at_once_in_order(config: Any) -> None:
    config.write("sandboxd.yaml", "version: 1\nlog_level: loud\nmax_sessions: none\n")
    config.agent("tmeout: 1\nnetwork: x\nlimits: {memory: x, files: x}\n")
    config.tool("timeout: soon\n")
    config.policy("mine", "network: open\nrules: [{allow: 3}]\n")
    config.write("policies/broken.yaml", "a: [")
    problems = config.problems()
    assert [p.split(": ")[0] for p in problems] == [
        "agents/coder.yaml:5:1",
        "agents/coder.yaml:6:10",
        "agents/coder.yaml:7:18",
        "agents/coder.yaml:7:28",
        "policies/broken.yaml:1:5",
        "policies/mine.yaml:3:10",
        "policies/mine.yaml:4:17",
        "sandboxd.yaml:2:12",
        "sandboxd.yaml:3:15",
        "tools/echo/tool.yaml:11:10",
    ]


def test_the_error_of_several_problems_lists_them_with_hints(config: Any) -> None:
    config.agent("netwrok: none\npolcy: x\n")
    with pytest.raises(SandboxdError) as caught:
        config.load()
    assert isinstance(caught.value, ConfigErrors)
    assert caught.value.exit_code == 2
    assert caught.value.message.startswith("2 problems in the configuration\n")
    assert "hint: did you mean 'network'?" in caught.value.message
    assert f"{config.path}/agents/coder.yaml:5:1: unknown key 'netwrok'" in caught.value.message


def test_a_name_in_a_broken_file_is_not_missing_as_well(config: Any) -> None:
    config.tool("timeout: soon\n")
    config.policy("mine", "network: open\n")
    config.agent("policy: mine\n")
    config.policy("child", "extends: mine\nrules: [{allow: echo}]\n")
    assert [p.split(":")[0] for p in config.problems()] == [
        "policies/mine.yaml",
        "tools/echo/tool.yaml",
    ]


def test_a_missing_directory_is_told_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match="no such directory") as caught:
        load_config(
            tmp_path / "no", shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
        )
    assert caught.value.hint == "make one with: sandboxctl init"


def test_files_that_would_be_read_by_another_name_are_told(config: Any) -> None:
    config.write("agents/second.yml", "version: 1\n")
    assert config.problem() == "agents/second.yml: is not read"
    assert config.hint() == "name it second.yaml"


def test_a_file_name_that_is_no_slug_is_refused(config: Any) -> None:
    config.write("agents/My Agent.yaml", "version: 1\n")
    assert "bad file name: 'My Agent' is not a slug" in config.problem()


def test_hidden_files_backups_and_notes_are_left_alone(config: Any) -> None:
    for name in ("agents/.#coder.yaml", "agents/coder.yaml~", "agents/README.md", "tools/README"):
        config.write(name, "not: [yaml")
    assert set(config.load().agents) == {"coder"}


def test_a_tool_folder_without_a_manifest_is_told(config: Any) -> None:
    (config.path / "tools/empty").mkdir()
    assert config.problem() == "tools/empty: has no tool.yaml"


def test_a_file_that_is_too_large_is_refused(config: Any) -> None:
    config.write("agents/big.yaml", "version: 1 #" + "x" * (256 * 1024))
    assert config.problem() == "agents/big.yaml:1:1: larger than 262,144 bytes"


def test_a_symbolic_link_is_not_read(config: Any, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.yaml"
    target.write_text((config.path / "agents/coder.yaml").read_text())
    (config.path / "agents/linked.yaml").symlink_to(target)
    assert "agents/linked.yaml: is a symbolic link" in config.problem()


def test_a_dangling_symbolic_link_is_not_taken_for_no_file(config: Any) -> None:
    (config.path / "sandboxd.yaml").symlink_to("/nonexistent")
    assert "sandboxd.yaml: is a symbolic link" in config.problem()


def test_a_linked_folder_is_not_read(config: Any, tmp_path: Path) -> None:
    (config.path / "policies").symlink_to(tmp_path)
    assert "policies: expected a directory, not a symbolic link" in config.problem()


def test_the_configuration_directory_itself_may_be_a_link(config: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(config.path)
    loaded = load_config(
        tmp_path / "link", shipped_policies=shipped("policies"), shipped_tools=shipped("tools")
    )
    assert "coder" in loaded.agents


def test_a_fifo_is_refused_without_waiting(config: Any) -> None:
    os.mkfifo(config.path / "agents/pipe.yaml")
    assert config.problem() == "agents/pipe.yaml: expected a regular file"


@pytest.mark.parametrize("name", ["agents/coder.yaml", "agents", "tools", "."])
@pytest.mark.parametrize("mode", [0o002, 0o022])
def test_what_others_can_write_is_not_trusted(config: Any, name: str, mode: int) -> None:
    path = config.path / name
    path.chmod(path.stat().st_mode | mode)
    (problem, *_) = config.problems()
    assert "is writable by everybody" in problem


@pytest.mark.skipif(not ROOT, reason="gives files away")
@pytest.mark.parametrize("name", ["agents/coder.yaml", "agents", "tools/echo", "tools/echo/run"])
def test_what_belongs_to_somebody_else_is_not_trusted(config: Any, name: str) -> None:
    os.chown(config.path / name, 12345, 0)
    assert any(
        "belongs to uid 12345, neither root nor this daemon's user" in p for p in config.problems()
    )


@pytest.mark.skipif(not ROOT, reason="gives files away")
def test_a_group_of_others_that_can_write_is_not_trusted(config: Any) -> None:
    path = config.path / "agents/coder.yaml"
    os.chown(path, 0, 54321)
    path.chmod(0o664)
    assert "is writable by its group" in config.problem()
    path.chmod(0o644)
    assert config.load()


def test_the_owners_private_group_may_write(config: Any) -> None:
    """umask 002 with user-private groups, as Debian and Fedora set it up."""
    import grp
    import pwd

    name = pwd.getpwuid(os.geteuid()).pw_name
    group = grp.getgrgid(os.getegid())
    if group.gr_name != name or set(group.gr_mem) - {name}:
        pytest.skip("this user has no private group")
    (config.path / "agents/coder.yaml").chmod(0o664)
    assert config.load()


# sandboxd.yaml


def test_settings_have_defaults_and_are_read_alone(config: Any) -> None:
    assert load_settings(config.path).max_sessions == 64
    config.write(
        "sandboxd.yaml",
        """\
        version: 1
        key: {file: /etc/sandboxd/key}
        user: broker
        admin_group: wheel
        log_level: debug
        max_sessions: 3
        max_concurrent_calls: 4
        uid_range: {first: 200000, count: 1000}
        """,
    )
    settings = load_settings(config.path)
    assert settings == config.load().settings
    assert settings.key is not None
    assert settings.key.kind == "file"
    assert settings.key.file == Path("/etc/sandboxd/key")
    assert (settings.user, settings.admin_group, settings.log_level) == ("broker", "wheel", "debug")
    assert (settings.max_sessions, settings.max_concurrent_calls) == (3, 4)
    assert (settings.uid_range.first, settings.uid_range.count) == (200_000, 1000)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("{credential: sandboxd.key}", "credential"),
        ("{passphrase: true}", "passphrase"),
        ("{passphrase_file: /etc/sandboxd/pass}", "passphrase"),
        ("{file: /k}", "file"),
    ],
)
def test_the_key_comes_from_one_of_three_places(config: Any, key: str, kind: str) -> None:
    config.write("sandboxd.yaml", f"version: 1\nkey: {key}\n")
    got = config.load().settings.key
    assert got is not None
    assert got.kind == kind


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("key: {}", "2:6: expected exactly one of file, credential and passphrase"),
        ("key: {file: /k, credential: c}", "2:6: expected exactly one of file"),
        ("key: {credential: ../c}", "2:19: expected a credential's name"),
        ("key: {credential: ''}", "2:19: expected a credential's name"),
        ("key: /etc/key", "2:6: key: expected a mapping"),
        ("uid_range: {first: 1000, count: 10}", "2:12: expected a range of user ids"),
        ("uid_range: {first: 2147483000, count: 9999}", "2:12: expected a range of user ids"),
        ("uid_range: {first: 70000}", "2:12: missing key 'count' in uid_range"),
        ("max_sessions: 0", "2:15: max_sessions: expected a whole number from 1"),
        ("max_sessions: 2.5", "2:15: max_sessions: expected a whole number"),
    ],
)
def test_a_mistake_in_the_settings_is_told_by_both_readers(
    config: Any, line: str, problem: str
) -> None:
    config.write("sandboxd.yaml", f"version: 1\n{line}\n")
    assert config.problem().startswith(f"sandboxd.yaml:{problem}")
    with pytest.raises(ConfigErrors):
        load_settings(config.path)


def test_a_passphrase_written_into_the_settings_is_not_shown(config: Any) -> None:
    config.write("sandboxd.yaml", "version: 1\nkey: {passphrase: hunter2}\n")
    with pytest.raises(ConfigErrors) as caught:
        config.load()
    shown = f"{caught.value!r} {caught.value} {caught.value.hint} {caught.value.errors}"
    assert "hunter2" not in shown
    assert "passphrase_file" in caught.value.hint


# Across files


def test_an_agent_may_not_have_more_network_than_its_policy(config: Any) -> None:
    config.agent("network: host\n")
    problem = config.problem()
    assert problem == (
        "agents/coder.yaml:5:10: network: host, and policy 'default' allows its agents none"
    )
    config.agent("network: host\npolicy: agent\n")
    assert config.load().agents["coder"].network == "host"


def test_a_tool_that_the_policy_will_always_deny_is_a_warning(config: Any) -> None:
    config.agent("policy: strict\n", tools="[echo, http_request]")
    (warning,) = [w for w in config.load().warnings if "coder.yaml" in w]
    assert "agents/coder.yaml:4:15: http_request needs network: host" in warning


@pytest.mark.parametrize(
    "more",
    [
        "mounts: [{source: CONFIG, target: /x}]\n",
        "mounts: [{source: CONFIG/agents, target: /x}]\n",
        "workspace: {path: CONFIG}\n",
        "workspace: {path: CONFIG/work}\n",
    ],
)
def test_no_agent_sees_the_configuration(config: Any, more: str) -> None:
    config.agent(more.replace("CONFIG", str(config.path)))
    assert any("would show the configuration" in p for p in config.problems())


def test_no_agent_sees_the_configuration_from_above_or_through_a_link(
    config: Any, tmp_path: Path
) -> None:
    config.agent(f"workspace: {{path: {tmp_path}}}\n")
    assert any("would show the configuration" in p for p in config.problems())
    (tmp_path / "link").symlink_to(config.path)
    config.agent(f"workspace: {{path: {tmp_path}/link}}\n")
    assert any("would show the configuration" in p for p in config.problems())


def test_no_agent_and_no_tool_sees_the_master_key(config: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    config.write("sandboxd.yaml", f"version: 1\nkey: {{file: {keys}/master}}\n")
    config.agent(f"mounts: [{{source: {keys}, target: /x}}]\n")
    config.tool(f"mounts: [{{source: {keys}, target: /x}}]\n")
    assert sum("would show the master key" in p for p in config.problems()) == 2


def test_no_agent_writes_where_a_tools_program_lives(config: Any) -> None:
    config.agent("mounts: [{source: /usr/bin, target: /x, mode: rw}]\n")
    assert any("would let an agent change the program of shell" in p for p in config.problems())
    config.agent("mounts: [{source: /usr/bin, target: /x}]\n")
    assert config.load()


def test_no_tool_writes_where_a_tools_program_lives(config: Any) -> None:
    config.tool("mounts: [{source: /usr/bin, target: /x, mode: rw}]\n")
    assert any("would let an agent change the program of shell" in p for p in config.problems())


def test_a_socket_of_the_host_is_never_mounted(config: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        config.agent(f"mounts: [{{source: {tmp_path}/s, target: /x}}]\n")
        assert "is a socket, a way out of the sandbox" in config.problem()


def test_two_mounts_on_one_place_are_refused(config: Any, tmp_path: Path) -> None:
    one = f"{{source: {tmp_path}/a, target: /x}}"
    config.agent(f"mounts: [{one}, {one}]\n")
    assert "/x is mounted twice" in config.problem()


def test_a_loader_variable_needs_a_reason(config: Any) -> None:
    config.agent("environment: {PATH: /opt/bin:/usr/bin}\n")
    assert "PATH is refused: it decides which programs" in config.problem()
    config.agent(
        "environment: {PATH: /opt/bin:/usr/bin}\nallow_environment: {PATH: node lives in /opt}\n"
    )
    assert config.load().agents["coder"].environment["PATH"] == "/opt/bin:/usr/bin"


# Generation


def test_the_generation_changes_with_every_file_and_program(config: Any) -> None:
    first = config.load().generation
    assert config.load().generation == first
    seen = {first}
    config.agent("args_allowed: true\n")
    seen.add(config.load().generation)
    config.program("tools/echo/run", "#!/bin/sh\necho other\n")
    seen.add(config.load().generation)
    config.write("sandboxd.yaml", "version: 1\n")
    seen.add(config.load().generation)
    config.policy("mine", "rules: []\n")
    seen.add(config.load().generation)
    assert len(seen) == 5


def test_what_was_loaded_can_not_be_changed(config: Any) -> None:
    loaded = config.load()
    with pytest.raises(TypeError):
        loaded.agents["x"] = loaded.agents["coder"]
    with pytest.raises(AttributeError):
        loaded.agents["coder"].network = "host"
    with pytest.raises(TypeError):
        loaded.agents["coder"].environment["A"] = "b"
