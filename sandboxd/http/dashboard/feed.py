"""Tool calls as the audit log tells them: one row for each, from its decision to its end."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

from sandboxd.http.dashboard.asking import Ask

__all__ = ["OUTCOMES", "calls_of", "records_of", "rows_of"]

#: How many records are kept for a list of calls, and how many calls it shows.
RECORDS, SHOWN = 2000, 100

#: Different views of the log (a team, and agents of it) whose newest records are kept.
_VIEWS = 8

#: What a list can be narrowed to.
OUTCOMES = {
    "": "all",
    "denied": "denied",
    "failed": "failed",
    "waiting": "waiting",
    "running": "running",
    "succeeded": "succeeded",
}


async def calls_of(
    ask: Ask, *, session: str = "", agent: str = "", tool: str = "", outcome: str = ""
) -> list[dict[str, Any]]:
    """The newest calls that fit, newest first."""
    found = [
        row
        for row in rows_of(await records_of(ask))
        if (not session or row["session"] == session)
        and (not agent or row["agent"] == agent)
        and (not tool or tool.lower() in row["tool"].lower())
        and (not outcome or row["kind"] == outcome)
    ]
    return found[:SHOWN]


async def records_of(ask: Ask) -> list[dict[str, Any]]:
    """The newest records about calls that the page may see, the oldest first.

    They are kept, so that a page that asks every other second costs what is new and no search.
    """
    views: OrderedDict[Any, tuple[int, deque[dict[str, Any]]]] = ask.shared.setdefault(
        "views of the log", OrderedDict()
    )
    ask.need("audit.read")  # what is kept was read for others
    view = (ask.principal.team, ask.principal.agents)
    seen, kept = views.pop(view, (-1, deque[dict[str, Any]](maxlen=RECORDS)))
    newest = ask.daemon.audit.newest
    if seen < 0:
        fresh = await ask.items("audit.tail", n=RECORDS)
    else:
        fresh = await ask.items("audit.tail", since=seen) if newest > seen else []
    for record in fresh:
        seen = max(seen, record["seq"])
        if "call" in record or record["event"] == "session.ended":
            kept.append({key: value for key, value in record.items() if key not in _UNUSED})
    views[view] = (max(seen, newest), kept)
    while len(views) > _VIEWS:
        views.popitem(last=False)
    return list(kept)


_UNUSED = frozenset({"prev", "mac"})


def rows_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a call, the newest first. A call whose decision is too long ago has no row."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        event, id = record.get("event", ""), record.get("call")
        if event == "call.decided":
            rows[str(id)] = _decided(record)
        elif (row := rows.get(str(id))) is not None:
            _follow(row, event, record)
        if event == "session.ended":
            # What was under way then is over, whether or not that could be recorded.
            for row in rows.values():
                if row["session"] == record.get("session") and row["kind"] in _OPEN:
                    row |= {"kind": "failed", "outcome": "ended with its session"}
    return list(reversed(rows.values()))


_OPEN = ("running", "waiting")


def _decided(record: dict[str, Any]) -> dict[str, Any]:
    kind = {"deny": "denied", "ask": "waiting"}.get(record.get("decision", ""), "running")
    return {
        "id": str(record.get("call", "")),
        "at": record.get("at"),
        "agent": str(record.get("agent", "")),
        "session": str(record.get("session", "")),
        "tool": str(record.get("tool", "")),
        "kind": kind,
        "outcome": kind,
        "rule": record.get("rule") or "",
        "reason": record.get("reason") or "",
        "injected": [item["name"] for item in record.get("injected") or ()],
        "duration_ms": None,
        "redactions": 0,
        "by": "",
    }


def _follow(row: dict[str, Any], event: str, record: dict[str, Any]) -> None:
    if event.startswith("approval."):
        word = event.removeprefix("approval.")
        row["by"] = record.get("by") or ""
        if word == "approved":
            row |= {"kind": "running", "outcome": "running"}
        else:
            row |= {"kind": "denied", "outcome": word, "reason": record.get("reason") or ""}
    elif event == "call.ended":
        outcome = str(record.get("outcome", ""))
        row |= {
            "kind": "succeeded" if outcome == "ok" else "failed",
            "outcome": "succeeded" if outcome == "ok" else outcome,
            "duration_ms": record.get("duration_ms"),
            "redactions": record.get("redactions") or 0,
            "exit_code": record.get("exit_code"),
        }
        if outcome != "ok" and record.get("reason"):
            row["reason"] = record["reason"]
