"""The errors that cross a module boundary: few, flat, each with a hint.

A message says what went wrong, a hint says what to do next. Neither ever holds a secret value.
Callers switch on ``code`` (stable, documented in docs/errors.md) or on the class; there is no
deeper hierarchy because nobody needs one.
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "ConfigError",
    "Conflict",
    "Denied",
    "Invalid",
    "KernelError",
    "NotFound",
    "SandboxdError",
    "StoreError",
    "Unauthenticated",
    "Unavailable",
    "where",
]


class SandboxdError(Exception):
    """Base of every expected failure.

    ``code`` is a stable machine-readable word, ``exit_code`` what sandboxctl exits with.
    """

    code = "error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class Invalid(SandboxdError):
    """The request itself is wrong: a bad name, a malformed value, arguments against the schema."""

    code = "invalid"
    exit_code = 2


class ConfigError(SandboxdError):
    """A configuration file is wrong. ``file``, ``line`` and ``column`` (1-based) say where."""

    code = "config"
    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        file: str | os.PathLike[str] = "",
        line: int = 0,
        column: int = 0,
        hint: str = "",
    ) -> None:
        self.file, self.line, self.column = os.fspath(file), line, column
        where = f"{self.file}:{line}:{column}" if line else self.file
        #: How the message begins: ``FILE:LINE:COLUMN: ``, as far as known.
        self.where = f"{where}: " if where else ""
        super().__init__(self.where + message, hint=hint)


class NotFound(SandboxdError):
    """No such agent, tool, session or variable."""

    code = "not_found"
    exit_code = 3


class Denied(SandboxdError):
    """Policy, custody or a credential says no. ``rule`` names which rule decided, when one did."""

    code = "denied"
    exit_code = 4

    def __init__(self, message: str, *, rule: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.rule = rule


class Unauthenticated(Denied):
    """No valid API key or token. Wrong, unknown, expired and deactivated ones read the same."""

    code = "invalid_api_key"

    def __init__(
        self, message: str = "the API key or token is not valid", *, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)


class Conflict(SandboxdError):
    """The state forbids it now: already running, already locked, already ended."""

    code = "conflict"
    exit_code = 5


class Unavailable(SandboxdError):
    """The daemon, the launcher or a needed host feature is not there."""

    code = "unavailable"
    exit_code = 6


class StoreError(SandboxdError):
    """The encrypted store or the audit log cannot be trusted, opened or written."""

    code = "store"
    exit_code = 7


class KernelError(SandboxdError):
    """A system call failed. Names the call, errno and path, and never an argument vector."""

    code = "kernel"
    exit_code = 8

    def __init__(self, syscall: str, errno: int, path: str = "", *, hint: str = "") -> None:
        self.syscall, self.errno, self.path = syscall, errno, path
        name = _errno.errorcode.get(errno, str(errno))
        target = f" {path}" if path else ""
        super().__init__(f"{syscall}{target}: {name} ({os.strerror(errno)})", hint=hint)


def where(error: BaseException) -> str:
    """For logs: an exception's type and places without its message, which might quote a secret."""
    import traceback  # sandboxctl starts without it
    from pathlib import Path

    frames = traceback.extract_tb(error.__traceback__)
    places = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)
    inner = ""
    if isinstance(error, BaseExceptionGroup):
        inner = " [" + "; ".join(where(one) for one in error.exceptions) + "]"
    return f"{type(error).__name__} at {places}{inner}"
