"""``/api/v1`` on a real daemon, by the wire of the platform's command line (version 0.0.28)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from http_daemon import client_of, new_key, served
from real_daemon import BROKER_UID, RealDaemon, until


class CommandLine:
    """The command line, as far as the wire shows it: paths, bodies, which fields it reads."""

    def __init__(self, daemon: RealDaemon, key: str) -> None:
        self.http = client_of(daemon, key)
        self.base = "/api/v1"  # API_URL_21ST

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        got = self.http.request(method, self.base + path, **options)
        if not got.is_success:
            raise RuntimeError(got.json()["message"])  # printed; without one it fails
        return got.json()  # so a 204 breaks it

    def whoami(self) -> str:
        me = self._ask("GET", "/me")
        return f"{me['user']['displayName'] or me['user']['email']} of {me['team']['name']}"

    def env_list(self, slug: str) -> list[str]:
        return list(self._ask("GET", f"/agents/{slug}/env")["keys"])

    def env_set(self, slug: str, *pairs: str) -> None:
        for pair in pairs:
            key, _, value = pair.partition("=")
            done = self._ask("PUT", f"/agents/{slug}/env", json={"key": key, "value": value})
            assert (done["success"], done["key"]) == (True, key)

    def env_remove(self, slug: str, key: str) -> None:
        self.env_list(slug)
        done = self._ask("DELETE", f"/agents/{slug}/env", json={"key": key})
        assert (done["success"], done["key"]) == (True, key)

    def agents(self) -> list[tuple[Any, ...]]:
        fields = ("slug", "runtime", "activeVersion", "activeDeploymentStatus", "deployedAt")
        rows = self._ask("GET", "/agents")["agents"]
        return [tuple(row[field] for field in fields) for row in rows]

    def agent(self, slug: str) -> Any:
        got = self._ask("GET", f"/agents/{slug}")
        return {field: got[field] for field in ("name", "model", "totalDeployments", "createdAt")}

    def delete(self, slug: str) -> str:
        return str(self._ask("DELETE", f"/agents/{slug}")["message"])

    def logs(self, slug: str, **query: Any) -> Any:
        return self._ask("GET", f"/agents/{slug}/logs", params=query)

    def log(self, slug: str, id: str) -> Any:
        return self._ask("GET", f"/agents/{slug}/logs/{id}")


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealDaemon]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def cli(daemon: RealDaemon) -> Iterator[CommandLine]:
    made = CommandLine(daemon, new_key(daemon))
    with made.http:
        yield made


def test_who_am_i(cli: CommandLine, daemon: RealDaemon) -> None:
    assert cli.whoami().startswith("a owner (an_sk_")
    assert cli.whoami().endswith(") of default")
    other = CommandLine(daemon, new_key(daemon, "viewer", team="other"))
    with other.http:
        assert other.whoami().endswith(" of The Others")


def test_variables_are_set_listed_by_name_and_removed(cli: CommandLine, daemon: RealDaemon) -> None:
    cli.env_set("worker", "TOKEN=hunter2==hunter2", "A_URL=https://example.com/?a=b")
    assert cli.env_list("worker") == ["A_URL", "TOKEN"]
    cli.env_remove("worker", "TOKEN")
    assert cli.env_list("worker") == ["A_URL"]
    cli.env_remove("worker", "A_URL")
    with pytest.raises(RuntimeError, match="TOKEN"):
        cli.env_remove("worker", "TOKEN")
    text = str(daemon.audit()) + daemon.log.read_text()
    assert "hunter2" not in text
    recorded = [r for r in daemon.audit() if r["event"] == "env.set"]
    assert recorded[-1]["by"].startswith("a owner (an_sk_")


@pytest.mark.parametrize("name", ["lower-case", "--flag", "", "A B", "1ST"])
def test_names_that_the_client_lets_through_are_refused_with_the_rule(
    cli: CommandLine, name: str
) -> None:
    got = cli.http.put("/api/v1/agents/worker/env", json={"key": name, "value": "x-value-x"})
    assert (got.status_code, got.json()["error"]) == (400, "validation_error")
    assert "letters, digits" in got.json()["message"]
    assert got.json()["status"] == 400
    with pytest.raises(RuntimeError, match="letters, digits"):
        cli.env_set("worker", f"{name}=x-value-x")


def test_several_variables_are_set_all_or_none(cli: CommandLine) -> None:
    def put(**variables: str) -> httpx2.Response:
        return cli.http.put("/api/v1/agents/second/env", json={"variables": variables})

    assert put(GOOD="good-value", **{"not good": "x"}).status_code == 400
    assert cli.env_list("second") == []
    assert put(ONE="first-value", TWO="second-value").json()["keys"] == ["ONE", "TWO"]
    assert cli.env_list("second") == ["ONE", "TWO"]


def test_a_value_never_comes_back(cli: CommandLine) -> None:
    cli.env_set("second", "SECRET=correct-horse-battery")
    for path in ("/agents", "/agents/second", "/agents/second/env", "/agents/second/logs"):
        assert "correct-horse" not in cli.http.get(f"/api/v1{path}").text


def test_agents_are_listed_and_shown(cli: CommandLine) -> None:
    rows = {row[0]: row for row in cli.agents()}
    assert sorted(rows) == ["failing", "second", "worker"]  # and none of another team
    assert rows["worker"][1] == "sh"
    assert rows["worker"][3] == "active"
    assert rows["worker"][4].endswith("Z")
    assert cli.agent("worker")["name"] == "agent worker of a test"
    with pytest.raises(RuntimeError, match="no agent 'foreign'"):
        cli.agent("foreign")
    with pytest.raises(RuntimeError, match="no agent 'nobody'"):
        cli.agent("nobody")
    with pytest.raises(RuntimeError, match="is not a slug"):
        cli.agent("Nobody..")


def test_logs_are_found_and_paged(cli: CommandLine, daemon: RealDaemon) -> None:
    ids = [daemon.call("session.start", agent="failing")["id"] for _ in range(3)]
    until(lambda: len(cli.logs("failing", status="error")["sandboxes"]) == 3)
    first = cli.logs("failing", limit=2)
    assert [row["id"] for row in first["sandboxes"]] == ids[:0:-1]
    rest = cli.logs("failing", limit=2, cursor=first["nextCursor"])
    assert [row["id"] for row in rest["sandboxes"]] == ids[:1]
    assert rest["nextCursor"] is None
    assert cli.logs("failing", search=ids[1])["sandboxes"][0]["id"] == ids[1]
    assert cli.logs("failing", status="running")["sandboxes"] == []
    at = first["sandboxes"][1]["created_at"]
    assert len(cli.logs("failing", createdAfter=at)["sandboxes"]) == 2
    assert len(cli.logs("failing", createdBefore=at)["sandboxes"]) == 1
    one = cli.log("failing", ids[0])
    assert (one["exit_code"], one["error"]) == (3, "the agent exited with status 3")
    assert one["sandbox_id"] == ids[0]
    with pytest.raises(RuntimeError, match="no such session"):
        cli.log("worker", ids[0])
    for wrong in ({"cursor": "x"}, {"createdAfter": "yesterday"}, {"limit": 0}):
        with pytest.raises(RuntimeError, match=r"cursor|createdAfter|limit"):
            cli.logs("failing", **wrong)


def test_what_an_agent_printed_is_in_its_log(cli: CommandLine, daemon: RealDaemon) -> None:
    id = daemon.call("session.start", agent="worker")["id"]
    until(lambda: "started with" in cli.log("worker", id)["output"])
    assert cli.log("worker", id)["status"] == "running"
    daemon.call("session.stop", id=id)


@pytest.mark.parametrize(
    ("role", "allowed"), [("viewer", False), ("operator", False), ("owner", True)]
)
def test_deleting_an_agent_is_for_owners(daemon: RealDaemon, role: str, allowed: bool) -> None:
    with client_of(daemon, new_key(daemon, role)) as client:
        got = client.delete("/api/v1/agents/nobody")
        assert got.status_code == (404 if allowed else 403)


def test_an_agent_whose_file_is_not_the_daemons_stays(daemon: RealDaemon, cli: CommandLine) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs another user's configuration: run as root")
    with pytest.raises(RuntimeError, match="comes from a file that this daemon may not change"):
        cli.delete("second")
    assert (daemon.paths.config / "agents/second.yaml").exists()
    assert "second" in [row[0] for row in cli.agents()]


def test_a_deleted_agent_is_gone_with_all_that_is_its() -> None:
    with served() as daemon:
        folder = daemon.paths.config / "agents"
        if os.geteuid() == 0:
            for path in (folder, folder / "second.yaml"):
                os.chown(path, BROKER_UID, -1)
        cli = CommandLine(daemon, new_key(daemon))
        with cli.http:
            cli.env_set("second", "TOKEN=correct-horse-battery")
            id = daemon.call("session.start", agent="second")["id"]
            other = daemon.call("session.start", agent="worker")["id"]
            told = cli.delete("second")
            assert "1 sessions ended, 1 variables removed" in told
            assert [row["id"] for row in daemon.call("session.list")["sessions"]] == [other]
            assert "second" not in [row[0] for row in cli.agents()]
            with pytest.raises(RuntimeError, match="no agent 'second'"):
                cli.delete("second")
            (kept,) = folder.glob("second.yaml.deleted-*")
            events = [r for r in daemon.audit() if r["event"] == "agent.deleted"]
            assert [(r["agent"], r["kept"]) for r in events] == [("second", kept.name)]
            done = daemon.ctl("agents", "delete", "second")
            assert (done.returncode, done.stdout) == (3, "")
            kept.rename(folder / "second.yaml")
            daemon.call("reload")
            assert cli.env_list("second") == []
            assert daemon.call("session.show", id=id)["reason"].startswith("its agent was deleted")
            done = daemon.ctl("agents", "delete", "second", "--json")
            assert (done.returncode, json.loads(done.stdout)["slug"]) == (0, "second")
