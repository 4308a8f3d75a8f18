"""Rate limits: the buckets by themselves, and what clients of a real daemon get of them."""

from __future__ import annotations

import httpx2
import pytest
from http_daemon import client_of, new_key, served

from sandboxd.http.rates import Rates


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_then_so_many_a_second() -> None:
    clock = Clock()
    rates = Rates(2.0, 3.0, clock=clock)
    assert [rates.take("a") for _ in range(5)] == [0, 0, 0, 1, 1]
    assert rates.take("b") == 0  # somebody else's is full
    clock.now += 0.5
    assert [rates.take("a"), rates.take("a")] == [0, 1]
    clock.now += 1000
    assert [rates.take("a") for _ in range(4)] == [0, 0, 0, 1]  # and never over the burst


def test_how_long_to_wait_is_told_without_taking_any() -> None:
    clock = Clock()
    rates = Rates(0.1, 1.0, clock=clock)
    assert [rates.wait_of("a"), rates.wait_of("a"), rates.take("a")] == [0, 0, 0]
    assert rates.wait_of("a") == 10
    clock.now += 9.5
    assert rates.wait_of("a") == 1


def test_names_that_nobody_uses_are_forgotten_first() -> None:
    rates = Rates(0.001, 1.0, most=2, clock=Clock())
    assert rates.take("busy") == 0
    for name in ("x", "y", "z"):
        assert rates.take(name) == 0
        assert rates.take("busy") > 0  # asked for all along, so still known
    assert rates.take("x") == 0  # forgotten, hence full again


@pytest.mark.soak
def test_guessing_ends_soon_and_locks_nobody_out() -> None:
    with served("listen: 127.0.0.1:0\nlimits: {failures: 4}") as daemon:
        good, late = new_key(daemon), new_key(daemon)
        with client_of(daemon, good) as client:
            assert client.get("/api/v1/me").status_code == 200
            statuses = []
            for digit in "01234567":
                wrong = {"authorization": f"Bearer an_sk_{digit * 64}"}
                statuses.append(client.get("/api/v1/me", headers=wrong).status_code)
            assert statuses[:4] == [401] * 4
            assert statuses[-1] == 429
            # A key that was right before still is; one that wasn't shown yet has to wait, or the
            # answer would tell a right guess from a wrong one.
            assert client.get("/api/v1/me").status_code == 200
            waits = client.get("/api/v1/me", headers={"authorization": f"Bearer {late}"})
            assert waits.status_code == 429
            assert 1 <= int(waits.headers["retry-after"]) <= 60
            assert waits.json()["error"] == "rate_limited"
        log = daemon.log.read_text()
        assert "a request from 127.0.0.1 had no valid key" in log
        for secret in (good, late, "an_sk_" + "0" * 64):
            assert secret not in log
            assert secret not in str(daemon.audit())


@pytest.mark.soak
def test_one_key_does_not_get_more_than_its_share() -> None:
    with served("listen: 127.0.0.1:0\nlimits: {requests: 2, body: 1K}") as daemon:
        with client_of(daemon, new_key(daemon)) as one, client_of(daemon, new_key(daemon)) as two:
            got = [one.get("/api/v1/me") for _ in range(8)]
            assert [answer.status_code for answer in got[:4]] == [200] * 4
            assert 429 in [answer.status_code for answer in got]
            assert two.get("/api/v1/me").status_code == 200
            assert_too_large(two)


def assert_too_large(client: httpx2.Client) -> None:
    for body in ({"content": b"x" * 1025}, {"content": iter([b"x" * 600, b"x" * 600])}):
        got = client.post("/v1/sandboxes", **body)  # type: ignore[arg-type]
        assert got.status_code == 413
        assert got.json()["error"]["message"] == "a request's body may have 1,024 bytes here"


@pytest.mark.parametrize("credential", ["", "Basic eDp5", "Bearer", "Bearer ", "Bearer a b"])
def test_what_is_no_bearer_is_no_key(credential: str) -> None:
    from sandboxd.http.guard import _bearer

    assert _bearer([(b"authorization", credential.encode())]) in ("", "a b")
    assert _bearer([(b"authorization", b"bearer x"), (b"authorization", b"bearer y")]) == ""
    assert _bearer([(b"authorization", b"bearer x")]) == "x"
