"""An agent that calls tools over the real bridge, and operators that answer, for tests.

The agent's argument is a JSON list of steps, each [how, tool, arguments]:

``call``: wait for the answer. ``cancel``: take the call back once it waits. ``leave``: exit
while it waits. ``many``: with a list of arguments, all at once, and wait for all answers.

It prints every message that it gets, one a line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from real_daemon import RealDaemon, until

SECRET = "s3cr3t-value-of-the-tests"

SOURCE = """
import json, os, subprocess, sys
bridge = subprocess.Popen(["sandboxd-mcp"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def say(**message):
    bridge.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\\n")
    bridge.stdin.flush()
def hear():
    line = bridge.stdout.readline()
    print(line.decode().strip(), flush=True)
    return json.loads(line)
def answer(id):
    while (message := hear()).get("id") != id:
        pass
def waits():
    while hear().get("method") != "notifications/progress":
        pass
def call(id, tool, arguments):
    say(id=id, method="tools/call",
        params={"name": tool, "arguments": arguments, "_meta": {"progressToken": f"p{id}"}})
say(id=0, method="initialize", params=dict(protocolVersion="2025-06-18", capabilities={},
    clientInfo={"name": "test", "version": "1"}))
answer(0)
say(method="notifications/initialized")
for number, (how, tool, arguments) in enumerate(json.loads(sys.argv[1]), 1):
    if how == "many":
        ids = {number * 1000 + n for n in range(len(arguments))}
        for id, one in zip(sorted(ids), arguments):
            call(id, tool, one)
        while ids:
            ids.discard(hear().get("id"))
        continue
    call(number, tool, arguments)
    if how == "call":
        answer(number)
        continue
    waits()
    if how == "leave":
        os._exit(0)
    say(method="notifications/cancelled", params={"requestId": number})
"""


class Asking:
    """A daemon with an agent ``caller`` under a policy that asks about the tool ``ask``."""

    def __init__(self, daemon: RealDaemon) -> None:
        self.daemon = daemon
        self.agents: list[subprocess.Popen[str]] = []

    def configure(self, rules: str = "[{ask: ask, reason: it costs money}, {allow: '*'}]") -> None:
        daemon = self.daemon
        daemon.write(
            "policies/asking.yaml",
            f"version: 1\ndescription: asks\nnetwork: none\nrules: {rules}\n",
        )
        daemon.write(
            "policies/hasty.yaml",
            "version: 1\ndescription: asks\nextends: asking\napproval_timeout: 300ms\n",
        )
        for slug, policy in (("caller", "asking"), ("hasty", "hasty")):
            daemon.python_agent(slug, SOURCE, policy=policy, tools="[ask, free]")
        word = "{type: object, additionalProperties: false, properties: {word: {type: string}}}"
        manifest = f'argv: ["{{word}}"]\ninput: {word}\n'
        daemon.tool("ask", '#!/bin/sh\necho "$1 $TOKEN"\n', manifest + "secrets: [TOKEN]\n")
        daemon.tool("free", "#!/bin/sh\necho free\n", manifest)

    def start(self, *steps: tuple[str, str, Any], agent: str = "caller") -> subprocess.Popen[str]:
        """The agent, in the background, attached to this test by its output."""
        daemon = self.daemon
        running = subprocess.Popen(
            [
                *(sys.executable, "-m", "sandboxd.cli", "--config", str(daemon.paths.config)),
                *("--state", str(daemon.paths.state), "--runtime", str(daemon.paths.runtime)),
                *("run", agent, "--", json.dumps(steps)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.agents.append(running)
        return running

    def end(self, running: subprocess.Popen[str]) -> list[dict[str, Any]]:
        """What the agent was answered, once it has ended; progress is in between."""
        said, errors = running.communicate(timeout=60)
        assert running.returncode == 0, errors
        return [json.loads(line) for line in said.splitlines()][1:]

    def waiting(self, count: int = 1) -> list[dict[str, Any]]:
        """The calls that wait, once there are so many."""
        found: list[dict[str, Any]] = []

        def enough() -> bool:
            found[:] = self.daemon.call("approvals.list")["approvals"]
            return len(found) >= count

        until(enough)
        return found

    def records(self, session: str) -> list[dict[str, Any]]:
        return [r for r in self.daemon.audit() if r.get("session") == session]

    def close(self) -> None:
        for running in self.agents:
            running.kill()
            running.communicate()


def answers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message["result"] for message in messages if "id" in message]


def text(result: dict[str, Any]) -> str:
    return "\n".join(block.get("text", "") for block in result["content"])
