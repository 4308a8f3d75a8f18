"""What may be told of an exception that nobody expected, or that came in a group of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["describe", "first"]


def first(group: BaseExceptionGroup[Any]) -> Any:
    """The first plain exception in nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def describe(error: BaseException) -> str:
    """An unexpected exception by its class and place only: its text may quote a secret."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else ""
    return type(error).__name__ + where
