"""What the tests of access share: the real thing on a real store, with time in the test's hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandboxd.access.control import Access
from sandboxd.access.ending import Dependent
from sandboxd.access.keys import ApiKey
from sandboxd.access.roles import Principal
from sandboxd.audit import AuditLog
from sandboxd.paths import shipped
from sandboxd.policy import Config, load_config
from sandboxd.secret import Secret
from sandboxd.vault import MasterKey, Vault

HOST = Principal("host", "root", "host", None)
NOW = 1_800_000_000.0


@dataclass(frozen=True)
class Running:
    """What access may know of a session."""

    id: str
    key: str = ""
    token: str = ""
    subject: str = ""
    team: str = "default"


@dataclass
class Parts:
    """A store, a log, a configuration; and :class:`Access` over them, as often as opened."""

    directory: Path
    now: float = NOW
    running: list[Running] = field(default_factory=list)
    stopped: list[tuple[str, str]] = field(default_factory=list)
    #: Runs in the place of a session's end.
    meanwhile: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        self.config = self._write()
        self.key = MasterKey(Secret(bytes(range(32))))
        self.open()

    def open(self) -> Access:
        self.vault = Vault.open(self.directory / "store.sqlite", self.key)
        self.audit = AuditLog.open(self.directory / "audit", self.vault.subkey("audit"))
        self.access = Access(
            self.vault,
            self.audit,
            config=lambda: self.config,
            stop=self.stop,
            clock=lambda: self.now,
        )
        return self.access

    def reopen(self) -> Access:
        """As after the daemon's next start."""
        self.close()
        return self.open()

    def close(self) -> None:
        self.audit.close()
        self.vault.close()

    async def key_of(self, role: str = "operator", **options: Any) -> tuple[ApiKey, str]:
        """A new key and its text."""
        fields = {"team": "default", "role": role, "label": "a test", "by": HOST} | options
        key, secret = await self.access.create_key(**fields)
        return key, secret.reveal().decode()

    def reload(self) -> None:
        """Put what the files say now in force."""
        self.config = self._read()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [record for record in self.audit.tail(1000) if record["event"] == name]

    async def stop(self, rests: Callable[[Dependent], bool], reason: str) -> Sequence[Dependent]:
        found = [one for one in self.running if rests(one)]
        if self.meanwhile is not None:
            self.meanwhile()
        for one in found:
            self.running.remove(one)
            self.stopped.append((one.id, reason))
        return found

    def _write(self) -> Config:
        config = self.directory / "config"
        for name in ("agents", "tools", "policies"):
            (config / name).mkdir(parents=True, exist_ok=True)
        teams = {"blue": {"name": "Blue"}, "red": {"name": "Red"}}
        (config / "sandboxd.yaml").write_text(json.dumps({"version": 1, "teams": teams}))
        for slug, team in (
            ("crawler", "default"),
            ("mailer", "default"),
            ("cook", "blue"),
            ("spy", "red"),
        ):
            agent = {"version": 1, "description": slug, "command": ["/bin/true"], "team": team}
            (config / "agents" / f"{slug}.yaml").write_text(json.dumps(agent))
        return self._read()

    def _read(self) -> Config:
        return load_config(
            self.directory / "config",
            shipped_policies=shipped("policies"),
            shipped_tools=shipped("tools"),
        )
