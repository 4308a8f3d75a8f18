"""The tab *Calls*: what agents asked for and what became of it; approve or deny what waits."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlencode

from starlette.responses import Response

from sandboxd import visible
from sandboxd.errors import Conflict, Invalid, NotFound
from sandboxd.http.dashboard.asking import Ask, Tabs
from sandboxd.http.dashboard.feed import OUTCOMES, calls_of, records_of, rows_of

__all__ = ["add"]

#: Lines of arguments that are shown unless all are asked for.
MAX_LINES = 200
_ANSWERS = {"approve": "once", "approve_session": "session", "deny": "once"}


def add(tabs: Tabs) -> None:
    tabs.get("/calls")(list_)
    tabs.get("/calls/live")(live)
    tabs.get("/calls/waiting/{id}")(question)
    tabs.post("/calls/waiting/{id}")(answer)
    tabs.get("/calls/{id}")(show)


async def list_(ask: Ask) -> Response:
    agents = [row["slug"] for row in (await ask("agents.list"))["agents"]]
    return ask.html(
        "calls.html", tab="calls", agents=agents, outcomes=OUTCOMES, **await _listed(ask)
    )


async def live(ask: Ask) -> Response:
    return ask.html("_calls.html", **await _listed(ask))


async def _listed(ask: Ask) -> dict[str, Any]:
    chosen = {name: ask.query(name) for name in ("agent", "tool", "outcome", "session")}
    if chosen["outcome"] not in OUTCOMES:
        chosen["outcome"] = ""
    waiting = (await ask("approvals.list"))["approvals"]
    return {
        "waiting": waiting,
        "calls": await calls_of(ask, **chosen),
        "chosen": chosen,
        "query": urlencode({name: value for name, value in chosen.items() if value}),
    }


async def show(ask: Ask) -> Response:
    """Every record of one call."""
    id = ask.request.path_params["id"]
    records = [record for record in await records_of(ask) if record.get("call") == id]
    rows = rows_of(records)
    if not rows:
        raise NotFound("no such call among the newest", hint="older ones: sandboxctl audit tail")
    return ask.html("call.html", tab="calls", call=rows[0], records=records)


async def question(ask: Ask) -> Response:
    id = ask.request.path_params["id"]
    try:
        asked = await ask("approvals.show", id=id)
    except (NotFound, Conflict):
        # It was answered, by whom is in its records.
        ask.tell("This call does not wait any more.", "warning")
        return ask.go(f"/calls/{quote(id, safe='')}")
    full = ask.query("full") == "1"
    limit = None if full else visible.MAX_TEXT
    return ask.html(
        "waiting.html",
        tab="calls",
        asked=asked,
        full=full,
        arguments=_cut(visible.json_lines(asked["arguments"], limit=limit), full),
        argv=_cut(visible.json_lines(asked["argv"], limit=limit), full) if asked["argv"] else None,
    )


async def answer(ask: Ask) -> Response:
    """The answer holds for exactly what was shown: its digest comes along."""
    id, chosen = ask.request.path_params["id"], ask.form.text("answer")
    if chosen not in _ANSWERS or not ask.form.text("digest"):
        raise Invalid("the answer is approve or deny, for the digest that was shown")
    told = {"reason": ask.form.text("reason")} if chosen == "deny" else {}
    got = await ask(
        "approvals.deny" if chosen == "deny" else "approvals.approve",
        id=id,
        digest=ask.form.text("digest"),
        scope=_ANSWERS[chosen],
        **told,
    )
    how = " for this session" if got["scope"] == "session" else ""
    ask.tell(f"{got['tool']} of {got['agent']} is {got['outcome']}{how}.")
    return ask.go("/calls")


def _cut(lines: Any, full: bool) -> dict[str, Any]:
    found = list(lines)
    shown = found if full else found[:MAX_LINES]
    return {"lines": shown, "left": len(found) - len(shown)}
