"""Who is let in before any route: names, origins, keys, failures. On a real daemon."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from real_daemon import RealDaemon, directories


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealDaemon]:
    with directories() as configured:
        configured.http("listen: 127.0.0.1:0\nhosts: [sandboxes.example.com]")
        configured.start()
        yield configured


@pytest.fixture
def client(daemon: RealDaemon) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=daemon.url) as opened:
        yield opened


def test_it_says_that_it_serves(client: httpx2.Client) -> None:
    got = client.get("/healthz")
    assert (got.status_code, got.json()) == (200, {"status": "ok"})
    assert got.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("name", ["sandboxes.example.com", "localhost:7621", "127.0.0.1", "[::1]"])
def test_its_own_names_are_answered(client: httpx2.Client, name: str) -> None:
    assert client.get("/healthz", headers={"host": name}).status_code == 200


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io"])
def test_a_name_that_somebody_pointed_here_is_refused(client: httpx2.Client, name: str) -> None:
    got = client.get("/healthz", headers={"host": name})
    assert (got.status_code, got.json()["error"]) == (421, "wrong_host")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1"])
def test_a_page_of_another_origin_is_refused(client: httpx2.Client, origin: str) -> None:
    got = client.get("/healthz", headers={"origin": origin})
    assert (got.status_code, got.json()["error"]) == (403, "cross_origin")


def test_a_refusal_before_the_body_was_read_says_that_the_connection_ends(
    client: httpx2.Client,
) -> None:
    refused = client.post("/healthz", content=b"x" * 1_000_000, headers={"origin": "null"})
    assert (refused.status_code, refused.headers["connection"]) == (403, "close")
    assert "connection" not in client.get("/healthz").headers
    # A short body may be here already: then the connection goes on. Neither breaks a request.
    for _ in range(20):
        assert client.post("/healthz", content=b"x", headers={"origin": "null"}).status_code == 403
        assert client.get("/healthz").status_code == 200


def test_our_own_pages_are_answered(daemon: RealDaemon, client: httpx2.Client) -> None:
    assert client.get("/healthz", headers={"origin": daemon.url}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/sandboxes/x", "/api/v1/me", "/nextjs/v1/tokens", "/mcp"])
def test_nothing_of_a_guarded_path_is_told_without_a_key(client: httpx2.Client, path: str) -> None:
    got = client.get(path)
    assert got.status_code == 401
    assert got.headers["www-authenticate"].startswith("Bearer")


def test_errors_have_the_form_that_each_client_reads(client: httpx2.Client) -> None:
    key = {"authorization": "Bearer an_sk_" + "0" * 64}
    text = "the API key or token is not valid"
    assert client.get("/v1/x", headers=key).json() == {
        "error": {"code": "invalid_api_key", "message": text}
    }
    assert client.get("/nextjs/v1/tokens", headers=key).json() == {"error": text}
    assert client.get("/api/v1/me", headers=key).json() == {
        "error": "invalid_api_key",
        "message": text,
        "status": 401,
    }
