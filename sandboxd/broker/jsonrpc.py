"""Lines of JSON-RPC from somebody who may mean harm: bounded, unambiguous, or refused by id.

A refused line costs its sender an error reply and nothing else: the connection goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
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

__all__ = ["MAX_DEPTH", "MAX_LINE", "Refused", "error_reply", "lines", "parse"]

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


async def lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes | Refused]:
    """Every non-empty line of ``stream``, or the refusal of one longer than MAX_LINE.

    Never holds more than a line and a chunk. What follows the last newline counts as a line.
    """
    buffer, searched, skipped = bytearray(), 0, b""
    while True:
        data = await stream.receive_some(_CHUNK)
        buffer += data
        while True:
            end = buffer.find(b"\n", searched)
            if end < 0:
                break
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            searched = 0
            if skipped:
                yield _too_long(skipped + line)
                skipped = b""
            elif len(line) > MAX_LINE:
                yield _too_long(line)
            elif line.strip():
                yield line
        searched = len(buffer)
        if skipped or len(buffer) > MAX_LINE:
            # Keep both ends: one holds the id in every client that we know.
            skipped = skipped or bytes(buffer[:_ENDS]) + b" "
            del buffer[:-_ENDS]
            searched = len(buffer)
        if not data:
            if skipped:
                yield _too_long(skipped + buffer)
            elif buffer.strip():
                yield bytes(buffer)
            return


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
        refused = Refused("not a JSON-RPC 2.0 message", hint="JSON-RPC 2.0, section 4")
        refused.id = known
        raise refused from None


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
