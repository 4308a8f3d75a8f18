"""Each tab shows what there is and does what it offers. On a real daemon, over plain HTTP."""

from __future__ import annotations

import base64
import html
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from plain_pages import Pages, new_key, signed_in, told
from real_daemon import RealDaemon, until

SECRET = "correct-horse-battery-staple-1729"
OTHER = "another-value-of-some-length-2718"


#: An agent's words that want to be read wrongly, and to be more than text.
TRICK = "</li><script>alert(1)</script>\u202egnp.exe\u200b \u0430dmin " + "x" * 500


@pytest.fixture
def waiting(daemon: RealDaemon, session: str) -> Iterator[dict[str, Any]]:
    """A call that waits for an operator, made in the session."""
    result: dict[str, Any] = {}

    def call() -> None:
        with daemon.client() as client:
            arguments = {"to": "production", "text": TRICK}
            sent = {"tool": "publish", "arguments": arguments, "session": session}
            result["items"] = list(client.stream("tools.run", **sent))

    thread = threading.Thread(target=call)
    thread.start()
    until(lambda: bool(daemon.call("approvals.list")["approvals"]))
    [found] = daemon.call("approvals.list")["approvals"]
    found["result"], found["thread"] = result, thread
    yield found
    daemon.call("session.stop", id=session, grace=0)
    thread.join(20)


def ended(waiting: dict[str, Any]) -> dict[str, Any]:
    waiting["thread"].join(20)
    found: dict[str, Any] = waiting["result"]["items"][-1]["ended"]
    return found


# -- environment ----------------------------------------------------------------------------------


def test_a_variable_is_set_updated_and_removed(daemon: RealDaemon, owner: Pages) -> None:
    got = owner.post("/environment/reader/set", name="TOKEN", value=SECRET)
    assert (got.status_code, got.headers["location"]) == (303, "/environment/reader")
    page = owner.read("/environment/reader")
    assert "TOKEN is set, version 1. It takes effect on the next session of reader." in told(page)
    assert "TOKEN is set" not in told(owner.read("/environment/reader"))
    assert SECRET not in page
    [row] = daemon.call("env.list", agent="reader")["variables"]
    assert row["fingerprint"] in page
    assert row["set_by"].startswith("owner of red (an_sk_")
    owner.post("/environment/reader/set", name="TOKEN", value=OTHER)
    assert "TOKEN is set, version 2" in told(owner.read("/environment/reader"))
    assert "Remove TOKEN of reader?" in told(owner.read("/environment/reader/remove/TOKEN"))
    owner.post("/environment/reader/remove/TOKEN")
    page = told(owner.read("/environment/reader"))
    assert "TOKEN is removed." in page
    assert "Declared by tools, and not set TOKEN for publish" in page


def test_a_value_arrives_as_it_was_typed(daemon: RealDaemon, owner: Pages) -> None:
    typed = "-----BEGIN KEY-----\r\nabc=&+%25 \u00e9\r\n-----END KEY-----\r\n"
    owner.post("/environment/reader/set", name="KEY_FILE", value=typed)
    [row] = daemon.call("env.list", agent="reader")["variables"]
    kept = typed.replace("\r\n", "\n").encode()
    assert row["size"] == len(kept)
    daemon.call("env.set", agent="reader", values={"KEY_TWO": base64.b64encode(kept).decode()})
    both = {
        r["name"]: r["fingerprint"] for r in daemon.call("env.list", agent="reader")["variables"]
    }
    assert both["KEY_FILE"] == both["KEY_TWO"]
    owner.post("/environment/reader/set", name="PASTED", value=SECRET + "\r\n")
    sizes = {r["name"]: r["size"] for r in daemon.call("env.list", agent="reader")["variables"]}
    assert sizes["PASTED"] == len(SECRET)
    daemon.call("env.remove", agent="reader", names=["KEY_FILE", "KEY_TWO", "PASTED"])


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("1BAD", SECRET, "this is not a variable name"),
        (SECRET, "TOKEN", "this is not a variable name"),
        ("LD_PRELOAD", SECRET, "LD_PRELOAD is refused"),
        ("TOKEN", "", "the value is empty"),
        ("TOKEN", "abc", "fewer than 4 characters"),
        ("TOKEN", "x" * 200_000, "131"),
    ],
)
def test_what_is_refused_is_said_and_no_value_is_shown(
    owner: Pages, name: str, value: str, says: str
) -> None:
    got = owner.post("/environment/reader/set", name=name, value=value)
    assert got.status_code == 400
    assert says in told(got.text)
    assert SECRET not in got.text
    assert "xxxxxxxxxx" not in got.text


