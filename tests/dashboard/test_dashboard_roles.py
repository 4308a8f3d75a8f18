"""Every route of the dashboard, read off the router, for every role and for another team."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from plain_pages import Pages, signed_in, told
from real_daemon import RealDaemon

from sandboxd.access.pages import Pages as Table
from sandboxd.http.dashboard import router

#: What each acting route needs to be asked with, and which roles may: all others are refused.
_OWNER, _OPERATOR, _DEVELOPER = (
    ("owner",),
    ("owner", "operator"),
    ("owner", "operator", "developer"),
)
_ALL = (*_DEVELOPER, "viewer")
_VARIABLE = {"name": "W", "value": "a-long-enough-value-42"}
_ANSWER = {"answer": "approve", "digest": "0" * 64}
ACTS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "/environment/{agent}/set": ("/environment/writer/set", _DEVELOPER, _VARIABLE),
    "/environment/{agent}/remove/{name}": ("/environment/writer/remove/NONE", _DEVELOPER, {}),
    "/environment/{agent}/revoke/{name}": ("/environment/writer/revoke/NONE", _DEVELOPER, {}),
    "/environment/{agent}/import": ("/environment/writer/import", _DEVELOPER, {"text": "A=b"}),
    "/environment/{agent}/preview": ("/environment/writer/preview", _ALL, {"text": "A=b"}),
    "/keys": ("/keys", _OWNER, {"label": "made", "role": "viewer"}),
    "/keys/{id}/deactivate": ("/keys/key_000000000000/deactivate", _OWNER, {}),
    "/keys/{id}/rotate": ("/keys/key_000000000000/rotate", _OWNER, {"overlap": "1h"}),
    "/sessions/{id}/stop": ("/sessions/s-0/stop", _OPERATOR, {}),
    "/calls/waiting/{id}": ("/calls/waiting/c-0", _OPERATOR, _ANSWER),
    "/tools/explain": ("/tools/explain", _ALL, {"agent": "writer", "tool": "publish"}),
    "/audit/verify": ("/audit/verify", _ALL, {}),
    "/sign-out": ("", (), {}),
    "/sign-in": ("", (), {}),
    "/sign-in/link": ("", (), {}),
}  # fmt: skip


def routes() -> list[tuple[str, str]]:
    daemon: Any = SimpleNamespace(pages=Table())
    found: list[Any] = router(daemon).routes
    return sorted((next(iter(route.methods)), route.path) for route in found)


def test_every_route_that_acts_has_its_row() -> None:
    assert {path for method, path in routes() if method == "POST"} == set(ACTS)


@pytest.mark.parametrize("role", _ALL)
def test_a_role_does_what_it_may_and_no_more(
    daemon: RealDaemon, keys: dict[str, str], role: str
) -> None:
    pages = signed_in(daemon, keys[role])
    for path, able, fields in ACTS.values():
        if path:
            got = pages.post(path, **fields)
            assert (got.status_code == 403) is (role not in able), (path, got.status_code)


@pytest.mark.parametrize("role", _ALL)
def test_what_a_role_may_not_do_is_not_offered(
    daemon: RealDaemon, keys: dict[str, str], session: str, role: str
) -> None:
    pages = signed_in(daemon, keys[role])
    seen = "".join(
        pages.read(path)
        for path in ("/environment/writer", "/sessions", f"/sessions/{session}", "/calls", "/tools")
    )
    for words, able in (
        ("Set variable", _DEVELOPER),
        ("Remove", _DEVELOPER),
        ("Stop session", _OPERATOR),
    ):
        assert (words in told(seen)) is (role in able), words
    assert ('href="/keys"' in seen) is (role in _OPERATOR)
    got = pages.get("/keys")
    assert (got.status_code == 200) is (role in _OPERATOR)
    if role in _OPERATOR:
        assert ("Create key" in told(got.text)) is (role == "owner")


def test_a_developer_sees_its_own_agents_alone(daemon: RealDaemon, keys: dict[str, str]) -> None:
    pages = signed_in(daemon, keys["developer"])
    assert "reader" not in told(pages.read("/tools"))
    assert pages.get("/environment/reader").status_code == 404
    assert pages.get("/environment").headers["location"] == "/environment/writer"


def test_another_team_gets_of_every_route_what_nobody_ever_had(
    daemon: RealDaemon, keys: dict[str, str], session: str
) -> None:
    """The same words for what is another team's as for what does not exist."""
    with daemon.client() as client:
        sent = {"tool": "publish", "arguments": {"to": "moon"}, "session": session}
        call = list(client.stream("tools.run", **sent))[-1]["ended"]["call"]
    key = next(k["id"] for k in daemon.call("keys.list", team="red")["keys"])
    spy = signed_in(daemon, keys["blue"])
    real = {"agent": "writer", "id": "", "name": "TOKEN"}
    none = {"agent": "nobody", "id": "", "name": "NOTHING"}
    walked = 0
    for method, path in routes():
        if path.startswith(("/sign-", "/static/")):
            continue
        kind = path.split("/")[1]
        real["id"] = {"sessions": session, "calls": call, "keys": key}.get(kind, "")
        none["id"] = {"sessions": "s-" + "0" * 16, "calls": "c-" + "0" * 16}.get(
            kind, "key_" + "0" * 12
        )
        fields = next((f for p, (_, _, f) in ACTS.items() if p == path), {})
        answers = []
        for names in (real, none):
            where = re.sub(r"{(\w+)}", lambda m, n=names: n[m[1]], path)  # type: ignore[misc]
            spy.get("/audit")  # takes what the one before left to be told
            got = spy.get(where) if method == "GET" else spy.post(where, **fields)
            text = re.sub(r'content="[^"]+"|value="[^"]+"', "", got.text)
            for word in (names["agent"], names["name"], names["id"]):
                text = text.replace(word, "X") if word else text
            answers.append((got.status_code, told(text)))
            if "{" in path:
                assert got.status_code in (303, 400, 403, 404, 409), (where, got.status_code)
        if path != "/tools/{name}" and "{" in path:
            assert answers[0] == answers[1], path
            walked += 1
        elif "{" not in path:
            seen = told(spy.get(path).text) if method == "GET" else ""
            for word in ("writer", "reader", session, call, "of red"):
                assert word not in seen, (path, word)
            walked += 1
    assert walked > 20
    assert Pages(daemon.url).get("/environment/writer").status_code == 303
