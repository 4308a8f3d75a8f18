"""Real daemons to measure: the shipped one, and others that differ in one thing only.

Each has a temporary directory of its own, the shipped default policy, one agent that calls, one
that does nothing, one that ends at once, and two tools: ``work``, which gets a secret and prints
it (coreutils env(1), some 130 bytes), and ``probe``, which looks at the walls around it.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import proc
from bench.walls import PROBE, holes, own_namespaces, weaker
from sandboxd.admin.client import AdminClient
from sandboxd.trial import stage as trial

__all__ = ["ENVIRONMENT", "PROGRAM", "Caller", "Stage", "configuration", "open_stage"]

#: What the tool ``work`` runs, and what a sandbox's environment is apart from the secret.
PROGRAM = "/usr/bin/env"
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
    "HOME": "/home/tool",
    "LANG": "C.UTF-8",
    "TMPDIR": "/tmp",  # noqa: S108 - a word for the program to print
}
#: In every answer where the secret stood.
REDACTED = "[redacted:TOKEN]"

_CALLER = "/opt/bench/caller.py"


def configuration(top: Path, *, sessions: int = 64) -> dict[str, str]:
    """A daemon's whole configuration: each file's name and text."""
    quoted = json.dumps
    caller = quoted(str(Path(__file__).parent / "caller.py"))
    tool = "version: 1\ninput: {type: object, additionalProperties: false}\n"
    return {
        "sandboxd.yaml": f"""\
version: 1
max_sessions: {sessions + 8}
key:
  file: {quoted(str(top / "key"))}
""",
        "agents/caller.yaml": f"""\
version: 1
description: makes the calls that are measured
command: [{quoted(sys.executable)}, -I, -S, -B, {_CALLER}]
tools: [work, probe]
mounts:
  - source: {caller}
    target: {_CALLER}
""",
        "agents/idle.yaml": """\
version: 1
description: does nothing
command: [/bin/sleep, infinity]
""",
        "agents/brief.yaml": """\
version: 1
description: says one word
command: [/bin/echo, here]
""",
        "tools/work/tool.yaml": f"""\
{tool}name: work
description: prints its environment
program: {PROGRAM}
secrets:
  - variable: TOKEN
""",
        "tools/plain/tool.yaml": f"""\
{tool}name: plain
description: does nothing
program: {program("true")}
""",
        "tools/probe/tool.yaml": f"""\
{tool}name: probe
description: looks around
program: probe.py
runtime: python
""",
        "tools/probe/probe.py": PROBE,
    }


def program(name: str) -> str:
    """A program of the system, at its place in /usr or else in /bin."""
    found = (f"/usr/bin/{name}", f"/bin/{name}")
    return next((path for path in found if Path(path).exists()), found[0])


@dataclass
class Stage(trial.Stage):
    """``module`` is the program that serves; ``traced`` writes to ``trace`` when it ends."""

    what: str = "bench"
    module: str = "sandboxd.main"
    trace: Path = field(init=False)
    profile: bool = False
    client: AdminClient = field(init=False)

    def __post_init__(self) -> None:
        self.trace = self.paths.state / "trace.json"

    def start(self, *, sessions: int, files: Mapping[str, str]) -> None:
        """Write the configuration and start the daemon; the agent ``caller`` gets its secret."""
        self.configure({**configuration(self.top, sessions=sessions), **files})
        environment = {"SANDBOXD_BENCH_TRACE": str(self.trace)}
        if self.profile:
            environment["SANDBOXD_BENCH_PROFILE"] = "1"
        self.serve(environment)
        self.client = AdminClient.connect(self.paths)
        token = base64.b64encode(secrets.token_hex(20).encode()).decode()
        self.client.call("env.set", agent="caller", values={"TOKEN": token}, now=False)

    def _command(self) -> list[str]:
        words = [word for word in super()._command() if not word.startswith("--log-level=")]
        at = words.index("sandboxd.main")
        return [*words[:at], self.module, *words[at + 1 :], "--log-level=warning"]

    @property
    def pid(self) -> int:
        assert self.daemon is not None
        return self.daemon.pid

    def launcher(self, session: str) -> int:
        """The launcher's pid: the parent of any session's init."""
        return proc.parent(int(self.client.call("session.show", id=session)["pid"]))


class Caller:
    """A running agent ``caller``: takes orders, gives times."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        started, fds = stage.client.call_with_fds(
            "session.start", agent="caller", args=[], tty=False, attach=True
        )
        self.id = str(started["id"])
        self.init = int(started["pid"])
        self._stdin = os.fdopen(fds[0], "w", buffering=1)
        self._stdout = os.fdopen(fds[1])
        self._stderr = os.fdopen(fds[2])
        self._launcher = stage.launcher(self.id)

    def order(self, calls: int, callers: int = 1, **more: Any) -> dict[str, Any]:
        """``calls`` calls, ``callers`` at once. SystemExit when one of them went wrong."""
        order = {"calls": calls, "callers": callers, "tool": "work", **more}
        if order["tool"] == "work" and not more.get("ping"):
            order.setdefault("holds", REDACTED)
        self._stdin.write(json.dumps(order) + "\n")
        line = self._stdout.readline()
        if not line:
            raise SystemExit(f"the agent ended: {self._stderr.read()[-500:]}")
        answer: dict[str, Any] = json.loads(line)
        if answer["replies"] and not more.get("replies"):
            raise SystemExit(f"a call went wrong: {answer['replies'][0][:500]}")
        return answer

    async def one(self) -> float:
        """The seconds of one call."""
        return float(self.order(1)["seconds"][0])

    def cpu(self) -> float:
        """CPU seconds of broker, launcher and tools; without this agent, which only asks."""
        return proc.cpu_seconds([self.stage.pid, self._launcher], without=[self.init])

    def probe(self) -> dict[str, Any]:
        """What a tool call sees of the walls around it."""
        line = self.order(1, tool="probe", replies=True)["replies"][0]
        if '"isError":true' in line or '"error"' in line:
            raise SystemExit(f"the probe did not run: {line[:500]}")
        told: dict[str, Any] = json.loads(json.loads(line)["result"]["content"][0]["text"])
        return told

    def lacking(self) -> list[str]:
        """In what this daemon's tool calls are isolated less than shipped."""
        explained = self.stage.client.call(
            "policy.explain", agent="caller", tool="work", arguments={}
        )
        return weaker(explained["isolation"]) + holes(self.probe(), own_namespaces())

    def layers(self) -> list[dict[str, str]]:
        explained: dict[str, Any] = self.stage.client.call(
            "policy.explain", agent="caller", tool="work", arguments={}
        )
        layers: list[dict[str, str]] = explained["isolation"]
        return layers

    def close(self) -> None:
        for stream in (self._stdin, self._stdout, self._stderr):
            stream.close()
        self.stage.client.call("session.wait", id=self.id)


@contextmanager
def open_stage(
    module: str = "sandboxd.main",
    *,
    sessions: int = 64,
    profile: bool = False,
    files: Mapping[str, str] | None = None,
) -> Iterator[Stage]:
    """A daemon that serves, with ``files`` more in its configuration; ended with the block."""
    with ExitStack() as undo:
        stage = undo.enter_context(
            trial.open_stage(lambda top: Stage(top, module=module, profile=profile))
        )
        stage.start(sessions=sessions, files=files or {})
        undo.callback(stage.client.close)
        yield stage
