"""From a decision and its secrets to what the launcher starts: one pure function, no side effects.

A tool's environment starts empty. What it holds is in this order, later ones never replacing
earlier ones: PATH, HOME, LANG, TMPDIR, the manifest's constants, where the proxy is, the secrets
that it declares.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sandboxd.egress import layout as egress
from sandboxd.errors import Invalid
from sandboxd.isolation.overlay import MERGED
from sandboxd.isolation.runtime import node_argv, node_mounts, python_argv, python_mounts
from sandboxd.isolation.wire import UNPINNED, FileSpec, LaunchSpec, MountSpec
from sandboxd.names import MAX_ENV_STRING, variable_value
from sandboxd.policy.decide import Decision
from sandboxd.policy.egress import NO_EGRESS, EgressTerms
from sandboxd.policy.model import SecretSpec, Tool
from sandboxd.policy.programs import TOOL_PATH, Held
from sandboxd.secret import Secret
from sandboxd.sessions.spec import launch_limits

__all__ = ["FIRST_FD", "SECRETS", "Prepared", "prepare"]

#: Where a secret delivered as a file appears, named as the manifest says.
SECRETS = "/run/secrets"
#: The descriptor of the first secret delivered by descriptor; the next ones follow.
FIRST_FD = 3

_USER = "tool"
_WORKSPACE = "/workspace"
_TEMPORARY = "/tmp"  # noqa: S108 - the sandbox's own, private one
_BASE = (
    ("PATH", TOOL_PATH),
    ("HOME", f"/home/{_USER}"),
    ("LANG", "C.UTF-8"),
    ("TMPDIR", _TEMPORARY),
)


@dataclass(frozen=True)
class Prepared:
    """A launch: the spec, the bytes of standard input (None: nothing to read), secrets for
    descriptors ``FIRST_FD`` and up."""

    spec: LaunchSpec
    stdin: bytes | None = field(repr=False)
    descriptors: tuple[bytes, ...] = field(default=(), repr=False)
    egress: EgressTerms = NO_EGRESS


def prepare(
    decision: Decision,
    secrets: Sequence[tuple[SecretSpec, Secret]],
    *,
    call: str,
    uid: int,
    workspace: Path | None,
    overlay: bool = False,
    template: str = "",
    held: Held | None = None,
) -> Prepared:
    """What to launch for an allowed ``decision``, from sandboxes kept ready for ``template``.

    ``held``: the program as it was opened and found to be the right one; nothing else is run.

    ``overlay``: the workspace is the session's copy-on-write view, whose mount namespace the
    launch brings along.

    Raises Invalid when the kernel could not take the environment and arguments (execve(2)).
    """
    tool = decision.tool
    if tool is None:
        raise Invalid("there is no tool to launch")
    environment = {**dict(_BASE), **tool.environment, **egress.environment(decision.egress)}
    env = [(name.encode(), value.encode()) for name, value in environment.items()]
    files: list[FileSpec] = []
    descriptors: list[bytes] = []
    stdin = decision.stdin
    for spec, secret in secrets:
        name, value = spec.as_name or spec.variable, secret.reveal()
        if spec.delivery == "env":
            env.append((name.encode(), variable_value(name, value)))
        elif spec.delivery == "file":
            files.append(FileSpec(f"{SECRETS}/{name}", value, 0o400))
        elif spec.delivery == "fd":
            env.append((name.encode(), b"%d" % (FIRST_FD + len(descriptors))))
            descriptors.append(value)
        else:
            stdin = value
    argv = _argv(tool, decision, held)
    program, pin = (held.execute if held else None) or ("", UNPINNED)
    _check_size(tool, argv, env)
    access = decision.workspace if workspace is not None else "none"
    spec_out = LaunchSpec(
        id=call,
        argv=argv,
        env=tuple(env),
        uid=uid,
        cwd=_WORKSPACE if access != "none" else _TEMPORARY,
        network=decision.network,
        hostname=tool.name.replace("_", "-")[:32],
        user=_USER,
        program=str(program),
        pin=pin,
        mounts=(
            *_own_mounts(tool, held),
            *_mounts(tool, workspace, access, overlay=overlay),
            *_program_mount(tool, held),
        ),
        files=tuple(files),
        extra_fds=tuple(range(FIRST_FD, FIRST_FD + len(descriptors))),
        limits=launch_limits(decision.limits),
        template=template,
        listeners=egress.listeners(decision.egress),
    )
    return Prepared(spec_out, stdin, tuple(descriptors), decision.egress)


def _argv(tool: Tool, decision: Decision, held: Held | None) -> tuple[bytes, ...]:
    program = str(tool.program)
    if tool.runtime == "python":
        start = python_argv(program)
    elif tool.runtime == "node":
        start = node_argv(program)
    else:
        start = tuple(map(os.fsencode, held.start if held else (program,)))
    return (*start, *(argument.encode() for argument in decision.argv))


def _own_mounts(tool: Tool, held: Held | None) -> Iterator[MountSpec]:
    """The tool's interpreter and its folder, or what is in it beside the program."""
    if tool.runtime == "python":
        yield from python_mounts()
    elif tool.runtime == "node":
        yield from node_mounts()
    if held is None or held.beside is None:
        yield MountSpec(str(tool.directory), str(tool.directory))
    else:
        for path in held.beside:
            yield MountSpec(str(path), str(path), optional=True)


