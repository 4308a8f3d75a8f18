"""``/mcp``: an agent's tools for holders of an API key or a token, as MCP's Streamable HTTP.

The SDK's own server speaks the protocol, in every version. Around it is what the session socket
has: one message at a time that two readers can't take two ways, bounds, and no answer that outlives
its asker. Who asks is found out before (:mod:`sandboxd.http.guard`), and whether they may is
decided where it is for every other route (:mod:`sandboxd.admin.perform`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

import mcp_types as types
import trio
from fastapi import APIRouter
from fastapi.responses import Response
from mcp.shared.dispatcher import coerce_request_id
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.routing import Route

from sandboxd.access.roles import Principal
from sandboxd.admin.perform import perform
from sandboxd.broker.jsonrpc import Refused, error_reply, parse
from sandboxd.errors import Unavailable
from sandboxd.http.errors import Refusal
from sandboxd.http.guard import replayed
from sandboxd.http.server import Message, Receive, Scope, Send
from sandboxd.http.visits import MAX_BODY, MAX_REQUESTS, Visit, Visits
from sandboxd.running import Daemon

__all__ = ["router"]

#: Messages longer than this are parsed in a thread, so that others don't wait for them.
_LARGE = 256 << 10
#: Seconds that a handshake may take to learn that a request's client is gone.
_TELLING = 5.0

_METHODS = ("POST", "DELETE", "GET")


def router(daemon: Daemon) -> APIRouter:
    endpoint = _Endpoint(daemon)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with endpoint.visits.serving():
            yield

    routes = APIRouter(lifespan=lifespan)
    for path in ("/mcp", "/mcp/{agent}"):
        routes.routes.append(
            Route(path, endpoint, methods=_METHODS, name="mcp", include_in_schema=False)
        )
    return routes


class _Endpoint:
    """An ASGI application: what it answers may be a stream, and ends when its client leaves."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.visits = Visits(daemon)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal = scope["state"].get("principal")
        if not isinstance(principal, Principal):
            raise Refusal.unauthenticated()
        place = await self._place(principal, scope)
        if scope["method"] not in ("POST", "DELETE"):
            # The server says nothing of its own accord, so there is no stream to listen to.
            not_here = Response(status_code=405, headers={"allow": "POST, DELETE"})
            await not_here(scope, receive, send)
            return
        visit = await self.visits.enter(principal, place["agent"], place["session"])
        if scope["method"] == "DELETE":
            with visit.request():
                visit.handshakes.pop(_handshake(scope), None)
                await visit.manager.handle_request(scope, receive, send)
            return
        body = await _whole(receive)
        try:
            message = await _message(body)
            refused = _excess(visit, scope, message)
        except Refused as found:
            refused = found
        if refused is not None:
            status = 429 if refused.code == -32000 else 400
            reply = error_reply(refused).model_dump_json(by_alias=True, exclude_unset=True)
            answer = Response(reply, status, media_type="application/json")
            await answer(scope, receive, send)
            return
        begun = False

        async def sent(answer: Message) -> None:
            nonlocal begun
            begun = True
            await send(answer)

        try:
            with visit.request():
                await _exchange(visit, message, body, scope, receive, sent)
        except Unavailable:
            if not begun:
                raise
            # A stream that ended early can only be cut off, and is.

    async def _place(self, principal: Principal, scope: Scope) -> dict[str, str]:
        """Whole names of the agent and, where one is named, of the live session of it."""
        agent = scope.get("path_params", {}).get("agent")
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        sessions = query.get("session", [])
        if len(sessions) > 1:
            raise Refusal(400, "validation_error", "the query names more than one session")
        if agent is None and not sessions:
            known = principal.agents or frozenset()
            if len(known) != 1:
                raise Refusal(
                    400,
                    "validation_error",
                    "this key or token is not for one agent alone: name one, as in /mcp/AGENT",
                )
            (agent,) = known
        params: dict[str, Any] = {"agent": agent} if agent is not None else {}
        if sessions:
            params["session"] = sessions[0]
        place: dict[str, str] = await perform(self._daemon, principal, "tools.place", params)
        return place


