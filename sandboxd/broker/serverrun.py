"""One MCP server from its launch to the end of its process tree."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets as random
import time
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import trio

from sandboxd.audit import JSON, AuditLog
from sandboxd.broker import descriptors
from sandboxd.broker.chosen import Chosen, unseal
from sandboxd.broker.failures import describe, first
from sandboxd.broker.launch import Prepared, prepare
from sandboxd.broker.mcppeer import Fault, Peer
from sandboxd.broker.session import Session, about
from sandboxd.egress.outlet import open_outlet
from sandboxd.errors import KernelError, SandboxdError, Unavailable
from sandboxd.isolation.client import Exit, Launcher, Process
from sandboxd.isolation.uids import UidPool
from sandboxd.isolation.wire import FileSpec
from sandboxd.policy.decide import Decision
from sandboxd.policy.definitions import digest_of, read_definitions
from sandboxd.policy.mcpserver import McpServer
from sandboxd.policy.programs import Held, hold_program
from sandboxd.redact import Mask, Matcher
from sandboxd.vault.vault import Vault

__all__ = ["Running", "Start"]

log = logging.getLogger(__name__)

#: Bytes of a server's standard error that are remembered: its end.
_LAST_WORDS = 4096
#: Seconds that a killed tree may take to be reaped, and the last audit record to be written.
_REAP = 10.0
#: Seconds that standard error may still take once the tree is dead.
_DRAIN = 1.0
#: Where the program that puts secrets into a command line stands in the sandbox.
_STARTER = "/run/sandboxd/start"


@dataclass(frozen=True)
class Start:
    """What starting a server takes."""

    vault: Vault
    audit: AuditLog
    launcher: Launcher
    uids: UidPool


class Running:
    """A server and its connection. One task runs :meth:`run`; calls use the rest meanwhile.

    ``offered`` holds the digests of what it offers, by the server's own names; ``digest`` is that
    of all of it.
    """

    def __init__(
        self, start: Start, session: Session, server: McpServer, terms: Decision, chosen: Chosen
    ) -> None:
        self.id = "m-" + random.token_hex(8)
        self.session, self.server = session, server
        self.versions = {sealed.name: sealed.version for _, sealed in chosen}
        self.started_at = time.time()
        self.calls = 0
        self.total = 0
        self.pid = 0
        self.reason = ""
        self.told = ""
        self.listed: list[Any] = []
        self.offered: dict[str, str] = {}
        self.digest = ""
        self.exit: Exit | None = None
        self.ended = trio.Event()
        self._begin, self._terms, self._chosen = start, terms, chosen
        self._began = trio.current_time()
        self._matcher = Matcher({})
        self._stderr = bytearray()
        self._ready = trio.Event()
        self._failure: SandboxdError | None = None
        self._scope = trio.CancelScope()
        self._idle = trio.CancelScope()
        self._listing = trio.Lock()
        self._peer: Peer | None = None

    @property
    def peer(self) -> Peer:
        if self._peer is None:
            raise Fault("it is not there yet")
        return self._peer

    @property
    def ready(self) -> bool:
        return self._ready.is_set() and self._peer is not None

    @property
    def usable(self) -> bool:
        """Whether it takes another call, or will when it has started."""
        gone = self._scope.cancel_called or self._idle.cancel_called or self.ended.is_set()
        return not gone and (self._peer is None or self._peer.fault is None)

    def end(self, reason: str) -> None:
        """Let its whole tree die. Calls that it still has fail with ``reason``."""
        self.reason = self.reason or reason
        self._scope.cancel()

    def hold(self) -> None:
        """It has one call more: it does not end for idleness now."""
        self.calls += 1
        self._idle.deadline = float("inf")

    def release(self) -> None:
        self.calls -= 1
        if not self.calls and self.ready:
            self._idle.deadline = trio.current_time() + self.server.idle

    async def wait_ready(self) -> None:
        """Until it may be called. Raises what kept it from starting."""
        await self._ready.wait()
        if self._failure is not None:
            raise self._failure
        if not self.usable:
            raise Fault(self.reason or "it ended")

    async def settle(self, why: str) -> None:
        """After a fault: end it, and wait until its standard error is whole."""
        self.end(why)
        with trio.move_on_after(_REAP):
            await self.ended.wait()

    def mask(self) -> Mask:
        """Takes the values that the server holds out of what it says."""
        return Mask(self._matcher)

    def last_words(self) -> bytes:
        """The end of its standard error, without secrets."""
        return self.mask().bytes(bytes(self._stderr))

    async def list_tools(self) -> None:
        """Ask what it offers. One at a time, so that no answer is older than another."""
        async with self._listing:
            self.listed = await self.peer.list_tools()
            definitions, _ = read_definitions(self.listed, self.server.name)
            allowed = [d for d in definitions if self.server.may_offer(d.name)]
            self.offered = {definition.name: definition.digest for definition in allowed}
            self.digest = digest_of(allowed)

    async def run(self) -> None:
        """Own the server until it is ended, idle or gone. Never raises; failures are kept."""
        try:
            with self._scope:
                await self._run()
        except* SandboxdError as group:
            self._fail(first(group))
        except* OSError as group:
            self._fail(Unavailable(first(group).strerror or "an operating system error"))
        except* Exception as group:  # noqa: BLE001 - a server must not end the broker
            # No traceback: exceptions quote what they choke on, and that can be a secret.
            log.error("server %s failed: %s", self.id, describe(first(group)))
            self._fail(Unavailable("an internal error", hint="the daemon's log says more"))
        finally:
            self._fail(Fault(self.reason or "it ended"))
            self.ended.set()

    def _fail(self, error: SandboxdError) -> None:
        """Before it was ready the error is the caller's; later it says why the server ended."""
        if self._ready.is_set():
            self.reason = self.reason or error.message
            return
        if isinstance(error, KernelError):
            # The path is the host's, which an agent need not know; the operator must.
            log.error("server %s failed: %s", self.id, error.message)
            error = KernelError(error.syscall, error.errno)
        said = self.last_words().decode("utf-8", "replace").strip()
        more = f"; it said: {said[-1000:]}" if said else ""
        self._failure = Unavailable(
            f"the server {self.server.name} did not start: {error.message}{more}", hint=error.hint
        )
        self._ready.set()

    async def _run(self) -> None:
        held = await trio.to_thread.run_sync(hold_program, self.server.launch)
        with contextlib.closing(held):
            await self._run_held(held)

    async def _run_held(self, held: Held) -> None:
        unsealed = await unseal(self._begin.vault, self._chosen)
        self._matcher = Matcher({spec.variable: value for spec, value in unsealed if spec.redact})
        session = self.session
        # overlayfs has no id-mapped mounts: who shares its files has to share its uid.
        shares = session.overlay >= 0 and self._terms.workspace != "none"
        uid = session.uid if shares else self._begin.uids.acquire()
        alive = False
        try:
            prepared = _started_by(
                self.server,
                prepare(
                    self._terms,
                    unsealed,
                    call=self.id,
                    uid=uid,
                    workspace=session.workspace,
                    overlay=shares,
                    held=held,
                ),
            )
            del unsealed
            alive = True
            alive = not await self._attend(prepared)
        finally:
            if not alive and not shares:  # else something may still run as it
                self._begin.uids.release(uid)

    async def _attend(self, prepared: Prepared) -> bool:
        """Launch, speak, and stay until the end; whether the tree is dead then."""
        async with trio.open_nursery() as nursery:
            with contextlib.ExitStack() as given:
                stdout, stdout_end = descriptors.output(given)
                stderr, stderr_end = descriptors.output(given)
                stdin, stdin_end = descriptors.input_(given)
                nursery.start_soon(self._listen, stderr, heard := trio.Event())
                way_out = (self._begin.audit.append, self._begin.vault, self.session.snapshot)
                outlet = given.enter_context(open_outlet(prepared.egress, self._who(), *way_out))
                try:
                    process = await self._begin.launcher.launch(
                        outlet.complete(prepared.spec),
                        stdin=stdin_end,
                        stdout=stdout_end,
                        stderr=stderr_end,
                        extra=[
                            *(descriptors.memory(data, given) for data in prepared.descriptors),
                            *([self.session.overlay] if prepared.spec.brings_namespace else ()),
                            *outlet.fds,
                        ],
                    )
                    try:
                        outlet.take()
                    except BaseException:  # nothing of it may run on that nobody attends to
                        await self._end(process)
                        raise
                except BaseException:
                    await trio.aclose_forcefully(stdout)
                    await trio.aclose_forcefully(stdin)
                    raise
            self.pid = process.pid
            nursery.start_soon(outlet.serve)
            self._peer = Peer(stdin, stdout)
            try:
                async with stdin, stdout:
                    async with trio.open_nursery() as talking:
                        talking.start_soon(self._talk, talking.cancel_scope)
                        talking.start_soon(self._watch, process, talking.cancel_scope)
                        await self._greet(process)
                        await self._serve()
                        talking.cancel_scope.cancel()
            finally:
                dead = await self._end(process)
                with trio.move_on_after(_DRAIN, shield=True):
                    await heard.wait()
            nursery.cancel_scope.cancel()
        return dead

    async def _greet(self, process: Process) -> None:
        """From the handshake to the first list of tools, within the time a start may take."""
        try:
            with trio.fail_after(self.server.startup):
                await self.peer.initialize()
                await self.list_tools()
        except trio.TooSlowError:
            raise Unavailable(
                f"it was not ready within {self.server.startup:g} s",
                hint=f"a slow one may have more: startup, in {self.server.source}",
            ) from None
        except Fault:
            with trio.move_on_after(_DRAIN):  # the connection is lost: its end says more
                raise Unavailable(f"it ended with {_how(await process.wait())}") from None
            raise
        injected: list[JSON] = [
            {"name": sealed.name, "version": sealed.version, "delivery": spec.delivery}
            for spec, sealed in self._chosen
        ]
        await self._begin.audit.append(
            "server.started",
            **self._who(),
            pid=self.pid,
            lifetime=self.server.lifetime,
            injected=injected,
        )

    async def _serve(self) -> None:
        """Ready, until nobody has called for the idle time."""
        self._ready.set()
        with self._idle:
            if not self.calls:
                self._idle.deadline = trio.current_time() + self.server.idle
            await trio.sleep_forever()
        self.reason = self.reason or f"it was idle for {self.server.idle:g} s"

    async def _talk(self, scope: trio.CancelScope) -> None:
        peer = self.peer
        await peer.run()
        if self._ready.is_set():
            self.reason = self.reason or (peer.fault.message if peer.fault else "")
            scope.cancel()

    async def _watch(self, process: Process, scope: trio.CancelScope) -> None:
        """Its process has ended by itself: nothing is left to talk to."""
        end = await process.wait()
        if self._ready.is_set():
            self.reason = self.reason or f"it ended with {_how(end)}"
            scope.cancel()

    async def _listen(self, stderr: trio.lowlevel.FdStream, heard: trio.Event) -> None:
        """Standard error, of which only the end is kept."""
        try:
            async with stderr:
                while data := await stderr.receive_some(65536):
                    self._stderr += data
                    del self._stderr[:-_LAST_WORDS]
        finally:  # cancelled as well: whoever ends the server waits for this
            heard.set()

    async def _end(self, process: Process) -> bool:
        """Kill what is left of the tree and record its end, cancelled or not."""
        dead = False
        with trio.move_on_after(_REAP, shield=True):
            with contextlib.suppress(Unavailable):  # the launcher is gone, and the tree with it
                await process.kill()
                self.exit = await process.wait()
            dead = True
            try:
                await self._record_end()
            except SandboxdError as error:
                log.error("server %s ended, but it can't be recorded: %s", self.id, error.message)
        return dead

    async def _record_end(self) -> None:
        if not self._ready.is_set() or self._failure is not None:
            return  # the call that wanted it records why it has none
        end = self.exit
        await self._begin.audit.append(
            "server.ended",
            **self._who(),
            reason=self.reason,
            exit_code=end.code if end else None,
            signal=end.signal if end else None,
            seconds=round(trio.current_time() - self._began, 3),
            calls=self.total,
            cpu_ms=end.cpu_ms if end else 0,
            peak_kib=end.peak_kib if end else 0,
        )

    def _who(self) -> dict[str, Any]:
        return {**about(self.session), "server": self.server.name, "id": self.id}


def _how(end: Exit) -> str:
    if end.oom:
        return "no memory left"
    return f"status {end.code}" if end.signal is None else f"signal {end.signal}"


def _started_by(server: McpServer, prepared: Prepared) -> Prepared:
    """The launch, by way of a program of ours where the command line holds secrets."""
    if not server.argv.names:
        return prepared
    words = [
        [element.before, element.name] for group in server.argv.groups for element in group.elements
    ]
    name = "node_start.mjs" if server.runtime == "node" else "python_start.py"
    starter = _STARTER + name[name.index(".") :]
    source = files("sandboxd.isolation").joinpath(name).read_bytes()
    *interpreter, program = prepared.spec.argv
    told = json.dumps([os.fsdecode(program), *words]).encode()
    spec = replace(
        prepared.spec,
        argv=(*interpreter, starter.encode(), told),
        files=(*prepared.spec.files, FileSpec(starter, source, 0o444)),
    )
    return replace(prepared, spec=spec)
