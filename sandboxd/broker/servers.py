"""MCP servers at work: started in a sandbox of their own, checked against what was accepted, ended.

A server lives for one call, or for a session until nobody has called it for a while. It holds the
secrets that it was started with for as long as it lives, so whatever takes a secret away ends it.
What it offers is compared with its pins whenever it starts and whenever it says that it changed;
a tool that differs is refused until an operator accepts it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import attrs
import trio

from sandboxd.audit import AuditLog
from sandboxd.broker.capture import Progress
from sandboxd.broker.chosen import Chosen
from sandboxd.broker.content import passed_on
from sandboxd.broker.mcppeer import Fault, RemoteError
from sandboxd.broker.result import CallResult
from sandboxd.broker.serverrun import Running, Start
from sandboxd.broker.session import Session, about, belongs
from sandboxd.errors import Denied, SandboxdError, Unavailable
from sandboxd.isolation.client import Launcher
from sandboxd.isolation.uids import UidPool
from sandboxd.policy.decide import Decision, launch_terms
from sandboxd.policy.definitions import Definition, read_definitions
from sandboxd.policy.mcpserver import McpServer, McpTool
from sandboxd.redact import Mask
from sandboxd.vault.vault import Vault

__all__ = ["Servers", "Tally"]

log = logging.getLogger(__name__)

#: Servers that one daemon keeps at once.
MAX_LIVE = 256
#: Seconds that a server has to answer a ping after a call was taken back, to be kept.
_GRACE = 2.0
#: Seconds between two progress reports.
_PAUSE = 0.1
#: Answers of more bytes are masked in a thread.
_LARGE = 256 << 10


@dataclass
class Tally:
    """What a call took and how often something in it was masked, for its last record."""

    received: int = 0
    redacted: Mapping[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Attached:
    """A session that may have servers: who owns their tasks, and one start at a time of each."""

    nursery: trio.Nursery
    locks: dict[str, trio.Lock] = field(default_factory=dict)


class Servers:
    """Every live server of one daemon."""

    def __init__(self, *, vault: Vault, audit: AuditLog, launcher: Launcher, uids: UidPool) -> None:
        self._start = Start(vault=vault, audit=audit, launcher=launcher, uids=uids)
        self._audit = audit
        self._attached: dict[str, _Attached] = {}
        self._live: dict[str, Running] = {}
        #: What servers turned out to offer instead of what a session had accepted: the digest of
        #: it and the differences, by their names.
        self.changed: dict[str, tuple[str, tuple[str, ...]]] = {}

    @asynccontextmanager
    async def attached(self, session: Session) -> AsyncIterator[None]:
        """Let the servers of ``session`` live from call to call; leaving ends them.

        Without it every call has a server of its own.
        """
        async with trio.open_nursery() as nursery:
            self._attached[session.id] = _Attached(nursery)
            try:
                yield
            finally:
                del self._attached[session.id]
                for one in self.live(session.id):
                    one.end("its session ended")
                nursery.cancel_scope.cancel()

    def live(self, session: str | None = None) -> list[Running]:
        """The servers that run now, of one session or of all, oldest first."""
        return [one for one in self._live.values() if session in (None, one.session.id)]

    def end_using(self, team: str, agent: str, name: str, up_to: int) -> list[Running]:
        """Begin to end the servers that hold a version of the variable up to ``up_to``.

        Each is dead when its ``ended`` is set.
        """
        holding = [
            one
            for one in self._live.values()
            if belongs(one.session, team, agent) and 0 < one.versions.get(name, 0) <= up_to
        ]
        for one in holding:
            one.end(f"the variable {name} was revoked")
        return holding

    async def call(
        self,
        session: Session,
        call: str,
        decision: Decision,
        chosen: Chosen,
        tally: Tally,
        progress: Progress | None,
    ) -> CallResult:
        """One allowed and recorded call, on a running server or on one that is started for it.

        Raises Denied when the tool is no longer what was accepted, Unavailable when its server
        can't be had, and what a launch raises.
        """
        tool = decision.tool
        assert isinstance(tool, McpTool)
        with trio.CancelScope(deadline=trio.current_time() + decision.timeout) as limit:
            attached = self._attached.get(session.id)
            if tool.server.lifetime == "call" or attached is None:
                async with trio.open_nursery() as nursery:
                    running = self._begin(session, tool.server, chosen, nursery)
                    try:
                        return await self._use(running, call, decision, tally, progress)
                    finally:
                        running.end("its call is over")
                        nursery.cancel_scope.cancel()
            running = await self._obtain(session, tool.server, chosen, attached)
            return await self._use(running, call, decision, tally, progress)
        assert limit.cancelled_caught
        for one in self.live(session.id):
            if one.server.name == tool.server.name and not one.calls:
                one.end("a call had no answer in time")
        return CallResult(
            "timeout",
            call,
            message=f"{tool.name} gave no answer within {decision.timeout:g} s",
            hint="ask for less at once; the operator sets timeout in the server's manifest",
        )

    async def probe(
        self, session: Session, server: McpServer, chosen: Chosen
    ) -> tuple[tuple[Definition, ...], tuple[str, ...]]:
        """What ``server`` offers now, and why some of it can't be had.

        It is started for this alone, under the terms of the session's agent. Raises Unavailable
        with what it said on standard error when it doesn't start.
        """
        failure: SandboxdError | None = None
        async with trio.open_nursery() as nursery:
            try:
                running = self._begin(session, server, chosen, nursery, probing=True)
                await running.wait_ready()
                running.end("it was only asked what it offers")
            except SandboxdError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        definitions, problems = read_definitions(running.listed, server.name)
        return tuple(d for d in definitions if server.may_offer(d.name)), problems

    def _begin(
        self,
        session: Session,
        server: McpServer,
        chosen: Chosen,
        nursery: trio.Nursery,
        *,
        probing: bool = False,
    ) -> Running:
        """A new server, starting. It is known from here on: a revocation ends it at any moment."""
        if len(self._live) >= MAX_LIVE:
            raise Unavailable(
                f"{MAX_LIVE} MCP servers are running, which is the limit",
                hint="stop sessions, or let servers end earlier: idle, in their manifests",
            )
        terms = launch_terms(session.config, session.agent, server.launch)
        if terms.verdict == "deny":
            raise Denied(terms.reason, rule=terms.rule, hint=terms.hint)
        if probing and terms.workspace != "none":
            terms = attrs.evolve(terms, workspace="ro")
        running = Running(self._start, session, server, terms, chosen)
        self._live[running.id] = running
        nursery.start_soon(self._own, running, name=f"server {running.id}")
        return running

    async def _own(self, running: Running) -> None:
        try:
            await running.run()
        finally:
            del self._live[running.id]

    async def _obtain(
        self, session: Session, server: McpServer, chosen: Chosen, attached: _Attached
    ) -> Running:
        """The session's server, started when there is none that can take a call."""
        async with attached.locks.setdefault(server.name, trio.Lock()):
            for one in self.live(session.id):
                if one.server.name == server.name and one.usable:
                    one.hold()
                    try:
                        await one.wait_ready()
                    finally:
                        one.release()
                    return one
            running = self._begin(session, server, chosen, attached.nursery)
            await running.wait_ready()
            return running

    async def _use(
        self,
        running: Running,
        call: str,
        decision: Decision,
        tally: Tally,
        progress: Progress | None,
    ) -> CallResult:
        tool = decision.tool
        assert isinstance(tool, McpTool)
        running.hold()
        running.total += 1
        before = 0
        mask = Mask({})
        try:
            await running.wait_ready()
            await self._check(running, tool)
            await self._audit.append(
                "call.launched",
                **about(running.session),
                tool=tool.name,
                call=call,
                pid=running.pid,
                server=running.id,
            )
            before = running.peer.received
            mask = running.mask()
            return await self._ask(running, call, decision, tool, mask, progress)
        except trio.Cancelled:
            if running.ready and running.usable and not await _answers(running):
                running.end("it does not answer any more")
            raise
        except Fault as fault:
            await running.settle(fault.message)
            return CallResult(
                "failed",
                call,
                message=f"the server {running.server.name} ended: {running.reason}",
                stderr=running.last_words(),
                rule=decision.rule,
            )
        finally:
            tally.received = max(0, running.peer.received - before) if running.ready else 0
            tally.redacted = dict(mask.counts)
            running.release()

    async def _check(self, running: Running, tool: McpTool) -> None:
        """Raise Denied unless the server offers the tool exactly as it was accepted."""
        if running.peer.list_changed:
            await running.list_tools()
        offered = running.offered.get(tool.remote)
        if offered == tool.pin:
            return
        name = running.server.name
        changes = _changes(running)
        self.changed[name] = (running.digest, changes)
        if running.told != running.digest:
            running.told = running.digest
            log.warning("%s offers other tools than were accepted: %s", name, ", ".join(changes))
            await self._audit.append(
                "server.changed",
                **about(running.session),
                server=name,
                id=running.id,
                tools=list(changes),
            )
        what = "is not offered any more" if offered is None else "changed since it was accepted"
        raise Denied(
            f"{tool.name} {what}",
            rule=f"{tool.source} definitions",
            hint=f"an operator can look at the change: sandboxctl tools accept {name}",
        )

    async def _ask(
        self,
        running: Running,
        call: str,
        decision: Decision,
        tool: McpTool,
        mask: Mask,
        progress: Progress | None,
    ) -> CallResult:
        """The request itself, with its progress passed on."""
        params = {"name": tool.remote, "arguments": json.loads(decision.stdin or b"{}")}
        reports = _Reports(progress, mask) if progress is not None else None
        failure: RemoteError | Fault | None = None
        result: Any = None
        size = 0
        async with trio.open_nursery() as nursery:
            if reports is not None:
                nursery.start_soon(reports.run)
            try:
                result, size = await running.peer.request(
                    "tools/call", params, reports.add if reports else None
                )
            except (RemoteError, Fault) as error:
                failure = error
            if reports is not None:
                await reports.last()
            nursery.cancel_scope.cancel()
        if isinstance(failure, RemoteError):
            said = mask.text(failure.said)[:2000]
            message = f"{tool.name}: the server refused the call (error {failure.number}): {said}"
            return CallResult("failed", call, message=message, rule=decision.rule)
        if failure is not None:
            raise failure
        if not isinstance(result, dict):
            raise Fault("its answer is none of MCP")
        limit = decision.output_limit
        if size > _LARGE:  # other sessions must not wait for it
            passed = await trio.to_thread.run_sync(passed_on, result, mask, limit)
        else:
            passed = passed_on(result, mask, limit)
        outcome: Any = "failed" if passed.is_error else "ok"
        if passed.left_out and tool.on_overflow == "kill":
            outcome = "overflow"
        if passed.structured is None and tool.output_schema is not None and outcome == "ok":
            # A client would not take a result that lacks what its definition promises.
            outcome = "failed"
        return CallResult(
            outcome,
            call,
            content=passed.blocks,
            structured=passed.structured,
            truncated=bool(passed.left_out),
            message=passed.left_out,
            rule=decision.rule,
        )


