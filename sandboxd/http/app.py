"""The application: every router, one guard around them, errors in their clients' forms."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from sandboxd import __version__
from sandboxd.errors import SandboxdError
from sandboxd.http import dashboard, mcp, routes_operator, routes_platform, routes_sdk
from sandboxd.http.attended import ClientLeft
from sandboxd.http.errors import Refusal, answer, refusal_of
from sandboxd.http.guard import Guard
from sandboxd.policy.model import HttpSettings
from sandboxd.running import Daemon

__all__ = ["make_app"]

#: Modules with ``router(daemon) -> APIRouter``, in the order in which their routes match.
ROUTERS = (
    routes_sdk,
    routes_platform,
    routes_operator,
    mcp,
    dashboard,
)

_TITLE = "sandboxd"
_ABOUT = (
    "Sandboxes for AI agents: sessions, files, commands and tools under policy, with secrets that "
    "no agent sees. Two base paths: /v1 is what @21st-sdk/node speaks, /api/v1 what the command "
    "line speaks."
)


def make_app(daemon: Daemon) -> FastAPI:
    """The whole HTTP API of one daemon, as an ASGI application.

    ``app.state.guard`` is the :class:`Guard`, for routes with a sign-in of their own.
    """
    settings = daemon.boot.settings.http or HttpSettings()
    app = FastAPI(
        title=_TITLE,
        description=_ABOUT,
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(SandboxdError, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientLeft, _left)
    app.add_exception_handler(Exception, _unexpected)

    @app.get("/healthz", tags=["server"], summary="Whether the daemon serves")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/.well-known/jwks.json", tags=["tokens"], summary="Keys that verify tokens")
    async def jwks() -> dict[str, Any]:
        return await daemon.access.jwks()

    for module in ROUTERS:
        app.include_router(module.router(daemon))
    _Guarded.install(app, daemon, settings)
    return app


class _Guarded:
    """The guard goes outside of everything, also of Starlette's own error handling."""

    @staticmethod
    def install(app: FastAPI, daemon: Daemon, settings: HttpSettings) -> None:
        build = app.build_middleware_stack

        def built() -> Any:
            guard = Guard(build(), daemon, settings)
            app.state.guard = guard
            return guard

        app.build_middleware_stack = built  # type: ignore[method-assign]
        app.middleware_stack = app.build_middleware_stack()


def _form(request: Request) -> str:
    """The path by whose form to answer."""
    form: str = request.scope["state"].get("form") or request.scope["path"]
    return form


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return answer(_form(request), error)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, SandboxdError)
    return answer(_form(request), refusal_of(error))


async def _invalid(request: Request, error: Exception) -> Response:
    """What the framework found wrong, by place and rule; what was sent is not quoted."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if any(problem["type"] == "json_invalid" for problem in problems):
        return answer(_form(request), Refusal(400, "invalid_json", "the body is not valid JSON"))
    found = "; ".join(
        f"{'.'.join(str(step) for step in problem['loc'][1:]) or problem['loc'][0]}: "
        f"{problem['msg'].removeprefix('Value error, ')}"
        for problem in problems[:5]
    )
    return answer(_form(request), Refusal(400, "validation_error", found))


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody gets it


async def _unexpected(request: Request, error: Exception) -> Response:
    """The framework raises the error again after this answer, and the server logs where it was."""
    internal = Refusal(500, "internal", "sandboxd failed at this: its log says where")
    return answer(_form(request), internal)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    messages = {404: "no such route", 405: "this route does not take this method"}
    status = error.status_code
    headers = dict(error.headers or {})
    if status == 405:
        headers = {"allow": ", ".join(_methods_of(request))}
    refusal = Refusal(
        status,
        codes.get(status, "bad_request" if status < 500 else "internal"),
        messages.get(status, "the request could not be read"),
        headers,
    )
    return answer(_form(request), refusal)


def _methods_of(request: Request) -> list[str]:
    """All methods that some route of this path takes; Starlette names the first route's alone."""
    asked = {"type": "http", "path": request.scope["path"], "root_path": ""}
    routes = request.app.routes
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(route.matches({**asked, "method": method})[0] is Match.FULL for route in routes)
    ]
