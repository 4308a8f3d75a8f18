"""The broker as an MCP client of one stdio server that may mean harm.

The project's own line reader and parser rather than the SDK's client: definitions are wanted as the
JSON that was sent (a digest pins them), results are bounded and redacted before anything makes
models of them, and whatever the server asks for on its own is refused before it is understood.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mcp_types as types
import trio

from sandboxd import __version__
from sandboxd.broker.jsonrpc import MAX_LINE, LineReader, Refused, parse
from sandboxd.errors import SandboxdError, Unavailable
from sandboxd.policy.definitions import MAX_TOOLS

__all__ = ["Fault", "Peer", "RemoteError"]

#: The newest version with an initialize handshake, and the older ones that mean the same to us.
_VERSION = "2025-11-25"
_VERSIONS = frozenset({_VERSION, "2025-06-18", "2025-03-26", "2024-11-05"})

#: What a server may say without being asked, in any ten seconds: lines and bytes.
_WINDOW = 10.0
_MAX_UNASKED = 2_000
_MAX_UNASKED_BYTES = 8 << 20
#: Answers to the server's own requests that may wait for it to read.
_MAX_WAITING = 64
#: Pages and bytes of one list of tools.
_MAX_PAGES = 64
_MAX_LISTED = 4 << 20
#: Lines longer than this are parsed in a thread, so that other sessions don't wait for them.
_LARGE = 256 << 10

Report = Callable[[float, str], None]


class Fault(Unavailable):
    """The server broke a bound or the protocol, or is gone; it is of no use any more."""


class RemoteError(SandboxdError):
    """The server answered a request with a JSON-RPC error. Its text is the server's, unredacted."""

    code = "remote"

    def __init__(self, number: int, said: str) -> None:
        super().__init__(f"the server refused (error {number})")
        self.number, self.said = number, said


@dataclass(eq=False)
class _Pending:
    """A request that waits for its answer. ``report`` hears of its progress."""

    report: Report | None = None
    done: trio.Event = field(default_factory=trio.Event)
    result: Any = None
    error: SandboxdError | None = None
    size: int = 0
    progress: float = -math.inf

    def finish(self, result: Any = None, error: SandboxdError | None = None) -> None:
        self.result, self.error = result, error
        self.done.set()