def test_live_sessions_keep_the_old_value_until_it_is_revoked(
    daemon: RealDaemon, owner: Pages, session: str
) -> None:
    owner.post("/environment/writer/set", name="TOKEN", value=OTHER)
    page = told(owner.read("/environment/writer"))
    assert "1 live session keeps the old value until it ends." in page
    assert "older in 1 live session" in page
    got = owner.post("/environment/writer/revoke/TOKEN")
    assert got.status_code == 303
    page = told(owner.read("/environment/writer"))
    assert "Live sessions lost the old value of TOKEN." in page
    assert "older in" not in page
    with daemon.client() as client:
        sent = {"tool": "publish", "arguments": {"to": "paper"}, "session": session}
        last = list(client.stream("tools.run", **sent))[-1]["ended"]
    assert (last["outcome"], last["message"]) == ("denied", "the variable TOKEN was revoked")


def test_a_file_is_previewed_and_then_imported(daemon: RealDaemon, owner: Pages) -> None:
    file = f"# settings\nexport ONE='{SECRET}'\nTOKEN={OTHER}\n".encode()
    sent = {"file": base64.b64encode(file).decode()}
    seen = owner.post("/environment/reader/preview", **sent)
    assert seen.status_code == 200
    assert "2 ONE" in told(seen.text)
    assert "no tool of reader uses it" in told(seen.text)
    assert SECRET not in seen.text
    assert OTHER not in seen.text
    digest = re.search(r'name="previewed" value="([0-9a-f]{64})"', seen.text)
    assert digest is not None
    other = {"file": base64.b64encode(file + b"MORE=something-else\n").decode()}
    refused = owner.post("/environment/reader/import", previewed=digest[1], **other)
    assert refused.status_code == 409
    assert daemon.call("env.list", agent="reader")["variables"] == []
    got = owner.post("/environment/reader/import", previewed=digest[1], **sent)
    assert got.status_code == 303
    assert "2 variables set: ONE, TOKEN." in told(owner.read("/environment/reader"))
    daemon.call("env.remove", agent="reader", names=["ONE", "TOKEN"])


def test_a_file_with_mistakes_sets_nothing(owner: Pages) -> None:
    seen = owner.post("/environment/reader/preview", text=f"ONE={SECRET}\n{OTHER}\n")
    assert "Line 2: not an assignment: expected NAME=value" in told(seen.text)
    assert OTHER not in seen.text
    assert "Set 1 variable" not in told(seen.text)


# -- API keys -------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_deactivated_with_what_that_stops(
    daemon: RealDaemon, owner: Pages
) -> None:
    sent = {"label": "the shop", "role": "operator", "agents": "", "expires": "30d"}
    made = owner.post("/keys", **sent)
    secret = re.search(r"an_sk_[0-9a-f]{64}", made.text)
    assert secret is not None
    assert "It is shown this once." in told(made.text)
    assert made.headers["cache-control"] == "no-store"
    listed = owner.read("/keys")
    assert secret[0] not in listed
    assert "the shop" in listed
    [key] = [k for k in daemon.call("keys.list")["keys"] if k["label"] == "the shop"]
    held = signed_in(daemon, secret[0])
    asked = told(owner.read(f"/keys/{key['id']}/deactivate"))
    assert "no session depends on it now" in asked
    got = owner.post(f"/keys/{key['id']}/deactivate")
    assert got.status_code == 303
    assert "the shop is deactivated. 0 sessions that depended on it ended." in told(
        owner.read("/keys")
    )
    assert held.get("/audit").status_code == 303


