"""Hooks: a real server, a real program. They hear of questions, and nothing depends on them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hook_servers import make_certificates, serving

from sandboxd.broker import hooks
from sandboxd.broker.hooks import Hooks
from sandboxd.broker.question import Answer, By, Question, Waiting
from sandboxd.broker.signing import signing_key
from sandboxd.errors import Denied, Invalid, Unavailable
from sandboxd.policy.model import ApprovalSettings, CommandHook, Limits, Webhook
from sandboxd.policy.values import AbsolutePath, Duration, WebAddress
from sandboxd.secret import Secret

KEY = b"0123456789abcdef0123456789abcdef"


def question(**changed: Any) -> Waiting:
    facts: dict[str, Any] = {
        "id": "c-0123456789abcdef",
        "agent": "worker",
        "team": "default",
        "session": "s-0123456789abcdef",
        "tool": "publish",
        "description": "publishes",
        "rule": "policies/p.yaml:4 ask publish",
        "reason": "it is seen",
        "arguments": {"text": "a\u202eb"},
        "program": "/usr/bin/publish",
        "program_digest": "0" * 64,
        "argv": ("x",),
        "stdin": None,
        "secrets": ({"variable": "TOKEN", "version": 1, "as": "TOKEN", "delivery": "env"},),
        "network": "none",
        "workspace": "none",
        "lowered": (),
        "limits": Limits(),
        "timeout": 60.0,
        "generation": "g",
        "digest": "d" * 64,
    }
    waiting = Waiting(Question(**{**facts, **changed}), 120.0)
    waiting.asked_at = time.time()
    return waiting


@asynccontextmanager
async def running(settings: ApprovalSettings, key: Secret | None = None) -> AsyncIterator[Hooks]:
    made = Hooks(lambda: settings, key)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        yield made
        nursery.cancel_scope.cancel()


def posting(url: str, **options: Any) -> ApprovalSettings:
    return ApprovalSettings(webhook=Webhook(url=WebAddress(url), **options))


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - of other threads and processes
            await trio.sleep(0.01)


@pytest.fixture(autouse=True)
def _quick_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_TRIES", (0.0, 0.01, 0.01))


async def test_a_question_is_posted_and_signed() -> None:
    with serving() as server:
        async with running(posting(server.url + "/hook?to=ops"), Secret(KEY)) as made:
            made.heard(question())
            await until(lambda: len(server.requests) == 1)
    (path, headers, body), notice = server.requests[0], json.loads(server.requests[0][2])
    assert (path, headers["content-type"]) == ("/hook?to=ops", "application/json")
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    mac = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{mac}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert notice["type"] == "approval.asked"
    data = notice["data"]
    assert (data["id"], data["agent"], data["tool"]) == ("c-0123456789abcdef", "worker", "publish")
    assert data["secrets"] == ["TOKEN"]
    assert "arguments" not in data
    assert KEY.decode() not in str(server.requests)


async def test_the_signature_is_that_of_standard_webhooks(monkeypatch: pytest.MonkeyPatch) -> None:
    # The example of the libraries at github.com/standard-webhooks/standard-webhooks.
    monkeypatch.setattr(time, "time", lambda: 1614265330.0)
    key = Secret(base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"))
    headers = Hooks(ApprovalSettings, key)._headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}'
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_arguments_are_posted_only_where_the_operator_wants_it() -> None:
    with serving() as server:
        async with running(posting(server.url, arguments=True)) as made:
            made.heard(question())
            await until(lambda: len(server.requests) == 1)
    notice = json.loads(server.requests[0][2])
    assert notice["data"]["arguments"] == '{\n  "text": "a\\u202eb"\n}'
    assert "webhook-signature" not in server.requests[0][1]


async def test_the_end_is_posted_with_its_outcome() -> None:
    waiting = question()
    waiting.answer = Answer("denied", "no", By("anna", 1001))
    with serving() as server:
        async with running(posting(server.url, arguments=True)) as made:
            made.heard(waiting)
            await until(lambda: len(server.requests) == 1)
    notice = json.loads(server.requests[0][2])
    assert notice["type"] == "approval.ended"
    assert (notice["data"]["outcome"], notice["data"]["by"]) == ("denied", "anna")
    assert "arguments" not in notice["data"]


async def test_tls_is_verified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ca, certificate = make_certificates(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    wrong_name = make_certificates(other, "hooks.example")
    with serving(certificate) as server, serving(wrong_name[1]) as misnamed:
        async with running(posting(server.url, ca_file=AbsolutePath(ca))) as made:
            made.heard(question())
            await until(lambda: len(server.requests) == 1)
        for url, authority in ((server.url, None), (misnamed.url, AbsolutePath(wrong_name[0]))):
            caplog.clear()
            async with running(posting(url, ca_file=authority)) as made:
                made.heard(question())
                await until(lambda: "failed" in caplog.text)
            assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    assert (len(server.requests), misnamed.requests) == (1, [])


async def test_a_server_that_is_down_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/secret-path"
        async with running(posting(url)) as made:
            made.heard(question())
            await until(lambda: "webhook for c-0123456789abcdef failed" in caplog.text)
    assert "secret-path" not in caplog.text


async def test_a_server_in_trouble_is_tried_again() -> None:
    with serving() as server:
        server.statuses += [500, 503]
        async with running(posting(server.url)) as made:
            made.heard(question())
            await until(lambda: len(server.requests) == 3)
    assert len({request[1]["webhook-id"] for request in server.requests}) == 1


async def test_nobody_is_told_of_a_question_that_was_answered_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting = question()
    with serving() as server:
        server.statuses += [500, 500, 500]
        server.go.clear()
        async with running(posting(server.url)) as made:
            made.heard(waiting)
            await until(lambda: len(server.requests) == 1)
            waiting.answer = Answer("approved")
            server.go.set()
            made.heard(question(id="c-ffffffffffffffff"))
            await until(lambda: "c-ffffffffffffffff failed" in caplog.text or not server.statuses)
    asked = [r for r in server.requests if r[1]["webhook-id"] == "c-0123456789abcdef.asked"]
    assert len(asked) == 1


async def test_a_redirect_is_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        server.statuses += [307, 307, 307]
        async with running(posting(server.url)) as made:
            made.heard(question())
            await until(lambda: "the server answered 307" in caplog.text)
    assert {path for path, _, _ in server.requests} == {"/"}


async def test_a_server_that_never_answers_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        server.go.clear()
        async with running(posting(server.url, timeout=Duration(0.1))) as made:
            made.heard(question())
            await until(lambda: "no answer in 0.1 s" in caplog.text)


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving() as server:
        async with running(posting(server.url)) as made:
            made.heard(question())
            await until(lambda: len(server.requests) == 1)


async def test_telling_never_waits(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        server.go.clear()
        async with running(posting(server.url)) as made:
            began = time.monotonic()
            for number in range(5000):
                made.heard(question(id=f"c-{number:016x}"))
            assert time.monotonic() - began < 5
            await until(lambda: len(server.requests) == hooks._AT_ONCE)
            assert caplog.text.count("hooks are too slow") == 1
            server.go.set()
            await until(lambda: "notices were dropped" in caplog.text)
            await until(lambda: len(server.requests) >= hooks._QUEUE)
    assert len(server.requests) <= hooks._QUEUE + hooks._AT_ONCE + 1


def commanding(*argv: str, **options: Any) -> ApprovalSettings:
    return ApprovalSettings(command=CommandHook(argv=argv, **options))


async def test_a_program_gets_the_question_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/sandboxd")
    script = f"cat > {tmp_path}/notice; env > {tmp_path}/env; pwd >> {tmp_path}/env; "
    script += f"ls /proc/self/fd | xargs > {tmp_path}/fds; mv {tmp_path}/fds {tmp_path}/done"
    settings = commanding("/bin/sh", "-c", script, environment={"DISPLAY": ":0"})
    async with running(settings) as made:
        made.heard(question())
        await until((tmp_path / "done").exists)
        ended = question()
        ended.answer = Answer("approved")
        *environment, directory = (tmp_path / "env").read_text().splitlines()
        descriptors = (tmp_path / "done").read_text().split()
        (tmp_path / "notice").rename(tmp_path / "kept")
        made.heard(ended)
        made.heard(question(id="c-ffffffffffffffff"))
        await until((tmp_path / "notice").exists)
    notice = json.loads((tmp_path / "kept").read_text())
    assert (notice["type"], notice["data"]["id"]) == ("approval.asked", "c-0123456789abcdef")
    assert notice["data"]["arguments"] == '{\n  "text": "a\\u202eb"\n}'
    assert {line.split("=")[0] for line in environment} <= {"PATH", "LANG", "DISPLAY", "PWD", "_"}
    assert "DISPLAY=:0" in environment
    assert directory == "/"
    assert descriptors[:3] == ["0", "1", "2"]
    assert len(descriptors) <= 4  # ls has its directory open


async def test_a_program_that_hangs_is_ended_with_its_children(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = f"sleep 86399 & echo $! > {tmp_path}/pid; sleep 86399"
    async with running(commanding("/bin/sh", "-c", script, timeout=Duration(2.0))) as made:
        made.heard(question())
        await until(lambda: "was ended after 2 s" in caplog.text)
    pid = int((tmp_path / "pid").read_text())
    await until(lambda: not _alive(pid))


async def test_what_a_program_complains_about_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    script = r"printf 'no \033[31mdisplay'; printf 'no \033[31mdisplay' >&2; exit 3"
    async with running(commanding("/bin/sh", "-c", script)) as made:
        made.heard(question())
        await until(lambda: "ended with status 3" in caplog.text)
    assert r"no \x1b[31mdisplay" in caplog.text
    caplog.clear()
    async with running(commanding("/no/such/program")) as made:
        made.heard(question())
        await until(lambda: "can't be run: No such file" in caplog.text)


async def test_a_program_that_prints_without_end_fills_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = "head -c 20000000 /dev/zero | tr '\\0' x >&2; exit 1"
    async with running(commanding("/bin/sh", "-c", script)) as made:
        made.heard(question())
        await until(lambda: "ended with status 1" in caplog.text)
    assert len(caplog.text) < 2000


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def keyed(path: Path) -> Webhook:
    return Webhook(url=WebAddress("https://a.example/"), secret_file=AbsolutePath(path))


def test_a_key_is_base64_or_a_line(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for content in (b"whsec_" + base64.b64encode(KEY) + b"\n", KEY + b"\n"):
        path.write_bytes(content)
        path.chmod(0o400)
        key = signing_key(keyed(path))
        assert key is not None
        assert key.reveal() == KEY
        path.unlink()
    (tmp_path / "hook").write_bytes(KEY)
    webhook = Webhook(url=WebAddress("https://a.example/"), credential="hook")
    key = signing_key(webhook, credentials=str(tmp_path))
    assert key is not None
    assert key.reveal() == KEY
    assert signing_key(Webhook(url=WebAddress("https://a.example/"))) is None
    assert signing_key(None) is None


@pytest.mark.parametrize(
    ("content", "mode", "error"),
    [
        (b"short", 0o600, Invalid),
        (b"whsec_!!!", 0o600, Invalid),
        (b"whsec_" + base64.b64encode(b"short"), 0o600, Invalid),
        (KEY, 0o644, Denied),
        (None, 0, Unavailable),
    ],
)
def test_what_is_no_private_key_is_refused(
    tmp_path: Path, content: bytes | None, mode: int, error: type[Exception]
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(error) as refused:
        signing_key(keyed(path))
    assert "short" not in str(refused.value)


async def test_addresses_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving() as server:
        async with running(posting(server.url + "/token-in-path")) as made:
            made.heard(question())
            await until(lambda: len(server.requests) == 1)
    assert "token-in-path" not in caplog.text
