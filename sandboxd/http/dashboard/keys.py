"""The tab *API keys*: made and shown once, rotated, deactivated with what that stops."""

from __future__ import annotations

from typing import Any

from starlette.responses import RedirectResponse, Response

from sandboxd.errors import Conflict
from sandboxd.http.dashboard.asking import Ask, Tabs, is_fragment
from sandboxd.http.dashboard.render import count

__all__ = ["add"]


def add(tabs: Tabs) -> None:
    tabs.get("/keys")(list_)
    tabs.post("/keys")(create)
    tabs.get("/keys/{id}/deactivate")(ask_to_deactivate)
    tabs.post("/keys/{id}/deactivate")(deactivate)
    tabs.get("/keys/{id}/rotate")(ask_to_rotate)
    tabs.post("/keys/{id}/rotate")(rotate)


async def list_(ask: Ask) -> Response:
    found = (await ask("keys.list"))["keys"]
    return ask.html(
        "keys.html",
        tab="keys",
        active=[key for key in found if key["state"] == "active"],
        old=[key for key in found if key["state"] != "active"],
        agents=[row["slug"] for row in (await ask("agents.list"))["agents"]],
    )


async def create(ask: Ask) -> Response:
    agents = [word for word in ask.form.text("agents").replace(",", " ").split() if word]
    expires = ask.form.text("expires")
    got = await ask(
        "keys.create",
        label=ask.form.text("label"),
        role=ask.form.text("role"),
        **({"agents": agents} if agents else {}),
        **({"expires_in": expires} if expires else {}),
    )
    return _made(ask, got)


async def ask_to_rotate(ask: Ask) -> Response:
    return ask.html("rotate.html", tab="keys", key=await _managed(ask))


async def rotate(ask: Ask) -> Response:
    got = await ask(
        "keys.rotate", key=ask.request.path_params["id"], overlap=ask.form.text("overlap")
    )
    return _made(ask, got, got["replaced"]["expires_at"])


async def ask_to_deactivate(ask: Ask) -> Response:
    key = await _managed(ask)
    if key["state"] != "active":
        raise Conflict(f"this key is {key['state']}")
    live = {row["id"]: row for row in (await ask("session.list"))["sessions"]}
    return ask.html(
        "deactivate.html",
        tab="keys",
        key=key,
        sessions=[live[id] for id in key["sessions"] if id in live],
    )


async def deactivate(ask: Ask) -> Response:
    got = await ask("keys.deactivate", key=ask.request.path_params["id"])
    if got["key"]["id"] == ask.principal.key:
        return RedirectResponse("/sign-in?over=1", status_code=303)
    ended = got["ended_sessions"]
    ask.tell(
        f"{got['key']['label']} is deactivated. {count(len(ended), 'session')} that depended on it "
        f"ended{': ' + ', '.join(ended) if ended else ''}."
    )
    return ask.go("/keys")


async def _managed(ask: Ask) -> dict[str, Any]:
    """The key, for who may change it: nobody else is asked whether to."""
    ask.need("keys.manage")
    found: dict[str, Any] = await ask("keys.show", key=ask.request.path_params["id"])
    return found


def _made(ask: Ask, got: dict[str, Any], rotated: str | None = None) -> Response:
    """The new key, in this answer and nowhere else: it is in no address and in no history."""
    return ask.html(
        "_made.html" if is_fragment(ask.request) else "made.html",
        tab="keys",
        key=got["key"],
        secret=got["secret"],
        rotated=rotated,
    )