class Peer:
    """One connection to a server. :meth:`run` moves its bytes; the rest may be called meanwhile."""

    def __init__(self, send: trio.abc.SendStream, receive: trio.abc.ReceiveStream) -> None:
        self._send, self._receive = send, receive
        self._lines: trio.MemorySendChannel[bytes]
        self._lines, self._outgoing = trio.open_memory_channel[bytes](_MAX_WAITING)
        self._pending: dict[int, _Pending] = {}
        self._numbers = 0
        self._window, self._unasked, self._unasked_bytes = 0.0, 0, 0
        #: Set when the server says that its list of tools is another one now.
        self.list_changed = False
        self.received = 0
        self.fault: Fault | None = None

    async def run(self) -> None:
        """Serve the connection until the server closes it or breaks a bound. Never raises.

        Afterwards :attr:`fault` says why, and every request that still waited has failed with it.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                nursery.cancel_scope.cancel()
        except* Fault as group:
            fault: BaseException = group
            while isinstance(fault, BaseExceptionGroup):
                fault = fault.exceptions[0]
            assert isinstance(fault, Fault)
            self._fail(fault)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._fail(Fault("it closed its standard input or output"))
        finally:
            self._fail(Fault("it ended"))

    async def initialize(self) -> None:
        """The handshake (MCP 2025-11-25, "Lifecycle"). No capability of a client is offered."""
        result, _ = await self.request(
            "initialize",
            {
                "protocolVersion": _VERSION,
                "capabilities": {},
                "clientInfo": {"name": "sandboxd", "version": __version__},
            },
        )
        version = result.get("protocolVersion") if isinstance(result, dict) else None
        if version not in _VERSIONS:
            raise Fault("it speaks no version of MCP that sandboxd knows")
        await self._say({"jsonrpc": "2.0", "method": "notifications/initialized"})

    async def list_tools(self) -> list[Any]:
        """Every page of tools/list, as it came. Raises Fault for a list without an end."""
        self.list_changed = False
        found: list[Any] = []
        cursors: set[str] = set()
        cursor: str | None = None
        size = 0
        for _ in range(_MAX_PAGES):
            page, length = await self.request("tools/list", {"cursor": cursor} if cursor else {})
            size += length
            tools = page.get("tools") if isinstance(page, dict) else None
            if not isinstance(tools, list):
                raise Fault("its list of tools is none")
            found += tools
            if size > _MAX_LISTED or len(found) > 2 * MAX_TOOLS:
                raise Fault(f"its list of tools has more than {2 * MAX_TOOLS} or 4 MiB")
            cursor = page.get("nextCursor")
            if cursor is None:
                return found
            if not isinstance(cursor, str) or cursor in cursors:
                raise Fault("its list of tools goes round in a circle")
            cursors.add(cursor)
        raise Fault(f"its list of tools has more than {_MAX_PAGES} pages")

    async def request(
        self, method: str, params: dict[str, Any], report: Report | None = None
    ) -> tuple[Any, int]:
        """The result of one request and the bytes that it took.

        Raises :class:`RemoteError` for the server's refusal and :class:`Fault` when it is gone.
        Cancelled, it tells the server so; an answer that still comes is dropped.
        """
        self.check()
        self._numbers += 1
        number, pending = self._numbers, _Pending(report)
        if report is not None:
            params = {**params, "_meta": {"progressToken": number}}
        self._pending[number] = pending
        answered = False
        try:
            await self._say({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
            await pending.done.wait()
            answered = True
        finally:
            self._pending.pop(number, None)
            if not answered:
                self._reply(
                    {
                        "jsonrpc": "2.0",
                        "method": "notifications/cancelled",
                        "params": {"requestId": number, "reason": "the call was cancelled"},
                    }
                )
        if pending.error is not None:
            raise pending.error
        return pending.result, pending.size

    async def answers(self) -> bool:
        """Whether it answers a ping now; who calls it sets the limit."""
        try:
            await self.request("ping", {})
        except RemoteError:
            return True  # it may not know ping, and yet it answered
        except Fault:
            return False
        return True

    def check(self) -> None:
        """Raise the fault that ended the connection, if one did."""
        if self.fault is not None:
            raise Fault(self.fault.message)

    def _fail(self, fault: Fault) -> None:
        if self.fault is None:
            self.fault = fault
        for pending in self._pending.values():
            pending.finish(error=Fault(self.fault.message))

    async def _say(self, message: dict[str, Any]) -> None:
        try:
            await self._lines.send(_encode(message))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.check()
            raise Fault("it is gone") from None

    def _reply(self, message: dict[str, Any]) -> None:
        """Something that nobody waits for: lost when the server reads nothing."""
        lost = (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError)
        with contextlib.suppress(*lost):
            self._lines.send_nowait(_encode(message))

    async def _write(self) -> None:
        async with self._outgoing:
            async for line in self._outgoing:
                await self._send.send_all(line)

    async def _read(self) -> None:
        reader = LineReader(self._receive, resume=False)
        while (line := await reader.receive()) is not None:
            if isinstance(line, Refused):
                raise Fault(f"it sent a line of more than {MAX_LINE:,} bytes")
            self.received += len(line)
            try:
                if len(line) > _LARGE:
                    message = await trio.to_thread.run_sync(parse, line)
                else:
                    message = parse(line)
            except Refused as refused:
                self._unanswerable(refused, len(line))
                continue
            self._take(message, len(line))

    def _take(self, message: types.JSONRPCMessage, size: int) -> None:
        if isinstance(message, types.JSONRPCResponse | types.JSONRPCError):
            pending = self._pending.get(message.id) if isinstance(message.id, int) else None
            if pending is None or pending.done.is_set():
                self._count(size)
                return
            pending.size = size
            if isinstance(message, types.JSONRPCError):
                error = message.error
                pending.finish(error=RemoteError(error.code, error.message))
            else:
                pending.finish(message.result)
            return
        self._count(size)
        if isinstance(message, types.JSONRPCRequest):
            self._refuse(message)
        elif message.method == "notifications/progress":
            self._progress(message.params or {})
        elif message.method == "notifications/tools/list_changed":
            self.list_changed = True

    def _refuse(self, message: types.JSONRPCRequest) -> None:
        """Answer a ping; sampling, roots, elicitation and the rest were never offered."""
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": message.id}
        if message.method == "ping":
            answer["result"] = {}
        else:
            answer["error"] = {
                "code": types.METHOD_NOT_FOUND,
                "message": "sandboxd offers a server nothing but ping",
            }
        self._reply(answer)

    def _progress(self, params: dict[str, Any]) -> None:
        """Only what was asked for, and only forward (MCP 2025-11-25, "Progress")."""
        token, value = params.get("progressToken"), params.get("progress")
        pending = self._pending.get(token) if isinstance(token, int) else None
        if pending is None or pending.report is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not value < 1e15:
            return
        if value > pending.progress:
            pending.progress = float(value)
            text = params.get("message")
            pending.report(float(value), text[:4096] if isinstance(text, str) else "")

    def _unanswerable(self, refused: Refused, size: int) -> None:
        """A line that is no message. Servers do print to their standard output by mistake."""
        pending = self._pending.get(refused.id) if isinstance(refused.id, int) else None
        if pending is None:
            self._count(size)
        else:
            pending.finish(error=Fault(f"its answer was refused: {refused.message}"))

    def _count(self, size: int) -> None:
        """One more line that nobody asked for. Raises Fault for a flood of them."""
        now = trio.current_time()
        if now > self._window + _WINDOW:
            self._window, self._unasked, self._unasked_bytes = now, 0, 0
        self._unasked += 1
        self._unasked_bytes += size
        if self._unasked > _MAX_UNASKED or self._unasked_bytes > _MAX_UNASKED_BYTES:
            raise Fault("it sent a flood of messages that nobody asked for")


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
