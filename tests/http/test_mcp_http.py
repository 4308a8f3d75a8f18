"""An agent's tools over HTTP: who gets to them, what they see, and how it ends."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from mcp_http_parts import (
    HANDSHAKE,
    MODERN,
    TOKEN,
    Wire,
    answer,
    configure,
    ended,
    key,
    texts,
    token,
)
from real_daemon import RealDaemon, directories, until


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealDaemon]:
    with directories() as daemon:
        configure(daemon)
        daemon.http()
        daemon.start()
        daemon.set("client", TOKEN=TOKEN)
        yield daemon


@pytest.fixture(params=[MODERN, HANDSHAKE])
def wire(request: pytest.FixtureRequest, daemon: RealDaemon) -> Wire:
    """A holder of a token for the agent ``client`` alone, in either form of the protocol."""
    id, _ = key(daemon)
    _, bearer = token(daemon, id, "client")
    made = Wire(daemon.url + "/mcp", bearer, request.param)
    if request.param == HANDSHAKE:
        assert made.shake().status_code == 200
    return made


def test_the_agents_tools_are_listed_but_for_those_that_need_files(wire: Wire) -> None:
    listed = answer(wire.post("tools/list"))["result"]["tools"]
    assert [tool["name"] for tool in listed] == ["use", "fail", "talk", "long"]
    assert listed[0]["annotations"]["title"] == "Uses the token"


def test_a_tool_uses_a_secret_that_nobody_sees(daemon: RealDaemon, wire: Wire) -> None:
    done = wire.call("use", word="grüße")
    assert texts(done) == [f"grüße used {len(TOKEN)}\nit is [redacted:TOKEN]\n"]
    assert done["result"]["_meta"]["sandboxd/outcome"] == "ok"
    failed = wire.call("fail")
    assert failed["result"]["isError"] is True
    assert texts(failed) == ["out\n", "err\n", "fail ended with status 3"]
    assert TOKEN not in str(daemon.audit()) + daemon.log.read_text()


def test_policy_decides_as_on_the_session_socket(daemon: RealDaemon, wire: Wire) -> None:
    refused = wire.call("use", word=5)
    assert refused["result"]["isError"] is True
    assert "arguments.word: expected string" in texts(refused)[0]
    unknown = wire.call("foreign")
    assert (unknown["error"]["code"], "unknown tool" in unknown["error"]["message"]) == (
        -32602,
        True,
    )
    records = [r for r in daemon.audit() if r["event"] == "call.decided"]
    assert [r["decision"] for r in records[-2:]] == ["deny", "deny"]
    visit = next(r for r in reversed(daemon.audit()) if r["event"] == "visit.began")
    assert (visit["agent"], visit["team"], visit["key"][:4]) == ("client", "default", "key_")
    assert records[-1]["session"] == visit["session"]
    assert visit["token"]


def test_a_tool_that_needs_files_needs_a_live_session(daemon: RealDaemon) -> None:
    _, secret = key(daemon)
    nowhere = Wire(daemon.url + "/mcp/client", secret)
    refused = nowhere.call("look")
    assert refused["result"]["isError"] is True
    assert "needs the workspace" in texts(refused)[0]
    assert "?session=ID" in texts(refused)[0]
    session = daemon.call("session.start", agent="client")["id"]
    there = Wire(f"{daemon.url}/mcp/client?session={session}", secret)
    until(lambda: "mine\n" in str(texts(there.call("look"))).replace("\\n", "\n"))
    assert texts(there.call("look")) == ["mine\n"]
    assert "look" in [t["name"] for t in answer(there.post("tools/list"))["result"]["tools"]]
    began = next(r for r in reversed(daemon.audit()) if r["event"] == "visit.began")
    assert began["session"] == session
    # Of another agent, ended, or only guessed: there is no such session.
    wrong = Wire(f"{daemon.url}/mcp/other?session={session}", secret).post("tools/list")
    assert wrong.status_code == 404
    daemon.call("session.stop", id=session, grace=0)
    assert there.post("tools/list").status_code == 404
    until(lambda: any(r.get("reason") == "its session ended" for r in daemon.audit()))


def test_a_call_waits_for_its_operator(daemon: RealDaemon) -> None:
    id, _ = key(daemon)
    wire = Wire(daemon.url + "/mcp", token(daemon, id, "careful", subject="ann")[1])
    with ThreadPoolExecutor() as elsewhere:
        asked = elsewhere.submit(wire.call, "fail")
        until(lambda: daemon.call("approvals.list")["approvals"] != [])
        (question,) = daemon.call("approvals.list")["approvals"]
        assert (question["tool"], question["agent"]) == ("fail", "careful")
        assert not asked.done()
        daemon.call("approvals.approve", id=question["id"])
        assert texts(asked.result(30)) == ["out\n", "err\n", "fail ended with status 3"]
        again = elsewhere.submit(wire.call, "fail")
        until(lambda: daemon.call("approvals.list")["approvals"] != [])
        daemon.call("approvals.deny", id=daemon.call("approvals.list")["approvals"][0]["id"])
        assert again.result(30)["result"]["isError"] is True
    assert ended(daemon, "fail")[-1] == "failed"


def test_a_variable_that_is_set_is_there_at_the_next_call(daemon: RealDaemon, wire: Wire) -> None:
    assert f"used {len(TOKEN)}\n" in texts(wire.call("use", word="a"))[0]
    daemon.set("client", TOKEN=TOKEN + "-longer")
    try:
        assert f"used {len(TOKEN) + 7}\n" in texts(wire.call("use", word="a"))[0]
    finally:
        daemon.set("client", TOKEN=TOKEN)


def test_progress_streams_in_while_a_tool_works(wire: Wire) -> None:
    with wire.calling("talk", 7, meta={"progressToken": "p"}) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        lines = [json.loads(line[6:]) for line in got.iter_lines() if line.startswith("data: {")]
    steps = [m["params"]["message"] for m in lines if m.get("method") == "notifications/progress"]
    assert steps == ["one [redacted:TOKEN]\n", "two\n"]
    assert texts(lines[-1]) == ["one [redacted:TOKEN]\ntwo\n"]


def test_a_client_that_hangs_up_takes_its_call_back(daemon: RealDaemon, wire: Wire) -> None:
    before = len(ended(daemon, "long"))
    running = daemon.call("status")["calls"]
    if wire.version == HANDSHAKE:
        with wire.calling("long", 8):
            until(lambda: daemon.call("status")["calls"] == running + 1)
    else:  # whose head comes with the first event or answer, and there is none
        body = wire.body("tools/call", name="long", arguments={})
        headers = wire.headers | wire.routed("tools/call", {"name": "long"})
        with pytest.raises(httpx2.ReadTimeout):
            wire.send("POST", body, headers, wait=1)
    until(lambda: len(ended(daemon, "long")) == before + 1)
    assert ended(daemon, "long")[-1] == "cancelled"
    assert daemon.call("status")["calls"] == running


def test_a_handshake_can_cancel_by_name(daemon: RealDaemon) -> None:
    id, _ = key(daemon)
    wire = Wire(daemon.url + "/mcp", token(daemon, id, "client")[1], HANDSHAKE)
    wire.shake()
    before = len(ended(daemon, "long"))
    with wire.calling("long", 99) as got:
        until(lambda: daemon.call("status")["calls"] == 1)
        twice = wire.raw(wire.body("tools/call", id=99, name="fail", arguments={}))
        assert (twice.status_code, "open already" in twice.text) == (400, True)
        done = wire.raw(wire.body("notifications/cancelled", id=0, requestId=99))
        assert done.status_code == 202
        assert "cancelled" in got.read().decode()
    assert ended(daemon, "long")[before:] == ["cancelled"]


def test_nobody_gets_to_another_agents_tools(daemon: RealDaemon) -> None:
    id, _ = key(daemon)
    _, mine = token(daemon, id, "client")
    _, both = token(daemon, id, "client", "other")
    unknown = Wire(daemon.url + "/mcp/nobody", mine).post("tools/list")
    foreign = Wire(daemon.url + "/mcp/other", mine).post("tools/list")
    assert (unknown.status_code, foreign.status_code) == (404, 404)
    assert foreign.text.replace("other", "nobody") == unknown.text
    assert Wire(daemon.url + "/mcp/other", both).post("tools/list").status_code == 200
    which = Wire(daemon.url + "/mcp", both).post("tools/list")
    assert (which.status_code, "/mcp/AGENT" in which.text) == (400, True)


def test_a_session_of_another_user_does_not_exist(daemon: RealDaemon) -> None:
    id, secret = key(daemon)
    _, mine = token(daemon, id, "client", subject="me")
    session = daemon.call("session.start", agent="client")["id"]
    try:
        theirs = Wire(f"{daemon.url}/mcp/client?session={session}", mine).post("tools/list")
        absent = Wire(f"{daemon.url}/mcp/client?session=s-{'0' * 16}", mine).post("tools/list")
        assert (theirs.status_code, absent.status_code) == (404, 404)
        # The control: the key itself reaches every session of its team.
        there = Wire(f"{daemon.url}/mcp/client?session={session}", secret).post("tools/list")
        assert there.status_code == 200
    finally:
        daemon.call("session.stop", id=session, grace=0)


def test_a_role_that_may_not_call_calls_nothing(daemon: RealDaemon) -> None:
    _, viewer = key(daemon, "viewer")
    refused = Wire(daemon.url + "/mcp/client", viewer).post("tools/list")
    assert (refused.status_code, "may not call" in refused.text) == (403, True)
    assert daemon.audit()[-1]["event"] == "admin.denied"


def test_a_handshake_belongs_to_who_made_it(daemon: RealDaemon) -> None:
    id, _ = key(daemon)
    one, two = (
        Wire(daemon.url + "/mcp", token(daemon, id, "client")[1], HANDSHAKE) for _ in range(2)
    )
    one.shake()
    two.headers["mcp-session-id"] = one.headers["mcp-session-id"]
    assert two.post("tools/list").status_code == 404
    assert one.post("tools/list").status_code == 200
    gone = one.send("DELETE")
    assert gone.status_code == 200
    assert one.post("tools/list").status_code == 404


@pytest.mark.parametrize("what", ["token", "key", "user"])
def test_what_ends_a_key_or_token_ends_its_calls_first(daemon: RealDaemon, what: str) -> None:
    id, _ = key(daemon)
    jti, bearer = token(daemon, id, "client", subject="them")
    wire = Wire(daemon.url + "/mcp", bearer, HANDSHAKE)
    wire.shake()
    before = len(ended(daemon, "long"))
    with wire.calling("long", 5) as got:
        until(lambda: daemon.call("status")["calls"] == 1)
        if what == "token":
            daemon.call("tokens.revoke", id=jti)
        elif what == "user":
            daemon.call("tokens.revoke", subject="them")
        else:
            daemon.call("keys.deactivate", key=id)
        # By now the call is over, its tree dead and its end recorded.
        assert daemon.call("status")["calls"] == 0
        assert ended(daemon, "long")[before:] == ["cancelled"]
        with pytest.raises(httpx2.RemoteProtocolError):
            got.read()
    assert wire.post("tools/list").status_code == 401
    assert [r["reason"] for r in daemon.audit() if r["event"] == "visit.ended"][-1]


SMUGGLED = {
    "twice": b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/call"}',
    "twice below": b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"use",'
    b'"arguments":{"word":"a","word":"b"}}}',
    "a batch": b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]',
    "no number": b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":NaN}}',
    "utf-16": '{"jsonrpc":"2.0","id":1,"method":"ping"}'.encode("utf-16"),
    "half a character": b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":"\\ud800"}}',
    "too deep": b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":'
    + b"[" * 70
    + b"]" * 70
    + b"}}",
    "two messages": b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n' * 2,
    "nothing": b"",
}


@pytest.mark.parametrize("body", SMUGGLED.values(), ids=SMUGGLED)
def test_what_two_readers_could_take_two_ways_is_refused(wire: Wire, body: bytes) -> None:
    got = wire.raw(body)
    assert got.status_code == 400
    assert answer(got)["error"]["code"] in (-32700, -32600)
    assert (
        answer(wire.post("ping" if wire.version == HANDSHAKE else "tools/list"))["result"]
        is not None
    )


def test_a_message_has_a_size(wire: Wire) -> None:
    assert wire.raw(b" " * ((4 << 20) + 1)).status_code == 413


def test_other_names_origins_methods_and_types_are_refused(wire: Wire) -> None:
    body = wire.body("tools/list")
    assert wire.raw(body, host="evil.example").status_code == 421
    assert wire.raw(body, origin="https://evil.example").status_code == 403
    assert wire.raw(body, content_type="text/plain").status_code == 400
    assert wire.raw(body, authorization="Bearer an_sk_" + "0" * 64).status_code == 401
    listening = wire.send("GET")
    assert (listening.status_code, listening.headers["allow"]) == (405, "POST, DELETE")
    assert wire.raw(body, mcp_protocol_version="1999-01-01").status_code == 400


def test_parts_of_a_modern_request_must_agree(daemon: RealDaemon) -> None:
    id, _ = key(daemon)
    wire = Wire(daemon.url + "/mcp", token(daemon, id, "client")[1])
    body = wire.body("tools/call", name="fail", arguments={})
    assert wire.raw(body, mcp_method="tools/call", mcp_name="use").status_code == 400
    assert wire.raw(body, mcp_method="tools/call", mcp_name="fail").status_code == 200


def test_handshakes_that_nobody_ends_make_room_for_new_ones(daemon: RealDaemon) -> None:
    id, _ = key(daemon)
    _, bearer = token(daemon, id, "client")
    made = [Wire(daemon.url + "/mcp", bearer, HANDSHAKE) for _ in range(34)]
    busy, *others = made
    busy.shake()
    with busy.calling("long", 1):
        assert [other.shake().status_code for other in others] == [200] * 33
        # The first is at work; of the others those went that were used least lately.
        assert busy.post("ping").status_code == 200
        assert [other.post("ping").status_code for other in others[:4]] == [404, 404, 200, 200]


def test_one_visit_has_so_many_requests(daemon: RealDaemon) -> None:
    id, _ = key(daemon)
    wire = Wire(daemon.url + "/mcp", token(daemon, id, "client")[1], HANDSHAKE)
    wire.shake()
    with contextlib.ExitStack() as open_ones:
        for n in range(32):
            open_ones.enter_context(wire.calling("long", 100 + n))
        refused = wire.post("tools/list")
        assert (refused.status_code, answer(refused)["error"]["code"]) == (429, -32000)
        assert wire.post("ping").status_code == 200
    until(lambda: wire.post("tools/list").status_code == 200)


def test_a_daemon_that_stops_ends_what_runs_and_complains_of_nothing(
    configured: RealDaemon,
) -> None:
    configure(configured)
    configured.start()
    id, _ = key(configured)
    jti, bearer = token(configured, id, "client")
    stopped, revoked = (
        Wire(configured.url + "/mcp", t, HANDSHAKE)
        for t in (token(configured, id, "client")[1], bearer)
    )
    stopped.shake()
    revoked.shake()
    with stopped.calling("long", 1), revoked.calling("long", 1):
        until(lambda: configured.call("status")["calls"] == 2)
        configured.call("tokens.revoke", id=jti)
        assert configured.stop() == 0
    log = configured.log.read_text()
    assert "ERROR" not in log
    for wire in (stopped, revoked):
        assert wire.headers["mcp-session-id"] not in log
