"""MCP for one connection of a session: the protocol by its own SDK, on bounded lines of ours.

The SDK's low-level server knows every published protocol version, negotiation and shapes. What it
leaves to a transport is done here: bounds on lines and on requests in flight, duplicate keys and
ids, a peer that reads slowly, half-closes or vanishes.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import select
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import anyio
import mcp_types as types
import trio
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.shared.dispatcher import coerce_request_id
from mcp.shared.exceptions import MCPError
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from pydantic import TypeAdapter

from sandboxd import __version__
from sandboxd.broker.calls import Calls, Session
from sandboxd.broker.jsonrpc import LineReader, Refused, error_reply, parse
from sandboxd.broker.result import CallResult
from sandboxd.errors import SandboxdError
from sandboxd.names import shown
from sandboxd.policy.model import Tool

__all__ = ["refuse_connection", "serve_connection", "tool_server"]

log = logging.getLogger(__name__)

#: Requests that one connection may have open.
_MAX_REQUESTS = 32
#: Lines over the limit that one connection may send before it is closed.
_MAX_TOO_LONG = 16
#: Bytes of replies that may wait for a slow reader before nothing more is read from it.
_MAX_UNSENT = 8 << 20
#: Seconds after which a reader that takes nothing at all is given up.
_STALLED = 30.0
#: Seconds that a refused peer has to read why.
_REFUSING = 2.0
#: Lines longer than this are parsed in a thread, so that other sessions don't wait for them.
_LARGE = 256 << 10
_CHUNK = 65536

_BLOCK: TypeAdapter[types.ContentBlock] = TypeAdapter(types.ContentBlock)

_INSTRUCTIONS = (
    "These tools run outside your sandbox, some with credentials that you cannot see and need not "
    "ask for. Where a result shows [redacted:NAME], a secret value stood there."
)


async def serve_connection(stream: trio.SocketStream, session: Session, calls: Calls) -> None:
    """Serve MCP on ``stream`` (newline-delimited JSON-RPC 2.0) until the peer closes.

    A peer that only ends its sending still gets the answers to what it asked. One that is gone
    has its calls cancelled. Never raises for anything that the peer does.
    """

    async def own() -> Session:
        return session

    server = tool_server(calls, session.agent.slug, own)
    connection = _Connection(stream)
    with _hangup(stream) as gone:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when, gone, nursery.cancel_scope)
            nursery.start_soon(connection.read, nursery.cancel_scope)
            nursery.start_soon(connection.write, nursery.cancel_scope)
            await server.run(
                connection.inbox, connection.outbox, server.create_initialization_options()
            )
            await connection.written.wait()
            nursery.cancel_scope.cancel()


async def refuse_connection(stream: trio.SocketStream, error: SandboxdError) -> None:
    """Tell a peer why it is not served, in its own language, and leave."""
    refused = Refused(error.message, code=-32000, hint=error.hint)
    with trio.move_on_after(_REFUSING):
        await stream.send_all(_encode(error_reply(refused)))
        await stream.send_eof()
        # Closing with input unread would reset the connection and lose the answer (unix(7)).
        while await stream.receive_some(_CHUNK):
            pass


def tool_server(
    calls: Calls,
    agent: str,
    session: Callable[[], Awaitable[Session]],
    lacking: Callable[[Session, Tool], str] | None = None,
) -> Server[Any]:
    """The SDK's server of an agent's tools. Each request is made in what ``session`` returns then.

    ``lacking`` says, in a hint, what a session lacks to use a tool at all; such tools are not
    listed. What ``session`` raises as SandboxdError the client gets as an error of the protocol.
    """

    async def current() -> Session:
        try:
            return await session()
        except SandboxdError as error:
            data = {"hint": error.hint} if error.hint else None
            raise MCPError(types.INVALID_REQUEST, error.message, data) from None

    async def list_tools(
        ctx: ServerRequestContext[Any, Any], params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        now = await current()
        tools = [t for t in calls.tools(now) if lacking is None or not lacking(now, t)]
        return types.ListToolsResult(tools=[_describe(tool) for tool in tools])

    async def call_tool(
        ctx: ServerRequestContext[Any, Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        now = await current()
        progress = _progress(ctx) if ctx.meta and "progress_token" in ctx.meta else None
        result = await calls.call(now, params.name, params.arguments or {}, progress=progress)
        if result.outcome == "denied":
            tool = next((tool for tool in calls.tools(now) if tool.name == params.name), None)
            if tool is None:
                # Not a result but an error of the protocol: the client named what isn't there.
                raise MCPError(
                    types.INVALID_PARAMS,
                    f"unknown tool {shown(params.name)}",
                    {"hint": "tools/list names the tools of this session"},
                )
            if lacking is not None and (hint := lacking(now, tool)):
                result = replace(result, hint=hint)
        return _answer(result)

    server: Server[Any] = Server(
        "sandboxd",
        version=__version__,
        title=f"Tools of agent {agent}",
        instructions=_INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )
    server.middleware.clear()  # OpenTelemetry: would carry names and errors out of the daemon
    return server


def _progress(ctx: ServerRequestContext[Any, Any]) -> Callable[[float, str], Awaitable[None]]:
    async def report(received: float, text: str) -> None:
        # The first protocol version has no message in a progress notification.
        message = None if ctx.protocol_version == "2024-11-05" else text
        await ctx.session.report_progress(received, message=message)

    return report


def _describe(tool: Tool) -> types.Tool:
    hints = tool.annotations.as_dict()
    return types.Tool(
        name=tool.name,
        title=hints.get("title"),
        description=tool.description,
        input_schema=dict(tool.input_schema),
        output_schema=None if tool.output_schema is None else dict(tool.output_schema),
        annotations=types.ToolAnnotations.model_validate(hints) if hints else None,
    )


def _answer(result: CallResult) -> types.CallToolResult:
    """What a server answered or a program printed, then what people should know about the end."""
    content: list[types.ContentBlock] = [
        _BLOCK.validate_python(block) for block in result.content or ()
    ]
    for name, data, form in (
        ("stdout", result.stdout, result.output_format),
        ("stderr", result.stderr, "auto"),
    ):
        if data:
            content.append(_block(name, data, form, result.call))
    explanation = result.message
    if result.hint:
        explanation += f"\nhint: {result.hint}"
    if not explanation and not content and result.content is None:
        explanation = "(no output)"
    if explanation:
        content.append(types.TextContent(type="text", text=explanation))
    about = {"outcome": result.outcome, "call": result.call, "exit_code": result.exit_code}
    return types.CallToolResult(
        content=content,
        structured_content=result.structured,
        is_error=result.outcome != "ok",
        _meta={f"sandboxd/{key}": value for key, value in about.items() if value not in ("", None)},
    )


def _block(name: str, data: bytes, form: str, call: str) -> types.ContentBlock:
    """Text as text; bytes that are none, by what the manifest says or no UTF-8, as a resource."""
    meta = {"sandboxd/stream": name}
    try:
        if form == "binary":
            raise UnicodeDecodeError("utf-8", b"", 0, 0, "not meant to be text")
        text = data.decode("utf-8", "replace" if form == "text" else "strict")
        return types.TextContent(type="text", text=text, _meta=meta)
    except UnicodeDecodeError:
        blob = types.BlobResourceContents(
            uri=f"sandboxd://calls/{call}/{name}",
            mime_type="application/octet-stream",
            blob=base64.b64encode(data).decode("ascii"),
        )
        return types.EmbeddedResource(type="resource", resource=blob, _meta=meta)


class _Connection:
    """The two directions of one stream, and the requests between them."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        send_in, receive_in = trio.open_memory_channel[SessionMessage](0)
        send_out, receive_out = trio.open_memory_channel[bytes](0)
        self._incoming, self._outgoing = send_in, receive_out
        self._open: set[types.RequestId] = set()
        self.unsent = 0
        self._changed = trio.Event()
        self.inbox = _Inbox(receive_in)
        self.outbox = _Outbox(send_out, self)
        self.written = trio.Event()

    async def read(self, connection: trio.CancelScope) -> None:
        """Lines to messages. Ends with the peer's last line and the answers to it."""
        async with self._incoming:
            reader = LineReader(self._stream)
            try:
                too_long = 0
                while (line := await reader.receive()) is not None:
                    too_long += isinstance(line, Refused)
                    if too_long > _MAX_TOO_LONG:
                        log.warning("a client sends too much; its connection is closed")
                        connection.cancel()
                    while self.unsent > _MAX_UNSENT:
                        await self._change()
                    try:
                        message = await self._take(line)
                    except Refused as refused:
                        await self.outbox.reply(error_reply(refused))
                    else:
                        await self._incoming.send(message)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                connection.cancel()
            while self._open:
                await self._change()

    async def write(self, connection: trio.CancelScope) -> None:
        """Lines to the peer, in order. One that takes nothing for long loses the connection."""
        async with self._outgoing:
            async for line in self._outgoing:
                try:
                    for start in range(self._write_now(line), len(line), _CHUNK):
                        with trio.fail_after(_STALLED):
                            await self._stream.send_all(line[start : start + _CHUNK])
                except trio.TooSlowError:
                    log.warning("a client takes no answers; its connection is closed")
                    connection.cancel()
                    return
                except (OSError, trio.BrokenResourceError):
                    connection.cancel()
                    return
                self.unsent -= len(line)
                self._changed.set()
        self.written.set()

    def _write_now(self, line: bytes) -> int:
        """How many bytes there was room for: of nearly every answer, all."""
        try:
            return os.write(self._stream.socket.fileno(), line)
        except BlockingIOError:
            return 0

    def settle(self, id: types.RequestId | None) -> None:
        """The request is answered, or never will be."""
        if id is not None:
            self._open.discard(coerce_request_id(id))
        self._changed.set()

    async def _take(self, line: bytes | Refused) -> SessionMessage:
        if isinstance(line, Refused):
            raise line
        if len(line) > _LARGE:
            message = await trio.to_thread.run_sync(parse, line)
        else:
            message = parse(line)
        if not isinstance(message, types.JSONRPCRequest):
            return SessionMessage(message)
        refused = None
        key = coerce_request_id(message.id)
        if key in self._open:
            refused = Refused("a request with this id is open already", hint="use a new id")
        elif len(self._open) >= _MAX_REQUESTS and message.method != "ping":
            refused = Refused(
                f"this connection has {_MAX_REQUESTS} requests open",
                code=-32000,
                hint="wait for an answer, then ask again",
            )
        if refused is not None:
            refused.id = message.id
            raise refused
        self._open.add(key)

        async def unanswered() -> None:  # a cancelled request gets no answer
            self.settle(message.id)

        return SessionMessage(message, ServerMessageMetadata(on_request_unanswered=unanswered))

    async def _change(self) -> None:
        self._changed = trio.Event()
        await self._changed.wait()


