"""An agent that moves between teams, and what two teams share, as the keys of both meet them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from real_daemon import BROKER_UID, RealDaemon, directories, until

from sandboxd.access.denials import LIMIT

SCRIPT = "echo begun; while :; do sleep 0.2; done"
NEVER = "s-0000000000000000"


@dataclass
class Teams:
    """A daemon where ``bot`` was red's and is blue's now, with the traces that it left."""

    daemon: RealDaemon
    client: httpx2.Client
    keys: dict[str, str]
    live: str = ""
    ended: str = ""
    call: str = ""

    def ask(self, team: str, verb: str, path: str, body: Any = None) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {self.keys[team]}"}
        got = self.client.request(verb, path, json=body, headers=headers)
        return got.status_code, json.loads(got.text) if got.text else None

    def operate(self, whose: str, method: str, **params: Any) -> tuple[int, Any]:
        return self.ask(whose, "POST", f"/api/v1/operator/{method}", params)

    def lines(self, team: str, method: str, **params: Any) -> str:
        headers = {"authorization": f"Bearer {self.keys[team]}"}
        path = f"/api/v1/operator/{method}"
        return self.client.request("POST", path, json=params, headers=headers).text


def write_bot(daemon: RealDaemon, team: str) -> None:
    daemon.agent(
        "bot", SCRIPT, team=team, tools="[ask]", policy="asking", workspace="{mode: overlay}"
    )
    text = (daemon.paths.config / "agents/bot.yaml").read_text()
    daemon.write("agents/bot.yaml", text.replace("agent bot of a test", f"what {team} does"))


@pytest.fixture(scope="module")
def teams() -> Iterator[Teams]:
    with directories() as daemon:
        daemon.write("sandboxd.yaml", "version: 1\nteams:\n  red: {name: R}\n  blue: {name: B}\n")
        daemon.http("listen: 127.0.0.1:0\nlimits: {requests: 100000}")
        daemon.write(
            "policies/asking.yaml",
            "version: 1\ndescription: asks\nrules: [{ask: ask, reason: it costs}]\n",
        )
        none = "argv: []\ninput: {type: object, additionalProperties: false}\n"
        daemon.tool("ask", "#!/bin/sh\necho ran\n", none)
        write_bot(daemon, "red")
        shared = daemon.base / "shared"
        shared.mkdir()
        if os.geteuid() == 0:
            os.chown(shared, BROKER_UID, -1)
        for team in ("red", "blue"):
            workspace = f"{{mode: overlay, path: {shared}}}"
            daemon.agent(f"of-{team}", SCRIPT, team=team, workspace=workspace)
        daemon.start()
        with httpx2.Client(base_url=daemon.url, timeout=60) as client, daemon.client() as waiting:
            keys = {
                team: daemon.call("keys.create", team=team, role="owner", label=team)["secret"]
                for team in ("red", "blue")
            }
            made = Teams(daemon, client, keys)
            daemon.set("bot", RED_VARIABLE="a-value-of-the-red-team")
            made.live = made.operate("red", "session.start", agent="bot")[1]["id"]
            made.ended = made.operate("red", "session.start", agent="bot")[1]["id"]
            files = [{"path": "made-by-red", "content": "x"}]
            daemon.call("session.files.write", id=made.ended, files=files)
            daemon.call("session.stop", id=made.ended, grace=0)
            waiting.submit("tools.run", tool="ask", arguments={}, session=made.live)
            until(lambda: bool(daemon.call("approvals.list")["approvals"]))
            made.call = daemon.call("approvals.list")["approvals"][0]["id"]
            write_bot(daemon, "blue")
            daemon.call("reload")
            yield made


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("session.show", {}),
        ("session.wait", {}),
        ("session.logs", {}),
        ("session.diff", {}),
        ("session.apply", {}),
        ("session.discard", {}),
        ("session.stop", {}),
        ("session.signal", {"signal": 9}),
        ("session.exec", {"command": "id"}),
        ("session.files.list", {"path": "."}),
        ("session.files.read", {"path": "made-by-red"}),
    ],
)
@pytest.mark.parametrize("which", ["live", "ended"])
def test_the_new_team_finds_no_session_of_the_old_one(
    teams: Teams, method: str, params: Any, which: str
) -> None:
    id = getattr(teams, which)
    status, told = teams.operate("blue", method, id=id, **params)
    never = teams.operate("blue", method, id=NEVER, **params)
    assert status == 404
    assert (status, json.dumps(told).replace(id, NEVER)) == (never[0], json.dumps(never[1]))
    assert teams.daemon.call("session.show", id=teams.live)["state"] == "running"


def test_the_new_team_begins_with_nothing_of_the_old_one(teams: Teams) -> None:
    assert teams.operate("blue", "session.list", all=True)[1] == {"sessions": []}
    assert teams.operate("blue", "env.list", agent="bot")[1]["variables"] == []
    assert teams.operate("blue", "env.list", agent="bot")[1]["elsewhere"] == []
    assert teams.operate("blue", "env.list", agent="bot", team="red")[0] == 404
    gone = teams.operate("blue", "env.remove", agent="bot", team="red", names=["RED_VARIABLE"])
    assert gone[0] == 404
    assert teams.operate("blue", "approvals.list")[1] == {"approvals": []}
    for method in ("approvals.show", "approvals.approve", "approvals.deny"):
        assert teams.operate("blue", method, id=teams.call)[0] == 404
    shown = teams.operate("blue", "agents.show", agent="bot")[1]
    assert (shown["variables"], shown["sessions"]) == ([], [])
    assert teams.ask("blue", "GET", "/api/v1/agents/bot/logs")[1]["sandboxes"] == []
    assert teams.ask("blue", "GET", f"/api/v1/agents/bot/logs/{teams.ended}")[0] == 404
    assert teams.ask("blue", "GET", f"/v1/sandboxes/{teams.live}")[0] == 404
    assert teams.operate("blue", "status")[1]["sessions"] == 0
    records = teams.lines("blue", "audit.tail", n=1000)
    assert not {"RED_VARIABLE", teams.live, teams.ended, teams.call} & set(records.split('"'))
    daemon = {name for name in ("red", "RED_VARIABLE") if f'"{name}"' in records}
    assert daemon == set()
    assert "RED_VARIABLE" in teams.lines("red", "audit.tail", n=1000)  # there is something to see


def test_the_old_team_keeps_its_sessions_and_nothing_else_of_the_agent(teams: Teams) -> None:
    listed = teams.operate("red", "session.list", all=True)[1]["sessions"]
    assert {row["id"] for row in listed} >= {teams.live, teams.ended}
    assert teams.operate("red", "session.show", id=teams.live)[1]["team"] == "red"
    assert [row["id"] for row in teams.operate("red", "approvals.list")[1]["approvals"]] == [
        teams.call
    ]
    assert teams.operate("red", "session.diff", id=teams.ended)[0] == 200
    for method in ("agents.show", "env.list", "session.start", "policy.explain"):
        status, told = teams.operate("red", method, agent="bot", tool="ask")
        never = teams.operate("red", method, agent="nob", tool="ask")
        assert status == 404
        assert json.dumps(told).replace("'bot'", "'nob'") == json.dumps(never[1])
    slugs = [row["slug"] for row in teams.operate("red", "agents.list")[1]["agents"]]
    assert slugs == ["of-red"]
    # What the agent is called there now is the other team's to know.
    for id in (teams.live, teams.ended):
        status, sandbox = teams.ask("red", "GET", f"/v1/sandboxes/{id}")
        assert (status, sandbox["agent"]) == (200, {"slug": "bot", "name": "bot"})
    assert teams.operate("blue", "agents.show", agent="bot")[1]["description"] == "what blue does"


def test_a_session_of_another_team_on_the_same_workspace_is_not_named(teams: Teams) -> None:
    mine = teams.operate("red", "session.start", agent="of-red")[1]["id"]
    files = [{"path": "made", "content": "x"}]
    assert teams.operate("red", "session.files.write", id=mine, files=files)[0] == 200
    theirs = teams.operate("blue", "session.start", agent="of-blue")[1]["id"]
    teams.operate("red", "session.stop", id=mine, grace=0)
    status, told = teams.operate("red", "session.apply", id=mine)
    assert status == 409
    assert told["message"].startswith("a session of another team is running on top of the same")
    assert theirs not in json.dumps(told)
    teams.operate("blue", "session.stop", id=theirs, grace=0)
    assert teams.operate("red", "session.apply", id=mine)[0] == 200


def test_deleting_an_agent_tells_and_puts_in_force_nothing_of_others(teams: Teams) -> None:
    folder = teams.daemon.paths.config / "agents"
    teams.daemon.agent("doomed", SCRIPT, team="red")
    teams.daemon.call("reload")
    if os.geteuid() == 0:
        for path in (folder, folder / "doomed.yaml"):
            os.chown(path, BROKER_UID, -1)
    staged = folder / "staged.yaml"
    for text in ("version: 1\nsecret-plans-of-blue: yes\n", None):
        if text is None:  # no mistake, but not in force either
            teams.daemon.agent("staged", SCRIPT, team="blue")
        else:
            staged.write_text(text)
        status, told = teams.ask("red", "DELETE", "/api/v1/agents/doomed")
        assert status == 409
        assert "somebody is changing them" in told["message"]
        assert "staged" not in json.dumps(told)
        assert "blue" not in json.dumps(told)
        assert (folder / "doomed.yaml").exists()
    assert "staged" not in json.dumps(teams.daemon.call("agents.list"))
    staged.unlink()
    assert teams.ask("red", "DELETE", "/api/v1/agents/doomed")[0] == 200
    assert not (folder / "doomed.yaml").exists()


def test_refusals_in_a_loop_do_not_fill_the_log(teams: Teams) -> None:
    def denied() -> int:
        records = [r for r in teams.daemon.audit() if r["event"] == "admin.denied"]
        return sum(record["team"] == "blue" for record in records)

    before = denied()
    for _ in range(LIMIT + 5):
        assert teams.operate("blue", "audit.verify")[0] == 403
    assert LIMIT - 5 <= denied() - before <= LIMIT
