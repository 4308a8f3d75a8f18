"""For every HTTP route a request about the walk's target, as walk_cases has for every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mcp_http_parts import Wire
from walk_cases import OPERATE, OWN, READ_SESSIONS, RUN, VIEW, WRITE, Case
from walk_world import GHOST, Names, World

_MCP = ("GET", "POST", "DELETE")
_EVERY = ("GET", "POST", "DELETE")


@dataclass(frozen=True)
class Route:
    """One case of one route. ``fill`` says which name stands for which part of its path."""

    case: Case
    fill: dict[str, str] = field(default_factory=dict)
    query: Callable[[World, Names], str] = lambda made, names: ""
    #: A page of the dashboard: a cookie and forms instead of a key and JSON.
    page: bool = False
    mcp: bool = False

    def ask(
        self, made: World, who: str, names: Names, method: str, template: str
    ) -> tuple[int, str]:
        words = {part: getattr(names, name) for part, name in self.fill.items()}
        path = template.replace(":path", "").format(**{"rest": "x", "thread": "t", **words})
        path += self.query(made, names)
        body = self.case.body(made, names)
        if self.page:
            return made.visit(who, method, path, body)
        if self.mcp:
            wire = Wire(path, "")
            body = json.loads(wire.body("tools/list"))
            wire.headers.pop("authorization")
            headers = {**wire.headers, **wire.routed("tools/list", {})}
            return made.ask(who, method, path, body=body, headers=headers)
        return made.ask(who, method, path, body=body or None)


def _body(**values: Any) -> Callable[[World, Names], Any]:
    return lambda made, names: values


def _agent(allowed: frozenset[str], slug: str = "slug", **more: Any) -> Route:
    return Route(Case("one", allowed, **more), {slug: "agent"})


def _sandbox(**more: Any) -> Route:
    query = more.pop("query", lambda made, names: "")
    more.setdefault("status", (200, 204))
    return Route(Case("one", RUN, users=True, **more), {"id": "live"}, query)


def _page(
    kind: Any, allowed: frozenset[str], fill: dict[str, str] | None = None, **more: Any
) -> Route:
    more.setdefault("status", (200,))
    return Route(Case(kind, allowed, **more), fill or {}, page=True)


def _digest(made: World, names: Names) -> Any:
    """The form that denies what was shown."""
    if names == GHOST:
        return {"answer": "deny", "digest": "0" * 64, "reason": "the walk"}
    shown = made.daemon.call("approvals.show", id=names.call)["digest"]
    return {"answer": "deny", "digest": shown, "reason": "the walk"}


_PATH = lambda made, names: f"?path={names.file}"  # noqa: E731

#: By method and path, exactly as the application's table has them.
ROUTES: dict[tuple[str, str], tuple[Route, ...]] = {
    # -- for everybody
    ("GET", "/openapi.json"): (Route(Case("open", READ_SESSIONS)),),
    ("GET", "/healthz"): (Route(Case("open", READ_SESSIONS)),),
    ("GET", "/.well-known/jwks.json"): (Route(Case("open", READ_SESSIONS)),),
    # -- what the SDK calls
    **{
        ("POST", f"{base}/tokens"): (
            Route(
                Case("one", OPERATE, lambda made, names: {"agents": [names.agent]}, status=(201,))
            ),
        )
        for base in ("/v1", "/nextjs/v1")
    },
    ("POST", "/v1/sandboxes"): (
        Route(Case("one", RUN, lambda made, names: {"agent": names.agent})),
    ),
    ("GET", "/v1/sandboxes/{id}"): (
        Route(Case("one", READ_SESSIONS, users=True), {"id": "live"}),
        Route(Case("one", READ_SESSIONS, users=True), {"id": "ended"}),
        Route(Case("one", READ_SESSIONS, users=True), {"id": "short"}),
    ),
    ("DELETE", "/v1/sandboxes/{id}"): (_sandbox(ends="live"),),
    ("POST", "/v1/sandboxes/{id}/exec"): (_sandbox(body=_body(command="true")),),
    ("POST", "/v1/sandboxes/{id}/files"): (_sandbox(body=_body(files={"sent": "x"})),),
    ("GET", "/v1/sandboxes/{id}/files"): (_sandbox(query=_PATH),),
    ("DELETE", "/v1/sandboxes/{id}/files"): (_sandbox(query=_PATH, ends="file"),),
    ("GET", "/v1/sandboxes/{id}/files/list"): (
        _sandbox(query=lambda made, names: "?path=/workspace"),
    ),
    ("GET", "/v1/sandboxes/{id}/files/info"): (_sandbox(query=_PATH),),
    ("GET", "/v1/sandboxes/{id}/files/exists"): (_sandbox(query=_PATH),),
    ("POST", "/v1/sandboxes/{id}/files/mkdir"): (_sandbox(body=_body(path="made")),),
    ("POST", "/v1/sandboxes/{id}/files/rename"): (
        _sandbox(body=lambda made, names: {"oldPath": names.file, "newPath": "moved"}, ends="file"),
    ),
    **{
        (method, path): (Route(Case("own", READ_SESSIONS, status=(501,)), {part: name}),)
        for method in _EVERY
        for path, part, name in (
            ("/v1/chat/{agent}", "agent", "agent"),
            ("/v1/chat/{agent}/{rest:path}", "agent", "agent"),
            ("/v1/sandboxes/{id}/threads", "id", "live"),
            ("/v1/sandboxes/{id}/threads/{thread}", "id", "live"),
            ("/v1/sandboxes/{id}/git/clone", "id", "live"),
        )
    },
    # -- what the command line calls
    ("GET", "/api/v1/me"): (Route(Case("own", READ_SESSIONS)),),
    ("GET", "/api/v1/agents"): (Route(Case("list", READ_SESSIONS)),),
    ("GET", "/api/v1/agents/{slug}"): (_agent(READ_SESSIONS),),
    ("DELETE", "/api/v1/agents/{slug}"): (_agent(OWN, ends="agent"),),
    ("GET", "/api/v1/agents/{slug}/env"): (_agent(VIEW),),
    ("PUT", "/api/v1/agents/{slug}/env"): (
        _agent(WRITE, body=_body(key="RED_VARIABLE", value="a-value-of-the-walk")),
    ),
    ("DELETE", "/api/v1/agents/{slug}/env"): (
        _agent(WRITE, body=_body(key="RED_VARIABLE"), ends="variable"),
    ),
    ("GET", "/api/v1/agents/{slug}/logs"): (_agent(READ_SESSIONS),),
    ("GET", "/api/v1/agents/{slug}/logs/{id}"): (
        Route(Case("one", READ_SESSIONS, users=True), {"slug": "agent", "id": "ended"}),
        Route(Case("one", READ_SESSIONS, users=True), {"slug": "agent", "id": "live"}),
    ),
    # -- MCP
    **{
        (method, "/mcp/{agent}"): (
            Route(Case("one", RUN, status=status), {"agent": "agent"}, mcp=True),
            Route(
                Case("one", RUN, users=True, status=status),
                {"agent": "agent"},
                lambda made, names: f"?session={names.live}",
                mcp=True,
            ),
        )
        for method, status in (("POST", (200,)), ("GET", (405,)), ("DELETE", (400, 404, 405)))
    },
    **{
        (method, "/mcp"): (
            Route(
                Case("one", RUN, users=True, status=status),
                {},
                lambda made, names: f"?session={names.live}",
                mcp=True,
            ),
        )
        for method, status in (("POST", (200,)), ("GET", (405,)), ("DELETE", (400, 404, 405)))
    },
    # -- the dashboard
    ("GET", "/sign-in"): (Route(Case("open", READ_SESSIONS)),),
    ("POST", "/sign-in"): (Route(Case("open", READ_SESSIONS)),),
    ("POST", "/sign-in/link"): (Route(Case("open", READ_SESSIONS)),),
    ("GET", "/static/{name}"): (Route(Case("open", READ_SESSIONS), {"name": "tool"}),),
    ("GET", "/"): (_page("own", VIEW, status=(303,)),),
    ("GET", "/environment"): (_page("list", VIEW, status=(200, 303)),),
    ("GET", "/environment/{agent}"): (_page("one", VIEW, {"agent": "agent"}),),
    ("POST", "/environment/{agent}/set"): (
        _page(
            "one",
            WRITE,
            {"agent": "agent"},
            body=_body(name="RED_VARIABLE", value="a-value-of-the-walk"),
            status=(303,),
        ),
    ),
    ("GET", "/environment/{agent}/remove/{name}"): (
        _page("one", VIEW, {"agent": "agent", "name": "variable"}),
    ),
    ("POST", "/environment/{agent}/remove/{name}"): (
        _page("one", WRITE, {"agent": "agent", "name": "variable"}, ends="variable", status=(303,)),
    ),
    ("POST", "/environment/{agent}/revoke/{name}"): (
        _page("one", WRITE, {"agent": "agent", "name": "variable"}, ends="variable", status=(303,)),
    ),
    ("POST", "/environment/{agent}/preview"): (
        _page("one", VIEW, {"agent": "agent"}, body=_body(text="RED_VARIABLE=a-value-of-it")),
    ),
    ("POST", "/environment/{agent}/import"): (
        _page(
            "one",
            WRITE,
            {"agent": "agent"},
            body=_body(text="RED_VARIABLE=a-value-of-it", previewed="as the preview has it"),
            status=(303,),
        ),
    ),
    ("GET", "/keys"): (_page("list", OPERATE),),
    ("POST", "/keys"): (
        _page(
            "one",
            OWN,
            body=lambda made, names: {"label": "x", "role": "viewer", "agents": names.agent},
        ),
    ),
    ("GET", "/keys/{id}/deactivate"): (_page("one", OWN, {"id": "key"}),),
    ("POST", "/keys/{id}/deactivate"): (
        _page("one", OWN, {"id": "key"}, ends="key", status=(303,)),
    ),
    ("GET", "/keys/{id}/rotate"): (_page("one", OWN, {"id": "key"}),),
    ("POST", "/keys/{id}/rotate"): (
        _page("one", OWN, {"id": "key"}, ends="key", body=_body(overlap="1h")),
    ),
    ("GET", "/sessions"): (_page("list", VIEW),),
    ("GET", "/sessions/live"): (_page("list", VIEW),),
    ("GET", "/sessions/ended"): (_page("list", VIEW),),
    ("GET", "/sessions/{id}"): (
        _page("one", VIEW, {"id": "live"}),
        _page("one", VIEW, {"id": "ended"}),
    ),
    ("GET", "/sessions/{id}/live"): (_page("one", VIEW, {"id": "live"}),),
    ("POST", "/sessions/{id}/stop"): (
        _page("one", OPERATE, {"id": "live"}, ends="live", status=(303,)),
    ),
    ("GET", "/calls"): (_page("list", VIEW),),
    ("GET", "/calls/live"): (_page("list", VIEW),),
    # Who finds no question is sent on to the call's records, and finds none there either.
    ("GET", "/calls/waiting/{id}"): (_page("one", VIEW, {"id": "call"}, gone=(303,)),),
    ("POST", "/calls/waiting/{id}"): (
        _page("one", OPERATE, {"id": "call"}, body=_digest, ends="call", status=(303,)),
    ),
    ("GET", "/calls/{id}"): (_page("one", VIEW, {"id": "call"}),),
    ("GET", "/tools"): (_page("list", VIEW),),
    ("POST", "/tools/explain"): (
        _page(
            "one",
            VIEW,
            body=lambda made, names: {"agent": names.agent, "tool": "x", "arguments": "{}"},
        ),
    ),
    ("GET", "/tools/{name}"): (_page("one", VIEW, {"name": "tool"}),),
    ("GET", "/audit"): (_page("list", VIEW),),
    ("GET", "/audit/live"): (_page("list", VIEW),),
    ("POST", "/audit/verify"): (_page("own", VIEW),),
    ("POST", "/sign-out"): (_page("own", VIEW, status=(303,)),),
}
