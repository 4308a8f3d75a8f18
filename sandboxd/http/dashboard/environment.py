"""The tab *Environment*: an agent's secret variables, by name and fingerprint."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.responses import Response

from sandboxd import dotenv
from sandboxd.errors import Conflict, Invalid
from sandboxd.http.dashboard.asking import Ask, Form, Tabs
from sandboxd.http.dashboard.render import count
from sandboxd.maskable import FEWEST, weakness
from sandboxd.names import loader_reason, variable_name, variable_value

__all__ = ["add"]


def add(tabs: Tabs) -> None:
    tabs.get("/")(home)
    tabs.get("/environment")(agents)
    tabs.get("/environment/{agent}")(agent)
    tabs.post("/environment/{agent}/set")(set_)
    tabs.get("/environment/{agent}/remove/{name}")(ask_to_remove)
    tabs.post("/environment/{agent}/remove/{name}")(remove)
    tabs.post("/environment/{agent}/revoke/{name}")(revoke)
    tabs.post("/environment/{agent}/preview")(preview)
    tabs.post("/environment/{agent}/import")(import_)


async def home(ask: Ask) -> Response:
    return ask.go("/environment")


async def agents(ask: Ask) -> Response:
    found = (await ask("agents.list"))["agents"]
    if len(found) == 1:
        return ask.go(_path(found[0]["slug"]))
    return ask.html("agents.html", tab="environment", agents=found)


async def agent(ask: Ask) -> Response:
    return await _page(ask)


async def _page(
    ask: Ask, *, name: str = "", error: Exception | None = None, status: int = 200
) -> Response:
    slug = ask.request.path_params["agent"]
    listed = await ask("env.list", agent=slug)
    tools = (await ask("tools.list", agent=slug))["tools"]
    users = _users(tools)
    rows = [
        {"held_by": [], **row, "tools": users.get(row["name"], [])} for row in listed["variables"]
    ]
    there = {row["name"] for row in rows}
    return ask.html(
        "environment.html",
        status=status,
        tab="environment",
        agent=slug,
        agents=[row["slug"] for row in (await ask("agents.list"))["agents"]],
        variables=rows,
        missing=[
            {"name": name, "tools": by} for name, by in sorted(users.items()) if name not in there
        ],
        name=name or ask.query("name"),
        error=error,
        fewest=FEWEST,
    )


async def set_(ask: Ask) -> Response:
    slug, form, name = ask.request.path_params["agent"], ask.form, ""
    try:
        name = _name(form.text("name"))
        value = variable_value(name, _value(form))
        got = await ask(
            "env.set",
            agent=slug,
            values={name: base64.b64encode(value).decode()},
            now="now" in form,
            force="force" in form,
        )
    except (Invalid, Conflict) as error:
        error.hint = error.hint.replace("--force", "allow it, below the value")
        # What is no name is not shown again: it may be the value, in the wrong field.
        return await _page(ask, name=name, error=error, status=400)
    _tell(ask, [f"{name} is set, version {got['versions'][name]}."], got, "now" in form)
    return ask.go(_path(slug))


async def ask_to_remove(ask: Ask) -> Response:
    slug, name = ask.request.path_params["agent"], ask.request.path_params["name"]
    listed = (await ask("env.list", agent=slug))["variables"]
    row = next((row for row in listed if row["name"] == name), None)
    if row is None:
        ask.tell("There is no such variable any more.", "warning")
        return ask.go(_path(slug))
    tools = (await ask("tools.list", agent=slug))["tools"]
    live = [s for s in (await ask("session.list"))["sessions"] if s["agent"] == slug]
    return ask.html(
        "remove.html",
        tab="environment",
        agent=slug,
        variable=row,
        tools=_users(tools).get(name, []),
        live=live,
    )


async def remove(ask: Ask) -> Response:
    slug, name = ask.request.path_params["agent"], ask.request.path_params["name"]
    now = "now" in ask.form
    got = await ask("env.remove", agent=slug, names=[name], now=now)
    _tell(ask, [f"{name} is removed."], got, now)
    return ask.go(_path(slug))


async def revoke(ask: Ask) -> Response:
    slug, name = ask.request.path_params["agent"], ask.request.path_params["name"]
    got = await ask("env.revoke", agent=slug, names=[name])
    ended = count(got["cancelled_calls"], "tool call")
    ask.tell(f"Live sessions lost the old value of {name}. {ended} that held it ended.")
    return ask.go(_path(slug))


async def preview(ask: Ask) -> Response:
    """What an import would do. Nothing of the file is kept: the browser sends it again."""
    slug = ask.request.path_params["agent"]
    data = _file(ask.form)
    entries, problems = dotenv.parse(data)
    known = {v["name"]: v["version"] for v in (await ask("env.list", agent=slug))["variables"]}
    users = _users((await ask("tools.list", agent=slug))["tools"])
    return ask.html(
        "_preview.html",
        agent=slug,
        problems=problems,
        rows=[
            {
                "line": entry.line,
                "name": entry.name,
                "size": len(entry.value),
                "replaces": known.get(entry.name),
                "weakness": weakness(entry.value) if entry.value else "",
                "tools": users.get(entry.name, []),
            }
            for entry in entries
        ],
        digest=_digest(ask, data),
    )


async def import_(ask: Ask) -> Response:
    slug, form = ask.request.path_params["agent"], ask.form
    ask.need("env.write")
    data = _file(form)
    if form.text("previewed") != _digest(ask, data):
        raise Conflict("this is not what the preview showed", hint="look at the preview again")
    entries, problems = dotenv.parse(data)
    if problems or not entries:
        raise Invalid("nothing was set: the file has mistakes, or sets no variable")
    got = await ask(
        "env.set",
        agent=slug,
        values={entry.name: base64.b64encode(entry.value).decode() for entry in entries},
        now="now" in form,
        force="force" in form,
    )
    names = ", ".join(sorted(got["versions"]))
    _tell(ask, [f"{count(len(entries), 'variable')} set: {names}."], got, "now" in form)
    return ask.go(_path(slug))


def _tell(ask: Ask, said: list[str], got: Mapping[str, Any], now: bool) -> None:
    """What happened, and when it counts."""
    live = got.get("live_sessions") or []
    if now:
        ended = count(got["cancelled_calls"], "tool call")
        said.append(f"In force now: live sessions lost the old value, and {ended} ended.")
    elif "warnings" in got:
        said.append(f"It takes effect on the next session of {got['agent']}.")
    if live and not now:
        kept = "keeps the old value until it ends" if len(live) == 1 else "keep the old one"
        said.append(f"{count(len(live), 'live session')} {kept}.")
    ask.tell(" ".join(said))
    for warning in got.get("warnings", ()):
        ask.tell(f"Note: {warning}.", "warning")


def _users(tools: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Which tools are given each variable."""
    users: dict[str, list[str]] = {}
    for tool in tools:
        for name in tool["secrets"]:
            users.setdefault(name, []).append(tool["name"])
    return users