def test_a_key_is_rotated(daemon: RealDaemon, owner: Pages) -> None:
    old = new_key(daemon, "red", "viewer")
    assert "goes on working" in told(owner.read(f"/keys/{old['key']['id']}/rotate"))
    got = owner.post(f"/keys/{old['key']['id']}/rotate", overlap="1h")
    secret = re.search(r"an_sk_[0-9a-f]{64}", got.text)
    assert secret is not None
    assert "The old one works until" in told(got.text)
    assert signed_in(daemon, secret[0]).get("/audit").status_code == 200
    assert signed_in(daemon, old["secret"]).get("/audit").status_code == 200


def test_deactivating_the_pages_own_key_signs_it_out(daemon: RealDaemon) -> None:
    made = new_key(daemon, "red", "owner")
    pages, id = signed_in(daemon, made["secret"]), made["key"]["id"]
    assert "this page, too" in told(pages.read(f"/keys/{id}/deactivate"))
    got = pages.post(f"/keys/{id}/deactivate")
    assert (got.status_code, got.headers["location"]) == (303, "/sign-in?over=1")
    assert pages.get("/keys").headers["location"] == "/sign-in"


# -- sessions -------------------------------------------------------------------------------------


def test_a_session_is_seen_and_stopped(daemon: RealDaemon, owner: Pages, session: str) -> None:
    assert session in owner.read("/sessions")
    part = owner.get("/sessions/live", **{"x-live": "1"}).text
    assert "<html" not in part
    assert session in part
    assert 'class="spark"' in part
    page = told(owner.read(f"/sessions/{session}"))
    assert "Stop this session" in page
    assert "TOKEN version" in page
    got = owner.post(f"/sessions/{session}/stop", at_once="on")
    assert got.status_code == 303
    page = owner.read("/sessions")
    assert f"Session {session} has ended." in told(page)
    assert session in page.partition('id="ended-list"')[2]
    assert session in owner.read("/sessions/ended")
    assert session not in owner.read("/sessions/live")
    assert "stopped by owner of red" in told(owner.read(f"/sessions/{session}"))
    assert owner.post(f"/sessions/{session}/stop").status_code == 404


# -- calls ----------------------------------------------------------------------------------------


def test_a_waiting_call_is_shown_and_approved(
    daemon: RealDaemon, owner: Pages, waiting: dict[str, Any]
) -> None:
    listed = owner.read("/calls")
    assert f"/calls/waiting/{waiting['id']}" in listed
    assert "publish waits" in told(owner.read("/sessions"))
    page = owner.read(f"/calls/waiting/{waiting['id']}")
    assert waiting["digest"] in page
    assert "customers see it" in page
    assert html.escape('"to": "production"') in page.replace("&#34;", "&quot;")
    assert "<script>alert" not in page
    assert "\u202e" not in page
    assert "\u200b" not in page
    shown = html.unescape(page)
    assert "\\u202egnp.exe\\u200b \\u0430dmin xxx" in shown
    assert "characters left out>" in shown
    assert "x" * 500 in owner.read(f"/calls/waiting/{waiting['id']}?full=1")
    wrong = owner.post(f"/calls/waiting/{waiting['id']}", answer="approve", digest="0" * 64)
    assert wrong.status_code == 409
    none = owner.post(f"/calls/waiting/{waiting['id']}", answer="approve")
    assert none.status_code == 400
    got = owner.post(f"/calls/waiting/{waiting['id']}", answer="approve", digest=waiting["digest"])
    assert got.status_code == 303
    assert ended(waiting)["outcome"] == "ok"
    assert "publish of writer is approved." in told(owner.read("/calls"))
    shown = told(owner.read(f"/calls/{waiting['id']}"))
    assert "answered by owner of red" in shown
    assert "succeeded" in shown
    again = owner.get(f"/calls/waiting/{waiting['id']}")
    assert again.headers["location"] == f"/calls/{waiting['id']}"


