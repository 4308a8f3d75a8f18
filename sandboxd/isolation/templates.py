"""The launcher's templates: which are idle, which call runs in which, when each ends.

The launcher knows a template by its group and key, two words of the broker's, and never reads the
spec that it was built from; a template refuses a launch that isn't its own. Standard library only.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from sandboxd.errors import KernelError
from sandboxd.isolation.template import LAST, enter
from sandboxd.isolation.wire import FRAME, Frame, Kind, failed

__all__ = ["Templates"]

#: Seconds without a call, and since it was built, after which an idle template ends.
IDLE_LIMIT = 60.0
AGE_LIMIT = 900.0
#: Idle ones beyond this number end at once, the one that was idle longest first.
MOST_IDLE = 64

Fork = Callable[[Callable[[], NoReturn]], tuple[int, int]]
Send = Callable[..., None]


@dataclass(eq=False)
class _Template:
    key: tuple[str, str]
    pid: int
    pidfd: int
    sock: socket.socket
    made: float
    number: int = 0  # of the call that it has, 0 when idle
    started: bool = False
    used: int = 0  # CPU microseconds before that call
    idle_since: float = 0.0
    retired: bool = False


@dataclass
class Templates:
    """All templates of one launcher. ``fork`` starts an init of a new pid namespace."""

    fork: Fork
    send: Send
    selector: selectors.BaseSelector
    privileged: bool
    _all: set[_Template] = field(default_factory=set)
    _idle: dict[tuple[str, str], list[_Template]] = field(default_factory=dict)
    _busy: dict[int, _Template] = field(default_factory=dict)

    def __contains__(self, number: int) -> bool:
        return number in self._busy

    def launch(self, number: int, words: str, fds: Sequence[int]) -> None:
        """Start a call in an idle template of this group and key, or in a new one.

        Raises KernelError or OSError when neither can be had.
        """
        group, _, key = words.partition("\t")
        frame = Frame(Kind.LAUNCH, number, len(fds)).pack()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        template = self._take_idle((group, key))
        if template is not None:
            try:
                template.sock.sendmsg([frame], ancillary)
            except ConnectionError:  # it has just died
                self._end(template)
                template = None
        if template is None:
            template = self._make((group, key))
            template.sock.sendmsg([frame], ancillary)
        template.number, template.started = number, False
        self._busy[number] = template

    def signal(self, number: int, signum: int) -> None:
        """Pass a signal on to a call. SIGKILL ends its template, and with it the whole tree."""
        template = self._busy.get(number)
        if template is not None:
            with contextlib.suppress(OSError):  # it has just ended
                signal.pidfd_send_signal(template.pidfd, signum)

    def retire(self, group: str) -> None:
        """End the templates of a group, those with a call after it."""
        for template in self._all:
            if template.key[0] == group:
                template.retired = True
                if not template.number:
                    self._end(template)

    def expire(self) -> float | None:
        """End what was idle for too long. Seconds until the next is due, None if there is none."""
        now = time.monotonic()
        idle = [template for templates in self._idle.values() for template in templates]
        for template in idle:
            if now - template.idle_since >= IDLE_LIMIT or now - template.made >= AGE_LIMIT:
                self._end(template)
        left = [template.idle_since for templates in self._idle.values() for template in templates]
        return max(0.1, min(left) + IDLE_LIMIT - now) if left else None

    def _make(self, key: tuple[str, str]) -> _Template:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid, pidfd = self.fork(lambda: enter(theirs, privileged=self.privileged))
            except BaseException:
                ours.close()
                raise
        template = _Template(key, pid, pidfd, ours, time.monotonic())
        self._all.add(template)
        self.selector.register(ours, selectors.EVENT_READ, lambda: self._on_report(template))
        self.selector.register(pidfd, selectors.EVENT_READ, lambda: self._on_exit(template))
        return template

    def _take_idle(self, key: tuple[str, str]) -> _Template | None:
        idle = self._idle.get(key)
        if not idle:
            return None
        template = idle.pop()
        if not idle:
            del self._idle[key]
        return template

    def _rest(self, template: _Template) -> None:
        """A call has ended: keep its template for another, or not."""
        self._busy.pop(template.number, None)
        template.number = 0
        now = template.idle_since = time.monotonic()
        if template.retired or now - template.made >= AGE_LIMIT:
            self._end(template)
            return
        self._idle.setdefault(template.key, []).append(template)
        idle = [template for templates in self._idle.values() for template in templates]
        if len(idle) > MOST_IDLE:
            self._end(min(idle, key=lambda each: each.idle_since))

    def _end(self, template: _Template) -> None:
        """Kill it; its exit is then reaped as any."""
        idle = self._idle.get(template.key, [])
        if template in idle:
            idle.remove(template)
            if not idle:
                del self._idle[template.key]
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(template.pidfd, signal.SIGKILL)

    def _on_report(self, template: _Template) -> None:
        try:
            data = template.sock.recv(FRAME.size)
        except ConnectionError:
            data = b""
        if not data:
            self.selector.unregister(template.sock)
            return
        frame = Frame.unpack(data)
        if not template.number or frame.number != template.number:
            self._end(template)  # it can't be: it speaks of its own call only
        elif frame.kind is Kind.STARTED:
            template.started, template.used = True, frame.a
            self.send(Frame(Kind.STARTED, frame.number), template.pidfd)
        elif frame.kind is Kind.EXITED:
            template.retired = template.retired or frame.text == LAST
            self.send(Frame(Kind.EXITED, frame.number, frame.a, frame.b, frame.c))
            self._rest(template)
        elif frame.kind is Kind.FAILED:
            self.send(frame)
            self._rest(template)

    def _on_exit(self, template: _Template) -> None:
        while template.sock in self.selector.get_map():
            self._on_report(template)  # what it said last
        _, _, usage = os.wait4(template.pid, 0)
        self._end(template)
        self.selector.unregister(template.pidfd)
        os.close(template.pidfd)
        template.sock.close()
        self._all.discard(template)
        number = template.number
        if number:
            del self._busy[number]
            if template.started:
                # However it ended, the kernel has killed its call.
                cpu = int((usage.ru_utime + usage.ru_stime) * 1e6) - template.used
                self.send(Frame(Kind.EXITED, number, signal.SIGKILL, cpu, usage.ru_maxrss))
            else:
                self.send(
                    failed(number, KernelError("setup", errno.ECHILD, "killed while starting"))
                )
