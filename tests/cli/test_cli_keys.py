"""``sandboxctl keys`` and ``tokens``: a key is printed once, and named without being shown."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cli_support import Ctl

KEY = re.compile(r"an_sk_[0-9a-f]{64}")


@pytest.fixture(scope="module")
def made(daemon: Ctl) -> dict[str, Any]:
    """A key that the tests leave alone."""
    found: dict[str, Any] = daemon.json("keys", "create", "--role", "operator", "--label", "kept")
    return found


def test_the_key_alone_is_on_standard_output(daemon: Ctl) -> None:
    done = daemon("keys", "create", "--role", "viewer", "--label", "screen in the hall")
    assert KEY.fullmatch(done.stdout.rstrip("\n"))
    assert not KEY.search(done.stderr)
    assert "viewer of team default" in done.stderr


def test_a_list_has_what_tells_keys_apart_and_no_key(daemon: Ctl, made: dict[str, Any]) -> None:
    (row,) = [row for row in daemon.json("keys", "list")["keys"] if row["label"] == "kept"]
    assert row == made["key"]
    assert row["prefix"] == made["secret"][:12]
    assert (row["role"], row["state"], row["last_used_at"]) == ("operator", "active", None)
    printed = daemon("keys", "list").stdout
    assert made["key"]["id"] in printed
    assert not re.search(r"an_sk_[0-9a-f]{7}", printed)


@pytest.mark.parametrize("named", ["id", "prefix", "-"])
def test_it_is_named_by_id_by_beginning_or_from_standard_input(
    daemon: Ctl, made: dict[str, Any], named: str
) -> None:
    name = made["key"].get(named, "-")
    shown = daemon.json("keys", "show", name, stdin=made["secret"].encode() + b"\n")
    assert shown["id"] == made["key"]["id"]


def test_a_deactivated_key_is_listed_and_does_not_work(daemon: Ctl) -> None:
    made = daemon.json("keys", "create", "--role", "operator", "--label", "short-lived")
    id = made["key"]["id"]
    done = daemon("keys", "deactivate", "-", stdin=made["secret"].encode())
    assert done.stdout == f"deactivated {id} (short-lived)\nended 0 sessions\n"
    assert daemon.json("keys", "show", id)["state"] == "deactivated"
    assert id not in daemon("keys", "list", "--active").stdout
    refused = daemon("tokens", "create", "--key", id, status=4)
    assert "not valid" in refused.stderr
    assert "is deactivated" in daemon("keys", "rotate", id, status=5).stderr
    again = daemon.json("keys", "deactivate", id)
    assert (again["key"]["id"], again["ended_sessions"]) == (id, [])


def test_a_rotated_key_says_until_when_it_works(daemon: Ctl) -> None:
    old = daemon.json("keys", "create", "--role", "viewer", "--label", "turning")["key"]["id"]
    done = daemon("keys", "rotate", old, "--overlap", "2h")
    until = daemon.json("keys", "show", old)["expires_at"]
    assert KEY.fullmatch(done.stdout.rstrip("\n"))
    assert f"{old} works until {until}\n" in done.stderr
    (new,) = [k for k in daemon.json("keys", "list")["keys"] if k["replaces"] == old]
    done = daemon("keys", "rotate", new["id"], "--overlap", "0")
    assert f"{new['id']} is deactivated\n" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("keys", "create", "--role", "operator"), 2, "missing: --label"),
        (("keys", "create", "--role", "king", "--label", "x"), 2, "invalid choice"),
        (("keys", "create", "--role", "developer", "--label", "x"), 2, "named agents"),
        (("keys", "create", "--role", "viewer", "--label", "x", "--agent", "no"), 3, "no agent"),
        (("keys", "create", "--role", "viewer", "--label", "x", "--team", "no"), 3, "no team"),
        (("keys", "create", "--role", "viewer", "--label", "x", "--expires", "1y"), 2, "durat"),
        (("keys", "create", "--role", "viewer", "--label", "a\nb"), 2, "one line"),
        (("keys", "show", "key_000000000000"), 3, "no API key 'key_000000000000'"),
        (("keys", "rotate", "key_000000000000"), 3, "sandboxctl keys list"),
        (("keys", "deactivate", "-"), 2, "standard input is empty"),
        (("tokens", "create", "--key", "nothing"), 3, "no API key"),
        (("tokens", "revoke"), 2, "name a token, or a user"),
        (("tokens", "revoke", "tok_1"), 2, "not the id of a token"),
        (("tokens", "revoke", "x", "--user", "ann"), 2, "name a token, or a user"),
        (("tokens", "revoke", "--user", "a\tb"), 2, "printable"),
    ],
    ids=str,
)
def test_mistakes(daemon: Ctl, arguments: tuple[str, ...], status: int, told: str) -> None:
    done = daemon(*arguments, status=status)
    assert (done.stdout, told in done.stderr) == ("", True), done.stderr
    assert "\n  hint: " in done.stderr


def test_tokens_for_agents_and_users(daemon: Ctl, made: dict[str, Any]) -> None:
    id = made["key"]["id"]
    done = daemon("tokens", "create", "--key", id, "--agent", "sh", "--user", "ann")
    assert done.stdout.count(".") == 2
    assert done.stdout.strip() not in done.stderr
    token = daemon.json("tokens", "create", "--key", id, "--expires", "48h")
    assert set(token) == {"token", "id", "expires_at"}
    revoked = daemon.json("tokens", "revoke", "-", stdin=token["token"].encode())
    assert revoked == {"id": token["id"], "team": "default", "ended_sessions": []}
    revoked = daemon.json("tokens", "revoke", "--user", "ann")
    assert revoked == {"subject": "ann", "team": "default", "ended_sessions": []}
    missing = daemon("tokens", "create", "--key", id, "--agent", "nobody", status=3)
    assert "no agent 'nobody'" in missing.stderr


def test_signing_keys_are_published_and_replaced(daemon: Ctl) -> None:
    before = json.loads(daemon("tokens", "jwks").stdout)["keys"]
    rotated = daemon.json("tokens", "rotate-key")["keys"]
    assert [key["kid"] for key in rotated[1:]] == [key["kid"] for key in before]
    assert daemon("tokens", "rotate-key", "--now").stdout.endswith("ended 0 sessions\n")
    (last,) = json.loads(daemon("tokens", "jwks").stdout)["keys"]
    assert last["kid"] not in {key["kid"] for key in rotated}
