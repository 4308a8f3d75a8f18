"""Signing in and out, and the files that every page loads."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from sandboxd.access.pages import Pages
from sandboxd.access.roles import Principal
from sandboxd.errors import SandboxdError
from sandboxd.http.dashboard.asking import (
    Ask,
    Tabs,
    cookie_of,
    read_form,
    refuse_foreign,
)
from sandboxd.http.dashboard.render import STATIC, content, digest, render
from sandboxd.http.errors import Refusal
from sandboxd.running import Daemon

__all__ = ["add"]

_KEEP = "public, max-age=31536000, immutable"
_NOT_VALID = "This API key is not valid."
_LINK_OVER = "This link is not valid any more. It works once, and for two minutes."


def add(tabs: Tabs, daemon: Daemon, pages: Pages) -> None:
    async def form(request: Request) -> Response:
        if pages.find(request.cookies.get(cookie_of(request), ""), used=False) is not None:
            return RedirectResponse("/", status_code=303)
        message = ""
        if "over" in request.query_params:
            message = "You were signed out: the page's time was over, or its key is not valid now."
        elif "out" in request.query_params:
            message = "You are signed out."
        return _form(message=message)

    async def with_key(request: Request) -> Response:
        try:
            refuse_foreign(request)
            key = (await read_form(request)).text("key")
            guard = request.app.state.guard
            principal = await guard.authenticate(request.scope, key)
            return await enter(request, principal, "key")
        except Refusal as refusal:
            if refusal.status != 401:
                return _form(problem=refusal.message.capitalize() + ".", status=refusal.status)
            return _form(problem=_NOT_VALID, status=401)
        except SandboxdError as error:
            return _form(problem=_told(error), status=400)

    async def with_link(request: Request) -> Response:
        try:
            refuse_foreign(request)
            principal = pages.redeem((await read_form(request)).text("code"))
            if principal is None:
                return _form(problem=_LINK_OVER, status=401)
            return await enter(request, principal, "link")
        except SandboxdError as error:
            return _form(problem=_told(error), status=400)

    async def enter(request: Request, principal: Principal, way: str) -> Response:
        daemon.access.check(principal)
        old = request.cookies.get(cookie_of(request), "")
        token, _ = pages.open(principal)
        pages.close(old)  # another one's cookie is never taken over
        await daemon.audit.append(
            "dashboard.signed_in",
            by=principal.name,
            team=principal.team,
            role=principal.role,
            key=principal.key,
            way=way,
        )
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(
            cookie_of(request),
            token.reveal().decode(),
            path="/",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return response

    async def out(ask: Ask) -> Response:
        ask.pages.close(ask.request.cookies.get(cookie_of(ask.request), ""))
        await ask.daemon.audit.append(
            "dashboard.signed_out", by=ask.principal.name, team=ask.principal.team
        )
        response = RedirectResponse("/sign-in?out=1", status_code=303)
        response.delete_cookie(cookie_of(ask.request), path="/", httponly=True, samesite="strict")
        return response

    tabs.open("/sign-in", "GET", form)
    tabs.open("/sign-in", "POST", with_key)
    tabs.open("/sign-in/link", "POST", with_link)
    tabs.open("/static/{name}", "GET", _static)
    tabs.post("/sign-out")(out)


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in STATIC:
        return Response(status_code=404)
    asked = request.query_params.get("v", "")
    return Response(
        content(name),
        media_type=STATIC[name],
        headers={"Cache-Control": _KEEP if asked == digest(name)[:16] else "no-cache"},
    )


def _form(*, problem: str = "", message: str = "", status: int = 200) -> Response:
    return HTMLResponse(
        render("sign_in.html", problem=problem, message=message), status_code=status
    )


def _told(error: SandboxdError) -> str:
    return f"{error.message.capitalize()}." + (f" {error.hint.capitalize()}." if error.hint else "")
