"""What may be told of an exception: nothing of the host's, and no value that it may quote."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sandboxd.broker.result import CallResult, Outcome
from sandboxd.errors import Denied, KernelError, SandboxdError

__all__ = ["describe", "failed_result", "first"]

log = logging.getLogger(__name__)


def failed_result(call: str, tool: str, error: Exception) -> CallResult:
    """What a call comes to that could not run, or not to its end, because of ``error``."""
    if isinstance(error, KernelError):
        # The path is the host's, which an agent need not know; the operator must.
        log.error("call %s failed: %s", call, error.message)
        reason, hint = KernelError(error.syscall, error.errno).message, ""
    elif isinstance(error, SandboxdError):
        reason, hint = error.message, error.hint
    elif isinstance(error, OSError):  # of our own pipes and files: says nothing of the tool's
        reason = error.strerror or "an operating system error"
        log.error("call %s failed: %s", call, reason)
        hint = "the daemon may have too few open files: sandboxctl doctor"
    else:
        # No traceback: exceptions quote what they choke on, and that can be a secret.
        log.error("call %s failed: %s", call, describe(error))
        reason, hint = "an internal error", "the daemon's log says more"
    outcome: Outcome = "denied" if isinstance(error, Denied) else "failed"
    return CallResult(outcome, call, message=f"{tool} could not run: {reason}", hint=hint)


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