class _Reports:
    """A server's progress on its way to the client: the newest, in the client's own time."""

    def __init__(self, progress: Progress, mask: Mask) -> None:
        self._progress, self._mask = progress, mask
        self._news = trio.Event()
        self._newest: tuple[float, str] | None = None
        self._turn = trio.Lock()

    def add(self, value: float, text: str) -> None:
        self._newest = (value, text)
        self._news.set()

    async def run(self) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            await self.last()
            await trio.sleep(_PAUSE)

    async def last(self) -> None:
        """Pass on what was not yet."""
        async with self._turn:
            newest, self._newest = self._newest, None
            if newest is not None:
                await self._progress(newest[0], self._mask.text(newest[1]))


async def _answers(running: Running) -> bool:
    """Whether a server of a session, told that a call was taken back, is fit for another one."""
    if running.server.lifetime == "call":
        return False
    with trio.move_on_after(_GRACE, shield=True):
        return await running.peer.answers()
    return False


def _changes(running: Running) -> tuple[str, ...]:
    """In words: what differs between the accepted tools and what is offered."""
    pins: Mapping[str, str] = {
        tool.remote: tool.pin
        for tool in running.session.config.tools.values()
        if isinstance(tool, McpTool) and tool.server.name == running.server.name
    }
    out = [
        f"{name} {'changed' if name in running.offered else 'is gone'}"
        for name, pin in sorted(pins.items())
        if running.offered.get(name) != pin
    ]
    new = sorted(set(running.offered) - set(pins))
    return (*out, *(f"{name} is new" for name in new))[:50]
