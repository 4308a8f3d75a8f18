"""One request of a signed-in page: who asks, what the form says, and the answer in HTML.

What a tab shows and does goes through :meth:`Ask.__call__`, which is the admin method of that name
with the page's principal: permission and team are decided there, not here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from sandboxd.access.pages import Page, Pages, room_for_one_more, same
from sandboxd.access.roles import Permission, Principal
from sandboxd.admin.perform import perform, stream
from sandboxd.errors import (
    Conflict,
    Denied,
    Invalid,
    NotFound,
    SandboxdError,
    Unauthenticated,
    Unavailable,
)
from sandboxd.http.dashboard.render import render
from sandboxd.running import Daemon

__all__ = ["Ask", "Form", "Tabs", "cookie_of", "is_fragment", "read_form", "refuse_foreign"]

#: Bytes of a form: a .env file of 512 KB in base64, and the rest.
MAX_FORM = 1 << 20
_FIELDS = 100

#: Nothing inline, nothing from elsewhere, no frame around it. Trusted Types would be the next
#: step; htmx writes answers as HTML.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Not no-referrer: with that, browsers send forms with "Origin: null" (Fetch, 3.2).
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Dashboard": "1",
    "X-Frame-Options": "DENY",
}
_STATUS: Mapping[type[SandboxdError], int] = {
    Invalid: 400,
    Denied: 403,
    NotFound: 404,
    Conflict: 409,
    Unavailable: 503,
}


class Form(dict[str, str]):
    """A form's fields, the last where one is there twice. Some are secret: it doesn't show them."""

    def __repr__(self) -> str:
        return f"<form of {len(self)} fields>"

    __str__ = __repr__

    def text(self, name: str) -> str:
        return self.get(name, "").strip()


@dataclass
class Ask:
    """What a tab's handler gets."""

    daemon: Daemon
    pages: Pages
    page: Page
    request: Request
    #: What the tabs keep for all pages.
    shared: dict[str, Any]
    form: Form = field(default_factory=Form)

    @property
    def principal(self) -> Principal:
        return self.page.principal

    async def __call__(self, method: str, /, **params: Any) -> Any:
        """The admin method's result. Raises what it raises, Denied and NotFound first of all."""
        return await perform(self.daemon, self.principal, method, params)

    async def items(self, method: str, /, **params: Any) -> list[Any]:
        """What a streaming admin method sends, to its end."""
        async with aclosing(stream(self.daemon, self.principal, method, params)) as items:
            return [item async for item in items]

    def may(self, permission: Permission) -> bool:
        return self.principal.may(permission)

    def need(self, permission: Permission) -> None:
        """Raise Denied before anything is said about what was asked. The gate would, later."""
        if not self.may(permission):
            raise Denied(f"the role {self.principal.role} may not do this")

    def query(self, name: str) -> str:
        return self.request.query_params.get(name, "").strip()

    def tell(self, message: str, kind: str = "done") -> None:
        """Show a message on the page that comes next."""
        told = self.page.memory.setdefault("told", [])
        told.append((kind, message))
        del told[:-5]

    def html(self, template: str, /, status: int = 200, **values: Any) -> Response:
        whole = not is_fragment(self.request)
        return HTMLResponse(
            render(
                template,
                ask=self,
                principal=self.principal,
                may=self.may,
                csrf=self.page.csrf,
                told=self.page.memory.pop("told", []) if whole else [],
                **values,
            ),
            status_code=status,
        )

    def go(self, path: str) -> Response:
        """Answer a form that did its work: the browser gets the page anew, with GET."""
        if is_fragment(self.request):
            return Response(status_code=200, headers={"HX-Redirect": path})
        return RedirectResponse(path, status_code=303)


Handler = Callable[[Ask], Awaitable[Response]]
Open = Callable[[Request], Awaitable[Response]]


