"""One sandbox's way out: decides each connection, records it before it is made and after it ended.

A connection that can't be recorded isn't made. Refusals are recorded too; a client that asks for
refused hosts in a loop gets its answer each time, and one record a minute tells how often.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from sandboxd.egress.dial import Dialer
from sandboxd.errors import Denied, SandboxdError
from sandboxd.policy.destinations import Admission, Destination, DestinationRule, decide

__all__ = ["MAX_PATH", "Bounds", "Connection", "Gate"]

#: Refusals that are recorded one by one in a minute.
_REFUSALS = 60
_MINUTE = 60.0
#: Of a request's path, what is recorded.
MAX_PATH = 500

Record = Callable[..., Awaitable[object]]


@dataclass(frozen=True)
class Bounds:
    """What one sandbox may have open and move, in connections, bytes and seconds.

    ``head`` is the time for a request's head to arrive, ``idle`` how long nothing may move,
    ``lifetime`` the longest a connection lasts, ``volume`` its bytes in both directions together.
    """

    connections: int = 64
    volume: int = 4 << 30
    head: float = 10.0
    dial: float = 15.0
    idle: float = 300.0
    lifetime: float = 6 * 3600.0


@dataclass
class Connection:
    """A connection that was allowed, and what moved on it so far.

    ``methods``: whether a rule of it names methods, which plain HTTP must not get around.
    """

    destination: Destination
    stream: trio.SocketStream
    rule: str
    kind: str
    opened_at: float
    sent: int = 0
    received: int = 0
    methods: bool = False


@dataclass
class Gate:
    """Decides for one sandbox. ``who`` is in every record: session, agent, call, tool.

    ``lists``: the rules of the sandbox, then those that bound them; each has to allow.
    ``explain``: the command that shows the rules, for refusals.
    """

    lists: Sequence[Sequence[DestinationRule]]
    who: Mapping[str, Any]
    record: Record
    dialer: Dialer
    explain: str = ""
    bounds: Bounds = field(default_factory=Bounds)
    _window: float = field(default=0.0, init=False)
    _refused: int = field(default=0, init=False)

    async def admit(
        self, wanted: Destination, kind: str, method: str = ""
    ) -> tuple[Admission, str]:
        """The rules that allow ``wanted``, and the first one's title. Denied otherwise."""
        verdict = decide(self.lists, wanted, method)
        if verdict.admission is None:
            await self.refuse(wanted, kind, verdict.rule, verdict.reason, method)
            raise Denied(verdict.reason, rule=verdict.rule, hint=self.hint)
        return verdict.admission, verdict.rule

    @property
    def hint(self) -> str:
        return f"the operator sees what is allowed with: {self.explain}" if self.explain else ""

    async def open(self, wanted: Destination, kind: str, method: str = "") -> Connection:
        """A connection to ``wanted``, recorded before it is made.

        Raises Denied when no rule allows it or its address, Unavailable when nobody answers.
        """
        admission, rule = await self.admit(wanted, kind, method)
        try:
            with trio.fail_after(self.bounds.dial):
                addresses = await self.dialer.resolve(wanted, admission)
        except Denied as refusal:
            await self.refuse(wanted, kind, rule, refusal.message, method)
            raise Denied(refusal.message, rule=rule, hint=self.hint) from None
        except trio.TooSlowError:
            raise self.dialer.silent(wanted) from None
        await self.record(
            "egress.opened",
            **self.who,
            **_named(wanted, kind, method),
            rule=rule,
            address=str(addresses[0]),
        )
        started = time.monotonic()
        try:
            stream = await self.dialer.dial(wanted, addresses, self.bounds.dial)
        except BaseException as failure:
            ended = failure.message if isinstance(failure, SandboxdError) else "cancelled"
            with trio.CancelScope(shield=True):
                await self._closed(wanted, kind, rule, started, 0, 0, ended)
            raise
        methods = any(one.methods for one in admission.rules)
        return Connection(wanted, stream, rule, kind, started, methods=methods)

    async def close(self, connection: Connection, outcome: str) -> None:
        """End ``connection`` and record what moved on it. Not cancelled by anybody."""
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(connection.stream)
            await self._closed(
                connection.destination,
                connection.kind,
                connection.rule,
                connection.opened_at,
                connection.sent,
                connection.received,
                outcome,
            )

    async def refuse(
        self, wanted: Destination | None, kind: str, rule: str, reason: str, method: str = ""
    ) -> None:
        """Record a refusal, or count it when there were too many in this minute."""
        now = time.monotonic()
        if now - self._window >= _MINUTE:
            unwritten, self._window, self._refused = self._refused - _REFUSALS, now, 0
            if unwritten > 0:
                await self.record("egress.refused", **self.who, times=unwritten, reason="as before")
        self._refused += 1
        if self._refused <= _REFUSALS:
            await self.record(
                "egress.refused",
                **self.who,
                **(_named(wanted, kind, method) if wanted else {"kind": kind}),
                rule=rule,
                reason=reason,
            )

    async def _closed(
        self,
        wanted: Destination,
        kind: str,
        rule: str,
        started: float,
        sent: int,
        received: int,
        outcome: str,
    ) -> None:
        await self.record(
            "egress.closed",
            **self.who,
            **_named(wanted, kind, ""),
            rule=rule,
            sent=sent,
            received=received,
            duration_ms=round((time.monotonic() - started) * 1000),
            outcome=outcome,
        )


def _named(wanted: Destination, kind: str, method: str) -> dict[str, Any]:
    named = {"kind": kind, "host": wanted.host, "port": wanted.port}
    return {**named, "method": method} if method else named
