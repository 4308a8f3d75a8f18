"""A broker of real parts: launcher, vault, audit log, configuration on disk. Only the daemon and
its sessions are left out: the test is the session."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sandboxd.audit import AuditLog
from sandboxd.broker.calls import Bounds, Calls
from sandboxd.broker.capture import Progress
from sandboxd.broker.result import CallResult
from sandboxd.isolation.client import Launcher
from sandboxd.isolation.uids import UidPool
from sandboxd.paths import shipped
from sandboxd.policy import Agent, Config, load_config
from sandboxd.secret import Secret
from sandboxd.vault.custody import create_key_file
from sandboxd.vault.vault import Snapshot, Vault

AGENT = "worker"
ORDINARY_UID = 64123


@dataclass
class StandIn:
    """A session as the broker sees one."""

    id: str
    config: Config
    agent: Agent
    snapshot: Snapshot
    workspace: Path | None
    uid: int
    pid: int
    overlay: int = -1


class Broker:
    """Real parts on a directory, and short ways to give them tools, variables and calls."""

    def __init__(self, root: Path, launcher: Launcher, bounds: Bounds | None) -> None:
        self.root = root
        self.launcher = launcher
        if os.geteuid() == 0:  # sandboxes of an ordinary user must be able to reach what they mount
            for directory in (root, *root.parents):
                if directory.is_relative_to("/tmp/pytest-of-root"):
                    directory.chmod(0o755)
        self.config_dir = root / "config"
        for folder in ("agents", "tools", "policies"):
            (self.config_dir / folder).mkdir(parents=True)
        self.workspace: Path | None = None
        key = create_key_file(root / "key")
        self.vault = Vault.open(root / "store.sqlite", key)
        self.audit = AuditLog.open(root / "audit", key.derive("audit"))
        self.uids = UidPool(privileged=launcher.privileged)
        self.tools: list[str] = []
        self.agent_more: dict[str, Any] = {}
        self._config: Config | None = None
        self.calls = Calls(
            vault=self.vault,
            audit=self.audit,
            launcher=launcher,
            uids=self.uids,
            bounds=bounds,
        )

    def close(self) -> None:
        self.audit.close()
        self.vault.close()

    @property
    def config(self) -> Config:
        if self._config is None:
            agent = {
                "version": 1,
                "description": "a test",
                "command": ["/bin/true"],
                "tools": self.tools,
                **self.agent_more,
            }
            (self.config_dir / "agents" / f"{AGENT}.yaml").write_text(json.dumps(agent))
            self._config = load_config(
                self.config_dir,
                shipped_policies=shipped("policies"),
                shipped_tools=shipped("tools"),
            )
        return self._config

    def tool(
        self,
        name: str,
        script: str = "",
        /,
        *,
        beside: Mapping[str, str] = MappingProxyType({}),
        **manifest: Any,
    ) -> None:
        """A tool that runs ``script`` with /bin/sh; ``manifest`` adds to and replaces its keys.

        Argument ``word`` is the script's $1. ``beside`` are programs beside the manifest.
        """
        directory = self.config_dir / "tools" / name
        directory.mkdir()
        for file, text in beside.items():
            (directory / file).write_text(text)
            (directory / file).chmod(0o755)
        word = {"word": {"type": "string"}}
        keys: dict[str, Any] = {
            "version": 1,
            "name": name,
            "description": f"the tool {name}",
            "program": "/bin/sh",
            "argv": ["-c", script.replace("{", "{{").replace("}", "}}"), name, "{word}"],
            "input": {"type": "object", "additionalProperties": False, "properties": word},
            **manifest,
        }
        (directory / "tool.yaml").write_text(json.dumps(keys))
        self.tools.append(name)
        self._config = None

    def set(self, **values: str | bytes) -> None:
        self.vault.of("default").set(
            AGENT, {name: Secret(value) for name, value in values.items()}, by="test"
        )

    def session(self, id: str = "s-0000000000000001") -> StandIn:
        return StandIn(
            id=id,
            config=self.config,
            agent=self.config.agents[AGENT],
            snapshot=self.vault.of("default").snapshot(AGENT),
            workspace=self.workspace,
            uid=os.geteuid(),
            pid=os.getpid(),
        )

    async def call(
        self,
        tool: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        session: StandIn | None = None,
        progress: Progress | None = None,
    ) -> CallResult:
        session = session or self.session()
        return await self.calls.call(session, tool, arguments or {}, progress=progress)

    async def run(self, script: str, **manifest: Any) -> CallResult:
        """Make a tool of ``script`` and call it once."""
        name = f"t{len(self.tools)}"
        self.tool(name, script, **manifest)
        return await self.call(name)

    def records(self, event: str | None = None) -> list[dict[str, Any]]:
        return [r for r in self.audit.tail(1000) if event in (None, r["event"])]

    def make_workspace(self) -> Path:
        path = self.root / "workspace"
        path.mkdir()
        if os.geteuid() == 0:
            os.chown(path, ORDINARY_UID, ORDINARY_UID)
        self.workspace = path
        return path
