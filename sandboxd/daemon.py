"""The composition root: which parts run, in which order they start, in which order they stop.

Start: store, audit log, launcher, configuration, leftovers of a crash, admin socket, HTTP,
readiness. Stop: no new sessions, every session ended, HTTP and the admin socket, the launcher,
audit log, store.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from socket import socket

import trio

from sandboxd.access.control import Access
from sandboxd.access.ending import Dependent
from sandboxd.admin.methods import Methods
from sandboxd.admin.perform import guarded
from sandboxd.admin.server import Caller, serve_admin
from sandboxd.audit import AuditLog
from sandboxd.broker.approvals import Approvals
from sandboxd.broker.calls import Bounds, Calls
from sandboxd.broker.hooks import Hooks
from sandboxd.broker.socket import bind_session_socket, serve_session_socket
from sandboxd.errors import SandboxdError, Unauthenticated, Unavailable
from sandboxd.isolation.client import open_launcher
from sandboxd.isolation.uids import UidPool
from sandboxd.policy.mcpserver import with_pins
from sandboxd.policy.pinstore import PinStore
from sandboxd.running import Boot, Daemon, load
from sandboxd.service import Service
from sandboxd.sessions.manager import Manager, Request
from sandboxd.sessions.session import Session
from sandboxd.vault.vault import Vault

__all__ = ["run"]

_log = logging.getLogger("sandboxd")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Seconds that what was kept ready for a session may take to end with it.
_ENDING = 5.0


def run(boot: Boot) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status, or raises SandboxdError."""
    for number in _SIGNALS:
        # What the receiver leaves over is raised again when it closes, and must not end the
        # process by its default action, with sessions half recorded.
        signal.signal(number, signal.SIG_IGN)
    try:
        trio.run(_serve, boot)
    except BaseExceptionGroup as group:
        expected, rest = group.split(SandboxdError)
        if rest is not None or expected is None:
            raise
        raise _first(expected) from None
    return 0


async def _serve(boot: Boot) -> None:
    # Received from the first moment to the last; what comes while stopping changes nothing.
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        await _serve_until_told(boot, signals)


async def _serve_until_told(boot: Boot, signals: AsyncIterator[int]) -> None:
    async with _parts(boot) as daemon, trio.open_nursery() as nursery:
        await _compose(daemon, nursery)
        hooks = Hooks(lambda: daemon.config.settings.approvals, boot.webhook_key)
        daemon.calls.approvals.listeners.append(hooks.heard)
        for id in await daemon.sessions.clear_leftovers():
            _log.warning("session %s ended with an earlier daemon", id)
        await daemon.audit.append(
            "daemon.started",
            pid=os.getpid(),
            mode=daemon.launcher.mode,
            generation=daemon.config.generation,
            store=daemon.vault.generation,
        )
        await nursery.start(_admin, daemon)
        if boot.http is not None:
            from sandboxd.http.serve import serve_http  # the framework, only where it is used

            await nursery.start(serve_http, daemon, boot.http)
        if not daemon.launcher.cgroup.complete:
            _log.warning(
                "limits hold for single processes, not for whole sandboxes: %s",
                daemon.launcher.cgroup.lacking,
            )
        nursery.start_soon(_fail_without_launcher, daemon)
        nursery.start_soon(daemon.audit.keep)
        nursery.start_soon(_watchdog, boot.service)
        nursery.start_soon(hooks.run)
        nursery.start_soon(daemon.access.run)
        for warning in daemon.access.warnings:
            _log.warning("%s", warning)
        _give_back_memory()
        # What there is now stays: without it a full collection takes no tenth of a second.
        gc.freeze()
        boot.service.ready(daemon.status())
        _log.info("serving on %s, %s mode", boot.paths.admin_socket, daemon.launcher.mode)
        await _until_told_to_stop(daemon, signals)
        boot.service.stopping()
        _log.info("stopping")
        await daemon.audit.append("daemon.stopping", sessions=len(daemon.sessions.live))
        await daemon.sessions.stop_all(reason="the daemon stopped")
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _parts(boot: Boot) -> AsyncIterator[Daemon]:
    config = load(boot.paths)
    vault = await trio.to_thread.run_sync(Vault.open, boot.paths.store, boot.key)
    try:
        pins = PinStore.open(boot.paths.pins, vault.subkey("accepted tools"))
        config = with_pins(config, pins.pins)
        for warning in (*config.warnings, *vault.warnings):
            _log.warning("%s", warning)
        audit = await trio.to_thread.run_sync(
            AuditLog.open, boot.paths.audit, vault.subkey("audit")
        )
        try:
            async with open_launcher(boot.launcher) as launcher:
                yield Daemon(boot, config, vault, audit, launcher, pins)
        finally:
            audit.close()
    finally:
        vault.close()


