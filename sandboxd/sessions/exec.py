"""One more program in a session's sandbox, beside its agent: started, captured, ended.

It is confined as the agent is, because the sandbox's own init starts it (see
:mod:`sandboxd.isolation.further`), and it gets what the agent gets: the agent's plain environment,
never a tool's secret.
"""

from __future__ import annotations

import fcntl
import os
import posixpath
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import trio

from sandboxd.audit import AuditLog
from sandboxd.errors import Conflict, Invalid
from sandboxd.isolation.inside import Further, open_further
from sandboxd.isolation.reports import Exit
from sandboxd.isolation.wire import LaunchSpec
from sandboxd.names import loader_reason, variable_name, variable_value
from sandboxd.sessions.session import Session
from sandboxd.sessions.spec import agent_spec
from sandboxd.sessions.streams import attached

__all__ = ["DEFAULT_LIMIT", "DEFAULT_TIMEOUT", "MAX_LIMIT", "ExecResult", "Execs"]

#: Seconds that a program may take, and bytes of its output that are kept, unless asked otherwise.
DEFAULT_TIMEOUT = 60.0
DEFAULT_LIMIT = 1 << 20
MAX_LIMIT = 8 << 20
#: A program that prints this much more than is kept is ended: reading on helps nobody.
_PATIENCE = 64 << 20
#: Programs at once, of one session and of all.
MAX_OF_SESSION = 16
MAX_OF_ALL = 64
#: Of standard input; it waits in the broker's memory until it is read.
MAX_STDIN = 4 << 20

_CHUNK = 65536


@dataclass(frozen=True)
class ExecResult:
    """How it ended: ``exit_code`` or ``signal``; and what it printed, both streams together at
    most as much as was asked for (``truncated``: there was more)."""

    exit_code: int | None
    signal: int | None
    stdout: bytes = field(repr=False)
    stderr: bytes = field(repr=False)
    truncated: bool
    timed_out: bool
    seconds: float


class Execs:
    """What runs beside the agents of one daemon."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._running: dict[str, int] = {}

    async def run(
        self,
        session: Session,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str = "",
        stdin: bytes = b"",
        timeout: float = DEFAULT_TIMEOUT,
        limit: int = DEFAULT_LIMIT,
        by: str = "",
    ) -> ExecResult:
        """Run ``argv`` to its end. Its tree is killed at ``timeout``, on a flood, when cancelled.

        The program is found along the agent's PATH; ``cwd`` is relative to where the agent began.
        ``environment`` comes on top of the agent's own. What the program leaves in the background
        when it ends by itself goes on, and ends with the session.

        Raises Invalid for what can't be given to a program, Conflict when the session has ended or
        has too much to do, StoreError when it can't be recorded (nothing runs then), and
        KernelError when the program can't be run.
        """
        spec = _spec(session, argv, environment or {}, cwd)
        if len(stdin) > MAX_STDIN:
            raise Invalid(f"standard input may have {MAX_STDIN:,} bytes", hint="write a file")
        limit = max(0, min(limit, MAX_LIMIT))
        if session.process is None or session.ending is not None:
            raise Conflict("the session does not run", hint="see: sandboxctl session list")
        here = self._running.get(session.id, 0)
        if here >= MAX_OF_SESSION or sum(self._running.values()) >= MAX_OF_ALL:
            raise Conflict("too many programs run beside agents already", hint="wait for one")
        self._running[session.id] = here + 1
        try:
            return await self._run(session, spec, stdin, timeout, limit, by)
        finally:
            self._running[session.id] -= 1
            if not self._running[session.id]:
                del self._running[session.id]

    async def _run(
        self, session: Session, spec: LaunchSpec, stdin: bytes, timeout: float, limit: int, by: str
    ) -> ExecResult:
        # Arguments may hold what nobody meant to keep; the program's name tells enough.
        who = {**session.about, "by": by}
        program = os.fsdecode(spec.argv[0])
        await self._audit.append(
            "session.exec", **who, program=program, arguments=len(spec.argv) - 1
        )
        began = trio.current_time()
        output = _Output(limit)
        exited: Exit | None = None
        timed_out = False
        try:
            exited, timed_out = await self._attend(session, spec, stdin, timeout, output)
        finally:
            with trio.CancelScope(shield=True):
                seconds = round(trio.current_time() - began, 3)
                await self._audit.append(
                    "session.exec_ended",
                    **who,
                    program=program,
                    exit_code=exited.code if exited else None,
                    signal=exited.signal if exited else None,
                    timed_out=timed_out,
                    output_bytes=output.received,
                    seconds=seconds,
                )
        return ExecResult(
            exited.code,
            exited.signal,
            bytes(output.kept["stdout"]),
            bytes(output.kept["stderr"]),
            output.truncated,
            timed_out,
            seconds,
        )

    async def _attend(
        self, session: Session, spec: LaunchSpec, stdin: bytes, timeout: float, output: _Output
    ) -> tuple[Exit, bool]:
        assert session.process is not None
        ends = attached()
        try:
            opened = open_further(
                session.process,
                spec,
                stdin=ends.child[0],
                stdout=ends.child[1],
                stderr=ends.child[2],
            )
            async with opened as further:
                ends.close_child()
                write, out, err = (trio.lowlevel.FdStream(fd) for fd in ends.take_operator())
                async with write, out, err:
                    timed_out = await _until_end(further, timeout, output, write, stdin, (out, err))
                    # All that the program itself wrote is in its pipes by now.
                    for name, stream in (("stdout", out), ("stderr", err)):
                        output.drain(name, stream.fileno())
                assert further.exit is not None
                return further.exit, timed_out
        finally:
            ends.close()


async def _until_end(
    further: Further,
    timeout: float,
    output: _Output,
    write: trio.lowlevel.FdStream,
    stdin: bytes,
    read: Sequence[trio.lowlevel.FdStream],
) -> bool:
    """Feed the program and read from it until it ends. Whether it had to be ended for its time."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_feed, write, stdin)
        for name, stream in zip(("stdout", "stderr"), read, strict=True):
            nursery.start_soon(output.read, name, stream)

        async def end_at_flood() -> None:
            await output.flooded.wait()
            await further.kill()

        nursery.start_soon(end_at_flood)
        with trio.move_on_after(timeout):
            await further.wait()
        timed_out = further.exit is None
        if timed_out:
            await further.kill()
            await further.wait()
        nursery.cancel_scope.cancel()
    return timed_out


