"""What the OpenAPI document says of errors, for every route alike."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

__all__ = ["ERRORS", "PLATFORM_ERRORS"]


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
