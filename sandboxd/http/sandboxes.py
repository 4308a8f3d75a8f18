"""A sandbox as the SDK and the command line know it: a session, its files, what runs in it."""

from __future__ import annotations

import base64
import errno
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import trio

from sandboxd.access.roles import Principal
from sandboxd.admin.perform import perform
from sandboxd.admin.reach import agents_of
from sandboxd.errors import Denied, Invalid, KernelError, NotFound
from sandboxd.http.errors import Refusal
from sandboxd.names import shown
from sandboxd.policy.decide import session_terms
from sandboxd.running import Daemon

__all__ = ["check_network", "entry_of", "error_of", "execute", "start", "status_of"]

#: What a command may take where its client says nothing, and what a client may say.
DEFAULT_TIMEOUT, MAX_TIMEOUT = 60.0, 3600.0

#: How a shell tells that a command ran out of time (timeout(1)).
_TIMED_OUT = 124

#: Spellings of "all of the network" that clients use to deny it.
_EVERYTHING = frozenset(("*", "0.0.0.0/0", "::/0"))


def status_of(row: Mapping[str, Any]) -> str:
    """``starting``, ``running``, ``stopped`` or ``error``, of a row of session.list."""
    if row["state"] != "ended":
        return str(row["state"])
    return "error" if error_of(row) else "stopped"


def error_of(row: Mapping[str, Any]) -> str | None:
    """Why the agent of an ended session failed; None where it didn't, or was told to stop."""
    if row["state"] != "ended":
        return None
    reason, code, number = str(row["reason"] or ""), row["exit_code"], row["exit_signal"]
    if reason in ("exited", "killed", "out of memory") or reason.startswith("failed to start"):
        if code == 0:
            return None
        if code is not None:
            return f"the agent exited with status {code}"
        return reason if number is None else f"{reason} ({_signal(number)})"
    return None


def check_network(
    daemon: Daemon, principal: Principal, agent: str, allow: Sequence[str], deny: Sequence[str]
) -> None:
    """Refuse what the policy doesn't allow, and what could only be ignored.

    What an agent reaches is in its file and policy; nothing else can be asked of one sandbox.
    Denied for hosts that the policy does not let it reach, Invalid for what can't be enforced.
    """
    found = agents_of(daemon, principal).get(agent)
    if found is None:
        return  # starting it says so, as for an agent that never was
    terms = session_terms(daemon.config, found)
    if terms.egress.egress.stated:
        if allow or deny:
            raise Invalid(
                f"what agent {agent} reaches can't be changed for one sandbox",
                hint="leave networkAllowOut and networkDenyOut away: egress in its file and "
                "policy decides (docs/network.md)",
            )
        return
    if terms.network == "none":
        if allow:
            raise Denied(
                f"agent {agent} has no network, so networkAllowOut can't be granted",
                hint="its policy decides: agent_network in docs/configuration.md",
            )
        return
    if deny or set(allow) - _EVERYTHING:
        raise Invalid(
            f"agent {agent} has the host's network, which can't be narrowed for one sandbox",
            hint="leave networkAllowOut and networkDenyOut away, or give the agent network: none",
        )


async def start(
    daemon: Daemon,
    principal: Principal,
    *,
    agent: str,
    environment: Mapping[str, str],
    files: Mapping[str, str],
    setup: Sequence[str],
    lifetime: float | None,
) -> str:
    """Start a session in the background, put ``files`` into it, run ``setup``; its id.

    What fails on the way ends the session: half a sandbox is none. Also when cancelled.
    """
    params: dict[str, Any] = {"agent": agent}
    if environment:
        params["environment"] = dict(environment)
    if lifetime is not None:
        params["lifetime"] = lifetime
    id = str((await perform(daemon, principal, "session.start", params))["id"])
    try:
        if files:
            rows = [{"path": path, "content": text} for path, text in files.items()]
            await perform(daemon, principal, "session.files.write", {"id": id, "files": rows})
        for number, command in enumerate(setup, 1):
            done = await execute(
                daemon, principal, id, command, cwd=None, environment={}, timeout=MAX_TIMEOUT
            )
            if done["exitCode"] != 0:
                said = str(done["stderr"] or done["stdout"]).strip().splitlines()[-1:]
                words = f": {shown(said[0], 300)}" if said else ""
                raise Refusal(
                    400,
                    "setup_failed",
                    f"setup command {number} ended with status {done['exitCode']}{words}",
                )
        await trio.lowlevel.checkpoint()  # who left meanwhile does not know of it
    except BaseException:
        with trio.move_on_after(30, shield=True):
            await _stop_quietly(daemon, principal, id)
        raise
    return id


async def _stop_quietly(daemon: Daemon, principal: Principal, id: str) -> None:
    with suppress(NotFound):  # it ended by itself
        await perform(daemon, principal, "session.stop", {"id": id, "grace": 0})


async def execute(
    daemon: Daemon,
    principal: Principal,
    id: str,
    command: str,
    *,
    cwd: str | None,
    environment: Mapping[str, str],
    timeout: float | None,
) -> dict[str, Any]:
    """Run a shell's command line in the agent's own sandbox; how it ended and what it printed."""
    params: dict[str, Any] = {
        "id": id,
        "command": command,
        "timeout": DEFAULT_TIMEOUT if timeout is None else timeout,
    }
    if cwd is not None:
        params["cwd"] = cwd
    if environment:
        params["environment"] = dict(environment)
    try:
        done = await perform(daemon, principal, "session.exec", params)
    except KernelError as failure:
        if failure.errno == errno.E2BIG:
            raise Invalid("the command and its variables are too long for a program") from None
        if failure.syscall != "chdir":
            raise
        raise Invalid(f"cwd {shown(cwd or '')} is no directory in the sandbox") from None
    code, number = done["exit_code"], done["signal"]
    if code is None:
        code = 128 + number if number is not None else 1  # as shells tell it
    if done["timed_out"]:
        code = _TIMED_OUT
    return {
        "exitCode": code,
        "stdout": _text(done["stdout"]),
        "stderr": _text(done["stderr"]),
        "signal": None if number is None else _signal(number),
        "timedOut": done["timed_out"],
        "truncated": done["truncated"],
    }


def entry_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A file or directory, with the fields that the SDK declares."""
    mode = entry.get("mode")
    told = {
        "name": entry["name"],
        "path": f"/workspace/{entry['path']}".rstrip("/"),
        "type": {"directory": "dir"}.get(entry["type"], entry["type"]),
        "size": entry.get("size"),
        "mode": mode,
        "permissions": _permissions(mode) if isinstance(mode, int) else None,
        "modifiedTime": entry.get("modified"),
        "symlinkTarget": entry.get("target"),
    }
    return {name: value for name, value in told.items() if value is not None}


def _permissions(mode: int) -> str:
    letters = "rwxrwxrwx"
    return "".join(c if mode & (0o400 >> i) else "-" for i, c in enumerate(letters))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode("utf-8", "replace")
