"""What the OpenAPI document says of errors, for every route alike."""

from __future__ import annotations

from typing import Any

from fastapi import Path
from pydantic import BaseModel, Field

__all__ = ["AGENT", "ERRORS", "NAMES", "PLATFORM_ERRORS", "SLUG", "VARIABLE"]

_AGENT_PATTERN = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
_VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"

# Patterns are described here and enforced by the methods, whose refusals say the rule in words.

#: The field ``agent`` of a body, and the parameter ``slug`` of a path.
AGENT: Any = Field(
    max_length=100, examples=["worker"], json_schema_extra={"pattern": _AGENT_PATTERN}
)
SLUG = Path(examples=["worker"], json_schema_extra={"pattern": _AGENT_PATTERN, "maxLength": 100})

#: The name of one variable, and a mapping whose keys are such names.
VARIABLE: Any = Field(max_length=1000, json_schema_extra={"pattern": _VARIABLE_PATTERN})
NAMES: dict[str, Any] = {"propertyNames": {"pattern": _VARIABLE_PATTERN}}


class ErrorDetail(BaseModel):
    code: str
    message: str


class SdkError(BaseModel):
    error: ErrorDetail | str = Field(description="a text for /nextjs/v1 alone")


class PlatformError(BaseModel):
    error: str = Field(description="a code, such as validation_error")
    message: str
    status: int


_WHAT = {
    400: "The request is wrong; the message says what about it",
    401: "No valid API key or token",
    403: "The role, the scope of the token, or a policy forbids it",
    404: "There is no such thing, or not in reach",
    409: "The state forbids it now",
    413: "The body is too large",
    429: "Too many requests; Retry-After says when to go on",
    500: "sandboxd failed; its log says where",
    503: "Something that is needed is not there",
}


def _responses(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": model, "description": what} for status, what in _WHAT.items()}


#: ``responses=`` of the SDK's routes, and of the command line's.
ERRORS = _responses(SdkError)
PLATFORM_ERRORS = _responses(PlatformError)
