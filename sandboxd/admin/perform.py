"""The gate of every admin method, and the way in for those who don't come by the admin socket.

Permission and team are decided here and nowhere else: the admin socket, every HTTP route, the
dashboard and MCP over HTTP all call the methods that :func:`guarded` made.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import trio

from sandboxd.access.roles import PERMISSIONS, Permission, Principal
from sandboxd.admin.params import param, slug, strings
from sandboxd.admin.permissions import NEEDS, Need
from sandboxd.admin.reach import no_agent, question_of, sees_agent, session_of, tools_of
from sandboxd.admin.server import Caller, Method, Reply, clean_up, only_expected
from sandboxd.errors import Denied, Invalid, NotFound
from sandboxd.names import shown
from sandboxd.running import Daemon

__all__ = ["guarded", "perform", "stream", "streams"]


def guarded(daemon: Daemon, table: Mapping[str, Method]) -> dict[str, Method]:
    """The methods of ``table``, each behind its line of NEEDS. KeyError for one without a line."""
    return {name: _behind(daemon, name, NEEDS[name], method) for name, method in table.items()}


async def perform(
    daemon: Daemon, principal: Principal, method: str, params: Mapping[str, Any]
) -> Any:
    """What an admin method answers ``principal``.

    Raises what the method raises; Denied, recorded, when the role lacks the permission; NotFound
    for what does not exist or is out of reach; Invalid for a method that streams.
    """
    caller = Caller.remote(principal)
    try:
        started = _method(daemon, method)(caller, dict(params))
        if isinstance(started, AsyncGenerator):
            await started.aclose()
            raise Invalid(f"{method} answers in a stream")
        reply = await started
        for fd in reply.fds:
            os.close(fd)
        return reply.result
    except BaseExceptionGroup as group:
        raise only_expected(group) or group from None
    finally:
        with trio.CancelScope(shield=True):
            await clean_up(caller)


async def stream(
    daemon: Daemon, principal: Principal, method: str, params: Mapping[str, Any]
) -> AsyncGenerator[Any, None]:
    """What a streaming admin method sends, item by item. Raises as :func:`perform` does.

    Close it (``contextlib.aclosing``) to end the method early. A method that doesn't stream gives
    its one answer.
    """
    caller = Caller.remote(principal)
    try:
        started = _method(daemon, method)(caller, dict(params))
        if not isinstance(started, AsyncGenerator):
            reply = await started
            for fd in reply.fds:
                os.close(fd)
            yield reply.result
            return
        async with aclosing(started) as items:
            async for item in items:
                if isinstance(item, Reply):
                    return
                yield item
    except BaseExceptionGroup as group:
        raise only_expected(group) or group from None
    finally:
        with trio.CancelScope(shield=True):
            await clean_up(caller)


def streams(daemon: Daemon, method: str) -> bool:
    """Whether the method's answer is a stream. NotFound where there is no such method."""
    return inspect.isasyncgenfunction(_method(daemon, method))


def _method(daemon: Daemon, name: str) -> Method:
    if name not in daemon.methods:
        raise NotFound(f"this sandboxd has no method {shown(name)}")
    return daemon.methods[name]


def _behind(daemon: Daemon, name: str, need: Need, method: Method) -> Method:
    if inspect.isasyncgenfunction(method):

        async def streamed(caller: Caller, params: dict[str, Any]) -> AsyncGenerator[Any, None]:
            checked = await _checked(daemon, caller, name, need, params)
            async with aclosing(method(caller, checked)) as items:
                async for item in items:
                    yield item

        return streamed

    async def answered(caller: Caller, params: dict[str, Any]) -> Reply:
        started = method(caller, await _checked(daemon, caller, name, need, params))
        assert not isinstance(started, AsyncGenerator)
        return await started

    return answered


async def _checked(
    daemon: Daemon, caller: Caller, name: str, need: Need, params: dict[str, Any]
) -> dict[str, Any]:
    """The parameters that the method gets. Denied, NotFound or Invalid when it gets none."""
    principal = caller.principal
    if not principal.may(need.permission) or (need.scope == "host" and principal.team is not None):
        left_out = daemon.denials.note(principal.key or principal.name, trio.current_time())
        if left_out is not None:
            await daemon.audit.append(
                "admin.denied",
                by=principal.name,
                method=name,
                role=principal.role,
                team=principal.team,
                key=principal.key,
                **({"left_out": left_out} if left_out else {}),
            )
        raise _denied(principal, name, need.permission)
    if principal.team is not None:
        _check_team(principal, params)
        if need.tool:
            _check_tool(daemon, principal, params)
    if need.scope in ("session", "live"):
        id = param(params, "id", str)
        whole = await session_of(daemon, principal, id, live_only=need.scope == "live")
        return {**params, "id": whole}
    if need.scope == "approval":
        id = param(params, "id", str)
        whole = question_of(daemon, principal, id, abbreviated=need.abbreviated)
        return {**params, "id": whole}
    if need.scope == "place" and params.get("session") is not None:
        id = param(params, "session", str)
        whole = await session_of(daemon, principal, id, live_only=True)
        return {**params, "session": whole}
    if need.scope in ("agent", "place") or (
        need.scope == "agent?" and params.get("agent") is not None
    ):
        if not sees_agent(daemon, principal, slug(params)):
            raise no_agent(slug(params))
    elif need.scope == "team":
        return _with_team(daemon, principal, params)
    return params


def _check_team(principal: Principal, params: dict[str, Any]) -> None:
    """Whatever the method, a team that is named is the caller's own."""
    if params.get("team") is not None and param(params, "team", str) != principal.team:
        raise NotFound(f"no team {shown(params['team'])}", hint="leave it away: your own is meant")


def _check_tool(daemon: Daemon, principal: Principal, params: dict[str, Any]) -> None:
    if params.get("tool") is not None:
        tool = param(params, "tool", str)
        if tool not in tools_of(daemon, principal):
            raise NotFound(f"no tool {shown(tool)}", hint="see: sandboxctl tools list")


def _with_team(daemon: Daemon, principal: Principal, params: dict[str, Any]) -> dict[str, Any]:
    if principal.team is None:
        return params
    for agent in strings(params, "agents") if params.get("agents") is not None else ():
        if not sees_agent(daemon, principal, agent):
            raise no_agent(agent)
    return {**params, "team": principal.team}


def _denied(principal: Principal, method: str, permission: Permission) -> Denied:
    able = [role for role in PERMISSIONS if role != "application" and _may(role, permission)]
    who = "the host's operators can, on the admin socket" if able == ["host"] else ""
    return Denied(
        f"{principal.own_name} may not call {method}: the role {principal.role} does not have it",
        hint=who or f"a key of one of these roles can: {', '.join(r for r in able if r != 'host')}",
    )


def _may(role: Any, permission: Permission) -> bool:
    return permission in PERMISSIONS[role]