async def _compose(daemon: Daemon, nursery: trio.Nursery) -> None:
    launcher, range_ = daemon.launcher, daemon.config.settings.uid_range
    uids = UidPool(privileged=launcher.privileged, first=range_.first, count=range_.count)
    daemon.calls = Calls(
        vault=daemon.vault,
        audit=daemon.audit,
        launcher=launcher,
        uids=uids,
        bounds=Bounds(total=daemon.config.settings.max_concurrent_calls),
        approvals=Approvals(daemon.audit, settings=lambda: daemon.config.settings.approvals),
    )

    async def serve(
        session: Session, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            async with daemon.calls.servers.attached(session):
                await serve_session_socket(
                    session.socket,
                    session,
                    daemon.calls,
                    listener=session.listener,
                    task_status=task_status,
                )
        finally:
            with trio.move_on_after(_ENDING, shield=True):
                await daemon.calls.end_session(session.id)
            daemon.calls.forget(session.id)

    daemon.sessions = Manager(
        paths=daemon.boot.paths,
        config=lambda: daemon.config,
        vault=daemon.vault,
        audit=daemon.audit,
        launcher=launcher,
        uids=uids,
        serve=serve,
        bind=bind_session_socket,
        bridge=files("sandboxd.broker").joinpath("bridge.py").read_bytes(),
        nursery=nursery,
    )

    async def stop(rests: Callable[[Dependent], bool], reason: str) -> Sequence[Dependent]:
        return await daemon.sessions.stop_where(rests, reason)

    daemon.access = await trio.to_thread.run_sync(
        partial(Access, daemon.vault, daemon.audit, config=lambda: daemon.config, stop=stop)
    )

    def admit(request: Request) -> None:
        if not daemon.access.admits(request.key, request.token):
            raise Unauthenticated

    daemon.sessions.admit = admit
    daemon.access.on_deactivated.append(daemon.pages.end_key)
    daemon.methods = guarded(daemon, Methods(daemon).table())


async def _admin(
    daemon: Daemon, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    boot = daemon.boot
    group = _group_id(daemon.config.settings.admin_group) if boot.identity else None
    allowed = {0, os.geteuid()}

    def allow(uid: int, gids: list[int]) -> bool:
        return uid in allowed or (group is not None and group in gids)

    async def refused(caller: Caller) -> None:
        await daemon.audit.append("admin.refused", uid=caller.uid, pid=caller.pid, by=caller.name)

    listener = boot.service.listen_fds.get("admin")
    own_group = group if group is not None and group in (os.getegid(), *os.getgroups()) else None
    await serve_admin(
        boot.paths.admin_socket,
        daemon.methods,
        allow=allow,
        mode=0o660 if own_group is not None else 0o600,
        group=own_group,
        listener=socket(fileno=listener) if listener is not None else None,
        refused=refused,
        task_status=task_status,
    )


async def _until_told_to_stop(daemon: Daemon, signals: AsyncIterator[int]) -> None:
    async for received in signals:
        if received != signal.SIGHUP:
            return
        with contextlib.suppress(SandboxdError):  # logged and recorded already
            await daemon.reload("SIGHUP")


async def _fail_without_launcher(daemon: Daemon) -> None:
    await daemon.launcher.gone.wait()
    raise Unavailable(
        "the launcher died, and every session with it",
        hint="the service manager restarts the daemon; look for an out-of-memory kill in the log",
    )


async def _watchdog(service: Service) -> None:
    if service.watchdog_interval is None:
        return
    while True:
        service.watchdog()
        await trio.sleep(service.watchdog_interval)


def _give_back_memory() -> None:
    """Return what loading left behind, cycles and free heap (malloc_trim(3), glibc alone)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _group_id(name: str) -> int | None:
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def _first(group: BaseExceptionGroup[SandboxdError]) -> SandboxdError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, SandboxdError)
    return found
