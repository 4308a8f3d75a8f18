"""The walk: every HTTP route and every admin method, with every key that is not the right one.

Routes come from the application's own table and methods from the admin socket's: neither can
be left out. Beside each refusal stands a control: the right key, the same request, through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from walk_cases import METHODS, Case
from walk_world import GHOST, Names, World, world

from sandboxd.admin.methods import Methods
from sandboxd.errors import Denied, SandboxdError

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
        if case.kind == "host":
            through_the_socket(made, name, case.body(made, made.real))


Ask = Callable[[str, Names], tuple[int, str]]


def walk(made: World, case: Case, ask: Ask) -> None:
    real = made.anew(case.ends)
    refused = {ask(who, names) for who in ("nobody", "guesser") for names in (real, GHOST)}
    assert {status for status, _ in refused} == {401}
    for who, role in ROLES.items():
        if role not in case.allowed:
            check_denied(who, ask, real)
        elif who in OUTSIDE or (who == "bob" and case.users):
            check_outside(made, case, who, ask, real)
    controls = case.controls or tuple(
        who for who, role in ROLES.items() if role in case.allowed and who not in (*OUTSIDE, "bob")
    )
    for who in controls[:1] if case.ends else controls:
        status, text = ask(who, real)
        assert status in case.status, (who, status, text)
        if case.kind == "list":
            assert any(mark in text for mark in made.marks), (who, text)


def check_denied(who: str, ask: Ask, real: Names) -> None:
    """A role that lacks the permission is told so, whether the thing exists or not."""
    status, text = ask(who, real)
    assert status == 403, (who, status, text)
    assert ask(who, GHOST) == (status, text)


def check_outside(made: World, case: Case, who: str, ask: Ask, real: Names) -> None:
    """What is out of reach doesn't exist: it reads as what never did, and no list has it."""
    status, text = ask(who, real)
    if case.kind == "one":
        assert status == 404, (who, status, text)
        assert (status, GHOST.in_place_of(real, text)) == ask(who, GHOST)
        return
    assert status in case.status, (who, status, text)
    seen = [mark for mark in made.marks if mark in text]
    assert not seen, (who, seen)


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


def test_a_team_that_is_named_is_the_callers_own(made: World) -> None:
    """Variables stay with the team that set them; naming it is no way to them."""
    for team in ("ruby", "nob"):
        params = {"agent": "blue-agent", "team": team}
        status, text = made.operate("stranger", "env.list", params)
        assert (status, text.replace(team, "TEAM")) == (
            404,
            made.operate("stranger", "env.list", {"agent": "blue-agent", "team": "x"})[1].replace(
                "'x'", "'TEAM'"
            ),
        )
    assert (
        made.operate("stranger", "env.list", {"agent": "blue-agent", "team": "sapphire"})[0] == 200
    )


def test_a_stranger_revokes_no_token_of_ours(made: World) -> None:
    for params in ({"id": made.ids["bob"]}, {"subject": "bob"}):
        made.operate("stranger", "tokens.revoke", params)
    assert made.operate("bob", "status", {})[0] == 200
    assert made.operate("owner", "tokens.revoke", {"id": made.ids["bob"]})[0] == 200
    assert made.operate("bob", "status", {})[0] == 401


def test_every_refusal_of_a_permission_is_recorded(made: World) -> None:
    before = made.daemon.call("status")["pid"]
    made.operate("viewer", "session.start", {"agent": "red-target"})
    (record,) = [r for r in made.daemon.audit()[-3:] if r["event"] == "admin.denied"]
    assert (record["method"], record["key"], record["team"]) == (
        "session.start",
        made.ids["viewer"],
        "ruby",
    )
    assert before
