"""``/api/v1``: what the platform's command line speaks. Every answer has a JSON body."""

from __future__ import annotations

import base64
import binascii
import json
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from pydantic import BaseModel, ConfigDict, Field

from sandboxd.access.roles import Principal
from sandboxd.admin.perform import perform, stream
from sandboxd.errors import Invalid, NotFound
from sandboxd.http import sandboxes
from sandboxd.http.described import NAMES, PLATFORM_ERRORS, SLUG, VARIABLE
from sandboxd.http.guard import Caller
from sandboxd.names import variable_name
from sandboxd.policy.values import Slug
from sandboxd.running import Daemon

__all__ = ["router"]

#: Characters of a session's recorded output that its log shows: the newest.
MAX_OUTPUT = 256 * 1024


_Slug = Annotated[str, SLUG]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Variable(_Strict):
    key: str = VARIABLE
    value: str
    now: bool = Field(False, description="take the older value from live sessions, too")


class Variables(_Strict):
    variables: dict[str, str] = Field(min_length=1, max_length=256, json_schema_extra=NAMES)
    now: bool = False


class Removal(_Strict):
    key: str = VARIABLE
    now: bool = Field(False, description="take it from live sessions, too")


class Account(BaseModel):
    displayName: str
    email: str | None


class TeamOf(BaseModel):
    slug: str
    name: str


class Me(BaseModel):
    user: Account
    team: TeamOf
    role: str
    agents: list[str] | None = Field(description="the agents in reach; null: all of the team")


class Names(BaseModel):
    keys: list[str]


class Success(BaseModel):
    success: bool
    key: str
    message: str
    warnings: list[str]


class SuccessAll(BaseModel):
    success: bool
    keys: list[str]
    message: str
    warnings: list[str]


class AgentRow(BaseModel):
    slug: str
    runtime: str = Field(description="the program that it runs")
    activeVersion: str | None = Field(description="the configuration in force, shortened")
    activeDeploymentStatus: str
    deployedAt: str | None = Field(description="when its file was changed last")


class Agents(BaseModel):
    agents: list[AgentRow]


class AgentDetail(AgentRow):
    name: str
    model: str | None
    totalDeployments: int
    createdAt: str | None
    policy: str
    tools: list[str]
    sessions: int


class Message(BaseModel):
    message: str


class LogRow(BaseModel):
    id: str
    sandbox_id: str
    agent_slug: str
    status: str
    error: str | None
    reason: str | None
    exit_code: int | None
    started_by: str
    created_at: str
    updated_at: str
    ended_at: str | None


class Logs(BaseModel):
    sandboxes: list[LogRow]
    nextCursor: str | None


class LogDetail(LogRow):
    output: str = Field(description="the newest of what the agent printed")
    truncated: bool


def router(daemon: Daemon) -> APIRouter:
    routes = APIRouter(prefix="/api/v1", responses=PLATFORM_ERRORS)
    _add_agents(routes, daemon)
    _add_variables(routes, daemon)
    _add_logs(routes, daemon)
    return routes


def _add_agents(routes: APIRouter, daemon: Daemon) -> None:
    @routes.get("/me", tags=["agents"], summary="Who this key is")
    async def me(caller: Caller) -> Me:
        slug = caller.team or "default"
        team = daemon.config.settings.teams.get(Slug(slug))
        return Me(
            user=Account(displayName=caller.own_name, email=None),
            team=TeamOf(slug=slug, name=team.name if team else slug),
            role=caller.role,
            agents=None if caller.agents is None else sorted(caller.agents),
        )

    @routes.get("/agents", tags=["agents"], summary="The agents in reach")
    async def agents(caller: Caller) -> Agents:
        rows = (await perform(daemon, caller, "agents.list", {}))["agents"]
        return Agents(agents=[await _agent(daemon, caller, row["slug"]) for row in rows])

    @routes.get("/agents/{slug}", tags=["agents"], summary="One agent")
    async def agent(caller: Caller, slug: _Slug) -> AgentDetail:
        return await _agent(daemon, caller, slug)

    @routes.delete("/agents/{slug}", tags=["agents"], summary="Delete an agent")
    async def delete(caller: Caller, slug: _Slug) -> Message:
        done = await perform(daemon, caller, "agents.delete", {"agent": slug})
        sessions, variables = len(done["ended_sessions"]), len(done["removed_variables"])
        return Message(
            message=f"Agent {slug} deleted: {sessions} sessions ended, {variables} variables "
            f"removed; its file is kept as {done['kept']}"
        )


async def _agent(daemon: Daemon, caller: Principal, slug: str) -> AgentDetail:
    row = await perform(daemon, caller, "agents.show", {"agent": slug})
    return AgentDetail(
        slug=row["slug"],
        runtime=row["program"],
        activeVersion=daemon.config.generation[:12],
        activeDeploymentStatus="active",
        deployedAt=row["changed_at"],
        name=row["description"],
        model=None,
        totalDeployments=1,
        createdAt=row["changed_at"],
        policy=row["policy"],
        tools=row["tools"],
        sessions=len(row["sessions"]),
    )


