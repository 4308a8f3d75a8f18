"""The tab *Sessions*: who runs, what it does now, what it uses, and how to stop it."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import Any

from starlette.responses import Response

from sandboxd.http.dashboard.asking import Ask, Tabs
from sandboxd.http.dashboard.feed import calls_of

__all__ = ["add"]

#: Samples that are kept of a session while somebody watches, and their least distance in seconds.
_SAMPLES, _DISTANCE = 60, 1.0
_ENDED = 50


def add(tabs: Tabs) -> None:
    history = _History()

    async def list_(ask: Ask) -> Response:
        shown = {**await _live(ask, history), **await _ended(ask)}
        return ask.html("sessions.html", tab="sessions", **shown)

    async def live(ask: Ask) -> Response:
        return ask.html("_sessions.html", **await _live(ask, history))

    async def ended(ask: Ask) -> Response:
        return ask.html("_ended.html", **await _ended(ask))

    async def show(ask: Ask) -> Response:
        return ask.html("session.html", tab="sessions", **await _shown(ask, history))

    async def show_live(ask: Ask) -> Response:
        return ask.html("_session.html", **await _shown(ask, history))

    tabs.get("/sessions")(list_)
    tabs.get("/sessions/live")(live)
    tabs.get("/sessions/ended")(ended)
    tabs.get("/sessions/{id}")(show)
    tabs.get("/sessions/{id}/live")(show_live)
    tabs.post("/sessions/{id}/stop")(stop)


async def stop(ask: Ask) -> Response:
    id = ask.request.path_params["id"]
    grace = 0.0 if "at_once" in ask.form else None
    got = await ask("session.stop", id=id, **({} if grace is None else {"grace": grace}))
    ask.tell(f"Session {got['id']} has ended.")
    return ask.go("/sessions")


async def _live(ask: Ask, history: _History) -> dict[str, Any]:
    live = (await ask("session.list", usage=True))["sessions"]
    for row in live:
        row["samples"] = history.take(row["id"], row["usage"])
    return {"live": live}


async def _ended(ask: Ask) -> dict[str, Any]:
    """The newest of them; asked for less often, as there may be many."""
    rows = (await ask("session.list", all=True))["sessions"]
    ended = [row for row in rows if row["ended_at"] is not None]
    ended.sort(key=lambda row: str(row["ended_at"]), reverse=True)
    return {"ended": ended[:_ENDED], "more": max(0, len(ended) - _ENDED)}


async def _shown(ask: Ask, history: _History) -> dict[str, Any]:
    row = await ask("session.show", id=ask.request.path_params["id"])
    samples = history.take(row["id"], row.get("usage")) if row["ended_at"] is None else None
    return {"session": row, "samples": samples, "calls": await calls_of(ask, session=row["id"])}


class _History:
    """Memory and processor time of sessions while somebody watches them; the newest are kept."""

    def __init__(self, clock: Any = time.monotonic) -> None:
        self._clock = clock
        self._of: OrderedDict[str, deque[tuple[float, int, float]]] = OrderedDict()

    def take(self, id: str, usage: dict[str, Any] | None) -> dict[str, Any]:
        """Add what a session uses now; gives what it used lately, the processor as a share."""
        samples = self._of.setdefault(id, deque(maxlen=_SAMPLES + 1))
        self._of.move_to_end(id)
        while len(self._of) > 1000:
            self._of.popitem(last=False)
        now = self._clock()
        if usage and (not samples or now - samples[-1][0] >= _DISTANCE):
            samples.append((now, usage["memory"], usage["cpu_seconds"]))
        pairs = zip(list(samples), list(samples)[1:], strict=False)
        # A process that ended takes its seconds along, so that a difference can be negative.
        cpu = [max(0.0, (c1 - c0) / (t1 - t0)) for (t0, _, c0), (t1, _, c1) in pairs if t1 > t0]
        return {
            "memory": [float(memory) for _, memory, _ in samples],
            "cpu": cpu,
            "memory_now": samples[-1][1] if samples else 0,
            "cpu_now": cpu[-1] if cpu else 0.0,
        }
