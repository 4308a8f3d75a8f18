"""``/api/v1/operator``: the admin methods for ``sandboxctl --server``, with the caller's role.

``POST METHOD`` with the parameters as a JSON object. A method's result comes as JSON; a stream, or
any method for a client that asks for ``application/x-ndjson``, as lines: ``{"item": ...}`` each,
then ``{"result": ...}`` or ``{"error": ...}``, with empty lines while there is nothing to say.
Errors hold what the admin socket's hold: class, hint and exit status.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import trio
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from sandboxd.access.roles import Principal
from sandboxd.admin import protocol
from sandboxd.admin.perform import perform, stream, streams
from sandboxd.errors import SandboxdError, where
from sandboxd.http.errors import refusal_of
from sandboxd.http.guard import Caller
from sandboxd.http.server import Message, Receive, Scope, Send
from sandboxd.running import Daemon

__all__ = ["router"]

_NDJSON = "application/x-ndjson"

#: Seconds that whoever ends a key waits for its streams to be told.
_FAREWELL = 1.0

_log = logging.getLogger(__name__)

_ERROR = {
    "type": "object",
    "required": ["error", "message", "status"],
    "properties": {
        "error": {"type": "string"},
        "message": {"type": "string"},
        "status": {"type": "integer"},
        "data": {
            "type": "object",
            "description": "What sandboxctl makes the same error of, exit status included.",
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "hint": {"type": "string"},
                "exit_code": {"type": "integer"},
            },
        },
    },
}


def router(daemon: Daemon) -> APIRouter:
    routes = APIRouter(prefix="/api/v1/operator", tags=["operator"])

    @routes.post(
        "/{method}",
        summary="Call an admin method",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"type": "object"}}},
            }
        },
        responses={
            200: {
                "description": "The method's result, or lines of items, result and error",
                "content": {"application/json": {"schema": {}}, _NDJSON: {"schema": {}}},
            },
            **{
                status: {"description": what, "content": {"application/json": {"schema": _ERROR}}}
                for status, what in (
                    (400, "Wrong parameters"),
                    (401, "No valid key"),
                    (403, "The role, or a policy, does not allow it"),
                    (404, "No such method, or nothing of this name in the caller's reach"),
                    (409, "Not possible in this state"),
                    (413, "Too large"),
                    (429, "Too many requests"),
                    (500, "sandboxd failed"),
                    (503, "A part of the daemon or the host is not available"),
                )
            },
        },
    )
    async def call(method: str, request: Request, caller: Caller) -> Response:
        try:
            params = protocol.decode(await request.body())
            lines = streams(daemon, method) or _NDJSON in request.headers.get("accept", "")
        except SandboxdError as error:
            return _refused(error)
        kind = _Lines if lines else _One
        return kind(daemon, caller, method, params)

    return routes


class _Answer(Response):
    """A method that runs while its answer is sent, and ends when the client leaves."""

    def __init__(
        self, daemon: Daemon, principal: Principal, method: str, params: dict[str, Any]
    ) -> None:
        super().__init__()
        self._daemon, self._principal = daemon, principal
        self._method, self._params = method, params

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
            await self._run(scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    def _failed(self, failure: Exception) -> SandboxdError:
        """What is told of a failure: an expected one as it is, any other by its class."""
        if isinstance(failure, SandboxdError):
            return failure
        _log.error("operator method %s failed: %s", self._method, where(failure))
        internal = SandboxdError(
            f"{self._method} failed inside sandboxd ({type(failure).__name__})",
            hint="the daemon's log says where: journalctl -u sandboxd",
        )
        internal.code = "internal"
        return internal


class _One(_Answer):
    """The result as one JSON document."""

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            result = await perform(self._daemon, self._principal, self._method, self._params)
            answer: Response = JSONResponse(result)
        except Exception as failure:  # noqa: BLE001 - told to the client, and logged by its place
            answer = _refused(self._failed(failure))
        await answer(scope, receive, send)


class _Lines(_Answer):
    """The result, or the items of a stream, as lines that begin when there is the first."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send, self._begun, self._turn = send, False, trio.Lock()
        self._silent_since = trio.current_time()
        await super().__call__(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            try:
                await self._all()
            except trio.Cancelled:
                await self._tell_why()
                raise
            except Exception as failure:  # noqa: BLE001 - as above
                error = self._failed(failure)
                if self._begun:
                    await self._line({"error": protocol.error_object(error)}, more=False)
                else:
                    self._begun = True
                    await _refused(error)(scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _all(self) -> None:
        called = (self._daemon, self._principal, self._method, self._params)
        result: Any = {}
        if streams(self._daemon, self._method):
            items: AsyncGenerator[Any, None]
            async with aclosing(stream(*called)) as items:
                async for item in items:
                    await self._line({"item": item})
        else:
            result = await perform(*called)
        await self._line({"result": result}, more=False)

    async def _tell_why(self) -> None:
        """Say that the caller's key or token ended, where that is why nothing more comes."""
        try:
            self._daemon.access.check(self._principal)
        except SandboxdError as error:
            if self._begun:
                with trio.move_on_after(_FAREWELL, shield=True):
                    await self._line({"error": protocol.error_object(error)}, more=False)

    async def _beat(self) -> None:
        """Tell whoever is in between, and the client, that this side is alive."""
        while True:
            await trio.sleep_until(self._silent_since + protocol.BEAT_SECONDS)
            if trio.current_time() >= self._silent_since + protocol.BEAT_SECONDS:
                await self._line(None)

    async def _line(self, message: dict[str, Any] | None, *, more: bool = True) -> None:
        data = b"\n" if message is None else protocol.encode(message)
        async with self._turn:
            if not self._begun:
                self._begun = True
                headers = [(b"content-type", _NDJSON.encode())]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            self._silent_since = trio.current_time()
            await self._send({"type": "http.response.body", "body": data, "more_body": more})


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            scope.cancel()
            return


def _refused(error: SandboxdError) -> Response:
    refusal = refusal_of(error)
    told = protocol.error_object(error)
    body = {
        "error": refusal.code,
        "message": refusal.message,
        "status": refusal.status,
        "data": {**told["data"], "message": told["message"]},
    }
    return JSONResponse(body, refusal.status, headers=refusal.headers)
