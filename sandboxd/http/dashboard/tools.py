"""The tab *Tools and policies*: what each agent may do, what each tool is, and why."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from sandboxd.errors import Invalid
from sandboxd.http.dashboard.asking import Ask, Tabs

__all__ = ["add"]


def add(tabs: Tabs) -> None:
    tabs.get("/tools")(list_)
    tabs.post("/tools/explain")(explain)
    tabs.get("/tools/{name}")(show)


async def list_(ask: Ask) -> Response:
    tools = (await ask("tools.list"))["tools"]
    found = (await ask("policy.outlook"))["outlook"]
    agents = {row["slug"]: row for row in (await ask("agents.list"))["agents"]}
    return ask.html(
        "tools.html",
        tab="tools",
        tools=tools,
        outlook={slug: rows for slug, rows in sorted(found.items()) if slug in agents},
        agents=agents,
        agent=ask.query("agent"),
        tool=ask.query("tool"),
        explained=None,
        arguments="{}",
    )


async def show(ask: Ask) -> Response:
    tool = await ask("tools.show", tool=ask.request.path_params["name"])
    return ask.html("tool.html", tab="tools", tool=tool)


async def explain(ask: Ask) -> Response:
    agent, tool, text = (ask.form.text(name) for name in ("agent", "tool", "arguments"))
    got = await ask("policy.explain", agent=agent, tool=tool, arguments=_arguments(text or "{}"))
    return ask.html("_explained.html", got=got, tool=tool)


def _arguments(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Invalid("the arguments have the same key twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise Invalid("the arguments are nested too deeply") from None
    except ValueError as error:
        raise Invalid(
            f"the arguments are not valid JSON: {error}",
            hint='like {"url": "https://example.com/"}',
        ) from None