class Tabs:
    """The routes of signed-in pages."""

    def __init__(self, daemon: Daemon, pages: Pages) -> None:
        self.router = APIRouter()
        self._daemon, self._pages = daemon, pages
        self._shared: dict[str, Any] = {}

    def get(self, path: str) -> Callable[[Handler], Handler]:
        return self._add(path, "GET")

    def post(self, path: str) -> Callable[[Handler], Handler]:
        return self._add(path, "POST")

    def open(self, path: str, method: str, handler: Open) -> None:
        """A route for who isn't signed in."""

        async def endpoint(request: Request) -> Response:
            response = await handler(request)
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        self.router.add_api_route(
            path, endpoint, methods=[method], include_in_schema=False, response_model=None
        )

    def _add(self, path: str, method: str) -> Callable[[Handler], Handler]:
        def add(handler: Handler) -> Handler:
            async def endpoint(request: Request) -> Response:
                return await self._admit(request, handler)

            self.open(path, method, endpoint)
            return handler

        return add

    async def _admit(self, request: Request, handler: Handler) -> Response:
        """Find the page, and serve it for as long as its API key is valid and no longer."""
        token = request.cookies.get(cookie_of(request), "")
        page = self._pages.find(token, used="x-live" not in request.headers)
        if page is None:
            return _sign_in_first(request)
        try:
            with self._daemon.access.held(page.principal):
                return await self._serve(request, page, handler)
        except Unauthenticated:
            self._pages.close(token)
        return _sign_in_first(request)

    async def _serve(self, request: Request, page: Page, handler: Handler) -> Response:
        ask = Ask(self._daemon, self._pages, page, request, self._shared)
        if not room_for_one_more(page):
            busy = Unavailable("this page has too many requests under way", hint="wait a moment")
            return _problem(ask, busy, 429)
        page.running += 1
        try:
            if request.method == "POST":
                refuse_foreign(request)
                ask.form = await read_form(request)
                sent = request.headers.get("x-csrf-token") or ask.form.get("csrf", "")
                if not same(sent, page.csrf):
                    raise Denied(
                        "the form does not come from this page",
                        hint="load the page again, then repeat what you did",
                    )
            return await handler(ask)
        except SandboxdError as error:
            return _problem(ask, error, _STATUS.get(type(error), 500))
        finally:
            page.running -= 1


async def read_form(request: Request) -> Form:
    """The fields of an urlencoded form. Raises Invalid for anything else, quoting none of it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Invalid("a form is sent as application/x-www-form-urlencoded")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_FORM:
                raise Invalid(f"a form may have {MAX_FORM:,} bytes")
    except ClientDisconnect:
        raise Invalid("the form did not arrive whole") from None
    fields: list[tuple[str, str]] | None
    try:
        fields = parse_qsl(
            bytes(body).decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_FIELDS,
        )
    except ValueError:
        fields = None
    if fields is None:  # not in the handler: a chained error holds the text
        raise Invalid("the form can't be read")
    return Form(fields)


def refuse_foreign(request: Request) -> None:
    """Raise Denied unless a page of ours sent this.

    ``Origin`` is what no script can set (Fetch, 2.2.2), and every browser sends it with POST; the
    host was compared with the allowed ones before.
    """
    origin = request.headers.get("origin", "")
    site = request.headers.get("sec-fetch-site", "same-origin")
    if site != "same-origin" or urlsplit(origin).netloc != request.headers.get("host", ""):
        raise Denied(
            "the form does not come from this page",
            hint="open the dashboard itself and repeat what you did",
        )


def is_fragment(request: Request) -> bool:
    """Whether the page's script asks, for a part of the page."""
    return "hx-request" in request.headers


def cookie_of(request: Request) -> str:
    """The cookie's name. Cookies don't tell ports apart, so that the name has to.

    Over TLS the prefix keeps other hosts from setting it (RFC 6265bis, 4.1.3.2).
    """
    host = request.headers.get("host", "")
    tail = hashlib.sha256(host.encode()).hexdigest()[:8]
    return f"{'__Host-' if request.url.scheme == 'https' else ''}sandboxd-{tail}"


def _sign_in_first(request: Request) -> Response:
    if is_fragment(request):
        return Response(status_code=401, headers={"HX-Redirect": "/sign-in?over=1"})
    # What was asked for is not kept: a path in the address would be somebody's to choose.
    return RedirectResponse("/sign-in", status_code=303)


def _problem(ask: Ask, error: SandboxdError, status: int) -> Response:
    template = "_problem.html" if is_fragment(ask.request) else "problem.html"
    return ask.html(template, status=status, error=error, tab="")
