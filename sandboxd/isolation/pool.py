"""The broker's side of templates: one connection each, whose turn it is, when each ends.

The launcher makes a template and kills it; everything else is said to the template itself, over a
socket that came with it. Closing the socket ends an idle template.
"""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio

from sandboxd.errors import SandboxdError
from sandboxd.isolation.wire import FRAME, LAST, Frame, Kind

__all__ = ["Call", "Pool", "Template"]

#: Seconds without a call, and since it was made, after which an idle template ends.
IDLE_LIMIT = 60.0
AGE_LIMIT = 900.0
#: Idle ones beyond this number end at once, the one that was idle longest first.
MOST_IDLE = 64
_LOOK_PAUSE = 15.0

Key = tuple[str, str]


class Call:
    """What a template tells of the program that it runs now."""

    def __init__(self, number: int) -> None:
        self.number = number
        #: FAILED, STARTED or EXITED, as they come; None when the template ended.
        self.take: Callable[[Frame | None], None] = lambda _: None


class Template:
    """One template: its number for the launcher, and the socket to the template itself."""

    def __init__(self, number: int, key: Key) -> None:
        self.number, self.key = number, key
        self.pid = 0
        self.sock: trio.socket.SocketType | None = None
        self.made = self.rested = trio.current_time()
        self.call: Call | None = None
        self.used = 0  # microseconds of CPU before the call
        self.worn = False  # ends after its call
        self.ready, self.dead = trio.Event(), trio.Event()
        self.failure: SandboxdError | None = None
        #: CPU microseconds and peak KiB of its whole life, once the launcher has reaped it.
        self.usage: tuple[int, int] | None = None

    async def send(self, call: Call, fds: Sequence[int]) -> bool:
        """Hand a launch over; False when the template has died."""
        assert self.sock is not None
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        frame = Frame(Kind.LAUNCH, call.number, len(fds))
        self.call, self.used = call, 0
        try:
            await self.sock.sendmsg([frame.pack()], ancillary)
        except (ConnectionError, trio.ClosedResourceError):
            self.call = None
            return False
        except BaseException:
            self.call = None
            self.end()  # it may have got the launch or not
            raise
        return True

    def end(self) -> None:
        """Close the conversation, upon which an idle template exits."""
        self.worn = True
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


class Pool:
    """All templates of one launcher. ``make`` asks the launcher for one."""

    def __init__(self, make: Callable[[Template], Awaitable[None]]) -> None:
        self._make = make
        self._all: set[Template] = set()
        self._idle: dict[Key, list[Template]] = {}
        self.nursery: trio.Nursery | None = None

    async def take(self, key: Key) -> Template:
        """An idle template of this key, or a new one. The caller sends it a call, or ends it."""
        if idle := self._idle.get(key):
            return self._remove(idle[-1])
        template = Template(0, key)
        await self._make(template)
        assert self.nursery is not None
        if not self._all:
            self.nursery.start_soon(self._end_the_idle)
        self._all.add(template)
        self.nursery.start_soon(self._attend, template)
        return template

    async def retire(self, group: str) -> None:
        """End the templates of a group; those with a call after it. The idle ones are gone then."""
        idle = [template for template in self._all if template.key[0] == group]
        for template in idle:
            self._end(template)
        for template in idle:
            if template.call is None:
                await template.dead.wait()

    def launcher_is_gone(self) -> None:
        """Nothing lives any more, and no news will come."""
        for template in self._all:
            template.ready.set()
            template.dead.set()

    async def _attend(self, template: Template) -> None:
        """Take what one template says until it ends; then tell of its call, if it had one."""
        assert template.sock is not None
        try:
            with contextlib.suppress(ConnectionError, trio.ClosedResourceError, ValueError):
                while data := await template.sock.recv(FRAME.size):
                    self._take(template, Frame.unpack(data))
            template.worn = True
            template.sock.close()
            await template.dead.wait()
            if template.call is not None:
                template.call.take(None)
        finally:
            template.sock.close()
            self._all.discard(template)
            self._remove(template)

    def _take(self, template: Template, frame: Frame) -> None:
        call = template.call
        if call is None or frame.number != call.number:
            raise ValueError("a template speaks of its own call only")
        if frame.kind is Kind.STARTED:
            template.used = frame.a
            call.take(frame)
        elif frame.kind in (Kind.EXITED, Kind.FAILED):
            template.worn = template.worn or frame.text == LAST
            template.call = None
            self._rest(template)
            call.take(frame)

    def _rest(self, template: Template) -> None:
        """A call has ended: keep its template for another, or not."""
        template.rested = trio.current_time()
        if template.worn or template.rested - template.made >= AGE_LIMIT:
            self._end(template)
            return
        self._idle.setdefault(template.key, []).append(template)
        if len(self._all) > MOST_IDLE:
            idle = [each for templates in self._idle.values() for each in templates]
            if len(idle) > MOST_IDLE:
                self._end(min(idle, key=lambda each: each.rested))

    def _end(self, template: Template) -> None:
        template.worn = True
        if template.call is None:
            self._remove(template)
            template.end()

    def _remove(self, template: Template) -> Template:
        idle = self._idle.get(template.key, [])
        if template in idle:
            idle.remove(template)
            if not idle:
                del self._idle[template.key]
        return template

    async def _end_the_idle(self) -> None:
        while True:
            await trio.sleep(_LOOK_PAUSE)
            now = trio.current_time()
            for template in [each for templates in self._idle.values() for each in templates]:
                if now - template.rested >= IDLE_LIMIT or now - template.made >= AGE_LIMIT:
                    self._end(template)
            if not self._all:
                return
