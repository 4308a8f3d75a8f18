"""Errors in the form that each client reads, by the path that it called.

``/v1`` (the SDK's surface): ``{"error": {"code", "message"}}``. ``/nextjs/v1`` (the same tokens,
for a client that reads a text): ``{"error": "message"}``. Everything else, as the command line
reads it: ``{"error": "code", "message", "status"}``. A message is for people: what is wrong, and
after a colon what to do. No message quotes a key, a token or a value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from sandboxd.errors import (
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

__all__ = ["STATUSES", "TOKENS", "Refusal", "answer", "form", "form_of_tokens", "refusal_of"]

TOKENS = "/v1/tokens"

#: What each class is in HTTP: status and code.
STATUSES: Mapping[type[SandboxdError], tuple[int, str]] = {
    Invalid: (400, "validation_error"),
    NotFound: (404, "not_found"),
    Denied: (403, "forbidden"),
    Conflict: (409, "conflict"),
    Unavailable: (503, "unavailable"),
    StoreError: (500, "store"),
    KernelError: (500, "kernel"),
}


class Refusal(Exception):
    """An answer that isn't the one asked for. ``headers`` go along with it."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message
        self.headers = dict(headers or {})

    @classmethod
    def unauthenticated(cls, message: str = "") -> Refusal:
        """One answer for a wrong, an unknown, an expired and a deactivated key."""
        return cls(
            401,
            "invalid_api_key",
            message or Unauthenticated().message,
            {"www-authenticate": 'Bearer realm="sandboxd"'},
        )

    @classmethod
    def too_many(cls, seconds: float, what: str = "requests") -> Refusal:
        wait = str(max(1, math.ceil(seconds)))
        message = f"too many {what}: try again in {wait} s"
        return cls(429, "rate_limited", message, {"retry-after": wait})


def refusal_of(error: SandboxdError) -> Refusal:
    """What an expected failure is in HTTP."""
    if isinstance(error, Unauthenticated):
        return Refusal.unauthenticated()
    message = f"{error.message}: {error.hint}" if error.hint else error.message
    for kind, (status, code) in STATUSES.items():
        if isinstance(error, kind):
            return Refusal(status, code, message)
    return Refusal(500, error.code, message)


def form(path: str, refusal: Refusal) -> dict[str, Any]:
    """The body of a refusal, as who calls ``path`` reads it."""
    if path.startswith("/v1/"):
        return {"error": {"code": refusal.code, "message": refusal.message}}
    if path.startswith("/nextjs/"):
        return {"error": refusal.message}
    return {"error": refusal.code, "message": refusal.message, "status": refusal.status}


def form_of_tokens(body: bytes | None) -> str:
    """By which path's form to answer who asked ``/v1/tokens`` with this body.

    @21st-sdk/nextjs asks the path that @21st-sdk/node asks, with the same headers, and reads errors
    as text. Where both a user and agents are named it names the user first, and the other one the
    agents; where not, nothing tells them apart, and ``/nextjs`` is for it.
    """
    try:
        names = list(json.loads(body or b"{}"))
    except (ValueError, TypeError, RecursionError):
        return TOKENS
    texts = (
        "userId" in names and "agents" in names and names.index("userId") < names.index("agents")
    )
    return f"/nextjs{TOKENS}" if texts else TOKENS


def answer(path: str, refusal: Refusal) -> JSONResponse:
    return JSONResponse(form(path, refusal), refusal.status, headers=refusal.headers)
