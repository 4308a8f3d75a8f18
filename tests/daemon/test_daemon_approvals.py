"""Calls that wait for an operator, through everything: agent, bridge, daemon, sandboxctl."""

from __future__ import annotations

import base64
import hmac
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking_agent import SECRET, Asking, answers, text
from hook_servers import Server, make_certificates, serving
from real_daemon import BROKER_UID, directories, until

from sandboxd.errors import Conflict

KEY = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def told() -> Iterator[Server]:
    """Who the daemon's webhook tells, over TLS."""
    with tempfile.TemporaryDirectory(prefix="sbx-hook", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o777)
        ca, certificate = make_certificates(directory)
        ca.chmod(0o644)
        key = directory / "key"
        key.write_bytes(KEY)
        key.chmod(0o400)
        with serving(certificate) as server:
            server.directory = directory
            yield server


def hooked(told: Server, url: str) -> str:
    directory = told.directory
    script = "cat > $0/new && id -u >> $0/new && mv $0/new $0/notice"
    return f"""\
        version: 1
        approvals:
          webhook:
            url: {url}
            secret_file: {directory}/key
            ca_file: {directory}/ca.pem
          command:
            argv: [/bin/sh, -c, "{script}", {directory}]
    """


@pytest.fixture(scope="module")
def _shared(told: Server) -> Iterator[Asking]:
    with directories() as daemon:
        shared = Asking(daemon)
        shared.configure()
        daemon.write("sandboxd.yaml", hooked(told, told.url))
        daemon.start()
        yield shared


@pytest.fixture
def asking(_shared: Asking) -> Iterator[Asking]:
    """The one daemon, with its variable set and nothing waiting."""
    for slug in ("caller", "hasty"):
        _shared.daemon.set(slug, TOKEN=SECRET)
    yield _shared
    _shared.close()
    until(lambda: not _shared.daemon.call("session.list")["sessions"])
    assert _shared.daemon.call("approvals.list")["approvals"] == []
    assert SECRET not in json.dumps(_shared.daemon.audit()) + _shared.daemon.log.read_text()


def events(asking: Asking, session: str) -> list[str]:
    return [r["event"] for r in asking.records(session)]


def test_an_approved_call_runs_and_its_client_gets_progress_meanwhile(asking: Asking) -> None:
    agent = asking.start(("call", "ask", {"word": "one"}))
    (row,) = asking.waiting()
    assert (row["agent"], row["tool"]) == ("caller", "ask")
    assert asking.daemon.call("status")["approvals"] == 1
    (session,) = asking.daemon.call("session.list")["sessions"]
    assert (session["calls_running"], session["calls_waiting"]) == (0, 1)
    assert " 0 (1 to approve) " in asking.daemon.ctl("session", "list").stdout
    assert row["id"] in asking.daemon.ctl("approvals", "list").stdout
    done = asking.daemon.ctl("approvals", "approve", row["id"])
    assert done.stdout == f"{row['id']} approved: ask of caller\n"
    progress, *_, last = asking.end(agent)
    assert progress["method"] == "notifications/progress"
    assert row["id"] in progress["params"]["message"]
    assert text(last["result"]) == "one [redacted:TOKEN]\n"
    assert not last["result"].get("isError")
    assert events(asking, row["session"]) == [
        *("session.started", "call.decided", "approval.approved"),
        *("call.launched", "call.ended", "session.ended"),
    ]
    approved = asking.records(row["session"])[2]
    assert (approved["uid"], approved["digest"]) == (os.geteuid(), row["digest"])
    assert approved["waited_ms"] > 0


def test_a_denied_call_tells_the_agent_why(asking: Asking) -> None:
    agent = asking.start(("call", "ask", {}))
    (row,) = asking.waiting()
    done = asking.daemon.ctl("approvals", "deny", row["id"], "--reason", "not today", "--json")
    assert json.loads(done.stdout)["outcome"] == "denied"
    (result,) = answers(asking.end(agent))
    assert result["isError"] is True
    assert text(result) == "ask did not run: an operator denied it: not today"
    assert "call.launched" not in events(asking, row["session"])


