"""How long a visit lasts, and which one has to go when there are too many."""

from __future__ import annotations

import pytest
import trio
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp_http_parts import Wire, configure, key, token
from real_daemon import RealDaemon, until
from trio.testing import MockClock

from sandboxd.access.roles import Principal
from sandboxd.errors import Unavailable
from sandboxd.http import visits
from sandboxd.http.visits import VISIT_IDLE, Visit


def a_visit() -> Visit:
    principal = Principal("key", "somebody", "operator", "default", key="key_0")
    return Visit(principal, "client", "", StreamableHTTPSessionManager(Server("of a test")))


async def test_a_visit_is_over_when_nothing_was_asked_for_a_while(
    autojump_clock: MockClock,
) -> None:
    visit, began = a_visit(), trio.current_time()
    over: list[float] = []

    async def wait() -> None:
        await visits.idle(visit)
        over.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(VISIT_IDLE - 1)
        with visit.request():  # which takes as long as it takes
            await trio.sleep(3 * VISIT_IDLE)
        assert over == []
    assert over == [pytest.approx(5 * VISIT_IDLE - 1)]


async def test_what_is_open_ends_with_its_visit(autojump_clock: MockClock) -> None:
    visit = a_visit()
    visit.reason = "it was over"
    reasons = []

    async def ask() -> None:
        try:
            with visit.request():
                await trio.sleep_forever()
        except Unavailable as ended:
            reasons.append(ended.message)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        visit.scope.cancel()
        await visit.end_requests()
        await ask()  # one that comes too late is not begun
    assert reasons == ["the request was ended: it was over"] * 4


@pytest.mark.soak
def test_the_visit_that_was_idle_for_longest_makes_room(configured: RealDaemon) -> None:
    configure(configured)
    configured.start()
    id, _ = key(configured)
    bearers = [token(configured, id, "client")[1] for _ in range(visits.MAX_OF_KEY + 1)]
    wires = [Wire(configured.url + "/mcp", bearer) for bearer in bearers]
    for wire in wires:
        assert wire.post("tools/list").status_code == 200

    def ended() -> list[str]:
        return [r["visit"] for r in configured.audit() if r["event"] == "visit.ended"]

    until(lambda: len(ended()) == 1)
    began = [r["visit"] for r in configured.audit() if r["event"] == "visit.began"]
    assert ended() == began[:1]
    assert wires[0].post("tools/list").status_code == 200  # it only begins anew
