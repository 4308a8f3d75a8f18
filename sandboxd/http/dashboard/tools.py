"""The tab *Tools and policies*: what each agent may do, what each tool is, and why."""

from __future__ import annotations

from starlette.responses import Response

from sandboxd.admin.protocol import read_arguments
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
    given = read_arguments(text or "{}", 'like {"url": "https://example.com/"}')
    got = await ask("policy.explain", agent=agent, tool=tool, arguments=given)
    return ask.html("_explained.html", got=got, tool=tool)
