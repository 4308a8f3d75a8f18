"""The demo's stage: a real configuration with a hostile agent and three tools, and its daemon."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sandboxd.secret import Secret
from sandboxd.trial import stage
from sandboxd.trial.archive import pack
from sandboxd.trial.hunt import decoy

__all__ = ["AGENT", "VARIABLE", "Stage", "open_stage"]

AGENT = "hostile"
VARIABLE = "BANK_TOKEN"
TOOLS = ("pay", "report", "greet")

_ARCHIVE = "/opt/demo/agent.pyz"
_MODULES = (
    "sandboxd.demo.hostile",
    "sandboxd.trial.hunt",
    "sandboxd.trial.mcp",
    "sandboxd.trial.reach",
)
_HERE = Path(__file__).parent


@dataclass
class Stage(stage.Stage):
    """``secret`` is what the agent wants; ``opened`` looks the same, in a file it may read."""

    what: str = "demo"
    secret: Secret = field(default_factory=lambda: Secret(_new_value()))
    opened: str = field(default_factory=lambda: _new_value().decode())
    since: float = field(default_factory=lambda: time.time() - 2)

    @property
    def open_file(self) -> Path:
        """Mounted into the agent's sandbox at its own path: the control for all the others."""
        return self.top / "open"

    def start(self, bank_port: int) -> None:
        """Write the configuration, start the daemon, and wait until it serves.

        Raises Unavailable when it can't on this host.
        """
        pack(self.top / "agent.pyz", _MODULES, "sandboxd.demo.hostile.agent:main")
        self.open_file.write_text(self.opened)
        files = configuration(self, bank_port)
        for tool in TOOLS:
            program = self.paths.config / "tools" / tool / "program.py"
            program.parent.mkdir(parents=True)
            shutil.copyfile(_HERE / "programs" / f"{tool}.py", program)
        self.configure(files)
        # A bait: nothing of the daemon's environment may reach an agent or a tool.
        self.serve({"BAIT": decoy().decode()})


@contextmanager
def open_stage(*, keep: bool = False) -> Iterator[Stage]:
    """The demo's stage, gone afterwards; only ``keep`` leaves its files."""
    with stage.open_stage(Stage, keep=keep) as made:
        yield made


def configuration(on: Stage, bank_port: int) -> dict[str, str]:
    """The daemon's whole configuration: each file's name and text."""
    quoted = json.dumps
    return {
        "sandboxd.yaml": f"""\
version: 1
key:
  file: {quoted(str(on.key))}
""",
        f"agents/{AGENT}.yaml": f"""\
version: 1
description: an agent that wants the bank token
command: [{quoted(sys.executable)}, -I, {_ARCHIVE}]
args_allowed: true
policy: demo
tools: [pay, report, greet]
mounts:
  - source: {quoted(str(on.top / "agent.pyz"))}
    target: {_ARCHIVE}
  - source: {quoted(str(on.open_file))}
    target: {quoted(str(on.open_file))}
""",
        "policies/demo.yaml": """\
version: 1
description: tools may reach the network where their manifest says so, the agent may not
network: host
agent_network: none
rules:
  - allow: "*"
    reason: the tool is in the agent's list
""",
        "tools/pay/tool.yaml": f"""\
version: 1
name: pay
description: Pay an amount to a payee
program: program.py
runtime: python
argv: ["--amount={{amount}}", "--memo={{memo}}", "{{payee}}"]
input:
  type: object
  additionalProperties: false
  required: [amount, payee]
  properties:
    amount: {{type: integer, minimum: 1}}
    payee: {{type: string, minLength: 1, maxLength: 100}}
    memo: {{type: string, maxLength: 100}}
environment:
  BANK_URL: "http://127.0.0.1:{bank_port}/payments"
secrets:
  - variable: {VARIABLE}
network: host
workspace: rw
timeout: 60s
""",
        "tools/report/tool.yaml": f"""\
version: 1
name: report
description: Print a report that holds everything, as careless programs do
program: program.py
runtime: python
argv: ["{{title}}"]
input:
  type: object
  additionalProperties: false
  required: [title]
  properties:
    title: {{type: string, maxLength: 100}}
secrets:
  - variable: {VARIABLE}
timeout: 30s
""",
        "tools/greet/tool.yaml": f"""\
version: 1
name: greet
description: Say hello, and print the environment
program: program.py
runtime: python
input:
  type: object
  additionalProperties: false
environment:
  DECOY: {quoted(on.opened)}
timeout: 30s
""",
    }


def _new_value() -> bytes:
    return b"sk_demo_" + secrets.token_hex(16).encode()
