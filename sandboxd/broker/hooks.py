"""Who else is told that a call waits for an operator: a web server, a program. They only hear.

Nothing here decides, delays or refuses anything: a question is handed over without waiting, and
what goes wrong is logged. Requests are signed as Standard Webhooks 1.0 says. What an agent wrote
is left out unless the operator wants it; what a secret holds is not known here.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import logging
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import httpx2
import trio

from sandboxd import __version__
from sandboxd.broker.question import Waiting
from sandboxd.names import shown
from sandboxd.policy.model import ApprovalSettings, CommandHook, Webhook
from sandboxd.policy.values import AbsolutePath
from sandboxd.secret import Secret
from sandboxd.visible import json_lines

__all__ = ["Hooks"]

log = logging.getLogger(__name__)
# It logs whole addresses, and a path can be a credential.
logging.getLogger("httpx2").setLevel(logging.WARNING)

Event = Literal["approval.asked", "approval.ended"]

#: Notices that wait for a slow listener, and those under way at once. More are dropped, and told.
_QUEUE, _AT_ONCE = 64, 4
#: Seconds before each try to reach a web server.
_TRIES = (0.0, 1.0, 5.0)
#: Seconds until certificate authorities are read again.
_KEEP_TLS = 300.0
#: Seconds that a program that has ended may go on being listened to, through children of it.
_LAST_WORDS = 0.5
#: Lines of arguments that a notice carries, and characters of what a program complains.
_LINES, _COMPLAINT = 100, 500


class Hooks:
    """Passes on what :class:`~sandboxd.broker.approvals.Approvals` tells its listeners."""

    def __init__(self, settings: Callable[[], ApprovalSettings], key: Secret | None) -> None:
        self._settings, self._key = settings, key
        self._send, self._receive = trio.open_memory_channel[tuple[Event, Waiting]](_QUEUE)
        self._dropped = 0
        self._tls: tuple[AbsolutePath | None, float, ssl.SSLContext] | None = None

    def heard(self, waiting: Waiting) -> None:
        """A question was asked, or it ended. Returns at once and never fails."""
        settings = self._settings()
        if settings.webhook is None and settings.command is None:
            return
        event: Event = "approval.asked" if waiting.answer is None else "approval.ended"
        try:
            self._send.send_nowait((event, waiting))
        except trio.WouldBlock:
            self._dropped += 1
            if self._dropped == 1:
                log.warning("hooks are too slow: questions go on, and nobody is told of some")

    async def run(self) -> None:
        """Notify until cancelled."""
        limit = trio.Semaphore(_AT_ONCE)
        async with trio.open_nursery() as nursery:
            async for event, waiting in self._receive:
                await limit.acquire()
                if self._dropped and not self._receive.statistics().current_buffer_used:
                    log.warning("%d notices were dropped while hooks were slow", self._dropped)
                    self._dropped = 0
                nursery.start_soon(self._notify, event, waiting, limit)

    async def _notify(self, event: Event, waiting: Waiting, limit: trio.Semaphore) -> None:
        settings = self._settings()
        try:
            async with trio.open_nursery() as nursery:
                if settings.webhook is not None:
                    body = _notice(event, waiting, arguments=settings.webhook.arguments)
                    nursery.start_soon(self._post, settings.webhook, event, waiting, body)
                if settings.command is not None and event == "approval.asked":
                    body = _notice(event, waiting, arguments=True)
                    nursery.start_soon(_run, settings.command, waiting.question.id, body)
        finally:
            limit.release()

    async def _post(self, webhook: Webhook, event: Event, waiting: Waiting, body: bytes) -> None:
        """Post one notice, again when the server can't be reached and the call still waits."""
        id = f"{waiting.question.id}.{event.removeprefix('approval.')}"
        problem = ""
        for pause in _TRIES:
            await trio.sleep(pause)
            if event == "approval.asked" and waiting.answer is not None:
                return  # nobody needs to hear of it any more
            with trio.move_on_after(webhook.timeout) as patience:
                problem = await self._try(webhook, id, body)
            if patience.cancelled_caught:
                problem = f"no answer in {webhook.timeout:g} s"
            if not problem:
                return
        log.warning("webhook for %s failed: %s", waiting.question.id, problem)

    async def _try(self, webhook: Webhook, id: str, body: bytes) -> str:
        """Why the server did not take it; "" when it did."""
        try:
            tls = await self._context(webhook.ca_file)
            # Neither proxies nor .netrc from the environment, and nothing followed elsewhere.
            async with httpx2.AsyncClient(
                verify=tls, trust_env=False, follow_redirects=False, timeout=webhook.timeout
            ) as client:
                headers = self._headers(id, body)
                async with client.stream(
                    "POST", webhook.url, content=body, headers=headers
                ) as response:
                    status = response.status_code
            return "" if 200 <= status < 300 else f"the server answered {status}"
        except (httpx2.HTTPError, OSError, ValueError) as error:
            return f"{type(error).__name__}: {shown(_cause(error), 200)}"
        except Exception as error:  # noqa: BLE001  # a hook must not end the daemon
            return type(error).__name__

    async def _context(self, ca_file: AbsolutePath | None) -> ssl.SSLContext:
        """What verifies certificates. Making it takes long, so it is kept for a while."""
        now = trio.current_time()
        if self._tls is None or self._tls[0] != ca_file or self._tls[1] < now:
            path = os.fspath(ca_file) if ca_file is not None else None
            made = await trio.to_thread.run_sync(partial(ssl.create_default_context, cafile=path))
            self._tls = ca_file, now + _KEEP_TLS, made
        return self._tls[2]

    def _headers(self, id: str, body: bytes) -> dict[str, str]:
        stamp = str(int(time.time()))
        headers = {
            "content-type": "application/json",
            "user-agent": f"sandboxd/{__version__}",
            "webhook-id": id,
            "webhook-timestamp": stamp,
        }
        if self._key is not None:
            signed = f"{id}.{stamp}.".encode() + body
            mac = hmac.digest(self._key.reveal(), signed, "sha256")
            headers["webhook-signature"] = "v1," + base64.b64encode(mac).decode()
        return headers