def _name(text: str) -> str:
    try:
        name = variable_name(text)
    except Invalid as error:  # what stands there may be a value
        hint = error.hint
    else:
        if reason := loader_reason(name):
            raise Invalid(f"{name} is refused: {reason}")
        return name
    raise Invalid("this is not a variable name", hint=hint)


def _value(form: Form) -> bytes:
    """What was typed. A browser sends lines with CR LF, whatever was typed.

    A single line loses its final newline, which is pasted along and nobody means.
    """
    text = form.get("value", "").replace("\r\n", "\n")
    line = text.removesuffix("\n")
    if "\n" not in line:
        text = line
    if not text:
        raise Invalid(
            "the value is empty", hint="to set an empty one on purpose: sandboxctl env set"
        )
    return text.encode()


def _file(form: Form) -> bytes:
    data = _decoded(form["file"]) if form.get("file") else form.get("text", "").encode()
    if not data.strip():
        raise Invalid("choose a file, or paste its lines")
    return data


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        pass
    raise Invalid("the file did not arrive whole", hint="choose it again")


def _digest(ask: Ask, data: bytes) -> str:
    """Of a file as this page sent it; without the page's own key it would tell of the values."""
    return hashlib.blake2b(data, key=ask.page.csrf.encode(), digest_size=32).hexdigest()


def _path(slug: str) -> str:
    return f"/environment/{quote(slug, safe='')}"
