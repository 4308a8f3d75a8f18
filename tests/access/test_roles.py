"""Roles only grow upward, and nobody but a host operator reaches beyond a team."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest

from sandboxd.access.roles import KEY_ROLES, PERMISSIONS, Permission, Principal, Role


def principal(role: Role, team: str | None = "blue", **keys: object) -> Principal:
    return Principal("key", "a key", role, team, **keys)  # type: ignore[arg-type]


def test_each_role_of_a_key_includes_the_next_lower_one() -> None:
    for higher, lower in pairwise(KEY_ROLES):
        assert PERMISSIONS[higher] > PERMISSIONS[lower]


def test_nobody_but_the_host_has_what_concerns_all_teams() -> None:
    holders = [role for role in get_args(Role) if "host" in PERMISSIONS[role]]
    assert holders == ["host"]


def test_every_permission_is_held_by_somebody_and_every_role_holds_only_permissions() -> None:
    assert PERMISSIONS["host"] == set(get_args(Permission))
    assert all(PERMISSIONS[role] <= PERMISSIONS["host"] for role in get_args(Role))


def test_a_token_makes_no_tokens_and_reads_no_variables() -> None:
    for permission in ("tokens.create", "keys.read", "keys.manage", "env.read", "env.write"):
        assert permission not in PERMISSIONS["application"]


@pytest.mark.parametrize("role", [r for r in get_args(Role) if r != "host"])
def test_another_team_is_out_of_reach(role: Role) -> None:
    one = principal(role)
    assert one.reaches("blue", "crawler")
    assert not one.reaches("red", "crawler")
    assert not one.reaches("red")


def test_a_scope_of_agents_holds_within_the_team() -> None:
    one = principal("developer", agents=frozenset({"crawler"}))
    assert one.reaches("blue", "crawler")
    assert not one.reaches("blue", "mailer")
    assert not one.reaches("red", "crawler")
    assert not one.reaches("blue")  # what concerns the whole team is beyond a scope


def test_the_host_reaches_every_team() -> None:
    assert Principal("host", "root", "host", None).reaches("red", "crawler")
