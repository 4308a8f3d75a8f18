"""``/v1`` on a real daemon: tokens, sandboxes, commands and files, as the SDK asks for them."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from http_daemon import client_of, new_key, served
from real_daemon import RealDaemon, until


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealDaemon]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def client(daemon: RealDaemon) -> Iterator[httpx2.Client]:
    with client_of(daemon, new_key(daemon)) as opened:
        yield opened


@pytest.fixture(scope="module")
def sandbox(client: httpx2.Client) -> str:
    """A sandbox that runs; tests leave it as they found it."""
    return str(create(client)["id"])


def create(client: httpx2.Client, **more: Any) -> Any:
    got = client.post("/v1/sandboxes", json={"agent": "worker", **more})
    assert got.status_code == 200, got.text
    return got.json()


def refused(got: httpx2.Response, status: int, code: str, text: str) -> None:
    """An error in the form that the SDK reads."""
    assert got.status_code == status, got.text
    error = got.json()["error"]
    assert error["code"] == code
    assert text in error["message"]


def test_a_sandbox_is_made_looked_at_and_deleted(client: httpx2.Client, daemon: RealDaemon) -> None:
    made = create(client)
    assert made["id"] == made["sandboxId"]
    assert made["status"] == "running"
    got = client.get(f"/v1/sandboxes/{made['id']}").json()
    assert got["agent"] == {"slug": "worker", "name": "agent worker of a test"}
    assert (got["threads"], got["error"]) == ([], None)
    assert made["id"] in [row["id"] for row in daemon.call("session.list")["sessions"]]
    gone = client.delete(f"/v1/sandboxes/{made['id']}")
    assert (gone.status_code, gone.content) == (204, b"")
    assert made["id"] not in [row["id"] for row in daemon.call("session.list")["sessions"]]
    after = client.get(f"/v1/sandboxes/{made['id']}").json()
    assert (after["status"], after["error"]) == ("stopped", None)
    assert client.delete(f"/v1/sandboxes/{made['id']}").status_code == 204  # as good as deleted


def test_a_sandbox_whose_agent_failed_says_so(client: httpx2.Client) -> None:
    made = client.post("/v1/sandboxes", json={"agent": "failing"}).json()
    path = f"/v1/sandboxes/{made['id']}"
    until(lambda: client.get(path).json()["status"] == "error")
    assert client.get(path).json()["error"] == "the agent exited with status 3"


def test_commands_run_in_the_agents_own_sandbox(client: httpx2.Client, sandbox: str) -> None:
    def run(command: str, **more: Any) -> Any:
        got = client.post(f"/v1/sandboxes/{sandbox}/exec", json={"command": command, **more})
        assert got.status_code == 200, got.text
        return got.json()

    done = run('echo "$X in $PWD"; echo oops >&2; exit 7', envs={"X": "x"}, cwd="/workspace")
    assert (done["exitCode"], done["stdout"], done["stderr"]) == (7, "x in /workspace\n", "oops\n")
    assert "sleep 86000" in run("cat /proc/*/cmdline | tr '\\0' ' '")["stdout"]  # the agent
    assert run("kill -9 $$")["exitCode"] == 137
    for cwd in ("/none", "none", "/etc/passwd", "x" * 300):
        got = client.post(f"/v1/sandboxes/{sandbox}/exec", json={"command": "true", "cwd": cwd})
        assert got.status_code == 400, cwd
    long = {"command": "true", "envs": {"X": "x" * 200_000}}
    assert client.post(f"/v1/sandboxes/{sandbox}/exec", json=long).status_code == 400
    late = run("sleep 60", timeoutMs=200)
    assert (late["exitCode"], late["timedOut"]) == (124, True)


def test_a_command_ends_when_who_asked_for_it_leaves(
    daemon: RealDaemon, client: httpx2.Client, sandbox: str
) -> None:
    def running() -> bool:
        got = daemon.call("session.exec", id=sandbox, command="cat /proc/*/cmdline")
        return b"86123" in base64.b64decode(got["stdout"])

    path = f"/v1/sandboxes/{sandbox}/exec"
    with client_of(daemon, new_key(daemon, "operator")) as leaving, ThreadPoolExecutor() as pool:
        asked = pool.submit(leaving.post, path, json={"command": "sleep 86123"}, timeout=3)
        until(running)
        with pytest.raises(httpx2.ReadTimeout):
            asked.result()
    until(lambda: not running())


def test_variables_files_and_setup_are_there_from_the_start(client: httpx2.Client) -> None:
    made = create(
        client,
        envs={"GREETING": "hello"},
        files={"notes/a.txt": "from the client\n"},
        setup=["cp notes/a.txt b.txt", 'test "$GREETING" = hello'],
    )
    path = f"/v1/sandboxes/{made['id']}"
    assert client.get(f"{path}/files", params={"path": "b.txt"}).json() == {
        "path": "b.txt",
        "content": "from the client\n",
    }
    log = f"/api/v1/agents/worker/logs/{made['id']}"
    until(lambda: "started with hello" in client.get(log).json()["output"])
    assert client.delete(path).status_code == 204


def test_a_sandbox_whose_setup_fails_is_none(client: httpx2.Client, daemon: RealDaemon) -> None:
    before = daemon.call("session.list")["sessions"]
    body = {"agent": "worker", "setup": ["true", "echo no such thing >&2; exit 4"]}
    got = client.post("/v1/sandboxes", json=body)
    refused(got, 400, "setup_failed", "setup command 2 ended with status 4: 'no such thing'")
    assert daemon.call("session.list")["sessions"] == before


def test_a_sandbox_ends_when_its_time_is_over(client: httpx2.Client) -> None:
    path = f"/v1/sandboxes/{create(client, timeoutMs=300)['id']}"
    until(lambda: client.get(path).json()["status"] == "stopped")


@pytest.mark.parametrize(
    ("more", "status", "code", "text"),
    [
        ({"agent": "nobody"}, 404, "not_found", "no agent 'nobody'"),
        ({"agent": "foreign"}, 404, "not_found", "no agent 'foreign'"),
        ({"agent": "../x"}, 400, "validation_error", "is not a slug"),
        ({"envs": {"LD_PRELOAD": "x"}}, 403, "forbidden", "LD_PRELOAD"),
        ({"envs": {"lower case": "x"}}, 400, "validation_error", "variable"),
        ({"files": {"../../etc/passwd": "x"}}, 400, "validation_error", "neither"),
        ({"timeoutMs": 0}, 400, "validation_error", "timeoutMs"),
        ({"timeoutMs": "1000"}, 400, "validation_error", "timeoutMs"),
        ({"networkAllowOut": ["example.com"]}, 403, "forbidden", "no network"),
        ({"unheard": 1}, 400, "validation_error", "unheard"),
    ],
)
def test_what_can_not_be_had_is_refused_and_never_ignored(
    client: httpx2.Client, more: dict[str, Any], status: int, code: str, text: str
) -> None:
    refused(client.post("/v1/sandboxes", json={"agent": "worker", **more}), status, code, text)


def test_denying_what_is_denied_anyway_is_granted(client: httpx2.Client) -> None:
    made = create(client, networkDenyOut=["0.0.0.0/0"])
    assert client.delete(f"/v1/sandboxes/{made['id']}").status_code == 204


def test_files_are_written_listed_moved_and_removed(client: httpx2.Client, sandbox: str) -> None:
    at = f"/v1/sandboxes/{sandbox}/files"
    assert client.post(at, json={"files": {"d/one.txt": "1", "d/two.txt": "ü"}}).status_code == 204
    assert client.get(at, params={"path": "d/two.txt"}).json()["content"] == "ü"
    listed = client.get(f"{at}/list", params={"path": "d"}).json()
    assert [entry["path"] for entry in listed] == ["/workspace/d/one.txt", "/workspace/d/two.txt"]
    assert listed[0] | {"modifiedTime": ""} == {
        "name": "one.txt",
        "path": "/workspace/d/one.txt",
        "type": "file",
        "size": 1,
        "mode": 0o644,
        "permissions": "rw-r--r--",
        "modifiedTime": "",
    }
    assert client.get(f"{at}/info", params={"path": "d"}).json()["type"] == "dir"
    assert client.get(f"{at}/exists", params={"path": "d/one.txt"}).json() is True
    assert client.get(f"{at}/exists", params={"path": "d/none.txt"}).json() is False
    assert client.post(f"{at}/mkdir", json={"path": "e/f"}).json() is True
    assert client.post(f"{at}/mkdir", json={"path": "e/f"}).json() is False
    renamed = client.post(f"{at}/rename", json={"oldPath": "d/one.txt", "newPath": "e/1.txt"})
    assert renamed.json()["path"] == "/workspace/e/1.txt"
    for path in ("d", "e"):
        assert client.delete(at, params={"path": path}).status_code == 204
    refused(client.get(at, params={"path": "d/two.txt"}), 404, "not_found", "does not exist")
    refused(client.get(at, params={"path": "/etc/passwd"}), 400, "validation_error", "workspace")


def test_a_key_becomes_a_token_for_one_agent(daemon: RealDaemon, client: httpx2.Client) -> None:
    body = {"agents": ["worker"], "userId": "u-1", "expiresIn": "15m"}
    got = client.post("/v1/tokens", json=body)
    assert got.status_code == 201
    assert got.json()["expiresAt"].endswith("Z")
    with client_of(daemon, got.json()["token"]) as user:
        made = create(user)
        assert user.get(f"/v1/sandboxes/{made['id']}").json()["status"] == "running"
        refused(user.post("/v1/sandboxes", json={"agent": "second"}), 404, "not_found", "no agent")
        refused(user.post("/v1/tokens", json={}), 403, "forbidden", "tokens.create")
        assert user.delete(f"/v1/sandboxes/{made['id']}").status_code == 204


def test_a_token_sees_the_sandboxes_of_its_own_user(
    daemon: RealDaemon, client: httpx2.Client, sandbox: str
) -> None:
    tokens = [
        client.post("/v1/tokens", json={"userId": user}).json()["token"] for user in ("u-1", "u-2")
    ]
    with client_of(daemon, tokens[0]) as one, client_of(daemon, tokens[1]) as two:
        made = create(one)
        path = f"/v1/sandboxes/{made['id']}"
        assert one.get(path).status_code == 200
        for got in (
            two.get(path),
            two.delete(path),
            two.post(f"{path}/exec", json={"command": "id"}),
            two.get(f"{path}/files", params={"path": "x"}),
            one.get(f"/v1/sandboxes/{sandbox}"),
        ):
            refused(got, 404, "not_found", "session")
        assert client.delete(path).status_code == 204  # who holds the key sees all


@pytest.mark.parametrize("given", ["1w", "", "-1h", "1.5h", "0s", "an hour", "1 h"])
def test_a_lifetime_that_can_not_be_had_is_refused(client: httpx2.Client, given: str) -> None:
    got = client.post("/v1/tokens", json={"expiresIn": given})
    refused(got, 400, "validation_error", "15m")


def test_a_lifetime_is_capped_at_a_day(client: httpx2.Client) -> None:
    got = client.post("/v1/tokens", json={"expiresIn": "48h"}).json()
    left = datetime.fromisoformat(got["expiresAt"]) - datetime.now(UTC)
    assert timedelta(hours=23, minutes=55) < left <= timedelta(hours=24)


def test_the_token_exchange_for_next_says_errors_as_text(
    daemon: RealDaemon, client: httpx2.Client
) -> None:
    got = client.post("/nextjs/v1/tokens", json={"userId": "u", "agents": ["nobody"]})
    assert got.status_code == 404
    assert got.json()["error"].startswith("no agent 'nobody'")
    assert client.post("/nextjs/v1/tokens", json={"expiresIn": "1h"}).status_code == 201


def test_who_names_the_user_first_reads_errors_as_text(
    daemon: RealDaemon, client: httpx2.Client
) -> None:
    """As @21st-sdk/nextjs does, at the path that it shares with @21st-sdk/node."""
    next_, node = {"userId": "u", "agents": ["nobody"]}, {"agents": ["nobody"], "userId": "u"}
    assert client.post("/v1/tokens", json=next_).json()["error"].startswith("no agent 'nobody'")
    refused(client.post("/v1/tokens", json=node), 404, "not_found", "no agent 'nobody'")
    with client_of(daemon, "an_sk_" + "0" * 64) as wrong:
        text = "the API key or token is not valid"
        got = wrong.post("/v1/tokens", json=next_)
        assert (got.status_code, got.json()) == (401, {"error": text})
        refused(wrong.post("/v1/tokens", json=node), 401, "invalid_api_key", text)
        for body in (b"", b"[", b"[" * 9000, b"7", b'"userId"'):
            refused(wrong.post("/v1/tokens", content=body), 401, "invalid_api_key", text)
        assert wrong.post("/v1/tokens", content=b"x" * 20_000).status_code == 413


def test_the_keys_that_verify_tokens_are_published(client: httpx2.Client) -> None:
    (key,) = client.get("/.well-known/jwks.json").json()["keys"]
    assert (key["kty"], key["crv"], key["alg"]) == ("OKP", "Ed25519", "EdDSA")
    assert "d" not in key


def test_what_is_not_offered_says_what_to_do(client: httpx2.Client, sandbox: str) -> None:
    got = client.post(f"/v1/sandboxes/{sandbox}/threads", json={"name": "x"})
    refused(got, 501, "not_offered", "no threads")


def test_a_wrong_method_is_told_the_right_ones(client: httpx2.Client) -> None:
    got = client.patch("/v1/sandboxes/s-0/files")
    refused(got, 405, "method_not_allowed", "does not take this method")
    assert got.headers["allow"] == "DELETE, GET, POST"


def test_bodies_that_are_no_json_are_told_apart(client: httpx2.Client) -> None:
    got = client.post(
        "/v1/tokens", content=b"{secret", headers={"content-type": "application/json"}
    )
    refused(got, 400, "invalid_json", "not valid JSON")
    assert "secret" not in got.text


def test_a_delete_with_a_content_type_and_no_body_is_understood(
    client: httpx2.Client, sandbox: str
) -> None:
    """As the SDK sends it."""
    got = client.delete(
        f"/v1/sandboxes/{sandbox}/files",
        params={"path": "none"},
        headers={"content-type": "application/json"},
    )
    refused(got, 404, "not_found", "does not exist")


def test_a_deactivated_key_is_refused_and_its_sandboxes_are_gone(daemon: RealDaemon) -> None:
    key = daemon.call("keys.create", role="operator", label="short")
    with client_of(daemon, key["secret"]) as client:
        made = create(client)
        ended = daemon.call("keys.deactivate", key=key["key"]["id"])["ended_sessions"]
        assert ended == [made["id"]]
        refused(client.get(f"/v1/sandboxes/{made['id']}"), 401, "invalid_api_key", "not valid")


def test_a_waiting_command_is_ended_with_its_key(daemon: RealDaemon) -> None:
    key = daemon.call("keys.create", role="operator", label="waiting")
    with client_of(daemon, key["secret"]) as client, ThreadPoolExecutor() as pool:
        path = f"/v1/sandboxes/{create(client)['id']}"
        body = {"command": "touch begun; sleep 86124"}
        asked = pool.submit(client.post, f"{path}/exec", json=body)
        exists = f"{path}/files/exists?path=begun"
        until(lambda: bool(client.get(exists).json()))
        began = time.monotonic()
        daemon.call("keys.deactivate", key=key["key"]["id"])
        got = asked.result()
    assert time.monotonic() - began < 15
    # Its process was killed first, or its request was ended first.
    assert got.status_code == 401 or got.json()["exitCode"] == 137
