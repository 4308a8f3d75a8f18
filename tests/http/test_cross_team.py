"""The walk: every HTTP route and every admin method, with every key that is not the right one.

Routes come from the application's own table and methods from the admin socket's: neither can
be left out. Beside each refusal stands a control: the right key, the same request, through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from walk_cases import METHODS, Case
from walk_routes import ROUTES, Route
from walk_world import GHOST, Names, World, world

from sandboxd.admin.methods import Methods
from sandboxd.errors import Denied, SandboxdError
from sandboxd.http.app import make_app

#: What each credential is. Who is not of the target's team, or not for its agent, is outside.
ROLES = {
    "owner": "owner",
    "operator": "operator",
    "developer": "developer",
    "viewer": "viewer",
    "beside": "operator",
    "developer beside": "developer",
    "stranger": "owner",
    "ann": "application",
    "bob": "application",
    "ann beside": "application",
    "ann of blue": "application",
}
OUTSIDE = ("beside", "developer beside", "stranger", "ann beside", "ann of blue")


@pytest.fixture(scope="module")
def made() -> Iterator[World]:
    with world() as built:
        yield built


def test_every_method_has_a_case() -> None:
    table = Methods(None).table()  # type: ignore[arg-type]  # listed, not called
    assert sorted(METHODS) == sorted(table), "give a new method its case in walk_cases.METHODS"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_reached_by_the_right_keys_alone(made: World, name: str) -> None:
    for case in METHODS[name]:
        path = f"/api/v1/operator/{name}"

        def ask(who: str, names: Names, case: Case = case, path: str = path) -> tuple[int, str]:
            body = case.body(made, names)
            return made.ask(who, "POST", path, body=body, first_line=case.first_line)

        walk(made, case, ask)
        if name == "dashboard.end":
            made.pages.clear()
        if case.kind == "host":
            through_the_socket(made, name, case.body(made, made.real))


def table() -> set[tuple[str, str]]:
    """Every method and path that the application serves, read off its own table."""
    stand_in: Any = SimpleNamespace(boot=SimpleNamespace(settings=SimpleNamespace(http=None)))
    stand_in.pages = None
    found: set[tuple[str, str]] = set()

    def collect(routes: Iterable[Any]) -> None:
        for route in routes:
            if hasattr(route, "effective_candidates"):  # a router that was included
                collect(route.effective_candidates())
                continue
            served = getattr(route, "starlette_route", None) or route
            path = getattr(route, "path", None) or served.path
            methods = getattr(route, "methods", None) or served.methods
            # HEAD is GET without its answer.
            found.update((method, path) for method in methods if method != "HEAD")

    collect(make_app(stand_in).routes)
    return found


def test_every_route_has_a_case() -> None:
    served = table()
    assert {("POST", "/api/v1/operator/{method}"), ("GET", "/v1/sandboxes/{id}")} <= served
    served.remove(("POST", "/api/v1/operator/{method}"))  # of which each method is walked
    assert sorted(ROUTES) == sorted(served), "give a new route its case in walk_routes.ROUTES"


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=lambda part: part)
def test_a_route_is_reached_by_the_right_keys_alone(made: World, method: str, path: str) -> None:
    for route in ROUTES[method, path]:

        def ask(who: str, names: Names, route: Route = route) -> tuple[int, str]:
            return route.ask(made, who, names, method, path)

        if route.case.kind == "open":
            check_open(made, ask)
        else:
            walk(made, route.case, ask, page=route.page)
        if path == "/sign-out":
            made.pages.clear()


Ask = Callable[[str, Names], tuple[int, str]]


def walk(made: World, case: Case, ask: Ask, *, page: bool = False) -> None:
    real = made.anew(case.ends)
    # Tokens don't sign in to pages.
    tokens = tuple(who for who, role in ROLES.items() if role == "application")
    for who in ("nobody", "guesser", *(tokens[:1] if page else ())):
        status, text = ask(who, real)
        assert status == (303 if page else 401), (who, status, text)
        assert not page or text == "/sign-in", (who, text)
    known = {who: role for who, role in ROLES.items() if not (page and who in tokens)}
    denied = {role: who for who, role in reversed(known.items()) if role not in case.allowed}
    for who in denied.values():  # whom a permission is refused for their role: one of each
        check_denied(who, ask, real)
    for who, role in known.items():
        if role not in case.allowed:
            continue
        if who in (case.outside or OUTSIDE) or (who == "bob" and case.users):
            check_outside(made, case, who, ask, real)
    # The right keys: who may do the least of those that may, and a user's own token.
    able = [who for who in ("viewer", "developer", "operator", "owner") if who in case.allowed]
    users = ["ann"] if "application" in case.allowed and not page else []
    controls = case.controls or (*able[:1], *users)
    for who in controls[:1] if case.ends else controls:
        status, text = ask(who, real)
        assert status in case.status, (who, status, text)
        assert not page or text != "/sign-in", (who, text)
        if case.kind == "list":
            assert any(mark in text for mark in made.marks), (who, text)


def check_denied(who: str, ask: Ask, real: Names) -> None:
    """A role that lacks the permission is told so, whether the thing exists or not."""
    status, text = ask(who, real)
    assert status == 403, (who, status, text)
    assert ask(who, GHOST) == (status, text), who


def check_outside(made: World, case: Case, who: str, ask: Ask, real: Names) -> None:
    """What is out of reach doesn't exist: it reads as what never did, and no list has it."""
    status, text = ask(who, real)
    if case.kind == "one":
        assert status in case.gone, (who, status, text)
        never, told = ask(who, GHOST)
        alike = GHOST.in_place_of(real, text), GHOST.in_place_of(real, told)
        assert (status, alike[0]) == (never, alike[1]), (who, status, *alike)
        return
    assert status in case.status, (who, status, text)
    marks = [*made.marks, *(made.team_marks if who in ("stranger", "ann of blue") else ())]
    seen = [mark for mark in marks if mark in text]
    assert not seen, (who, seen)


