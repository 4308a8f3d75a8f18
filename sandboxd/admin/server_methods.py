"""MCP servers for operators: what they offer, what was accepted of it, and accepting it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import trio

from sandboxd.admin.offers import offered_by
from sandboxd.admin.params import iso, known_agent, param
from sandboxd.admin.reach import agents_of
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.errors import Conflict, Invalid, NotFound
from sandboxd.names import shown
from sandboxd.policy import Agent, Config
from sandboxd.policy.definitions import Definition, digest_of, exposed, validator_of
from sandboxd.policy.mcpserver import McpServer, Pin
from sandboxd.running import Daemon

__all__ = ["ServerMethods"]

#: Inspections that wait to be accepted, of all servers together.
_REMEMBERED = 32


class ServerMethods:
    """``tools.pins``, ``tools.inspect``, ``tools.accept`` and ``tools.forget``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._inspected: dict[tuple[str, str], tuple[Definition, ...]] = {}

    def table(self) -> Mapping[str, Method]:
        return {
            "tools.pins": self.pins,
            "tools.inspect": self.inspect,
            "tools.accept": self.accept,
            "tools.forget": self.forget,
        }

    async def pins(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """Every configured server, and what was accepted of it."""
        config, accepted = self._daemon.config, self._daemon.pins.pins
        seen = agents_of(self._daemon, caller.principal)
        rows = []
        for name in sorted({*config.servers, *accepted}):
            listing = [slug for slug in _agents_of(config, name) if slug in seen]
            if not listing and caller.principal.team is not None:
                continue
            server, pin = config.servers.get(name), accepted.get(name)
            changes = self._changes(name)
            offered = [t for t in config.tools if t.startswith(f"{name}__")]
            rows.append(
                {
                    "server": name,
                    "source": server.source if server else None,
                    "state": _state(server, pin, offered, changes),
                    "tools": sorted(offered),
                    "digest": pin.digest if pin else None,
                    "accepted_by": pin.by if pin else None,
                    "accepted_at": iso(pin.at) if pin else None,
                    "changes": list(changes),
                    "agents": listing,
                    "running": sum(
                        one.server.name == name
                        and caller.principal.reaches(one.session.agent.team, one.session.agent.slug)
                        for one in self._daemon.calls.servers.live()
                    ),
                }
            )
        return Reply({"servers": rows})

    async def inspect(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """Start a server for one agent and ask what it offers, compared with what was accepted."""
        config = self._daemon.config
        server = _server(config, params)
        agent = self._agent(server, params)
        found, problems = await offered_by(self._daemon, server, agent, caller.name)
        digest = digest_of(found)
        self._remember(server.name, digest, found)
        pin = self._daemon.pins.pins.get(server.name)
        old = {d.name: d for d in pin.definitions} if pin else {}
        return Reply(
            {
                "server": server.name,
                "agent": agent.slug,
                "digest": digest,
                "accepted": pin.digest if pin else None,
                "wanted": server.definitions or None,
                "tools": [_described(server.name, d, old.get(d.name)) for d in found],
                "gone": sorted(set(old) - {d.name for d in found}),
                "problems": list(problems),
            }
        )

    async def accept(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """Accept what was inspected, by its digest: exactly what the operator was shown."""
        server = _server(self._daemon.config, params)
        digest = param(params, "digest", str)
        found = self._inspected.get((server.name, digest))
        if found is None:
            raise NotFound(
                f"{server.name} was not seen to offer {shown(digest)}",
                hint=f"look at what it offers first: sandboxctl tools accept {server.name}",
            )
        if server.definitions and digest != server.definitions:
            raise Conflict(
                f"{server.source} names other definitions: {server.definitions}",
                hint="if these are right, change 'definitions' there; then: sandboxctl reload",
            )
        if not found:
            raise Invalid(f"{server.name} offers nothing that could be accepted")
        pin = Pin(server.name, found, caller.name, time.time())
        # Once begun it is done to the end: what is accepted must be in force.
        with trio.CancelScope(shield=True):
            await self._daemon.accept(pin, caller.name)
        self._daemon.calls.servers.changed.pop(server.name, None)
        tools = sorted(t for t in self._daemon.config.tools if t.startswith(f"{server.name}__"))
        return Reply({"server": server.name, "digest": digest, "tools": tools})

    async def forget(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """Take an acceptance back: the server has no tools for sessions that start from now on."""
        name = param(params, "server", str)
        if name not in self._daemon.pins.pins:
            raise NotFound(
                f"nothing was accepted of {shown(name)}", hint="see: sandboxctl tools pins"
            )
        with trio.CancelScope(shield=True):
            await self._daemon.unaccept(name, caller.name)
        return Reply({"server": name})

    def _changes(self, name: str) -> tuple[str, ...]:
        """How the server differed when a session last met it, unless that was accepted since."""
        digest, changes = self._daemon.calls.servers.changed.get(name, ("", ()))
        pin = self._daemon.pins.pins.get(name)
        return () if pin is not None and pin.digest == digest else changes

    def _remember(self, server: str, digest: str, found: tuple[Definition, ...]) -> None:
        self._inspected.pop((server, digest), None)
        self._inspected[server, digest] = found
        while len(self._inspected) > _REMEMBERED:
            del self._inspected[next(iter(self._inspected))]

    def _agent(self, server: McpServer, params: dict[str, Any]) -> Agent:
        """Who it is started for: the one that is named, or the only one that lists it."""
        if params.get("agent") is not None:
            return known_agent(self._daemon, params)
        config = self._daemon.config
        listing = _agents_of(config, server.name)
        if len(listing) != 1:
            raise Invalid(
                f"no agent lists {server.name}"
                if not listing
                else f"{server.name} belongs to several agents: {', '.join(listing)}",
                hint="say whose variables it is started with: --agent AGENT",
            )
        return config.agents[listing[0]]


def _server(config: Config, params: dict[str, Any]) -> McpServer:
    name = param(params, "server", str)
    if name not in config.servers:
        raise NotFound(
            f"no MCP server {shown(name)}",
            hint="known servers: "
            + (", ".join(sorted(config.servers)) or "none; see docs/mcp-servers.md"),
        )
    return config.servers[name]


def _agents_of(config: Config, server: str) -> list[str]:
    return sorted(
        slug
        for slug, agent in config.agents.items()
        if any(tool.partition("__")[0] == server for tool in agent.tools)
    )


def _state(
    server: McpServer | None, pin: Pin | None, offered: list[str], changes: tuple[str, ...]
) -> str:
    if server is None:
        return "not configured"
    if pin is None:
        return "not accepted"
    if not offered:
        return "not what the manifest names"
    return "changed" if changes else "accepted"


def _described(server: str, definition: Definition, old: Definition | None) -> dict[str, Any]:
    _, left = validator_of(definition.input_schema)
    state = "new" if old is None else "same" if old.digest == definition.digest else "changed"
    keys = sorted({*definition.content, *(old.content if old else {})})
    return {
        "name": definition.name,
        "exposed": exposed(server, definition.name),
        "state": state,
        "digest": definition.digest,
        "definition": dict(definition.content),
        "was": dict(old.content) if old is not None and state == "changed" else None,
        "changed_keys": [
            key
            for key in keys
            if old is not None and old.content.get(key) != definition.content.get(key)
        ],
        "unchecked": list(left),
    }