def _program_mount(tool: Tool, held: Held | None) -> Iterator[MountSpec]:
    """The program, above all that may hold its path as well."""
    program, pin = str(tool.program), held.program if held else UNPINNED
    inside = program.startswith(f"{tool.directory}/")
    if (inside and pin != UNPINNED) or not (inside or program.startswith("/usr/")):
        yield MountSpec(program, program, pin=pin)


def _mounts(
    tool: Tool, workspace: Path | None, access: str, *, overlay: bool
) -> tuple[MountSpec, ...]:
    """What the manifest mounts, and the workspace."""
    mounts = []
    for mount in tool.mounts:
        mounts.append(
            MountSpec(
                str(mount.source),
                str(mount.target),
                readonly=mount.mode == "ro",
                idmap=mount.mode == "rw",
            )
        )
    if access == "overlay" and not overlay:
        raise Invalid("the session has no copy-on-write workspace to share")
    if overlay and access != "none":
        mounts.append(MountSpec(MERGED, _WORKSPACE, readonly=access == "ro", shared=True))
    elif workspace is not None and access != "none":
        mounts.append(MountSpec(str(workspace), _WORKSPACE, readonly=access == "ro", idmap=True))
    return tuple(mounts)


def _check_size(tool: Tool, argv: Sequence[bytes], env: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse what execve(2) would answer with E2BIG, while the reason can still be told.

    Arguments and environment share a quarter of the stack limit, pointers included; 4 KiB stay
    for the program's path and what the kernel adds (execve(2), "Limits on size").
    """
    for argument in argv:
        if len(argument) >= MAX_ENV_STRING:
            raise Invalid(
                f"an argument of {tool.name} is too long for the kernel",
                hint=f"one argument may have {MAX_ENV_STRING - 1:,} bytes; let the tool read "
                "large input from stdin or the workspace",
            )
    strings = [*argv, *(name + b"=" + value for name, value in env)]
    size = sum(len(string) + 1 + 8 for string in strings) + 4096
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    limit = min(stack, 24 << 20) // 4 if stack != resource.RLIM_INFINITY else 6 << 20
    if size > limit:
        raise Invalid(
            f"environment and arguments of {tool.name} are {size - limit:,} bytes too large "
            "for the kernel",
            hint=f"together they may have {limit:,} bytes (execve(2)); deliver large secrets "
            "as files: delivery: file",
        )
