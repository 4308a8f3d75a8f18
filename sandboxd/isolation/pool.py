"""The broker's side of templates: one connection each, whose turn it is, when each ends.

The launcher makes a template and kills it; everything else is said to the template itself, over a
socket that came with it. Closing the socket ends an idle template.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

import trio

from sandboxd.errors import KernelError, SandboxdError
from sandboxd.isolation.reports import failure_of, pid_of
from sandboxd.isolation.wire import FRAME, MAX_INLINE, Frame, Kind, sealed_memfd

__all__ = ["Key", "Pool", "Template"]

#: Seconds without a call, and since it was made, after which an idle template ends.
IDLE_LIMIT = 60.0
AGE_LIMIT = 900.0
#: Idle ones beyond this number end at once, the one that was idle longest first.
MOST_IDLE = 32
_LOOK_PAUSE = 15.0

Key = tuple[str, object]
Take = Callable[[Frame | None], None]


class Template:
    """One template: its number for the launcher, and the socket to the template itself."""

    def __init__(self, number: int, key: Key) -> None:
        self.number, self.key = number, key
        self.pid = 0
        self.sock: socket.socket | None = None  # which never blocks
        self.made = self.rested = trio.current_time()
        self.worn = False  # ends after its call
        self.ready, self.dead, self.gone = trio.Event(), trio.Event(), trio.Event()
        self.failure: SandboxdError | None = None
        #: Its whole life, once the launcher has reaped it: an EXITED frame.
        self.usage: Frame | None = None
        # Of the call that it has, if any: its number, who takes its news, CPU used before it.
        self.call = 0
        self._take: Take = _nobody
        self._used = 0

    async def send(self, number: int, spec: bytes, fds: Sequence[int], take: Take) -> bool:
        """Hand a launch over; False when the template has died.

        ``take`` gets what it answers: EXITED, before it STARTED where the program stays for a
        moment; FAILED; or None when it ends instead.
        """
        assert self.sock is not None
        self.call, self._take, self._used = number, take, 0
        memfd = -1
        try:
            if len(spec) > MAX_INLINE:
                memfd = sealed_memfd(spec)
                fds, spec = (memfd, *fds), b""
            packet = [Frame(Kind.LAUNCH, number, int(memfd >= 0)).pack(), spec]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            while True:
                try:
                    self.sock.sendmsg(packet, ancillary)
                    return True
                except BlockingIOError:  # never for long: a template has one call
                    await trio.lowlevel.wait_writable(self.sock)
        except BaseException as failure:
            self.call, self._take = 0, _nobody
            self.end()
            if isinstance(failure, (ConnectionError, trio.ClosedResourceError)):
                return False
            if isinstance(failure, OSError):
                code = failure.errno or 0
                if code == errno.EBADF and self.sock.fileno() < 0:
                    return False  # closed here
                raise KernelError("sendmsg", code, "launch frame") from None
            raise
        finally:
            if memfd >= 0:
                os.close(memfd)

    def end(self) -> None:
        """Close the conversation, upon which an idle template exits."""
        self.worn = True
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def take(self, frame: Frame | None) -> None:
        """Tell whoever has the call. ValueError for news of another one."""
        if frame is not None and frame.number != self.call:
            raise ValueError("a template speaks of its own call only")
        take = self._take
        if frame is not None and frame.kind is Kind.STARTED:
            self._used = frame.a
        else:
            self.call, self._take = 0, _nobody
        take(frame)

    @property
    def left(self) -> bool:
        """Whether it ended by its own decision."""
        return self.usage is not None and self.usage.kind is Kind.EXITED and self.usage.a == 0

    def last_words(self) -> Frame:
        """What became of its call: the kernel has killed it with the template."""
        assert self.usage is not None
        cpu = max(0, self.usage.b - self._used)
        return replace(self.usage, a=int(signal.SIGKILL), b=cpu)


class Pool:
    """All templates of one launcher."""

    def __init__(self) -> None:
        self._all: dict[int, Template] = {}
        self._idle: dict[Key, list[Template]] = {}
        self._looking = False
        self.nursery: trio.Nursery | None = None

    def take(self, key: Key) -> Template | None:
        """An idle template of this key."""
        idle = self._idle.get(key)
        return self._remove(idle[-1]) if idle else None

    def add(self, number: int, key: Key) -> Template:
        """A template that the launcher is being asked for."""
        assert self.nursery is not None
        if not self._looking:
            self._looking = True
            self.nursery.start_soon(self._end_the_idle)
        template = self._all[number] = Template(number, key)
        return template

    def drop(self, template: Template) -> None:
        """Nobody waits for it any more: it ends as soon as it is there."""
        template.end()

    def take_report(self, frame: Frame, fds: list[int]) -> bool:
        """Act on what the launcher says of a template; False when it speaks of something else."""
        template = self._all.get(frame.number)
        if template is None:
            return False
        if frame.kind is Kind.STARTED:
            if len(fds) == 2:
                template.pid = pid_of(fds[1])
                template.sock = socket.socket(fileno=fds.pop(0))
                template.sock.setblocking(False)
                assert self.nursery is not None
                self.nursery.start_soon(self._attend, template)
                if template.worn:
                    template.end()
            else:  # the launcher's copy of the socket is closed too, and with it the template
                template.failure = KernelError("recvmsg", errno.EMFILE, "template")
                template.gone.set()
                del self._all[frame.number]
        elif frame.kind is Kind.FAILED:
            template.failure = failure_of(frame)
            template.dead.set()
            template.gone.set()
            del self._all[frame.number]
        elif frame.kind is Kind.EXITED:
            template.usage = frame
            template.dead.set()
        template.ready.set()
        return True

    async def retire(self, group: str) -> None:
        """End the templates of a group: the idle ones now, the others after their call."""
        for template in list(self._all.values()):
            if template.key[0] == group:
                self._end(template)
                if not template.call:
                    await template.gone.wait()

    def launcher_is_gone(self, failure: SandboxdError) -> None:
        """Nothing lives any more, and no news will come."""
        for template in self._all.values():
            template.failure = failure
            template.ready.set()
            template.dead.set()
            template.take(None)
        self._all.clear()
        self._idle.clear()

    async def _attend(self, template: Template) -> None:
        """Take what one template says until it ends; then tell of its call, if it had one."""
        assert template.sock is not None
        try:
            with contextlib.suppress(OSError, ValueError):
                while await self._hear(template, template.sock):
                    pass
            template.worn = True
            self._remove(template)
            template.end()
            await template.dead.wait()
            template.take(None)
        finally:
            trio.lowlevel.notify_closing(template.sock)
            template.sock.close()
            self._all.pop(template.number, None)
            template.gone.set()

    async def _hear(self, template: Template, sock: socket.socket) -> bool:
        """Wait for news and take all that there is; False at the end."""
        await trio.lowlevel.wait_readable(sock)
        with contextlib.suppress(BlockingIOError):
            while data := sock.recv(FRAME.size):
                self._take(template, Frame.unpack(data))
            return False
        return True

    def _take(self, template: Template, frame: Frame) -> None:
        if frame.kind is Kind.FAILED:
            template.worn = template.worn or bool(frame.b)
        template.take(frame)
        if not template.call:
            self._rest(template)

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
        if not template.call:
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
        while self._all:
            await trio.sleep(_LOOK_PAUSE)
            now = trio.current_time()
            for template in [each for templates in self._idle.values() for each in templates]:
                if now - template.rested >= IDLE_LIMIT or now - template.made >= AGE_LIMIT:
                    self._end(template)
        self._looking = False


def _nobody(_: Frame | None) -> None:
    """Takes the news of a template that has no call."""
