"""Signing in and out, cookies, forms of other pages, and the end of a page. On a real daemon."""

from __future__ import annotations

import json
import re

import httpx2
import pytest
from plain_pages import Pages, mark_of, new_key, signed_in, told
from real_daemon import RealDaemon


def cookie_of(got: httpx2.Response) -> str:
    found = [c for c in got.headers.get_list("set-cookie") if c.startswith("sandboxd-")]
    assert len(found) == 1, got.headers
    return str(found[0])


def test_without_a_page_there_is_only_the_way_in(daemon: RealDaemon) -> None:
    pages = Pages(daemon.url)
    for path in ("/", "/environment", "/keys", "/sessions", "/calls/live", "/audit?search=x"):
        got = pages.get(path)
        assert (got.status_code, got.headers["location"]) == (303, "/sign-in"), path
    got = pages.get("/calls/live", **{"hx-request": "true"})
    assert (got.status_code, got.headers["hx-redirect"]) == (401, "/sign-in?over=1")
    assert "API key" in told(pages.read("/sign-in"))


def test_a_key_signs_in(daemon: RealDaemon, keys: dict[str, str]) -> None:
    pages = Pages(daemon.url)
    got = pages.sign_in(keys["viewer"])
    assert (got.status_code, got.headers["location"]) == (303, "/")
    words = {word.strip().lower() for word in cookie_of(got).split(";")[1:]}
    assert words == {"httponly", "path=/", "samesite=strict"}
    assert keys["viewer"] not in str(got.headers)
    page = pages.read("/environment")
    assert "Team red" in told(page)
    assert keys["viewer"] not in page
    signed = [r for r in daemon.audit() if r["event"] == "dashboard.signed_in"][-1]
    assert (signed["team"], signed["role"], signed["way"]) == ("red", "viewer", "key")


@pytest.mark.parametrize("key", ["", "an_sk_" + "0" * 64, "x" * 9000, "\u2028"])
def test_a_wrong_key_does_not(daemon: RealDaemon, key: str) -> None:
    pages = Pages(daemon.url)
    got = pages.sign_in(key)
    assert got.status_code == 401
    assert "This API key is not valid." in told(got.text)
    assert "set-cookie" not in got.headers


def test_a_deactivated_key_reads_as_an_unknown_one(daemon: RealDaemon) -> None:
    made = new_key(daemon, "red", "viewer")
    daemon.call("keys.deactivate", key=made["key"]["id"])
    gone = Pages(daemon.url).sign_in(made["secret"])
    unknown = Pages(daemon.url).sign_in("an_sk_" + "1" * 64)
    assert (gone.status_code, gone.text) == (unknown.status_code, unknown.text)


def test_a_token_has_no_page(daemon: RealDaemon, keys: dict[str, str]) -> None:
    made = daemon.call("keys.list", team="red")["keys"]
    key = next(k["id"] for k in made if k["role"] == "operator")
    token = daemon.call("tokens.create", key=key, agents=["writer"])["token"]
    got = Pages(daemon.url).sign_in(token)
    assert got.status_code == 400
    assert "set-cookie" not in got.headers


def test_signing_in_again_ends_the_page_before(daemon: RealDaemon, keys: dict[str, str]) -> None:
    pages = signed_in(daemon, keys["viewer"])
    before = dict(pages.client.cookies)
    assert pages.sign_in(keys["operator"]).status_code == 303
    assert dict(pages.client.cookies) != before
    old = httpx2.get(daemon.url + "/audit", cookies=before)
    assert old.status_code == 303


def test_signing_out_ends_it(daemon: RealDaemon, keys: dict[str, str]) -> None:
    pages = signed_in(daemon, keys["viewer"])
    kept = dict(pages.client.cookies)
    got = pages.post("/sign-out")
    assert (got.status_code, got.headers["location"]) == (303, "/sign-in?out=1")
    assert not dict(pages.client.cookies)
    assert httpx2.get(daemon.url + "/audit", cookies=kept).status_code == 303


def test_the_end_of_a_key_is_the_end_of_its_page_at_once(daemon: RealDaemon) -> None:
    made = new_key(daemon, "red", "owner")
    pages, link = signed_in(daemon, made["secret"]), Pages(daemon.url)
    assert pages.get("/keys").status_code == 200
    daemon.call("keys.deactivate", key=made["key"]["id"])
    assert pages.get("/keys").headers["location"] == "/sign-in"
    assert link.sign_in(made["secret"]).status_code == 401


# -- the one-time link ----------------------------------------------------------------------------


def code_of(daemon: RealDaemon, *options: str) -> str:
    done = daemon.ctl("dashboard", *options)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(re.escape(daemon.url) + r"/sign-in#code=([\w-]{43})\n", done.stdout)
    assert found is not None, done.stdout
    return found[1]


def test_the_commands_link_signs_in_once(daemon: RealDaemon) -> None:
    code = code_of(daemon, "--team", "blue", "--role", "viewer")
    pages = Pages(daemon.url)
    got = pages.client.post("/sign-in/link", data={"code": code})
    assert (got.status_code, got.headers["location"]) == (303, "/")
    assert "Team blue viewer" in told(pages.read("/audit"))
    again = Pages(daemon.url).client.post("/sign-in/link", data={"code": code})
    assert again.status_code == 401
    assert "This link is not valid any more." in told(again.text)
    assert all(code not in str(record) for record in daemon.audit())
    assert code not in daemon.log.read_text()


