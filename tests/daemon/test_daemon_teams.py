"""Teams in a real daemon: whose agents, variables, workspaces and records are whose."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from real_daemon import RealDaemon, until

from sandboxd.errors import Denied, Invalid, NotFound

TEAMS = """
version: 1
teams:
  red: {name: Red team}
  blue: {name: Blue team}
"""
TOOL = "input: {type: object}\nsecrets: [{variable: TOKEN, redact: false}]\nworkspace: rw\n"
VALUE = "value-of-the-red-team"


def names(daemon: RealDaemon, agent: str, **more: Any) -> list[str]:
    return [row["name"] for row in daemon.call("env.list", agent=agent, **more)["variables"]]


def output(daemon: RealDaemon, session: str) -> bytes:
    with daemon.client() as client:
        items = client.stream("session.logs", id=session, follow=False)
        return b"".join(base64.b64decode(item["data"]) for item in items)


@pytest.fixture
def teams(configured: RealDaemon) -> RealDaemon:
    configured.write("sandboxd.yaml", TEAMS)
    configured.tool("show", '#!/bin/sh\necho "token $TOKEN"; ls /workspace\n', TOOL)
    configured.agent("bot", "echo mine > /workspace/of-red; sleep 300", team="red", tools="[show]")
    configured.agent("plain", "sleep 300")
    configured.start()
    return configured


def move(daemon: RealDaemon, to: str) -> None:
    daemon.agent("bot", "ls /workspace; echo listed; sleep 300", team=to, tools="[show]")
    daemon.call("reload")


def run_tool(daemon: RealDaemon, **where: Any) -> tuple[str, dict[str, Any]]:
    with daemon.client() as client:
        items = list(client.stream("tools.run", tool="show", **where))
    printed = b"".join(base64.b64decode(item["data"]) for item in items[:-1])
    return printed.decode(), items[-1]["ended"]


def test_an_agent_that_moves_takes_no_variable_along(teams: RealDaemon) -> None:
    teams.set("bot", TOKEN=VALUE)
    assert run_tool(teams, agent="bot")[0] == f"token {VALUE}\n"
    move(teams, "blue")
    assert names(teams, "bot") == []
    printed, ended = run_tool(teams, agent="bot")
    assert printed == ""
    assert (ended["outcome"], ended["message"]) == ("denied", "bot has no variable TOKEN")
    teams.set("bot", TOKEN="value-of-the-blue-team")
    assert run_tool(teams, agent="bot")[0] == "token value-of-the-blue-team\n"
    move(teams, "red")
    assert run_tool(teams, agent="bot")[0] == f"token {VALUE}\n"


def test_what_an_agent_left_behind_is_listed_and_removed_by_its_team(teams: RealDaemon) -> None:
    teams.set("bot", TOKEN=VALUE)
    move(teams, "blue")
    listed = teams.ctl("env", "list", "bot")
    assert listed.stdout == ""
    assert listed.stderr == (
        "bot has no variables in team blue\nit has others in team red: --team shows them\n"
    )
    assert names(teams, "bot", team="red") == ["TOKEN"]
    assert "TOKEN" in teams.ctl("env", "list", "--team", "red", "bot").stdout
    refused = teams.ctl("env", "remove", "bot", "TOKEN")
    assert refused.returncode == 3
    removed = teams.ctl("env", "remove", "--team", "red", "bot", "TOKEN")
    assert removed.stdout.startswith("removed TOKEN")
    assert names(teams, "bot", team="red") == []


def test_variables_of_an_agent_that_is_no_more_are_removed_without_naming_its_team(
    teams: RealDaemon,
) -> None:
    teams.set("bot", TOKEN=VALUE)
    (teams.paths.config / "agents/bot.yaml").unlink()
    teams.call("reload")
    assert teams.ctl("env", "list", "bot").returncode == 3
    assert teams.ctl("env", "remove", "bot", "TOKEN").returncode == 0
    assert teams.audit()[-1] | {"team": "red", "agent": "bot"} == teams.audit()[-1]


def test_a_live_session_stays_with_the_team_that_it_began_in(teams: RealDaemon) -> None:
    teams.set("bot", TOKEN=VALUE)
    session = teams.call("session.start", agent="bot")["id"]
    move(teams, "blue")
    teams.set("bot", now=True, TOKEN="value-of-the-blue-team")  # takes nothing from red's session
    assert run_tool(teams, session=session)[0].startswith(f"token {VALUE}\n")
    shown = teams.call("session.show", id=session)
    assert (shown["team"], shown["variables"]) == ("red", {"TOKEN": 1})
    (row,) = [row for row in teams.call("agents.list")["agents"] if row["slug"] == "bot"]
    assert (row["team"], row["sessions"], row["variables"]) == ("blue", 0, 1)
    teams.call("env.remove", agent="bot", names=["TOKEN"], team="red", now=True)
    _, ended = run_tool(teams, session=session)
    assert ended["message"] == "the variable TOKEN was revoked"
    teams.call("session.stop", id=session, grace=0)
    (record,) = teams.call("session.list", all=True)["sessions"]
    assert record["team"] == "red"


def test_workspaces_of_two_teams_are_two_directories(teams: RealDaemon) -> None:
    first = teams.call("session.start", agent="bot")["id"]
    workspace = teams.paths.workspaces / "red.bot"
    until(lambda: (workspace / "of-red").exists())
    teams.call("session.stop", id=first, grace=0)
    move(teams, "blue")
    second = teams.call("session.start", agent="bot")["id"]
    until(lambda: output(teams, second) == b"listed\n")
    assert teams.call("session.show", id=second)["workspace"] == str(
        teams.paths.workspaces / "blue.bot"
    )
    plain = teams.call("session.start", agent="plain")["id"]
    assert teams.call("session.show", id=plain)["workspace"] == str(
        teams.paths.workspaces / "plain"
    )
    move(teams, "red")
    third = teams.call("session.start", agent="bot")["id"]
    until(lambda: output(teams, third) == b"of-red\nlisted\n")


#: Records of the daemon's own life, which is no team's.
OWN = {"daemon.started", "daemon.reloaded", "daemon.stopping", "admin.refused"}


def test_every_record_of_an_agent_or_session_says_whose_it_is(teams: RealDaemon) -> None:
    teams.set("bot", TOKEN=VALUE)
    teams.set("plain", OTHER="value-of-the-default-team")
    session = teams.call("session.start", agent="bot")["id"]
    run_tool(teams, session=session)
    run_tool(teams, agent="bot")
    with pytest.raises(NotFound):
        teams.call("env.remove", agent="bot", names=["NONE"])
    teams.set("bot", now=True, TOKEN="value-of-the-red-team-2")
    teams.call("env.remove", agent="bot", names=["TOKEN"], now=True)
    teams.call("session.stop", id=session, grace=0)
    records = [record for record in teams.audit() if record["event"] not in OWN]
    assert {record["event"] for record in records} >= {
        *("env.set", "env.revoked", "env.removed", "admin.failed", "tools.run"),
        *("session.started", "session.ended", "call.decided", "call.launched", "call.ended"),
    }
    for record in records:
        team = {"bot": "red", "plain": "default"}[record["agent"]]
        assert record["team"] == team, record


def test_a_session_takes_plain_variables_of_its_own(configured: RealDaemon) -> None:
    configured.agent("env", "env | sort", environment="{FIXED: one}")
    configured.start()
    done = configured.ctl("run", "--env", "COLOUR=blue green", "--env", "EMPTY=", "env")
    assert "COLOUR=blue green\n" in done.stdout
    assert "EMPTY=\n" in done.stdout
    assert "FIXED=one\n" in done.stdout
    started = next(r for r in configured.audit() if r["event"] == "session.started")
    assert started["environment"] == ["COLOUR", "EMPTY"]
    assert "blue green" not in str(configured.audit())
    assert "COLOUR" not in configured.run("env").stdout
    session = configured.ctl("session", "start", "--env", "COLOUR=red", "env").stdout.strip()
    until(lambda: b"COLOUR=red\n" in output(configured, session))


@pytest.mark.parametrize(
    ("values", "error", "told"),
    [
        ({"LD_PRELOAD": "x"}, Denied, "LD_PRELOAD can't be set for a session: the dynamic loader"),
        ({"PATH": "/x"}, Denied, "PATH can't be set"),
        ({"SANDBOXD_SESSION": "s"}, Denied, "SANDBOXD_SESSION can't be set"),
        ({"https_proxy": "x"}, Denied, "https_proxy can't be set"),
        ({"FIXED": "two"}, Denied, "FIXED is fixed for agent env"),
        ({"A-B": "x"}, Invalid, "is not a variable name"),
        ({"A": "x\0y"}, Invalid, "the value of A holds a NUL byte"),
        ({"A": "x" * 70_000}, Invalid, "at most 128 variables of its own, 64 KiB together"),
        ({f"A{n}": "x" for n in range(129)}, Invalid, "at most 128 variables"),
        ({"A": 1}, Invalid, "maps names to texts"),
        (["A"], Invalid, "parameter environment must be of type dict"),
        ({"A": "\ud800"}, Invalid, "the value of A is not text"),
    ],
)
def test_a_variable_that_steers_or_replaces_is_refused_for_a_session(
    refusing: RealDaemon, values: Any, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        refusing.call("session.start", agent="env", environment=values)
    assert "two" not in str(caught.value)
    assert refusing.call("session.list", all=True)["sessions"] == []


@pytest.fixture(scope="module")
def refusing(request: pytest.FixtureRequest) -> Any:
    from real_daemon import directories

    with directories() as daemon:
        daemon.agent("env", "env", environment="{FIXED: one}")
        daemon.start()
        yield daemon


@pytest.mark.parametrize("lifetime", [0, -1, 1e9, True, "5"])
def test_a_lifetime_that_makes_no_sense_is_refused(refusing: RealDaemon, lifetime: Any) -> None:
    with pytest.raises(Invalid):
        refusing.call("session.start", agent="env", lifetime=lifetime)


def test_a_session_ends_when_its_time_is_over(configured: RealDaemon) -> None:
    configured.agent("long", "sleep 300")
    configured.start()
    done = configured.ctl("run", "--lifetime", "1s", "long")
    assert done.returncode == 128 + 15
    session = configured.ctl("session", "start", "--lifetime", "1h", "long").stdout.strip()
    shown = configured.call("session.show", id=session)
    assert shown["ends_at"] > shown["started_at"]
    assert "ends " in configured.ctl("session", "show", session).stdout
    ended = next(r for r in configured.audit() if r["event"] == "session.ended")
    assert ended["reason"] == "its time is over"
    assert 0.9 < ended["seconds"] < 30


def test_an_agent_is_shown_whole(teams: RealDaemon) -> None:
    teams.set("bot", SPARE="not-used-by-a-tool")
    session = teams.call("session.start", agent="bot")["id"]
    shown = teams.call("agents.show", agent="bot")
    assert (shown["team"], shown["team_name"]) == ("red", "Red team")
    assert shown["variables"] == [
        {"name": "SPARE", "version": 1, "required": False, "tools": []},
        {"name": "TOKEN", "version": None, "required": True, "tools": ["show"]},
    ]
    assert [row["id"] for row in shown["sessions"]] == [session]
    text = teams.ctl("agents", "show", "bot").stdout
    assert "SPARE (version 1; no tool uses it)" in text
    assert "TOKEN (not set, and needed; for show)" in text
    assert "red (Red team)" in text
    assert session in text
    assert "not-used-by-a-tool" not in text + str(shown)
    assert teams.ctl("agents", "show", "nobody").returncode == 3
    alone, listed = (teams.ctl(*words).stdout for words in (["agents"], ["agents", "list"]))
    assert alone == listed
    assert "TEAM" in alone
