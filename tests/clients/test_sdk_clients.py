"""Unmodified clients of the HTTP API from npm: @21st-sdk/node and @21st-sdk/nextjs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_daemon import new_key, served
from real_daemon import RealDaemon

pytestmark = pytest.mark.clients

FOLDER = Path(__file__).parent / "sdk"


@pytest.fixture(scope="module")
def serving() -> Iterator[RealDaemon]:
    with served() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def sdk() -> str:
    """Node.js, with the SDKs installed beside the clients."""
    node, npm = shutil.which("node"), shutil.which("npm")
    assert node, "these tests need Node.js"
    assert npm, "these tests need npm"
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(command, cwd=FOLDER, check=True, timeout=300)
    return node


def seen(node: str, client: str, **environment: str) -> Any:
    """What a client's program printed."""
    done = subprocess.run(
        [node, client],
        cwd=FOLDER,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_node_sdk_works(serving: RealDaemon, sdk: str) -> None:
    key = new_key(serving, "operator")
    saw = seen(sdk, "node_client.mjs", BASE_URL=serving.url, API_KEY=key)
    assert saw["made"]["id"] == saw["made"]["sandboxId"]
    assert saw["made"]["status"] == saw["detail"]["status"] == "running"
    assert saw["detail"]["agent"] == {"slug": "worker", "name": "agent worker of a test"}
    assert saw["detail"]["threads"] == []
    assert saw["exec"]["exitCode"] == 7
    assert saw["exec"]["stdout"] == "hello more in /workspace/notes\n"
    assert saw["exec"]["stderr"] == "oops\n"
    assert saw["late"]["exitCode"] == 124
    assert saw["setup"] == {"path": "b.txt", "content": "from the client\n"}
    assert saw["read"] == {"path": "/workspace/d/ü.txt", "content": "ü"}
    paths = {entry["path"]: entry["type"] for entry in saw["list"]}
    assert paths["/workspace/d"] == paths["/workspace/notes"] == "dir"
    assert paths["/workspace/d/one.txt"] == "file"
    assert (saw["info"]["name"], saw["info"]["size"]) == ("one.txt", 1)
    assert saw["exists"] == [True, False]
    assert saw["dirs"] == [True, False]
    assert saw["renamed"]["path"] == "/workspace/e/1.txt"
    assert saw["written"] is saw["removed"] is saw["deleted"] is saw["userDeleted"] is None
    assert saw["left"] is False
    assert saw["token"]["token"].count(".") == 2
    assert saw["user"] == "running"
    assert saw["after"]["status"] == "stopped"
    assert saw["capped"]["token"].count(".") == 2
    assert_told(saw["errors"])


def assert_told(errors: dict[str, str]) -> None:
    """What the SDK throws is the message, which says what was wrong."""
    for case, text in {
        "key": "the API key or token is not valid",
        "keyOfToken": "the API key or token is not valid",
        "agent": "no agent 'nobody'",
        "foreign": "no agent 'foreign'",
        "sandbox": "no session 's-0000000000000000'",
        "file": "does not exist",
        "outside": "a path has neither",
        "setup": "setup command 1 ended with status 3",
        "network": "no network",
        "expires": "expiresIn",
        "mint": "tokens.create",
        "scope": "no agent 'second'",
        "others": "no session",
        "threads": "no threads",
    }.items():
        assert text in errors[case], case
    assert errors["agent"].replace("nobody", "foreign") == errors["foreign"]


def test_the_token_handler_of_nextjs_works(serving: RealDaemon, sdk: str) -> None:
    key = new_key(serving, "operator")
    relay = f"{serving.url}/nextjs"
    saw = seen(sdk, "nextjs_client.mjs", RELAY_URL=relay, API_KEY=key)
    assert set(saw["exchanged"]) == {"token", "expiresAt"}
    assert saw["handled"]["status"] == saw["sharedGood"]["status"] == 200
    assert saw["handled"]["body"]["token"].count(".") == 2
    for case, text in {
        "nobody": "no agent 'nobody'",
        "shared": "no agent 'nobody'",
        "wrong": "the API key or token is not valid",
        "soon": "expiresIn",
    }.items():
        assert saw[case]["status"] == 500  # the handler's own
        assert text in saw[case]["body"]["error"], case


def example(kind: str) -> str:
    """A program of docs/clients.md."""
    text = (Path(__file__).parents[2] / "docs/clients.md").read_text()
    match = re.search(rf"^<!-- run: {kind} -->\n```js\n(.*?)^```", text, re.M | re.S)
    assert match
    return match[1]


def run_example(serving: RealDaemon, node: str, program: str) -> list[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "SANDBOXD_URL": serving.url,
        "SANDBOXD_API_KEY": new_key(serving, "operator"),
    }
    done = subprocess.run(
        [node, "--input-type=module", "--eval", program],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_node_client_of_the_manual_runs(serving: RealDaemon, sdk: str) -> None:
    lines = run_example(serving, sdk, example("node"))
    assert lines[:2] == ["0 Grace", "Ada"]
    assert any(line.startswith("refused: ") and "/workspace" in line for line in lines)
    assert any(line.startswith("3 2") for line in lines)  # three parts, and a time
    assert serving.call("session.list")["sessions"] == []


def test_the_token_route_of_the_manual_runs(serving: RealDaemon, sdk: str) -> None:
    asking = """
    const body = JSON.stringify({ agent: "worker", userId: "u" })
    const answer = await POST(new Request("http://localhost/", { method: "POST", body }))
    console.log(answer.status, Object.keys(await answer.json()).join())
    """
    lines = run_example(serving, sdk, example("nextjs") + asking)
    assert lines == ["200 token,expiresAt"]