class _Output:
    """Both streams, which together keep at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.kept = {"stdout": bytearray(), "stderr": bytearray()}
        self.received = 0
        self.truncated = False
        self.flooded = trio.Event()
        self._room, self._most = limit, limit + _PATIENCE

    async def read(self, name: str, stream: trio.lowlevel.FdStream) -> None:
        while data := await stream.receive_some(_CHUNK):
            self._take(name, data)

    def drain(self, name: str, fd: int) -> None:
        """What is there now, and no more: somebody in the background may go on writing."""
        left = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        with suppress(BlockingIOError):
            while left > 0 and (data := os.read(fd, min(left, _CHUNK))):
                left -= len(data)
                self._take(name, data)

    def _take(self, name: str, data: bytes | bytearray) -> None:
        self.received += len(data)
        self.truncated = self.truncated or len(data) > self._room
        kept = data[: self._room]
        self._room -= len(kept)
        self.kept[name] += kept
        if self.received > self._most:
            self.flooded.set()


async def _feed(write: trio.lowlevel.FdStream, data: bytes) -> None:
    async with write:
        with suppress(trio.BrokenResourceError):  # it doesn't read
            await write.send_all(data)


def _spec(
    session: Session, argv: Sequence[str], environment: Mapping[str, str], cwd: str
) -> LaunchSpec:
    if not argv or not argv[0]:
        raise Invalid("there is no program to run")
    own = agent_spec(session, bridge=b"")
    env = {**dict(own.env), **session.way_out}
    for name, value in environment.items():
        if reason := loader_reason(variable_name(name)):
            raise Invalid(
                f"{name} can't be set for a program beside an agent: {reason}",
                hint="let the command set it itself: sh -c 'NAME=value program'",
            )
        env[name.encode()] = variable_value(name, os.fsencode(value))
    if "\0" in cwd:
        raise Invalid("a directory's name holds a NUL byte")
    return replace(
        own,
        argv=tuple(os.fsencode(word) for word in argv),
        env=tuple(env.items()),
        cwd=posixpath.normpath(posixpath.join(own.cwd, cwd)),
        tty=False,
        mounts=(),
        files=(),
        listeners=(),
        further=False,
    )