def _add_variables(routes: APIRouter, daemon: Daemon) -> None:
    async def put(caller: Principal, slug: str, values: dict[str, str], now: bool) -> list[str]:
        encoded = {
            variable_name(name): base64.b64encode(_bytes(value)).decode()
            for name, value in values.items()
        }
        done = await perform(
            daemon, caller, "env.set", {"agent": slug, "values": encoded, "now": now}
        )
        return list(done["warnings"])

    @routes.get("/agents/{slug}/env", tags=["variables"], summary="Names of the variables")
    async def names(caller: Caller, slug: _Slug) -> Names:
        got = await perform(daemon, caller, "env.list", {"agent": slug})
        return Names(keys=sorted(row["name"] for row in got["variables"]))

    @routes.put("/agents/{slug}/env", tags=["variables"], summary="Set a variable, or several")
    async def set_(
        caller: Caller, slug: _Slug, body: Annotated[Variable | Variables, Body()]
    ) -> Success | SuccessAll:
        """``{"key", "value"}``, or ``{"variables": {...}}``: all of them or none."""
        when = "in force now" if body.now else "takes effect in the next session"
        if isinstance(body, Variable):
            warnings = await put(caller, slug, {body.key: body.value}, body.now)
            return Success(
                success=True, key=body.key, message=f"{body.key}: {when}", warnings=warnings
            )
        warnings = await put(caller, slug, body.variables, body.now)
        keys = sorted(body.variables)
        return SuccessAll(success=True, keys=keys, message=when, warnings=warnings)

    @routes.delete("/agents/{slug}/env", tags=["variables"], summary="Remove a variable")
    async def remove(caller: Caller, slug: _Slug, body: Annotated[Removal, Body()]) -> Success:
        params = {"agent": slug, "names": [body.key], "now": body.now}
        done = await perform(daemon, caller, "env.remove", params)
        live = len(done["live_sessions"])
        message = f"{body.key} removed" + (
            f"; {live} live sessions still have it: send now: true to take it away" if live else ""
        )
        return Success(success=True, key=body.key, message=message, warnings=[])


def _add_logs(routes: APIRouter, daemon: Daemon) -> None:
    @routes.get("/agents/{slug}/logs", tags=["logs"], summary="Sessions of an agent, newest first")
    async def logs(
        caller: Caller,
        slug: _Slug,
        status: Annotated[str | None, Query(max_length=20)] = None,
        search: Annotated[str | None, Query(max_length=200)] = None,
        createdAfter: Annotated[str | None, Query(max_length=40)] = None,
        createdBefore: Annotated[str | None, Query(max_length=40)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        cursor: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Logs:
        """``status``: starting, running, stopped or error. ``search`` looks at id, who started it
        and why it ended. Times are ISO 8601. ``cursor`` is the last answer's ``nextCursor``."""
        await perform(daemon, caller, "agents.show", {"agent": slug})
        rows = [_log(row) for row in await _sessions(daemon, caller, slug)]
        after, before = (
            _moment("createdAfter", createdAfter),
            _moment("createdBefore", createdBefore),
        )
        words = (search or "").lower()
        found = [
            row
            for row in rows
            if (status is None or row.status == status)
            and (after is None or datetime.fromisoformat(row.created_at) >= after)
            and (before is None or datetime.fromisoformat(row.created_at) < before)
            and words in f"{row.id} {row.started_by} {row.reason or ''} {row.error or ''}".lower()
        ]
        found.sort(key=_order, reverse=True)
        if cursor:
            last = _from_cursor(cursor)
            found = [row for row in found if _order(row) < last]
        page = found[:limit]
        more = len(found) > limit
        return Logs(sandboxes=page, nextCursor=_cursor(page[-1]) if more else None)

    @routes.get("/agents/{slug}/logs/{id}", tags=["logs"], summary="One session and its output")
    async def log(caller: Caller, slug: _Slug, id: str) -> LogDetail:
        row = await perform(daemon, caller, "session.show", {"id": id})
        if row["agent"] != slug:
            raise NotFound(f"agent {slug} has no such session")
        output, truncated = await _output(daemon, caller, row["id"])
        return LogDetail(**_log(row).model_dump(), output=output, truncated=truncated)


async def _sessions(daemon: Daemon, caller: Principal, slug: str) -> list[dict[str, Any]]:
    got = await perform(daemon, caller, "session.list", {"all": True})
    return [row for row in got["sessions"] if row["agent"] == slug]


async def _output(daemon: Daemon, caller: Principal, id: str) -> tuple[str, bool]:
    kept, truncated = bytearray(), False
    async with aclosing(stream(daemon, caller, "session.logs", {"id": id})) as chunks:
        async for chunk in chunks:
            kept += base64.b64decode(chunk["data"])
            if len(kept) > MAX_OUTPUT:
                del kept[:-MAX_OUTPUT]
                truncated = True
    return kept.decode("utf-8", "replace"), truncated


def _log(row: dict[str, Any]) -> LogRow:
    return LogRow(
        id=row["id"],
        sandbox_id=row["id"],
        agent_slug=row["agent"],
        status=sandboxes.status_of(row),
        error=sandboxes.error_of(row),
        reason=row["reason"] or None,
        exit_code=row["exit_code"],
        started_by=row["by"],
        created_at=row["started_at"],
        updated_at=row["ended_at"] or row["started_at"],
        ended_at=row["ended_at"],
    )


def _order(row: LogRow) -> tuple[str, str]:
    return (row.created_at, row.id)


def _cursor(row: LogRow) -> str:
    return base64.urlsafe_b64encode(json.dumps(_order(row)).encode()).decode()


def _from_cursor(cursor: str) -> tuple[str, str]:
    try:
        at, id = json.loads(base64.urlsafe_b64decode(cursor))
        if isinstance(at, str) and isinstance(id, str):
            return at, id
    except (ValueError, TypeError, binascii.Error):
        pass
    raise Invalid("cursor is not one of ours", hint="give nextCursor as it was answered")


def _moment(name: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise Invalid(f"{name} is a time with its zone, such as 2026-01-31T12:00:00Z")
    return moment


def _bytes(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        problem = "a value that is no text (a lone surrogate)"
    raise Invalid(problem)