def test_a_link_can_lead_by_way_of_a_proxy(daemon: RealDaemon) -> None:
    done = daemon.ctl("dashboard", "--team", "red", "--url", "https://sandboxes.example", "--json")
    got = json.loads(done.stdout)
    assert re.fullmatch(r"https://sandboxes[.]example/sign-in#code=[\w-]{43}", got["url"])
    assert (got["team"], got["role"], got["valid_for"]) == ("red", "owner", 120.0)
    for url in ("ftp://x.example", "x.example", "https://x.example/#code=1"):
        refused = daemon.ctl("dashboard", "--url", url)
        assert (refused.returncode, refused.stdout) == (2, "")


def test_a_keys_own_link_is_for_a_page_of_the_key(daemon: RealDaemon) -> None:
    made = new_key(daemon, "red", "viewer")
    with httpx2.Client(
        base_url=daemon.url, headers={"authorization": f"Bearer {made['secret']}"}
    ) as client:
        got = client.post("/api/v1/operator/dashboard.link", json={})
        other = client.post("/api/v1/operator/dashboard.link", json={"role": "owner"})
    assert other.status_code == 400
    pages = Pages(daemon.url)
    code = got.json()["path"].partition("#code=")[2]
    assert pages.client.post("/sign-in/link", data={"code": code}).status_code == 303
    assert "Team red viewer" in told(pages.read("/audit"))
    daemon.call("keys.deactivate", key=made["key"]["id"])
    assert pages.get("/audit").status_code == 303


def test_a_link_is_for_a_team_that_there_is(daemon: RealDaemon) -> None:
    assert daemon.ctl("dashboard", "--team", "green").returncode == 3


def test_the_command_ends_pages(daemon: RealDaemon, keys: dict[str, str]) -> None:
    pages, other = signed_in(daemon, keys["viewer"]), signed_in(daemon, keys["blue"])
    done = daemon.ctl("dashboard", "--end", "--team", "red")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+ pages? ended\n", done.stdout)
    assert pages.get("/audit").status_code == 303
    assert other.get("/audit").status_code == 200


# -- pages of others ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
    ids=str,
)
def test_a_form_of_another_page_is_refused(owner: Pages, headers: dict[str, str]) -> None:
    mark = owner.csrf
    sent = {"csrf": mark, "name": "FOREIGN", "value": "a-value-that-is-long"}
    got = owner.client.post("/environment/writer/set", data=sent, headers=headers)
    assert got.status_code == 403
    assert "FOREIGN" not in owner.read("/environment/writer")


def test_a_form_without_the_pages_own_mark_is_refused(
    owner: Pages, daemon: RealDaemon, keys: dict[str, str]
) -> None:
    other = mark_of(signed_in(daemon, keys["owner"]).read("/tools"))
    for mark in ("", "x", other):
        sent = {"csrf": mark, "name": "FOREIGN", "value": "a-value-that-is-long"}
        got = owner.client.post("/environment/writer/set", data=sent)
        assert got.status_code == 403
        assert "does not come from this page" in told(got.text)
    got = owner.client.post("/sign-out", data={"csrf": ""})
    assert got.status_code == 403
    assert owner.get("/audit").status_code == 200


def test_a_form_is_bounded_and_of_one_kind(owner: Pages) -> None:
    mark = owner.csrf
    many = "&".join(f"f{n}=1" for n in range(200))
    for content, kind, status in (
        ('{"csrf": 1}', "application/json", 400),
        (f"csrf={mark}&{many}", "application/x-www-form-urlencoded", 400),
        (f"csrf={mark}&value=%FF", "application/x-www-form-urlencoded", 400),
        (f"csrf={mark}&value=" + "x" * (1 << 20), "application/x-www-form-urlencoded", 413),
    ):
        got = owner.client.post(
            "/environment/writer/set", content=content, headers={"content-type": kind}
        )
        assert got.status_code == status, (kind, content[:80], got.text[:300])


# -- headers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/sign-in", "/environment/writer", "/calls", "/nothing/there"])
def test_pages_allow_nothing_but_our_own_files(owner: Pages, path: str) -> None:
    got = owner.get(path)
    if path == "/sign-in":  # signed in: somebody else's
        got = Pages(owner.url).get(path)
    if path == "/nothing/there":
        assert got.status_code == 404
        return
    rules = dict(
        rule.strip().split(" ", 1) for rule in got.headers["content-security-policy"].split(";")
    )
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("base-uri") == rules.pop("frame-ancestors") == "'none'"
    assert set(rules.values()) == {"'self'"}
    assert got.headers["cache-control"] == "no-store"
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["cross-origin-opener-policy"] == "same-origin"
    assert got.headers["referrer-policy"] == "same-origin"


def test_static_files_are_kept_by_their_digest(owner: Pages) -> None:
    page = owner.read("/environment")
    found = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    assert len(set(found)) == 4
    for path in found:
        got = Pages(owner.url).get(path)
        assert got.status_code == 200
        assert "immutable" in got.headers["cache-control"]
        assert got.headers["x-content-type-options"] == "nosniff"
    assert owner.get("/static/dashboard.css?v=0").headers["cache-control"] == "no-cache"
    for name in ("VENDORED.md", "..%2frender.py", "nothing.js"):
        assert owner.get(f"/static/{name}").status_code == 404