async def _whole(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise Refusal(413, "too_large", f"a message may have {MAX_BODY:,} bytes")
        if not message.get("more_body", False):
            return bytes(body)


async def _message(body: bytes) -> types.JSONRPCMessage:
    """The one message of a body; Refused for what two readers could take in two ways."""
    if len(body) > _LARGE:
        return await trio.to_thread.run_sync(parse, body)
    return parse(body)


def _excess(visit: Visit, scope: Scope, message: types.JSONRPCMessage) -> Refused | None:
    """Why a request can't be taken now, if so."""
    if not isinstance(message, types.JSONRPCRequest):
        return None
    refused = None
    if len(visit.open) >= MAX_REQUESTS and message.method != "ping":
        refused = Refused(
            f"{MAX_REQUESTS} requests are open", code=-32000, hint="wait for an answer"
        )
    elif _open_id(scope, message) in visit.ids:
        refused = Refused("a request with this id is open already", hint="use a new id")
    if refused is not None:
        refused.id = message.id
    return refused


async def _exchange(
    visit: Visit,
    message: types.JSONRPCMessage,
    body: bytes,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Have the SDK answer. A client that leaves takes its request back."""
    ended = False

    async def sent(answer: Message) -> None:
        nonlocal ended
        ended |= answer["type"] == "http.response.body" and not answer.get("more_body", False)
        await send(answer)
        if answer["type"] == "http.response.start" and answer["status"] < 300:
            for name, value in answer.get("headers", ()):
                if name == b"mcp-session-id":
                    visit.handshakes[value.decode("latin-1")] = None
                    visit.handshakes.move_to_end(value.decode("latin-1"))
        if (b"content-type", b"text/event-stream") in _plain(answer.get("headers", ())):
            # A stream has begun: its head goes out with the first bytes, and here they are.
            await send({"type": "http.response.body", "body": b": \r\n\r\n", "more_body": True})

    open_id = _open_id(scope, message)
    if open_id is not None:
        visit.ids.add(open_id)
    if getattr(message, "method", "") == "initialize" and (old := visit.forgotten()):
        del visit.handshakes[old]
        await _tell(visit, "DELETE", old, b"", scope)
    try:
        await visit.manager.handle_request(scope, replayed(body, receive), sent)
    finally:
        if open_id is not None:
            visit.ids.discard(open_id)
            if not ended:
                assert isinstance(message, types.JSONRPCRequest)
                with trio.move_on_after(_TELLING, shield=True):
                    await _take_back(visit, message.id, scope)


def _plain(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    return ((name.lower(), value.partition(b";")[0].strip()) for name, value in headers)


def _open_id(scope: Scope, message: types.JSONRPCMessage) -> tuple[str, int | str] | None:
    """How a request of a handshake is told from its others. Later protocols don't need it."""
    version, handshake = dict(scope["headers"]).get(b"mcp-protocol-version"), _handshake(scope)
    if version is not None and version.decode("latin-1") not in HANDSHAKE_PROTOCOL_VERSIONS:
        return None
    if not handshake or not isinstance(message, types.JSONRPCRequest):
        return None
    return handshake, coerce_request_id(message.id)


async def _take_back(visit: Visit, id: types.RequestId, scope: Scope) -> None:
    """Tell a handshake's server what a client that left would have told it.

    There is no way to come back for the answer, so nothing goes on working on it.
    """
    cancelled = {
        "jsonrpc": "2.0",
        "method": "notifications/cancelled",
        "params": {"requestId": id, "reason": "the client left"},
    }
    await _tell(visit, "POST", _handshake(scope), json.dumps(cancelled).encode(), scope)


async def _tell(visit: Visit, verb: str, handshake: str, body: bytes, scope: Scope) -> None:
    """Ask something of a handshake's server in its client's place; nobody hears the answer."""

    async def nothing_more() -> Message:
        return {"type": "http.disconnect"}

    async def nobody(_: Message) -> None:
        pass

    replaced = (b"content-length", b"mcp-session-id")
    headers = [(name, value) for name, value in scope["headers"] if name not in replaced]
    headers.append((b"mcp-session-id", handshake.encode("latin-1")))
    asked = {**scope, "method": verb, "headers": headers, "state": dict(scope["state"])}
    with contextlib.suppress(RuntimeError):  # it ended with its visit, and needs no telling
        await visit.manager.handle_request(asked, replayed(body, nothing_more), nobody)


def _handshake(scope: Scope) -> str:
    """The handshake that a request belongs to; "" for none."""
    headers = dict(scope["headers"])
    return bytes(headers.get(b"mcp-session-id", b"")).decode("latin-1")