def test_a_waiting_call_is_denied_with_a_reason(owner: Pages, waiting: dict[str, Any]) -> None:
    owner.post(
        f"/calls/waiting/{waiting['id']}",
        answer="deny",
        digest=waiting["digest"],
        reason="not on a Friday",
    )
    found = ended(waiting)
    assert found["outcome"] == "denied"
    assert "not on a Friday" in found["message"]
    page = told(owner.read("/calls?outcome=denied"))
    assert "not on a Friday" in page


def test_a_denied_call_says_why(daemon: RealDaemon, owner: Pages, session: str) -> None:
    with daemon.client() as client:
        sent = {"tool": "publish", "arguments": {"to": "moon"}, "session": session}
        call = list(client.stream("tools.run", **sent))[-1]["ended"]["call"]
    page = told(owner.read("/calls?agent=writer&outcome=denied"))
    assert "nobody reads it there" in page
    assert "careful.yaml:5 deny publish" in page
    assert "nobody reads it there" in told(owner.read(f"/calls/{call}"))
    assert call not in owner.read("/calls?agent=reader")
    assert call not in owner.read("/calls/live?outcome=succeeded")


# -- tools, audit ---------------------------------------------------------------------------------


def test_policies_are_read_and_calls_explained(owner: Pages) -> None:
    page = told(owner.read("/tools"))
    assert "publish by argument deny when to is one of ['moon']" in page
    assert "TOKEN" in told(owner.read("/tools/publish"))
    got = owner.post("/tools/explain", agent="writer", tool="publish", arguments='{"to": "moon"}')
    assert "Denied : nobody reads it there" in told(got.text)
    assert "careful.yaml:5" in got.text
    got = owner.post("/tools/explain", agent="writer", tool="publish", arguments='{"to": "paper"}')
    assert "Allowed" in told(got.text)
    got = owner.post("/tools/explain", agent="writer", tool="publish", arguments='{"to": 1,}')
    assert got.status_code == 400
    assert "not valid JSON" in told(got.text)


def test_the_audit_tab_shows_the_teams_records_and_the_logs_state(
    daemon: RealDaemon, owner: Pages
) -> None:
    daemon.set("spy", SPYS=SECRET)
    owner.post("/environment/reader/set", name="AUDITED", value=SECRET)
    page = told(owner.read("/audit"))
    assert "AUDITED" in page
    assert "SPYS" not in page
    assert "AUDITED" in told(owner.read("/audit?search=audited&event=env"))
    assert "No records that fit." in told(owner.read("/audit?search=no-such-word"))
    got = owner.post("/audit/verify")
    assert "whole Every record is as it was written" in told(got.text)
    daemon.call("env.remove", agent="reader", names=["AUDITED"])


def test_a_page_that_shows_the_newest_records_is_sent_none_again(
    daemon: RealDaemon, owner: Pages
) -> None:
    found = re.search(r'hx-get="(/audit/live[?]since=[0-9]+)"', owner.read("/audit"))
    assert found is not None
    assert owner.get(found[1], **{"x-live": "1"}).status_code == 204
    daemon.set("spy", SPYS=OTHER)
    assert owner.get(found[1], **{"x-live": "1"}).status_code == 204
    daemon.set("reader", NEWS=OTHER)
    got = owner.get(found[1], **{"x-live": "1"})
    assert got.status_code == 200
    assert "NEWS" in got.text
    daemon.call("env.remove", agent="reader", names=["NEWS"])