def test_a_call_that_nobody_answers_is_denied(asking: Asking) -> None:
    (result,) = answers(asking.end(asking.start(("call", "ask", {}), agent="hasty")))
    assert result["isError"] is True
    assert text(result).startswith("ask did not run: nobody answered in 0.3 s\nhint: ")
    (expired,) = [r for r in asking.daemon.audit() if r["event"] == "approval.expired"]
    assert expired["waited_ms"] >= 300


@pytest.mark.parametrize("how", ["cancel", "leave"])
def test_a_call_taken_back_is_withdrawn(asking: Asking, how: str) -> None:
    agent = asking.start((how, "ask", {}), *([("call", "free", {})] if how == "cancel" else []))
    progress, *rest = asking.end(agent)
    id = progress["params"]["message"].split("(")[1].split(")")[0]
    if how == "cancel":
        assert text(rest[-1]["result"]) == "free\n"
    until(lambda: asking.daemon.call("approvals.list")["approvals"] == [])
    late = asking.daemon.ctl("approvals", "approve", id)
    assert late.returncode == 5
    assert "withdrawn" in late.stderr
    (record,) = [
        r for r in asking.daemon.audit() if r.get("call") == id and "approval" in r["event"]
    ]
    assert record["event"] == "approval.withdrawn"


def test_a_stopped_session_withdraws_its_questions(asking: Asking) -> None:
    asking.start(("call", "ask", {}))
    (row,) = asking.waiting()
    asking.daemon.call("session.stop", id=row["session"], grace=0)
    assert asking.daemon.call("approvals.list")["approvals"] == []
    assert "approval.withdrawn" in events(asking, row["session"])
    assert "call.launched" not in events(asking, row["session"])


def test_an_approval_for_the_session_holds_for_these_exact_arguments(asking: Asking) -> None:
    one, two = {"word": "one"}, {"word": "two"}
    agent = asking.start(*(("call", "ask", arguments) for arguments in (one, one, two)))
    (row,) = asking.waiting()
    asking.daemon.ctl("approvals", "approve", "--session", row["id"])
    until(lambda: [r["id"] for r in asking.waiting()] != [row["id"]])
    (other,) = asking.waiting()
    assert other["digest"] != row["digest"]
    asking.daemon.ctl("approvals", "deny", other["id"])
    first, second, third = answers(asking.end(agent))
    assert text(first) == text(second) == "one [redacted:TOKEN]\n"
    assert third["isError"] is True
    decided = [r for r in asking.records(row["session"]) if r["event"] == "call.decided"]
    assert [r["decision"] for r in decided] == ["ask", "allow", "ask"]
    again = asking.start(("call", "ask", one))
    (fresh,) = asking.waiting()
    assert (fresh["digest"], fresh["session"] != row["session"]) == (row["digest"], True)
    asking.daemon.call("approvals.deny", id=fresh["id"])
    asking.end(again)


def test_of_two_operators_the_faster_one_counts(asking: Asking) -> None:
    agent = asking.start(("call", "ask", {"word": "x"}))
    (row,) = asking.waiting()
    with asking.daemon.client() as one, asking.daemon.client() as other:
        approving = one.submit("approvals.approve", id=row["id"])
        denying = other.submit("approvals.deny", id=row["id"])
        outcomes: list[str] = []
        for client, request in ((one, approving), (other, denying)):
            try:
                outcomes.append(client.result(request)["outcome"])
            except Conflict:
                outcomes.append("Conflict")
    assert "Conflict" in outcomes
    won = next(outcome for outcome in outcomes if outcome != "Conflict")
    (result,) = answers(asking.end(agent))
    assert bool(result.get("isError")) == (won == "denied")
    settled = [e for e in events(asking, row["session"]) if e.startswith("approval.")]
    assert settled == [f"approval.{won}"]


