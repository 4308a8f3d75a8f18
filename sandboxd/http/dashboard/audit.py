"""The tab *Audit*: the team's records, and whether the log is whole."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from starlette.responses import Response

from sandboxd.http.dashboard.asking import Ask, Tabs

__all__ = ["add"]

#: Records that are searched, and records on a page.
_SEARCHED, _SHOWN = 10_000, 100
#: Fields with a column of their own, and those that only the verification needs.
_APART = frozenset({"seq", "at", "event", "prev", "mac", "team"})


def add(tabs: Tabs) -> None:
    tabs.get("/audit")(list_)
    tabs.get("/audit/live")(live)
    tabs.post("/audit/verify")(verify)


async def list_(ask: Ask) -> Response:
    return ask.html("audit.html", tab="audit", **await _listed(ask))


async def live(ask: Ask) -> Response:
    """The newest records; no content where there is none that the page does not show already."""
    since = ask.query("since")
    known = int(since[:15]) if since.isascii() and since.isdigit() else None
    if known is not None and not await ask.items("audit.tail", since=known):
        return Response(status_code=204)
    return ask.html("_audit.html", **await _listed(ask))


async def verify(ask: Ask) -> Response:
    return ask.html("_verified.html", state=await ask("audit.state"))


async def _listed(ask: Ask) -> dict[str, Any]:
    words, event, before = ask.query("search"), ask.query("event"), ask.query("before")
    records = await ask.items("audit.tail", n=_SEARCHED if words or event or before else _SHOWN)
    newest = max((record["seq"] for record in records), default=0)
    events = sorted({str(r.get("event", "")).partition(".")[0] for r in records})
    if event:
        records = [r for r in records if str(r.get("event", "")).partition(".")[0] == event]
    rows = [_row(record) for record in records]
    if words:
        rows = [row for row in rows if words.lower() in row["text"]]
    if before.isascii() and before.isdigit():
        rows = [row for row in rows if row["seq"] < int(before[:18])]
    older = len(rows) > _SHOWN or (not (words or event or before) and len(rows) == _SHOWN)
    rows = rows[-_SHOWN:][::-1]
    chosen = {"search": words, "event": event}
    return {
        "rows": rows,
        "events": events,
        "chosen": chosen,
        "query": urlencode({k: v for k, v in chosen.items() if v}),
        "newest": newest,
        "before": before,
        "older": rows[-1]["seq"] if rows and older else None,
    }


def _row(record: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in record.items() if key not in _APART}
    return {
        "seq": record.get("seq", 0),
        "at": record.get("at"),
        "event": str(record.get("event", "")),
        "decision": record.get("decision"),
        "rest": rest,
        "text": f"{record.get('event', '')} {rest}".lower(),
    }