def _notice(event: Event, waiting: Waiting, *, arguments: bool) -> bytes:
    question, answer = waiting.question, waiting.answer
    notice: dict[str, Any] = {
        "type": event,
        "timestamp": _iso(time.time()),
        "data": {
            "id": question.id,
            "agent": question.agent,
            "team": question.team,
            "session": question.session,
            "tool": question.tool,
            "rule": question.rule,
            "reason": question.reason,
            "digest": question.digest,
            "secrets": [secret["variable"] for secret in question.secrets],
            "network": question.network,
            "workspace": question.workspace,
            "asked_at": _iso(waiting.asked_at),
            "expires_at": _iso(waiting.expires_at),
        },
    }
    if event == "approval.asked" and arguments:
        notice["data"]["arguments"] = _cut(list(json_lines(question.arguments)))
    if event == "approval.ended" and answer is not None:
        notice["data"]["outcome"] = answer.outcome
        notice["data"]["by"] = answer.by.name if answer.by else None
    return json.dumps(notice).encode("ascii")


def _cut(lines: list[str]) -> str:
    """Lines as people may be shown them, and not too many."""
    if len(lines) > _LINES:
        more = len(lines) - _LINES
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        lines = [*lines[:_LINES], f"<{more:,} more lines; all of them: sha256 {digest}>"]
    return "\n".join(lines)


async def _run(hook: CommandHook, call: str, body: bytes) -> None:
    """Run the operator's program once, with the notice on its standard input. Bounded in time."""
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **hook.environment}
    try:
        process = await trio.lowlevel.open_process(
            list(hook.argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        log.warning("the hook for %s can't be run: %s", call, error.strerror)
        return
    complaint, heard = bytearray(), trio.Event()
    try:
        with trio.move_on_after(hook.timeout) as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_feed, process, body)
                nursery.start_soon(_listen, process, complaint, heard)
                await process.wait()
                with trio.move_on_after(_LAST_WORDS):
                    await heard.wait()
                nursery.cancel_scope.cancel()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it leads a process group of its own
                os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdin, process.stderr):
                if stream is not None:
                    await trio.aclose_forcefully(stream)
    if patience.cancelled_caught:
        log.warning("the hook for %s was ended after %g s", call, hook.timeout)
    elif process.returncode:
        said = shown(complaint.decode("utf-8", "replace").strip(), 200)
        log.warning("the hook for %s ended with status %d: %s", call, process.returncode, said)


async def _feed(process: trio.Process, body: bytes) -> None:
    if process.stdin is not None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await process.stdin.send_all(body)
        await process.stdin.aclose()


async def _listen(process: trio.Process, complaint: bytearray, heard: trio.Event) -> None:
    if process.stderr is not None:
        while data := await process.stderr.receive_some(4096):
            complaint += data[: max(0, _COMPLAINT - len(complaint))]
    heard.set()


def _cause(error: BaseException) -> str:
    """The innermost thing that is said of a failure: libraries wrap it in less."""
    said = str(error)
    while (inner := error.__cause__ or error.__context__) is not None:
        error, said = inner, str(inner) or said
    return said


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
