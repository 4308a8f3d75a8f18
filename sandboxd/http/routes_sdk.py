"""``/v1``: what ``@21st-sdk/node`` speaks. ``/nextjs/v1``: tokens for its Next.js sister.

A sandbox is a session: creating one starts the agent in the background, deleting it stops it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sandboxd.access.roles import Principal
from sandboxd.admin.perform import perform
from sandboxd.errors import NotFound
from sandboxd.http import sandboxes
from sandboxd.http.attended import attended
from sandboxd.http.described import AGENT, ERRORS, NAMES
from sandboxd.http.errors import Refusal
from sandboxd.http.guard import Caller
from sandboxd.running import Daemon

__all__ = ["router"]

_Milliseconds = Annotated[int, Field(gt=0, le=86_400_000)]
_Path = Annotated[str, Query(max_length=4096, description="relative to /workspace, or below it")]


_LIFETIME = re.compile(r"^0*[1-9][0-9]{0,8}(s|m|h|d)$")


def _lifetime(text: str) -> str:
    if not _LIFETIME.fullmatch(text):
        raise ValueError("use a number above 0 and s, m, h or d: 30s, 15m, 1h (24h at most)")
    return text


class _Strict(BaseModel):
    """A body in which nothing is converted and nothing unknown is left aside."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NewToken(_Strict):
    agents: list[str] | None = Field(None, min_length=1, max_length=100)
    userId: str | None = Field(None, min_length=1, max_length=200)
    expiresIn: Annotated[str, AfterValidator(_lifetime)] = Field(
        "1h",
        description="30s, 15m, 1h or 1d; a day at most, whatever is asked",
        json_schema_extra={"pattern": _LIFETIME.pattern},
    )


class Token(BaseModel):
    token: str
    expiresAt: str


class NewSandbox(_Strict):
    agent: str = AGENT
    files: dict[str, str] | None = Field(None, max_length=256)
    envs: dict[str, str] | None = Field(None, max_length=256, json_schema_extra=NAMES)
    setup: list[str] | None = Field(None, max_length=32)
    timeoutMs: _Milliseconds | None = Field(None, description="it is stopped after this time")
    networkAllowOut: list[str] | None = Field(None, max_length=256)
    networkDenyOut: list[str] | None = Field(None, max_length=256)


class Sandbox(BaseModel):
    id: str
    sandboxId: str
    status: str = Field(description="starting, running, stopped or error")
    createdAt: str


class AgentOf(BaseModel):
    slug: str
    name: str


class SandboxDetail(Sandbox):
    error: str | None
    agent: AgentOf
    threads: list[dict[str, Any]]
    updatedAt: str


class Command(_Strict):
    command: str = Field(min_length=1, max_length=131_072)
    cwd: str | None = Field(None, min_length=1, max_length=4096)
    envs: dict[str, str] | None = Field(None, max_length=256, json_schema_extra=NAMES)
    timeoutMs: Annotated[int, Field(gt=0, le=int(sandboxes.MAX_TIMEOUT * 1000))] | None = None


class Done(BaseModel):
    exitCode: int = Field(description="128 and the signal's number after one; 124 out of time")
    stdout: str
    stderr: str
    signal: str | None
    timedOut: bool
    truncated: bool


class NewFiles(_Strict):
    files: dict[str, str] = Field(min_length=1, max_length=256)


class NewDirectory(_Strict):
    path: str = Field(max_length=4096)


class Renaming(_Strict):
    oldPath: str = Field(max_length=4096)
    newPath: str = Field(max_length=4096)


class Content(BaseModel):
    path: str
    content: str


class Entry(BaseModel):
    name: str
    path: str
    type: str | None = None
    size: int | None = None
    mode: int | None = None
    permissions: str | None = None
    modifiedTime: str | None = None
    symlinkTarget: str | None = None


def router(daemon: Daemon) -> APIRouter:
    routes = APIRouter()
    routes.include_router(_tokens(daemon, "/v1"))
    routes.include_router(_tokens(daemon, "/nextjs/v1"))
    routes.include_router(_sandboxes(daemon))
    routes.include_router(_files(daemon))
    routes.include_router(_not_offered())
    return routes


def _tokens(daemon: Daemon, base: str) -> APIRouter:
    routes = APIRouter(prefix=base, tags=["tokens"], responses=ERRORS)

    @routes.post("/tokens", status_code=201, summary="Exchange an API key for a short-lived token")
    async def create_token(caller: Caller, body: Annotated[NewToken, Body()]) -> Token:
        params: dict[str, Any] = {"expires_in": body.expiresIn}
        if body.agents is not None:
            params["agents"] = body.agents
        if body.userId is not None:
            params["subject"] = body.userId
        made = await perform(daemon, caller, "tokens.create", params)
        return Token(token=made["token"], expiresAt=made["expires_at"])

    return routes


