"""From an agent's configuration to the sandbox it runs in. Pure: it decides, the manager acts."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from sandboxd.egress import layout as egress
from sandboxd.errors import Denied, Invalid
from sandboxd.isolation.overlay import MERGED
from sandboxd.isolation.runtime import python_mounts
from sandboxd.isolation.wire import FileSpec, LaunchSpec, Limits, MountSpec
from sandboxd.names import loader_reason, variable_name, variable_value
from sandboxd.policy import Agent, Policy
from sandboxd.policy import Limits as PolicyLimits
from sandboxd.policy.decide import SessionTerms
from sandboxd.policy.model import place
from sandboxd.sessions.session import Session

__all__ = ["BRIDGE", "HOME", "SOCKET", "WORKSPACE", "agent_spec", "check_agent", "launch_limits"]

HOME = "/home/agent"
WORKSPACE = "/workspace"
SOCKET = "/run/sandboxd/broker.sock"
BRIDGE = "/run/sandboxd/bin/sandboxd-mcp"

_BRIDGE_PROGRAM = "/run/sandboxd/lib/bridge.py"

#: Variables that a session may have of its own, and their size: execve(2) takes them all at once.
MAX_VARIABLES = 128
MAX_ENVIRONMENT = 64 << 10

_TERM = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,63}")


def check_agent(
    agent: Agent,
    policy: Policy,
    terms: SessionTerms,
    args: tuple[str, ...],
    environment: Mapping[str, str],
    offered: Collection[str],
) -> None:
    """Refuse what the agent's file or policy does not allow, before anything is made.

    ``offered`` are the isolation features that the session would have.
    """
    if args and not agent.args_allowed:
        raise Denied(
            f"agent {agent.slug} takes no arguments",
            rule=f"{agent.source}: args_allowed",
            hint=f"set 'args_allowed: true' in {agent.source} to allow them",
        )
    if any("\0" in arg for arg in args):
        raise Invalid("an argument holds a NUL byte, which no command line can carry")
    check_environment(agent, environment)
    missing = [feature for feature in terms.require if feature not in offered]
    if missing:
        raise Denied(
            f"policy {policy.name} requires what a session would not have: {', '.join(missing)}",
            rule=f"{policy.source}: require",
            hint="see what this host offers: sandboxctl doctor; or lower it by name, in a policy "
            f"that extends this one: lower: [{', '.join(missing)}]",
        )


def check_environment(agent: Agent, environment: Mapping[str, str]) -> None:
    """Refuse variables of one session that steer a loader or replace what the agent's file fixes.

    Raises Denied or Invalid naming the variable, never its value.
    """
    for name, value in environment.items():
        variable_name(name)
        if reason := loader_reason(name):
            raise Denied(
                f"{name} can't be set for a session: {reason}",
                hint=f"if it must be, it is a matter of {agent.source}: allow_environment",
            )
        if name in agent.environment:
            raise Denied(
                f"{name} is fixed for agent {agent.slug}",
                rule=place(agent, "environment"),
                hint="give the session's variable another name",
            )
        try:
            variable_value(name, value.encode())
        except UnicodeEncodeError:
            raise Invalid(f"the value of {name} is not text") from None
    size = sum(len(name) + len(value.encode()) for name, value in environment.items())
    if len(environment) > MAX_VARIABLES or size > MAX_ENVIRONMENT:
        raise Invalid(
            f"a session takes at most {MAX_VARIABLES} variables of its own, "
            f"{MAX_ENVIRONMENT >> 10} KiB together",
            hint="keep what is larger in a file of the workspace",
        )


def agent_spec(session: Session, *, bridge: bytes, term: str = "") -> LaunchSpec:
    """The sandbox of ``session``'s agent: an empty environment plus what is listed here.

    ``bridge`` is the source of the bridge program.
    """
    agent = session.agent
    environment = {
        "PATH": f"{PurePosixPath(BRIDGE).parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": HOME,
        "USER": "agent",
        "LOGNAME": "agent",
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",  # noqa: S108 - the sandbox's own
        "SANDBOXD_SESSION": session.id,
        "SANDBOXD_AGENT": agent.slug,
        "SANDBOXD_SOCKET": SOCKET,
        **agent.environment,
        **session.environment,
        **egress.environment(session.terms.egress),
    }
    if session.tty:
        environment["TERM"] = term if _TERM.fullmatch(term) else "xterm"
    mounts = [*python_mounts(), MountSpec(str(session.socket), SOCKET)]
    if session.overlay >= 0:
        mounts.append(MountSpec(MERGED, WORKSPACE, readonly=False, shared=True))
    elif session.workspace is not None:
        readonly = session.terms.workspace == "ro"
        mounts.append(MountSpec(str(session.workspace), WORKSPACE, readonly=readonly, idmap=True))
    mounts += (
        MountSpec(str(m.source), str(m.target), readonly=m.mode == "ro", idmap=m.mode == "rw")
        for m in agent.mounts
    )
    return LaunchSpec(
        id=session.id,
        argv=tuple(os.fsencode(word) for word in (*agent.command, *session.args)),
        env=tuple((os.fsencode(k), os.fsencode(v)) for k, v in environment.items()),
        uid=session.uid,
        cwd=WORKSPACE if session.workspace is not None else HOME,
        network=session.terms.network,
        tty=session.tty,
        mounts=tuple(mounts),
        files=(
            FileSpec(BRIDGE, bridge_command(sys.executable), 0o555),
            FileSpec(_BRIDGE_PROGRAM, bridge, 0o444),
        ),
        limits=launch_limits(session.terms.limits),
        listeners=egress.listeners(session.terms.egress),
        further=True,
    )


def bridge_command(python: str) -> bytes:
    """The bridge as a command. A shell starts ``python``: a #! line takes no spaces and 255 bytes
    (execve(2)), and a path may have both."""
    return os.fsencode(f'#!/bin/sh\nexec {shlex.quote(python)} -IS {_BRIDGE_PROGRAM} "$@"\n')


def launch_limits(limits: PolicyLimits) -> Limits:
    """A policy's limits as the launcher takes them; what they leave open has its default there."""
    given = {
        "memory": limits.memory,
        "processes": limits.processes,
        "open_files": limits.files,
        "file_size": limits.file_size,
        "cpu_seconds": None if limits.cpu is None else max(1, round(limits.cpu)),
        "tmp_size": limits.tmp_size,
        "millicpus": None if limits.cpus is None else round(limits.cpus * 1000),
        "io": limits.io,
    }
    return Limits(**{name: int(value) for name, value in given.items() if value is not None})