def test_an_agent_that_floods_with_questions_is_put_off(asking: Asking) -> None:
    words = [{"word": str(n)} for n in range(20)]
    flood = asking.start(("many", "ask", words))
    rows = asking.waiting(8)
    quiet = asking.start(("call", "free", {}), ("call", "ask", {"word": "quiet"}))
    (mine,) = [row for row in asking.waiting(9) if row["session"] != rows[0]["session"]]
    asking.daemon.call("approvals.approve", id=mine["id"])
    free, asked = answers(asking.end(quiet))
    assert (text(free), text(asked)) == ("free\n", "quiet [redacted:TOKEN]\n")
    for row in rows:
        asking.daemon.call("approvals.deny", id=row["id"])
    results = answers(asking.end(flood))
    outcomes = [result["_meta"]["sandboxd/outcome"] for result in results]
    assert (len(rows), outcomes.count("denied"), outcomes.count("busy")) == (8, 8, 12)
    assert len([e for e in events(asking, rows[0]["session"]) if e == "call.decided"]) == 8


def test_what_an_agent_wrote_is_shown_as_what_it_is(asking: Asking) -> None:
    hidden = "safe\u202egpj.exe\x1b[2J\u200b\u0430"
    agent = asking.start(("call", "ask", {"word": hidden}))
    (row,) = asking.waiting()
    shown = asking.daemon.ctl("approvals", "show", row["id"][:9]).stdout
    assert r'|   "word": "safe\u202egpj.exe\u001b[2J\u200b\u0430"' in shown.splitlines()
    assert shown.isascii()
    as_json = asking.daemon.ctl("approvals", "show", "--json", row["id"]).stdout
    assert as_json.isascii()
    assert json.loads(as_json)["arguments"] == {"word": hidden}
    facts = {line[:9].strip(): line[9:].strip() for line in shown.splitlines()}
    assert (facts["agent"], facts["session"]) == ("caller", row["session"])
    assert (facts["reason"], facts["digest"]) == ("it costs money", row["digest"])
    assert (facts["network"], facts["workspace"]) == ("none", "none")
    assert re.fullmatch(r"TOKEN \(version \d+\) as TOKEN \(env\)", facts["secrets"])
    asking.daemon.call("approvals.deny", id=row["id"])
    asking.end(agent)


def test_only_the_call_that_was_shown_is_approved(asking: Asking) -> None:
    agent = asking.start(("call", "ask", {}))
    (row,) = asking.waiting()
    ctl = asking.daemon.ctl
    assert ctl("approvals", "approve", row["id"][:6]).returncode == 3
    assert ctl("approvals", "approve", "c-" + "0" * 16).returncode == 3
    assert ctl("approvals", "approve", "--digest", "0" * 64, row["id"]).returncode == 5
    assert ctl("approvals", "approve", "--digest", "what", row["id"]).returncode == 2
    assert ctl("approvals", "deny", "--reason", "a\nb", row["id"]).returncode == 2
    assert ctl("approvals", "approve", "--digest", row["digest"], row["id"]).returncode == 0
    (result,) = answers(asking.end(agent))
    assert not result.get("isError")


def test_a_value_replaced_now_withdraws_the_question(asking: Asking) -> None:
    agent = asking.start(("call", "ask", {}))
    (row,) = asking.waiting()
    done = asking.daemon.set("caller", now=True, TOKEN="another-value-of-tests")
    assert done["cancelled_calls"] == 1
    (result,) = answers(asking.end(agent))
    assert "TOKEN was revoked" in text(result)
    assert events(asking, row["session"])[-2:] == ["approval.withdrawn", "session.ended"]


