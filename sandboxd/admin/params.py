"""Parameters of admin methods, checked: what is wrong is named, what is right has its type."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import trio

from sandboxd.errors import Invalid
from sandboxd.names import agent_slug
from sandboxd.policy import Agent, Tool
from sandboxd.policy.explain import agent_named, tool_named
from sandboxd.running import Daemon

__all__ = ["bounded", "iso", "known_agent", "known_tool", "param", "slug", "strings", "thread"]

T = TypeVar("T")

#: Threads of operators' requests: a store that is slow must not take those of tool calls along.
_LIMITER = trio.CapacityLimiter(8)


def known_agent(daemon: Daemon, params: dict[str, Any]) -> Agent:
    """The configured agent that the parameters name. NotFound lists those that there are."""
    return agent_named(daemon.config, slug(params))


def known_tool(daemon: Daemon, params: dict[str, Any]) -> Tool:
    """The configured tool that the parameters name. NotFound names the nearest."""
    name = param(params, "tool", str)
    return tool_named(daemon.config, name)


def param(params: dict[str, Any], name: str, kind: type[T]) -> T:
    value = params.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise Invalid(f"parameter {name} must be of type {kind.__name__}")
    return value


def slug(params: dict[str, Any]) -> str:
    return agent_slug(param(params, "agent", str))


def strings(params: dict[str, Any], name: str) -> list[str]:
    values = param(params, name, list)
    if not all(isinstance(value, str) for value in values):
        raise Invalid(f"parameter {name} must be a list of strings")
    return values


def bounded(
    params: dict[str, Any], name: str, default: int, *, least: int = 1, most: int = 10_000
) -> int:
    value = params.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Invalid(f"parameter {name} must be a whole number from {least} to {most:,}")
    return value


def iso(at: float | None) -> str | None:
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def thread(call: Callable[..., T], *args: Any) -> T:
    return await trio.to_thread.run_sync(call, *args, limiter=_LIMITER)
