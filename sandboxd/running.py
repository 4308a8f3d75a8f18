"""The running daemon as its operators meet it: its parts, and the configuration in force."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from socket import socket
from typing import TYPE_CHECKING

import trio

from sandboxd.access.control import Access
from sandboxd.access.denials import Denials
from sandboxd.access.pages import Pages
from sandboxd.audit import AuditLog
from sandboxd.broker.calls import Calls
from sandboxd.errors import SandboxdError, Unavailable
from sandboxd.isolation.client import Launcher
from sandboxd.paths import Paths, shipped
from sandboxd.policy import Config, Settings, load_config
from sandboxd.policy.mcpserver import Pin, with_pins
from sandboxd.policy.pinstore import PinStore
from sandboxd.privileges import Identity
from sandboxd.secret import Secret
from sandboxd.service import Service
from sandboxd.sessions.manager import Manager
from sandboxd.vault.custody import MasterKey
from sandboxd.vault.vault import Vault

if TYPE_CHECKING:
    from sandboxd.admin.server import Method
    from sandboxd.http.listen import Listening

__all__ = ["Boot", "Daemon", "load"]

_log = logging.getLogger("sandboxd")

#: Settings that are read once, when the daemon starts.
_AT_START = (
    "key",
    "user",
    "admin_group",
    "log_level",
    "max_concurrent_calls",
    "uid_range",
    "http",
)


@dataclass
class Boot:
    """What was made ready before the event loop: directories, key, launcher, identity."""

    paths: Paths
    settings: Settings
    key: MasterKey
    custody: str
    launcher: socket
    service: Service
    identity: Identity | None
    lock: int
    webhook_key: Secret | None = None
    http: Listening | None = None


@dataclass
class Daemon:
    """The running parts, and the one piece of state that changes: the configuration in force."""

    boot: Boot
    config: Config
    vault: Vault
    audit: AuditLog
    launcher: Launcher
    pins: PinStore
    started_at: float = field(default_factory=time.time)
    sessions: Manager = field(init=False)
    calls: Calls = field(init=False)
    access: Access = field(init=False)
    #: Who is signed in to the dashboard.
    pages: Pages = field(default_factory=Pages)
    #: What operators can ask of it, each method behind its permission and team.
    methods: Mapping[str, Method] = field(init=False)
    #: What was refused to whom lately.
    denials: Denials = field(default_factory=Denials)
    #: Servers whose manifest names definitions that they were asked about already.
    asked: set[tuple[str, str, str]] = field(default_factory=set)
    _reloading: trio.Lock = field(default_factory=trio.Lock)

    async def check(self) -> Config:
        """Read the configuration anew without applying it. ConfigErrors lists all that is wrong."""
        loaded = await trio.to_thread.run_sync(load, self.boot.paths)
        return with_pins(loaded, self.pins.pins)

    async def reload(self, by: str) -> bool:
        """Put a valid new configuration in force; whether it differs from the old one.

        Live sessions keep the agent, policy and versions that they started with. A configuration
        that can't be loaded raises, and the old one stays in force.
        """
        async with self._reloading:
            return await self._reload(by)

    async def _reload(self, by: str) -> bool:
        self.boot.service.reloading()
        try:
            try:
                config = await self.check()
            except Exception as failure:  # noqa: BLE001 - the old configuration must stay
                refused = failure if isinstance(failure, SandboxdError) else _unreadable(failure)
                await self.audit.append("daemon.reload_refused", by=by, problem=refused.message)
                _log.error("reload refused, the old configuration stays: %s", refused.message)
                raise refused from None
            changed = config.generation != self.config.generation
            await self.audit.append(
                "daemon.reloaded", by=by, generation=config.generation, changed=changed
            )
            self.config = config
            for warning in self.warnings():
                _log.warning("%s", warning)
            return changed
        finally:
            self.boot.service.ready(self.status())

    async def accept(self, pin: Pin, by: str) -> bool:
        """Accept what a server offers and put the configuration in force; whether it differs.

        Raises what a reload raises; the acceptance itself stands then.
        """
        async with self._reloading:
            await self.audit.append(
                "tools.accepted",
                by=by,
                server=pin.server,
                digest=pin.digest,
                tools=[definition.name for definition in pin.definitions],
            )
            await trio.to_thread.run_sync(self.pins.put, pin)
            return await self._reload(by)

    async def unaccept(self, server: str, by: str) -> bool:
        """Accept nothing of ``server`` any more; whether the configuration in force differs."""
        async with self._reloading:
            await self.audit.append("tools.forgotten", by=by, server=server)
            await trio.to_thread.run_sync(self.pins.remove, server)
            return await self._reload(by)

    def warnings(self) -> list[str]:
        """What is wrong with the configuration in force, and what of it is not in force yet."""
        old, new = self.boot.settings, self.config.settings
        waiting = [
            f"sandboxd.yaml: the new {name} takes effect at the next start of the daemon"
            for name in _AT_START
            if getattr(old, name) != getattr(new, name)
        ]
        if _signed_by(old) != _signed_by(new):
            waiting.append(
                "sandboxd.yaml: the webhook's new secret takes effect at the next start of the "
                "daemon"
            )
        return [*self.config.warnings, *self.access.warnings, *waiting]

    def status(self) -> str:
        count = len(self.sessions.live)
        return f"{count} session{'' if count == 1 else 's'}"


def load(paths: Paths) -> Config:
    """The configuration of one daemon. ConfigErrors lists all that is wrong with it."""
    return load_config(
        paths.config,
        shipped_policies=shipped("policies"),
        shipped_tools=shipped("tools"),
        private={"the daemon's state": paths.state, "the daemon's sockets": paths.runtime},
    )


def _signed_by(settings: Settings) -> object:
    webhook = settings.approvals.webhook
    return webhook and (webhook.secret_file, webhook.credential)


def _unreadable(failure: Exception) -> SandboxdError:
    """An error that the loader does not know, by its class: its text may quote anything."""
    return Unavailable(
        f"the configuration could not be read ({type(failure).__name__})",
        hint="look for what is unusual in the configuration directory: ls -lR",
    )
