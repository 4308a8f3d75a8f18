"""What MCP servers offer, asked on an operator's behalf, or on a manifest's that names it."""

from __future__ import annotations

import logging
import time

import trio

from sandboxd.admin.params import thread
from sandboxd.admin.standing import Standing
from sandboxd.broker.chosen import choose
from sandboxd.errors import Denied, SandboxdError
from sandboxd.policy import Agent
from sandboxd.policy.decide import launch_terms, session_terms
from sandboxd.policy.definitions import Definition, digest_of
from sandboxd.policy.mcpserver import McpServer, Pin, server_of
from sandboxd.running import Daemon

__all__ = ["offered_by", "take_named"]

_log = logging.getLogger(__name__)


async def offered_by(
    daemon: Daemon, server: McpServer, agent: Agent, by: str
) -> tuple[tuple[Definition, ...], tuple[str, ...]]:
    """Start ``server`` with the agent's variables: what it offers, and why some can't be had.

    Raises Denied when the agent's policy or store doesn't let it start, and Unavailable with what
    it printed when it doesn't.
    """
    config = daemon.config
    terms = launch_terms(config, agent, server.launch)
    if terms.verdict == "deny":
        raise Denied(terms.reason, rule=terms.rule, hint=terms.hint)
    snapshot = await thread(daemon.vault.of(agent.team).snapshot, agent.slug)
    chosen, missing, revoked = choose(daemon.vault, terms, snapshot)
    if missing or revoked:
        lacking = (missing or revoked)[0]
        raise Denied(
            f"{server.name} can't start: {agent.slug} has no variable {lacking}",
            hint=f"sandboxctl env set {agent.slug} {lacking}",
        )
    workspace = daemon.sessions.workspace_of(agent, session_terms(config, agent))
    standing = Standing(agent, config, snapshot, workspace)
    await daemon.audit.append(
        "tools.inspected",
        by=by,
        server=server.name,
        agent=agent.slug,
        team=agent.team,
        injected=[{"name": sealed.name, "version": sealed.version} for _, sealed in chosen],
    )
    return await daemon.calls.servers.probe(standing, server, chosen)


async def take_named(daemon: Daemon, slug: str) -> None:
    """Accept for an agent's servers what their manifests name, where that isn't accepted yet.

    A server that offers something else is left as it is, and the log says so; it is asked once
    for each configuration.
    """
    agent = daemon.config.agents.get(slug)
    if agent is None:
        return
    listed = (server_of(daemon.config, name) for name in agent.tools)
    for server in {one.name: one for one in listed if one is not None}.values():
        pin = daemon.pins.pins.get(server.name)
        held = digest_of(d for d in pin.definitions if server.may_offer(d.name)) if pin else ""
        key = (server.name, server.definitions, daemon.config.generation)
        if not server.definitions or held == server.definitions or key in daemon.asked:
            continue
        daemon.asked.add(key)
        by = f"{server.source} definitions"
        try:
            found, _ = await offered_by(daemon, server, agent, by)
        except SandboxdError as failure:
            _log.warning("%s: %s", server.source, failure.message)
            continue
        if digest_of(found) != server.definitions:
            _log.warning(
                "%s: the server offers %s, which is not what 'definitions' names",
                server.source,
                digest_of(found),
            )
            continue
        with trio.CancelScope(shield=True):
            await daemon.accept(Pin(server.name, found, by, time.time()), by)
