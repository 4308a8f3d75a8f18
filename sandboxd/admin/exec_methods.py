"""``session.exec``: one more program in a session's sandbox, beside its agent."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from sandboxd.admin.params import bounded, param, strings
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.errors import Invalid
from sandboxd.running import Daemon
from sandboxd.sessions.exec import DEFAULT_LIMIT, DEFAULT_TIMEOUT, MAX_LIMIT, ExecResult

__all__ = ["ExecMethods"]

MAX_TIMEOUT = 86_400.0


class ExecMethods:
    """The one method, in a table."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {"session.exec": self.exec}

    async def exec(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """``argv``, or ``command`` for a shell; ``cwd``, ``environment``, ``timeout`` (seconds),
        ``stdin`` (base64), ``limit`` (bytes of output). Output comes in base64."""
        manager = self._daemon.sessions
        session = manager.get(param(params, "id", str))
        if ("argv" in params) == ("command" in params):
            raise Invalid("give either argv, a list, or command, a line for /bin/sh")
        if "command" in params:
            argv = ["/bin/sh", "-c", param(params, "command", str)]
        else:
            argv = strings(params, "argv")
        result = await manager.exec(
            session,
            argv,
            environment=_environment(params),
            cwd=param(params, "cwd", str) if params.get("cwd") is not None else "",
            stdin=_stdin(params),
            timeout=_timeout(params),
            limit=bounded(params, "limit", DEFAULT_LIMIT, least=0, most=MAX_LIMIT),
            by=caller.name,
        )
        return Reply(_told(result))


def _told(result: ExecResult) -> dict[str, Any]:
    return {
        "exit_code": result.exit_code,
        "signal": result.signal,
        "stdout": base64.b64encode(result.stdout).decode(),
        "stderr": base64.b64encode(result.stderr).decode(),
        "truncated": result.truncated,
        "timed_out": result.timed_out,
        "seconds": result.seconds,
    }


def _environment(params: dict[str, Any]) -> dict[str, str]:
    if params.get("environment") is None:
        return {}
    given = param(params, "environment", dict)
    if not all(isinstance(value, str) for value in given.values()):
        raise Invalid("parameter environment must be an object of texts")
    return dict(given)


def _stdin(params: dict[str, Any]) -> bytes:
    if params.get("stdin") is None:
        return b""
    try:
        return base64.b64decode(param(params, "stdin", str), validate=True)
    except (binascii.Error, ValueError):
        raise Invalid("parameter stdin must be base64") from None


def _timeout(params: dict[str, Any]) -> float:
    value = params.get("timeout")
    if value is None:
        return DEFAULT_TIMEOUT
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Invalid("parameter timeout must be a number of seconds")
    if not 0 < value <= MAX_TIMEOUT:
        raise Invalid(f"parameter timeout must be over 0 and at most {MAX_TIMEOUT:,.0f} seconds")
    return float(value)
