"""One run of a tool in its real sandbox, on a stage of its own, and what came of it."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandboxd.admin.client import AdminClient
from sandboxd.authoring.calling import run_tool
from sandboxd.authoring.findings import Finding, findings
from sandboxd.errors import Invalid, NotFound, SandboxdError
from sandboxd.paths import shipped
from sandboxd.policy import ConfigErrors, Tool, load_config
from sandboxd.secret import Secret
from sandboxd.trial import stage

__all__ = ["Outcome", "dummy", "try_tool"]

_AGENT = "test"


@dataclass
class Outcome:
    """How the call ended, what it printed (redacted), and what it used and was refused."""

    tool: str
    ended: dict[str, Any]
    stdout: bytes = field(repr=False)
    stderr: bytes = field(repr=False)
    findings: list[Finding]
    dummies: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return bool(self.ended["outcome"] == "ok")


@dataclass
class _Stage(stage.Stage):
    what: str = "test"

    @property
    def records(self) -> Path:
        return self.top / "calls.jsonl"

    @property
    def workspace(self) -> Path:
        return self.top / "w"

    def _command(self) -> list[str]:
        watch = [sys.executable, "-m", "sandboxd.authoring.watch", str(self.records)]
        return [*watch, *super()._command()]


def dummy(name: str) -> Secret:
    """A value that stands for a secret: nobody's, recognisable, different each time."""
    return Secret(f"dummy-{name.lower()}-{secrets.token_hex(8)}".encode())


def try_tool(
    folder: Path,
    arguments: Mapping[str, Any],
    *,
    given: Mapping[str, Secret],
    workspace: Path | None = None,
) -> Outcome:
    """Call the tool in ``folder`` once; variables that aren't ``given`` get dummies.

    ``workspace`` is copied: nothing in it changes. Raises ConfigErrors for a manifest that can't
    be loaded and Unavailable where this host can't isolate or trace.
    """
    with stage.until_interrupted(), stage.open_stage(_Stage) as made:
        tool = _configure(made, folder, workspace)
        values = {s.variable: given.get(s.variable) or dummy(s.variable) for s in tool.secrets}
        made.serve({})
        with AdminClient.connect(made.paths) as client:
            if values:
                encoded = {n: base64.b64encode(v.reveal()).decode() for n, v in values.items()}
                client.call("env.set", agent=_AGENT, values=encoded, now=False, force=True)
            stdout, stderr, ended = run_tool(
                client, agent=_AGENT, tool=tool.name, arguments=dict(arguments)
            )
        made.stop()
        found = findings(_records(made.records), tool, os.path.lexists)
        return Outcome(
            tool=tool.name,
            ended=ended,
            stdout=stdout,
            stderr=stderr,
            findings=found,
            dummies=tuple(n for n in values if n not in given),
        )


def _configure(made: _Stage, folder: Path, workspace: Path | None) -> Tool:
    """Write the stage's configuration around the tool; the tool as it is loaded from there."""
    name = folder.name
    own = folder.parent == Path(os.path.realpath(shipped("tools")))
    if not own:
        copy = made.paths.config / "tools" / name
        shutil.copytree(folder, copy, symlinks=True)
    if workspace is None:
        made.workspace.mkdir()
    else:
        shutil.copytree(workspace, made.workspace, symlinks=True)
    if os.geteuid() == 0:  # the workspace is the broker's, as a daemon's default one is
        for directory, _, files in os.walk(made.workspace):
            for path in (Path(directory), *(Path(directory, file) for file in files)):
                os.chown(path, stage.BROKER_UID, stage.BROKER_UID, follow_symlinks=False)
    try:
        made.configure(_files(made, name))
        config = load_config(
            made.paths.config,
            shipped_policies=shipped("policies"),
            shipped_tools=shipped("tools"),
            private={},
        )
    except ConfigErrors as errors:
        raise _in_place(errors, made, folder) from None
    if name in config.servers:
        raise Invalid(
            f"{name} is an MCP server: what its tools are, an operator accepts first",
            hint=f"sandboxctl tools accept {name}; then call one of its tools: "
            f"sandboxctl tools run {name}__TOOL --agent AGENT",
        )
    if name not in config.tools:
        raise NotFound(f"{folder} holds no tool")
    return config.tools[name]


def _files(made: _Stage, name: str) -> dict[str, str]:
    return {
        "sandboxd.yaml": f"version: 1\nkey:\n  file: {json.dumps(str(made.key))}\n",
        f"agents/{_AGENT}.yaml": f"""\
version: 1
description: whoever calls the tool that is tested
command: [/bin/true]
policy: {_AGENT}
tools: [{json.dumps(name)}]
workspace: {{path: {json.dumps(str(made.workspace))}}}
""",
        f"policies/{_AGENT}.yaml": """\
version: 1
description: everything that the manifest asks for
network: host
rules:
  - allow: "*"
    approved: true
""",
    }


def _in_place(errors: ConfigErrors, made: _Stage, folder: Path) -> SandboxdError:
    """The same errors, told of the folder that the author knows."""
    copy = str(made.paths.config / "tools" / folder.name)
    for error in errors.errors:
        error.message = error.message.replace(copy, str(folder))
    return ConfigErrors(errors.errors)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as lines:
        for line in lines:
            yield json.loads(line)