def _sandboxes(daemon: Daemon) -> APIRouter:
    routes = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"], responses=ERRORS)

    @routes.post("", summary="Start a session of an agent in the background")
    async def create(
        request: Request, caller: Caller, body: Annotated[NewSandbox, Body()]
    ) -> Sandbox:
        sandboxes.check_network(
            daemon, caller, body.agent, body.networkAllowOut or (), body.networkDenyOut or ()
        )

        async def start() -> str:
            return await sandboxes.start(
                daemon,
                caller,
                agent=body.agent,
                environment=body.envs or {},
                files=body.files or {},
                setup=body.setup or (),
                lifetime=None if body.timeoutMs is None else body.timeoutMs / 1000,
            )

        detail = await _show(daemon, caller, await attended(request, start))
        return Sandbox(**detail.model_dump(include=set(Sandbox.model_fields)))

    @routes.get("/{id}", summary="A sandbox, running or ended")
    async def get(caller: Caller, id: str) -> SandboxDetail:
        return await _show(daemon, caller, id)

    @routes.delete("/{id}", status_code=204, summary="Stop it, and everything that runs in it")
    async def delete(caller: Caller, id: str) -> Response:
        try:
            await perform(daemon, caller, "session.stop", {"id": id})
        except NotFound:
            await _show(daemon, caller, id)  # ended already: as good, if it ever was
        return Response(status_code=204)

    @routes.post("/{id}/exec", summary="Run a command line in the agent's own sandbox")
    async def exec(
        request: Request, caller: Caller, id: str, body: Annotated[Command, Body()]
    ) -> Done:
        async def run() -> dict[str, Any]:
            return await sandboxes.execute(
                daemon,
                caller,
                id,
                body.command,
                cwd=body.cwd,
                environment=body.envs or {},
                timeout=None if body.timeoutMs is None else body.timeoutMs / 1000,
            )

        return Done(**await attended(request, run))

    return routes


async def _show(daemon: Daemon, caller: Principal, id: str) -> SandboxDetail:
    row = await perform(daemon, caller, "session.show", {"id": id})
    agent = daemon.config.agents.get(row["agent"])
    if agent is not None and agent.team != row["team"]:
        agent = None  # it moved since, and what it is there is not this team's to read
    return SandboxDetail(
        id=row["id"],
        sandboxId=row["id"],
        status=sandboxes.status_of(row),
        error=sandboxes.error_of(row),
        agent=AgentOf(slug=row["agent"], name=agent.description if agent else row["agent"]),
        threads=[],
        createdAt=row["started_at"],
        updatedAt=row["ended_at"] or row["started_at"],
    )


def _files(daemon: Daemon) -> APIRouter:
    routes = APIRouter(prefix="/v1/sandboxes/{id}/files", tags=["files"], responses=ERRORS)

    async def ask(caller: Principal, method: str, id: str, **params: Any) -> Any:
        return await perform(daemon, caller, f"session.files.{method}", {"id": id, **params})

    @routes.post("", status_code=204, summary="Write text files into the workspace")
    async def write(caller: Caller, id: str, body: Annotated[NewFiles, Body()]) -> Response:
        rows = [{"path": path, "content": text} for path, text in body.files.items()]
        await ask(caller, "write", id, files=rows)
        return Response(status_code=204)

    @routes.get("", summary="Read a text file")
    async def read(caller: Caller, id: str, path: _Path) -> Content:
        got = await ask(caller, "read", id, path=path)
        return Content(path=path, content=got["content"])

    @routes.delete("", status_code=204, summary="Remove a file, or a directory with all in it")
    async def remove(caller: Caller, id: str, path: _Path) -> Response:
        await ask(caller, "remove", id, path=path, recursive=True)
        return Response(status_code=204)

    @routes.get("/list", response_model_exclude_none=True, summary="What a directory holds")
    async def list_(
        caller: Caller, id: str, path: _Path, depth: Annotated[int, Query(ge=1, le=32)] = 1
    ) -> list[Entry]:
        got = await ask(caller, "list", id, path=path, depth=depth)
        return [Entry(**sandboxes.entry_of(entry)) for entry in got["entries"]]

    @routes.get("/info", response_model_exclude_none=True, summary="One file or directory")
    async def info(caller: Caller, id: str, path: _Path) -> Entry:
        return Entry(**sandboxes.entry_of(await ask(caller, "info", id, path=path)))

    @routes.get("/exists", summary="Whether something is there")
    async def exists(caller: Caller, id: str, path: _Path) -> bool:
        return bool((await ask(caller, "exists", id, path=path))["exists"])

    @routes.post("/mkdir", summary="Make a directory; false where it is there already")
    async def mkdir(caller: Caller, id: str, body: Annotated[NewDirectory, Body()]) -> bool:
        return bool((await ask(caller, "mkdir", id, path=body.path))["created"])

    @routes.post("/rename", response_model_exclude_none=True, summary="Rename or move")
    async def rename(caller: Caller, id: str, body: Annotated[Renaming, Body()]) -> Entry:
        await ask(caller, "rename", id, old=body.oldPath, new=body.newPath)
        return Entry(**sandboxes.entry_of(await ask(caller, "info", id, path=body.newPath)))

    return routes


def _not_offered() -> APIRouter:
    """What the SDK can call and sandboxd does not have, said so instead of just 'not found'."""
    routes = APIRouter(prefix="/v1", include_in_schema=False)
    every = ["GET", "POST", "DELETE"]

    @routes.api_route("/sandboxes/{id}/threads", methods=every)
    @routes.api_route("/sandboxes/{id}/threads/{thread}", methods=every)
    @routes.api_route("/chat/{agent}", methods=every)
    @routes.api_route("/chat/{agent}/{rest:path}", methods=every)
    async def threads(caller: Caller) -> None:
        raise Refusal(
            501,
            "not_offered",
            "sandboxd has no threads: an agent is a program that runs as long as its sandbox; "
            "speak to it through files, exec and its tools",
        )

    @routes.api_route("/sandboxes/{id}/git/clone", methods=every)
    async def clone(caller: Caller) -> None:
        raise Refusal(501, "not_offered", "clone with sandboxes.exec, as the SDK advises, too")

    return routes