def test_explain_tells_a_call_that_would_wait_by_its_status(asking: Asking) -> None:
    asked = asking.daemon.ctl("policy", "explain", "hasty", "ask", "{}")
    assert asked.returncode == 5
    assert "for an operator, 0.3 s at most" in asked.stdout
    assert asking.daemon.ctl("policy", "explain", "caller", "free", "{}").returncode == 0
    got = json.loads(asking.daemon.ctl("policy", "explain", "caller", "ask", "--json").stdout)
    assert (got["verdict"], got["approval_timeout"]) == ("ask", 300)
    assert [i["variable"] for i in got["inject"]] == ["TOKEN"]


def test_a_stopping_daemon_withdraws_what_waits(asking: Asking) -> None:
    with directories() as daemon:
        stopping = Asking(daemon)
        stopping.configure()
        daemon.start()
        daemon.set("caller", TOKEN=SECRET)
        stopping.start(("call", "ask", {}))
        (row,) = stopping.waiting()
        assert daemon.stop() == 0
        stopping.close()
        log = (daemon.paths.audit / "audit.jsonl").read_text().splitlines()
        recorded = [r["event"] for r in map(json.loads, log) if r.get("session") == row["session"]]
        assert recorded[-2:] == ["approval.withdrawn", "session.ended"]


def test_hooks_are_told_over_tls_and_signed(asking: Asking, told: Server) -> None:
    notice = told.directory / "notice"
    notice.unlink(missing_ok=True)
    agent = asking.start(("call", "ask", {"word": "hook"}))
    (row,) = asking.waiting()
    until(notice.exists)
    asking.daemon.call("approvals.deny", id=row["id"])
    asking.end(agent)
    mine: dict[str, Any] = {}

    def both() -> bool:
        for _, headers, body in told.requests:
            if headers["webhook-id"].startswith(row["id"]):
                mine[headers["webhook-id"].partition(".")[2]] = (headers, body)
        return len(mine) == 2

    until(both)
    for headers, body in mine.values():
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        mac = base64.b64encode(hmac.digest(KEY, signed, "sha256")).decode()
        assert headers["webhook-signature"] == f"v1,{mac}"
    assert json.loads(mine["ended"][1])["data"]["outcome"] == "denied"
    asked = json.loads(mine["asked"][1])["data"]
    assert (asked["digest"], asked["secrets"]) == (row["digest"], ["TOKEN"])
    said, user = notice.read_text().rsplit("}", 1)
    local = json.loads(said + "}")["data"]
    assert (local["id"], local["arguments"]) == (row["id"], '{\n  "word": "hook"\n}')
    assert int(user) == (BROKER_UID if os.geteuid() == 0 else os.geteuid())
    assert SECRET not in str(told.requests) + notice.read_text()


def test_a_webhook_that_is_down_holds_nothing_up(asking: Asking, told: Server) -> None:
    asking.daemon.write("sandboxd.yaml", hooked(told, "https://127.0.0.1:9/"))
    asking.daemon.call("reload")
    before = len(told.requests)
    agent = asking.start(("call", "ask", {"word": "down"}))
    (row,) = asking.waiting()
    asking.daemon.call("approvals.approve", id=row["id"])
    (result,) = answers(asking.end(agent))
    assert text(result) == "down [redacted:TOKEN]\n"
    assert len([r for r in told.requests[before:] if row["id"] in r[1]["webhook-id"]]) == 0
    asking.daemon.write("sandboxd.yaml", hooked(told, told.url))
    asking.daemon.call("reload")


def test_watching_tells_each_question_and_each_end(asking: Asking) -> None:
    with asking.daemon.client() as client:
        watch = client.stream("approvals.watch")
        agent = asking.start(("call", "ask", {"word": "w"}))
        asked = next(watch)
        assert (asked["event"], asked["arguments"]) == ("asked", {"word": "w"})
        asking.daemon.call("approvals.deny", id=asked["id"], reason="because")
        ended = next(watch)
    assert (ended["event"], ended["id"]) == ("ended", asked["id"])
    assert (ended["outcome"], ended["reason"]) == ("denied", "because")
    asking.end(agent)
