"""The selftest's stage: one agent that probes, a tool that probes, and a tool with the secret."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sandboxd.secret import Secret
from sandboxd.trial import stage
from sandboxd.trial.archive import pack
from sandboxd.trial.hunt import decoy

__all__ = ["AGENT", "IO", "MEMORY", "PROCESSES", "PROCESSORS", "TMP_SIZE", "VARIABLE", "Stage"]

AGENT = "selftest"
VARIABLE = "CANARY"
TMP_SIZE = 8 << 20
PROCESSES = 64
PROCESSORS = 4
IO = 1 << 30
MEMORY = 1 << 30

_ARCHIVE = "/opt/selftest/prober.pyz"
_MODULES = (
    "sandboxd.selftest.prober",
    "sandboxd.trial.hunt",
    "sandboxd.trial.mcp",
    "sandboxd.trial.reach",
)
_TOOLS = ("hold", "probe", "foreign")
#: Runs the prober in the place that it was started for.
_PROGRAM = """\
import runpy, sys
sys.argv = [{archive!r}, {place!r}, {patience!r}]
runpy.run_path({archive!r}, run_name="__main__")
"""


@dataclass
class Stage(stage.Stage):
    """``secret`` is the canary. ``planted`` are programs with privileges, where root made some.

    ``patience`` multiplies every limit of time, for a host that is slow.
    """

    what: str = "selftest"
    secret: Secret = field(default_factory=lambda: Secret(decoy()))
    since: float = field(default_factory=lambda: time.time() - 2)
    patience: float = 1.0

    @property
    def archive(self) -> Path:
        return self.top / "prober.pyz"

    @property
    def planted(self) -> Path:
        """Mounted into the sandboxes at its own path."""
        return self.top / "planted"

    @property
    def bait(self) -> Path:
        """A file of the host that is nobody's in a sandbox."""
        return self.top / "bait"

    def start(self) -> None:
        """Write the configuration, start the daemon, and wait until it serves.

        Raises Unavailable when it can't on this host.
        """
        pack(self.archive, _MODULES, "sandboxd.selftest.prober.main:main")
        self.bait.write_bytes(decoy())
        self.planted.mkdir()
        files = configuration(self)
        for tool in _TOOLS:
            files[f"tools/{tool}/program.py"] = _PROGRAM.format(
                archive=_ARCHIVE,
                place={"probe": "tool"}.get(tool, tool),
                patience=str(self.patience),
            )
        self.configure(files)
        self._plant()
        # Baits: nothing of the daemon's environment may reach an agent or a tool.
        self.serve({"BAIT": decoy().decode(), "SSH_AUTH_SOCK": "/bait", "DISPLAY": ":0"})

    def _plant(self) -> None:
        """Programs with a setuid bit and with file capabilities; root alone can make them."""
        for name in ("id", "cat"):
            shutil.copyfile(shutil.which(name) or f"/usr/bin/{name}", self.planted / name)
            (self.planted / name).chmod(0o755)
        if os.geteuid() == 0:
            # They lie open to every user of the host for a while: id(1) tells, and does nothing;
            # CAP_WAKE_ALARM is of no use to cat(1), which tells of it too.
            (self.planted / "id").chmod(0o4755)
            wake_alarm = struct.pack("<5I", 0x02000001, 0, 0, 1 << 3, 0)
            with suppress(OSError):  # told as a control that the host refuses
                os.setxattr(self.planted / "cat", "security.capability", wake_alarm)


def configuration(on: Stage) -> dict[str, str]:
    """The daemon's whole configuration: each file's name and text."""
    quoted = json.dumps
    timeout = f"{120 * on.patience:.0f}s"
    mounts = f"""\
mounts:
  - source: {quoted(str(on.archive))}
    target: {_ARCHIVE}
  - source: {quoted(str(on.planted))}
    target: {quoted(str(on.planted))}
"""
    limits = f"""\
  memory: {MEMORY >> 20}M
  processes: {PROCESSES}
  cpu: 10m
  cpus: {PROCESSORS}
  io: {IO >> 20}M
  files: 256
  file_size: 64M
  tmp_size: {TMP_SIZE >> 20}M
"""
    tool = f"""\
version: 1
program: program.py
runtime: python
input:
  type: object
  additionalProperties: false
workspace: rw
timeout: {timeout}
output_limit: 8M
limits:
{limits}{mounts}"""
    return {
        "sandboxd.yaml": f"""\
version: 1
key:
  file: {quoted(str(on.key))}
""",
        f"agents/{AGENT}.yaml": f"""\
version: 1
description: tries every way out of its sandbox
command: [{quoted(sys.executable)}, -I, -B, {_ARCHIVE}, agent, "{on.patience}"]
policy: selftest
tools: [probe, hold]
limits:
{limits}{mounts}""",
        "agents/neighbour.yaml": """\
version: 1
description: another agent, which the first can't know of
command: [/bin/sleep, "600"]
policy: selftest
tools: [foreign]
""",
        "policies/selftest.yaml": f"""\
version: 1
description: what the agent's file and the manifests say, without the network
network: none
timeout: {timeout}
output_limit: 8M
agent_limits:
{limits}rules:
  - allow: "*"
    reason: the tool is in the agent's list
""",
        "tools/probe/tool.yaml": f"{tool}name: probe\ndescription: tries every way out\n",
        "tools/foreign/tool.yaml": f"{tool}name: foreign\ndescription: of another agent\n",
        "tools/hold/tool.yaml": f"""\
{tool}name: hold
description: holds the canary in every way there is
secrets:
  - variable: {VARIABLE}
  - {{variable: {VARIABLE}, as: canary, delivery: file}}
  - {{variable: {VARIABLE}, as: CANARY_FD, delivery: fd}}
""",
    }