class _Stream:
    """What both directions owe the SDK as streams."""

    async def aclose(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


class _Inbox(_Stream):
    """Messages for the SDK; ends when the reader does."""

    def __init__(self, channel: trio.MemoryReceiveChannel[SessionMessage]) -> None:
        self._channel = channel

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self._channel.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        except trio.ClosedResourceError:
            raise anyio.ClosedResourceError from None

    async def receive(self) -> SessionMessage | Exception:
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            raise anyio.EndOfStream from None

    async def aclose(self) -> None:
        await self._channel.aclose()


class _Outbox(_Stream):
    """Messages of the SDK, and our own refusals, on their way to the writer."""

    def __init__(self, channel: trio.MemorySendChannel[bytes], connection: _Connection) -> None:
        self._channel, self._connection = channel, connection

    async def send(self, item: SessionMessage) -> None:
        message = item.message
        try:
            await self.reply(message)
        except trio.BrokenResourceError:
            raise anyio.BrokenResourceError from None
        except trio.ClosedResourceError:
            raise anyio.ClosedResourceError from None
        finally:
            if isinstance(message, types.JSONRPCResponse | types.JSONRPCError):
                self._connection.settle(message.id)

    async def reply(self, message: types.JSONRPCMessage) -> None:
        """Hand one message to the writer, counted as unsent from now on."""
        line = _encode(message)
        self._connection.unsent += len(line)
        try:
            await self._channel.send(line)
        except BaseException:
            self._connection.unsent -= len(line)
            raise

    async def aclose(self) -> None:
        await self._channel.aclose()


def _encode(message: types.JSONRPCMessage) -> bytes:
    return message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"


@contextmanager
def _hangup(stream: trio.SocketStream) -> Iterator[int]:
    """A descriptor that becomes readable when the peer has closed both directions.

    An end of input alone doesn't tell a half-closed peer from one that is gone; EPOLLHUP does
    (unix(7) sockets report it once both sides are shut down), and is reported unasked (epoll(7)).
    """
    with select.epoll() as epoll:
        epoll.register(stream.socket.fileno(), 0)
        yield epoll.fileno()


async def _cancel_when(gone: int, scope: trio.CancelScope) -> None:
    await trio.lowlevel.wait_readable(gone)
    scope.cancel()


class _Quiet(logging.Handler):
    """Takes arguments and tracebacks out of the SDK's records before any other handler sees them.

    Both quote requests and results. What remains is where it happened and of what kind it was.
    """

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0] if record.exc_info else None
        record.msg = f"{record.msg} ({kind.__name__})" if kind else str(record.msg)
        record.msg, record.args = re.sub(r"%[a-z]", "...", record.msg), None
        record.exc_info = record.exc_text = record.stack_info = None


def _quieten() -> None:
    """Once for the process: every record of the SDK passes here first on its way up."""
    logger = logging.getLogger("mcp")
    if not any(isinstance(handler, _Quiet) for handler in logger.handlers):
        logger.handlers.insert(0, _Quiet())


_quieten()
