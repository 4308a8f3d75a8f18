"""A folder to start a tool from: a manifest that loads, a program that runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sandboxd.errors import Conflict, Invalid, NotFound
from sandboxd.names import shown, tool_name

__all__ = ["write_tool"]

_HEAD = """\
version: 1
name: {name}
# Agents read this to choose between tools: say what comes back, and when not to use it.
description: {description}
"""

_PYTHON = """\
program: program.py
runtime: python            # the daemon's own interpreter, isolated
stdin: json                # the arguments, as one JSON object
input:                     # JSON Schema 2020-12: what doesn't match never reaches the program
  type: object
  additionalProperties: false
  required: [text]
  properties:
    text: {type: string, maxLength: 1000}
"""

_PROGRAM = """\
program: {program}
# One placeholder is one whole argument; after -- a value can't be taken for an option.
argv: ["--", "{{text}}"]
input:                     # JSON Schema 2020-12: what doesn't match never reaches the program
  type: object
  additionalProperties: false
  required: [text]
  properties:
    text: {{type: string, maxLength: 1000}}
"""

_TAIL = """\
network: none              # `host` lets it reach what this host reaches
workspace: none            # `ro` or `rw` shows it the agent's files, at /workspace
timeout: 30s
# limits: {memory: 512M, processes: 16}
# mounts: [{source: /opt/data, target: /opt/data}]
"""

_CODE = '''\
"""What the manifest's description promises."""

import json
import os
import sys


def main() -> int:
    arguments = json.load(sys.stdin)
    # key = os.environ["API_KEY"]  # a variable from `secrets`; print no exception that may quote it
    print(json.dumps({"text": arguments["text"], "language": os.environ.get("LANG")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''


def write_tool(
    directory: Path,
    name: str,
    *,
    description: str = "",
    program: str | None = None,
    secrets: Sequence[str] = (),
) -> list[Path]:
    """Write ``directory``/``name`` and what belongs in it; the files that were made.

    ``program`` is an absolute path to wrap; without one a Python program is made. Raises Invalid
    for what no manifest can say, NotFound without such a program, and Conflict when there is
    something in the folder's place; nothing is left behind then.
    """
    tool_name(name)
    if program is not None:
        program = _checked(program)
    folder = directory / name
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder.mkdir(mode=0o755)
    except FileExistsError:
        raise Conflict(f"{folder} is there already", hint="choose another name") from None
    files = {"tool.yaml": _manifest(name, description, program, secrets)}
    if program is None:
        files["program.py"] = _CODE
    for file, text in files.items():
        (folder / file).write_text(text)
        (folder / file).chmod(0o644)  # the broker reads it, whatever our umask
    return [folder / file for file in files]


def _manifest(name: str, description: str, program: str | None, secrets: Sequence[str]) -> str:
    said = description or f"Say what {name} does, in one sentence"
    body = _PYTHON if program is None else _PROGRAM.format(program=json.dumps(program))
    wanted = "".join(f"  - variable: {variable}\n" for variable in secrets)
    listed = f"secrets:                   # from the agent's store, for one call\n{wanted}"
    example = "# secrets: [{variable: API_KEY}]   # from the agent's store, for one call\n"
    return (
        _HEAD.format(name=name, description=json.dumps(said, ensure_ascii=False))
        + body
        + (listed if secrets else example)
        + _TAIL
    )


def _checked(program: str) -> str:
    if not Path(program).is_absolute():
        raise Invalid(
            f"{shown(program)} is not an absolute path",
            hint=f"the manifest pins one file: command -v {shown(program)}",
        )
    real = os.path.realpath(program)
    if not os.access(real, os.X_OK) or not Path(real).is_file():
        raise NotFound(f"there is no program {shown(program)} that may be executed")
    return real
