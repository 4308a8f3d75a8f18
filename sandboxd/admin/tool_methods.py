"""Tool calls that operators make themselves, as an agent would make them."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from sandboxd.admin.params import known_agent, param, thread
from sandboxd.admin.server import Caller, Method, Reply
from sandboxd.admin.standing import Standing
from sandboxd.broker.calls import Session
from sandboxd.broker.result import printed
from sandboxd.broker.session import about
from sandboxd.errors import Conflict, Invalid, NotFound
from sandboxd.names import shown
from sandboxd.policy.decide import session_terms
from sandboxd.running import Daemon

__all__ = ["ToolMethods"]

#: Bytes of output in one item of the answer's stream.
_PIECE = 1 << 20


class ToolMethods:
    """``tools.run`` and ``tools.place``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def table(self) -> Mapping[str, Method]:
        return {"tools.run": self.run, "tools.place": self.place}

    async def place(self, caller: Caller, params: dict[str, Any]) -> Reply:
        """``{agent}`` or ``{session, agent?}`` to ``{agent, session}``: where tools can be called.

        Does nothing: whoever may call is told the whole names, all others are refused.
        """
        if params.get("session") is None:
            return Reply({"agent": known_agent(self._daemon, params).slug, "session": ""})
        session = self._daemon.sessions.get(param(params, "session", str))
        if params.get("agent") not in (None, session.agent.slug):
            raise NotFound(
                f"no live session {shown(session.id)} of agent {shown(str(params['agent']))}",
                hint="see: sandboxctl session list",
            )
        return Reply({"agent": session.agent.slug, "session": session.id})

    async def run(self, caller: Caller, params: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """One call: its output in pieces, then how it ended. The client's leaving cancels it.

        With ``session`` it is made in that live session; else with what the agent's next session
        would have: the variables, configuration and workspace of now.
        """
        tool, arguments = param(params, "tool", str), params.get("arguments", {})
        if not isinstance(arguments, dict):
            raise Invalid("the arguments are a JSON object")
        session = await self._session(params)
        await self._daemon.audit.append("tools.run", by=caller.name, **about(session), tool=tool)
        try:
            result = await self._daemon.calls.call(session, tool, arguments)
        finally:
            if isinstance(session, Standing):
                self._daemon.calls.forget(session.id)
        stdout = result.stdout + printed(result.content or ())
        for stream, data in (("stdout", stdout), ("stderr", result.stderr)):
            for start in range(0, len(data), _PIECE):
                piece = base64.b64encode(data[start : start + _PIECE]).decode()
                yield {"stream": stream, "data": piece}
        yield {
            "ended": {
                "session": session.id,
                "call": result.call,
                "outcome": result.outcome,
                "exit_code": result.exit_code,
                "signal": result.signal,
                "message": result.message,
                "hint": result.hint,
                "rule": result.rule,
                "truncated": result.truncated,
            }
        }

    async def _session(self, params: dict[str, Any]) -> Session:
        manager = self._daemon.sessions
        if params.get("session") is not None:
            return manager.get(param(params, "session", str))
        agent = known_agent(self._daemon, params)
        config = self._daemon.config
        terms = session_terms(config, agent)
        if terms.workspace == "overlay":
            raise Conflict(
                f"the workspace of {agent.slug} is copy-on-write: each session has its own view",
                hint="name a live session: --session ID (sandboxctl session list)",
            )
        snapshot = await thread(self._daemon.vault.of(agent.team).snapshot, agent.slug)
        workspace = manager.workspace_of(agent, terms)
        return Standing(agent, config, snapshot, workspace)
