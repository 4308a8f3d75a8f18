"""The admin socket's wire: newline-delimited JSON-RPC 2.0, shared by the daemon and sandboxctl.

One line is one message. A request has ``jsonrpc``, ``id``, ``method`` and an object ``params``;
the reply has ``result`` or ``error``. Before its reply a streaming method sends notifications
``{"method": "stream", "params": {"id": ..., "data": ...}}``. A reply whose ``fds`` is *n* brings
*n* descriptors with its first byte (SCM_RIGHTS, unix(7)). An error's ``data`` holds ``code``,
``hint`` and ``exit_code`` so that the other side raises the class that the daemon raised.

Standard library only: sandboxctl imports this on every start.
"""

from __future__ import annotations

import json
from typing import Any

from sandboxd.errors import (
    ConfigError,
    Conflict,
    Denied,
    Invalid,
    KernelError,
    NotFound,
    SandboxdError,
    StoreError,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "BEAT_SECONDS",
    "INTERNAL",
    "INVALID_REQUEST",
    "MAX_FDS",
    "MAX_LINE",
    "METHOD_NOT_FOUND",
    "PARSE_ERROR",
    "ConfigErrorList",
    "decode",
    "encode",
    "error_object",
    "failure",
    "raised",
    "read_arguments",
    "reply",
    "request",
    "stream_item",
]

#: Longest line, newline included. An environment that execve(2) takes is at most 6 MiB
#: (3/4 of _STK_LIM, fs/exec.c), 8 MiB in base64; twice that leaves room for everything else.
MAX_LINE = 16 * 1024 * 1024

#: Most descriptors that one reply brings; the kernel's own limit is 253 (SCM_MAX_FD).
MAX_FDS = 8

#: Over HTTP: seconds of silence after which the server sends an empty line.
BEAT_SECONDS = 15.0

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INTERNAL = -32603
_FAILED = -32000

_CLASSES: dict[str, type[SandboxdError]] = {
    kind.code: kind
    for kind in (
        ConfigError,
        Conflict,
        Invalid,
        NotFound,
        StoreError,
        Unauthenticated,
        Unavailable,
    )
}


class ConfigErrorList(ConfigError):
    """Several things wrong in the configuration; ``errors`` holds each."""

    def __init__(self, message: str, errors: list[ConfigError], *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errors = errors


def encode(message: dict[str, Any]) -> bytes:
    """One message as a line. Raises Invalid when it is longer than :data:`MAX_LINE`."""
    # ASCII: a path that is not UTF-8 travels as the lone surrogates that os.fsdecode gave it.
    line = json.dumps(message, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    if len(line) > MAX_LINE:
        raise Invalid(
            f"the message is {len(line):,} bytes long; the admin socket takes {MAX_LINE:,}",
            hint="ask for less at once, or send it in several requests",
        )
    return line


def decode(line: bytes | bytearray) -> dict[str, Any]:
    """The object on one line. Raises Invalid, which quotes nothing of the line."""
    try:
        message = json.loads(line, object_pairs_hook=_unique)
    except RecursionError:
        raise Invalid("the JSON is nested too deeply") from None
    except ValueError as error:
        reason = f" at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise Invalid(f"the line is not valid JSON{reason}") from None
    if not isinstance(message, dict):
        raise Invalid("the line is not a JSON object")
    return message


def read_arguments(text: str, hint: str) -> Any:
    """A tool's arguments as an operator writes them. Raises Invalid, with ``hint`` for no JSON."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise Invalid("the arguments are nested too deeply") from None
    except ValueError as error:
        raise Invalid(f"the arguments are not valid JSON: {error}", hint=hint) from None


def request(id: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}


def reply(id: Any, result: Any, fds: int = 0) -> dict[str, Any]:
    message = {"jsonrpc": "2.0", "id": id, "result": result}
    if fds:
        message["fds"] = fds
    return message


def stream_item(id: Any, data: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": "stream", "params": {"id": id, "data": data}}


def failure(id: Any, error: SandboxdError, number: int = _FAILED) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "error": error_object(error, number)}


def error_object(error: SandboxdError, number: int = _FAILED) -> dict[str, Any]:
    """The ``error`` member that :func:`raised` turns back into the same class."""
    data: dict[str, Any] = {
        "code": error.code,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    if isinstance(error, Denied) and error.rule:
        data["rule"] = error.rule
    if isinstance(error, KernelError):
        data |= {"syscall": error.syscall, "errno": error.errno, "path": error.path}
    parts = getattr(error, "errors", None)
    if isinstance(parts, (list, tuple)):
        data["errors"] = [
            {"message": part.message, "hint": part.hint}
            for part in parts
            if isinstance(part, SandboxdError)
        ]
    return {"code": number, "message": error.message, "data": data}


def raised(error: Any) -> SandboxdError:
    """The exception that an ``error`` member stands for; an unknown code keeps its exit code."""
    error = error if isinstance(error, dict) else {}
    data = error.get("data")
    data = data if isinstance(data, dict) else {}
    message, hint = str(error.get("message", "unknown error")), str(data.get("hint", ""))
    code = data.get("code")
    if isinstance(data.get("errors"), list):
        parts = [
            ConfigError(str(part.get("message", "")), hint=str(part.get("hint", "")))
            for part in data["errors"]
            if isinstance(part, dict)
        ]
        return ConfigErrorList(message, parts, hint=hint)
    if code == Denied.code:
        return Denied(message, rule=str(data.get("rule", "")), hint=hint)
    if code == KernelError.code and isinstance(data.get("errno"), int):
        return KernelError(
            str(data.get("syscall", "")), data["errno"], str(data.get("path", "")), hint=hint
        )
    if code in _CLASSES:
        return _CLASSES[code](message, hint=hint)
    unknown = SandboxdError(message, hint=hint)
    if isinstance(code, str):
        unknown.code = code
    if isinstance(data.get("exit_code"), int):
        unknown.exit_code = data["exit_code"]
    return unknown


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Invalid("the JSON has the same key twice in one object")
    return found
