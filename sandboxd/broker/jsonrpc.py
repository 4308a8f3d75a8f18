"""Lines of JSON-RPC from somebody who may mean harm: bounded, unambiguous, or refused by id.

A refused line costs its sender an error reply and nothing else: the connection goes on.
"""

from __future__ import annotations

import json
import re
from typing import Any

import trio
from mcp_types import (
    INVALID_REQUEST,
    PARSE_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    RequestId,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError

from sandboxd.names import shown

__all__ = ["MAX_DEPTH", "MAX_LINE", "LineReader", "Refused", "error_reply", "parse"]

#: Bytes of one message, without its newline.
MAX_LINE = 4 << 20
#: Objects and lists inside one another. Arguments have a tighter bound of their own.
MAX_DEPTH = 64

_CHUNK = 65536
#: What is remembered of both ends of a line that is too long, to find its id.
_ENDS = 512
_ID = rb'(-?[0-9]{1,18}|"[^"\\\x00-\x1f]{0,256}")'
_ID_FIRST = re.compile(
    rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*' + _ID + rb"\s*[,}]"
)
_ID_LAST = re.compile(rb',\s*"id"\s*:\s*' + _ID + rb'\s*(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*$')


class Refused(Exception):
    """A line that is not taken. ``id`` is the request's, where it could be read."""

    def __init__(self, message: str, *, code: int = INVALID_REQUEST, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.code, self.hint = message, code, hint
        self.id: RequestId | None = None

    def about(self, line: bytes) -> Refused:
        """The same refusal, addressed to the request that ``line`` holds or began and ended as."""
        self.id = _recover_id(line)
        return self


class LineReader:
    """The lines of a stream. Never holds more than one and a chunk.

    Without ``resume`` a line that is too long is refused at once and the last one that is read.
    """

    def __init__(self, stream: trio.abc.ReceiveStream, *, resume: bool = True) -> None:
        self._stream, self._resume = stream, resume
        self._buffer = bytearray()
        self._searched = 0  # up to here the buffer holds no newline
        self._start = b""  # of a line that is too long already; only its ends are kept
        self._ended = False

    async def receive(self) -> bytes | Refused | None:
        """The next line that isn't blank, the refusal of one over MAX_LINE, or None at the end.

        What follows the last newline counts as a line.
        """
        while not self._ended:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0:
                line = self._cut(end)
                if line is not None:
                    return line
                continue
            self._searched = len(self._buffer)
            if self._start or len(self._buffer) > MAX_LINE:
                self._start = self._start or bytes(self._buffer[:_ENDS]) + b" "
                if not self._resume:
                    self._ended = True
                    break
                del self._buffer[:-_ENDS]
                self._searched = len(self._buffer)
            data = await self._stream.receive_some(_CHUNK)
            self._buffer += data
            self._ended = not data
        return self._cut(len(self._buffer))

    def _cut(self, end: int) -> bytes | Refused | None:
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        start, self._start, self._searched = self._start, b"", 0
        if start or len(line) > MAX_LINE:
            return _too_long(start + line)
        return line if line.strip() else None


def parse(line: bytes) -> JSONRPCMessage:
    """The one message in ``line``. Raises :class:`Refused`, addressed as well as can be."""
    try:
        value = _value(line)
    except Refused as refused:
        raise refused.about(line) from None
    if not isinstance(value, dict):
        what = "a batch" if isinstance(value, list) else "no JSON object"
        raise Refused(f"the line holds {what}", hint="send one JSON-RPC 2.0 message per line")
    id = value.get("id")
    known = id if isinstance(id, int | str) and not isinstance(id, bool) else None
    if "method" in value and "id" in value and known is None:
        raise Refused("the id is neither a whole number nor text", hint="JSON-RPC 2.0, section 4")
    try:
        return jsonrpc_message_adapter.validate_python(value, by_name=False)
    except ValidationError:
        wrong = Refused("not a JSON-RPC 2.0 message", hint="JSON-RPC 2.0, section 4")
        wrong.id = known
        raise wrong from None


def error_reply(refused: Refused) -> JSONRPCError:
    """What the sender of a refused line is told."""
    data = {"hint": refused.hint} if refused.hint else None
    error = ErrorData(code=refused.code, message=refused.message, data=data)
    return JSONRPCError(jsonrpc="2.0", id=refused.id, error=error)


def _value(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused("the line is not UTF-8", code=PARSE_ERROR) from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError:
        raise Refused("the line is not JSON", code=PARSE_ERROR, hint="RFC 8259") from None
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH:
        _check_depth(value)
    if b"\\u" in line:
        _check_characters(value)
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        below: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            below += [child for child in children if isinstance(child, dict | list)]
        level = below


def _check_characters(value: Any) -> None:
    """Halves of surrogate pairs are no text and can't be written anywhere (RFC 8259, 8.2)."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("half of a surrogate pair is no character", code=PARSE_ERROR) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise Refused(
            f"the key {shown(twice)} is there twice in one object",
            hint="two readers could take it two ways; send it once",
        )
    return made


def _no_constant(name: str) -> Any:
    raise Refused(f"{name} is not JSON", code=PARSE_ERROR, hint="RFC 8259, section 6")


def _too_deep() -> Refused:
    return Refused(f"the message is nested deeper than {MAX_DEPTH} levels")


def _too_long(ends: bytes) -> Refused:
    return Refused(
        f"the line is longer than {MAX_LINE:,} bytes",
        hint="put large input into a file of the workspace",
    ).about(ends)


def _recover_id(line: bytes) -> RequestId | None:
    """The top-level id of a line that is not read as a whole: its first or its last member.

    A nested "id" can't be taken for it: behind the first brace the nesting is one deep, and the
    last brace of a message closes its outermost object.
    """
    found = _ID_FIRST.match(line[:_ENDS]) or _ID_LAST.search(line[-_ENDS:])
    if found is None:
        return None
    try:
        value = json.loads(found[1])
    except ValueError:
        return None
    return value if isinstance(value, int | str) else None
