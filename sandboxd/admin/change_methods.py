"""Changes of copy-on-write workspaces over the admin socket: review, apply, discard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sandboxd.admin.params import param, strings
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.admin.session_methods import find_record
from sandboxd.errors import Invalid
from sandboxd.running import Daemon

__all__ = ["ChangeMethods"]


class ChangeMethods:
    """``session.diff``, ``session.apply`` and ``session.discard``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {
            "session.diff": self.diff,
            "session.apply": self.apply,
            "session.discard": self.discard,
        }

    async def diff(self, caller: Caller, params: dict[str, Any]) -> Reply:
        id, paths = await self._session(params), _paths(params)
        text = params.get("text", True) is True
        return Reply(await self._daemon.sessions.changes.diff(id, paths, text=text))

    async def apply(self, caller: Caller, params: dict[str, Any]) -> Reply:
        id, paths = await self._session(params), _paths(params)
        force = params.get("force") is True
        changes = self._daemon.sessions.changes
        return Reply(await changes.apply(id, paths, force=force, by=caller.name))

    async def discard(self, caller: Caller, params: dict[str, Any]) -> Reply:
        id = await self._session(params)
        await self._daemon.sessions.changes.discard(id, by=caller.name)
        return Reply({"session": id, "state": "discarded"})

    async def _session(self, params: dict[str, Any]) -> str:
        return (await find_record(self._daemon, param(params, "id", str))).id


def _paths(params: dict[str, Any]) -> list[str]:
    """Paths within the workspace, in their plain form; /workspace/a is as good as a."""
    paths = strings(params, "paths") if params.get("paths") is not None else []
    plain = [path.removeprefix("/workspace/").rstrip("/") for path in paths]
    for path in plain:
        if not path or path.startswith("/") or {"", ".", ".."} & set(path.split("/")):
            raise Invalid(
                "a path is relative to the workspace, without . and ..",
                hint="as session diff prints it",
            )
    return plain