def check_open(made: World, ask: Ask) -> None:
    """The same for everybody, with a key or without, and nothing of anybody's."""
    answers = {ask(who, names) for who in made.bearers for names in (made.real, GHOST)}
    ((status, text),) = answers
    assert status < 500, (status, text)
    assert not [mark for mark in (*made.marks, *made.team_marks) if mark in text]


def through_the_socket(made: World, name: str, params: dict[str, Any]) -> None:
    """What no key may, the host's operators may."""
    try:
        made.daemon.call(name, **params)
    except Denied:
        raise
    except SandboxdError:
        pass  # nothing was inspected that could be accepted, the server doesn't start


def test_the_walk_sees_a_leak(made: World) -> None:
    """A control of the walk itself: what shows the target to a stranger fails it."""
    listed = METHODS["agents.list"][0]

    def leaky(who: str, names: Names) -> tuple[int, str]:
        asked = "owner" if who == "stranger" else who
        return made.operate(asked, "agents.list", {})

    with pytest.raises(AssertionError, match="stranger"):
        walk(made, listed, leaky)
    shown = METHODS["session.show"][0]

    def told_apart(who: str, names: Names) -> tuple[int, str]:
        status, text = made.operate(who, "session.show", {"id": names.live})
        return status, text + (
            " of red" if (who, names.live) == ("stranger", made.real.live) else ""
        )

    with pytest.raises(AssertionError):
        walk(made, shown, told_apart)


def test_what_is_named_besides_is_the_callers_own_too(made: World) -> None:
    """Another team's variables of an agent that moved, another team's tool for an agent of one's
    own: whatever parameter names it, it does not exist.
    """
    own = {"agent": "blue-agent"}
    for method, params, named, right in (
        ("env.list", own, "team", "sapphire"),
        ("env.remove", {**own, "names": ["X"]}, "team", ""),
        ("keys.list", {}, "team", "sapphire"),
        ("tokens.create", {}, "team", "sapphire"),
        ("dashboard.link", {}, "team", "sapphire"),
        ("policy.egress", own, "tool", "ask-blue"),
        ("tools.show", {}, "tool", "ask-blue"),
        ("policy.explain", {**own, "arguments": {}}, "tool", "ask-blue"),
    ):
        answers = []
        for names in (made.real, GHOST):
            status, text = made.operate(
                "stranger", method, {**params, named: getattr(names, named)}
            )
            answers.append((status, GHOST.in_place_of(made.real, text)))
        assert answers[0] == answers[1], (method, answers)
        assert answers[0][0] == (200 if method == "policy.explain" else 404), (method, answers)
        if right:
            assert made.operate("stranger", method, {**params, named: right})[0] == 200, method


def test_an_abbreviation_is_looked_for_in_reach_alone(made: World) -> None:
    second = made.session()
    status, text = made.operate("owner", "session.show", {"id": "s-"})
    made.daemon.call("session.stop", id=second, grace=0)
    assert (status, "is ambiguous" in text) == (404, True)
    status, text = made.operate("stranger", "session.show", {"id": "s-"})
    assert (status, "no session 's-'" in text) == (404, True)


def test_a_stranger_revokes_no_token_of_ours(made: World) -> None:
    for params in ({"id": made.ids["bob"]}, {"subject": "bob"}):
        made.operate("stranger", "tokens.revoke", params)
    assert made.operate("bob", "status", {})[0] == 200
    assert made.operate("owner", "tokens.revoke", {"id": made.ids["bob"]})[0] == 200
    assert made.operate("bob", "status", {})[0] == 401


def test_a_refusal_of_a_permission_is_recorded(made: World) -> None:
    # A new key: how often those of one key are recorded is bounded.
    new = made.daemon.call("keys.create", team="ruby", role="viewer", label="refused")
    made.bearers["refused"] = new["secret"]
    assert made.operate("refused", "session.start", {"agent": "red-target"})[0] == 403
    found = [
        (record["event"], record["method"], record["role"], record["team"])
        for record in made.daemon.audit()
        if record.get("key") == new["key"]["id"] and "method" in record
    ]
    assert found == [("admin.denied", "session.start", "viewer", "ruby")]
