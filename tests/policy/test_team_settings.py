"""Teams in the configuration: named once, asked for by agents, told at their line when missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TEAMS = """
    version: 1
    teams:
      red: {name: Red team}
      blue: {name: Blue team}
    """


def test_an_agent_is_of_the_team_that_its_file_names_or_of_the_default_one(config: Any) -> None:
    config.write("sandboxd.yaml", TEAMS)
    config.agent("team: red\n", slug="of-red")
    loaded = config.load()
    assert loaded.agents["of-red"].team == "red"
    assert loaded.agents["coder"].team == "default"
    assert loaded.settings.teams["red"].name == "Red team"
    assert [loaded.settings.has_team(team) for team in ("red", "default", "green")] == [
        True,
        True,
        False,
    ]


def test_the_default_team_may_be_given_a_name(config: Any) -> None:
    config.write("sandboxd.yaml", "version: 1\nteams: {default: {name: Everybody}}\n")
    assert config.load().settings.teams["default"].name == "Everybody"


@pytest.mark.parametrize(
    ("settings", "agent", "told"),
    [
        (TEAMS, "team: green\n", "agents/coder.yaml:5:7: no team 'green'"),
        (TEAMS, "team: Red\n", "agents/coder.yaml:5:7: team: 'Red' is not a slug"),
        ("version: 1\n", "team: red\n", "agents/coder.yaml:5:7: no team 'red'"),
        ("version: 1\nteams: {red: {}}\n", "", "sandboxd.yaml:2:14: missing key 'name'"),
        ("version: 1\nteams: [red]\n", "", "sandboxd.yaml:2:8: teams: expected a mapping"),
        ("version: 1\nteams: {R: {name: r}}\n", "", "sandboxd.yaml:2:12: teams.R: 'R' is not a"),
    ],
)
def test_a_team_that_is_not_there_is_told_at_its_line(
    config: Any, settings: str, agent: str, told: str
) -> None:
    config.write("sandboxd.yaml", settings)
    config.agent(agent)
    assert told in config.problem()


def test_settings_that_are_wrong_are_told_without_the_teams_that_they_might_name(
    config: Any,
) -> None:
    config.write("sandboxd.yaml", "version: 1\nteams: {red: {name: 7}}\n")
    config.agent("team: red\n")
    assert "no team" not in config.problem()


def test_a_directory_that_two_teams_share_is_warned_about(config: Any, tmp_path: Path) -> None:
    config.write("sandboxd.yaml", TEAMS)
    shared = tmp_path / "shared"
    (shared / "below").mkdir(parents=True)
    config.agent(f"team: red\nworkspace: {{path: {shared}}}\n", slug="of-red")
    mount = f"mounts: [{{source: {shared}/below, target: /data}}]\n"
    config.agent(f"team: blue\n{mount}", slug="of-blue")
    (warning,) = config.load().warnings
    assert "agents/of-blue.yaml:6:" in warning
    assert "is shared with agent of-red of team red, which can write there" in warning
    config.agent(f"team: red\n{mount}", slug="of-blue")
    assert config.load().warnings == ()
    config.agent(f"team: red\nworkspace: {{path: {shared}, mode: ro}}\n", slug="of-red")
    config.agent(f"team: blue\n{mount}", slug="of-blue")
    assert config.load().warnings == ()
