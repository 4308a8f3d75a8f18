"""The performance: set the secret, start the agent, watch it, then look for the secret everywhere.

This process alone knows the secret, so it also judges: it has the controls that the agent can't
have, and it searches everything that was written or printed.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sandboxd.admin.client import AdminClient
from sandboxd.demo.hostile import probes
from sandboxd.demo.hostile.agent import ATTEMPTS, PAYMENT
from sandboxd.demo.report import Result, Row
from sandboxd.demo.server import HELD, Bank, open_bank
from sandboxd.demo.stage import AGENT, VARIABLE, Stage
from sandboxd.errors import KernelError, Unavailable
from sandboxd.trial import reach
from sandboxd.trial.hunt import decoy

__all__ = ["run"]

_AGENT_SECONDS = 120.0


def run(stage: Stage) -> Result:
    """Perform on ``stage`` and judge. Raises Unavailable when the host can't isolate."""
    with ExitStack() as undo:
        bank = undo.enter_context(open_bank(stage.secret))
        abstract = undo.enter_context(_baits(stage))
        stage.start(bank.port)
        with AdminClient.connect(stage.paths) as client:
            value = base64.b64encode(stage.secret.reveal()).decode()
            client.call("env.set", agent=AGENT, values={VARIABLE: value}, now=False)
            seen = _perform(client, stage, bank, _plan(stage, bank, abstract))
            records = list(client.stream("audit.tail", n=10_000))
            verified = client.call("audit.verify")
        stage.stop()
        return _judge(stage, bank, seen, records, verified, abstract)


@dataclass
class _Seen:
    """What came out of the agent: its lines, every byte, and how it ended."""

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)
    printed: dict[str, bytes] = field(default_factory=dict)
    done: bool = False
    problem: str = ""


def _perform(client: AdminClient, stage: Stage, bank: Bank, plan: dict[str, Any]) -> _Seen:
    """Run the agent to its end, attached, and answer its cues."""
    try:
        started, fds = client.call_with_fds(
            "session.start", agent=AGENT, args=[json.dumps(plan)], tty=False, attach=True
        )
    except KernelError as failure:
        raise Unavailable(
            f"this host does not let a sandbox be built: {failure.message}",
            hint="see what it lacks: sandboxctl doctor",
        ) from None
    stdin, stdout, stderr = fds
    bank.on_arrival = lambda: _tell(stdin)
    seen = _Seen()
    try:
        for line in _lines(stdout, stderr, seen):
            with suppress(ValueError):
                _take(json.loads(line), seen, bank)
    finally:
        bank.on_arrival = lambda: None
        for fd in fds:
            os.close(fd)
    if not seen.problem:
        ending = client.call("session.wait", id=started["id"])
        if ending["exit_code"] != 0 or not seen.done:
            last = seen.printed["stderr"].decode(errors="replace").strip()[-300:]
            seen.problem = f"the agent ended early, {ending['reason']}: {last}".rstrip(": ")
    return seen


def _tell(stdin: int) -> None:
    with suppress(OSError):  # the agent is gone already, and its row fails for that
        os.write(stdin, b"running\n")


def _take(line: Any, seen: _Seen, bank: Bank) -> None:
    if not isinstance(line, dict):
        return
    if "attempt" in line:
        seen.lines[str(line["attempt"])] = line
    elif line.get("event") == "spied":
        bank.release.set()
    elif line.get("event") == "done":
        seen.done = True
    elif line.get("event") == "no broker":
        seen.problem = f"the agent found no broker: {line.get('detail')}"


def _lines(stdout: int, stderr: int, seen: _Seen) -> Iterator[bytes]:
    """Each line of standard output as it comes; all of both streams is kept in ``seen``."""
    kept = {stdout: bytearray(), stderr: bytearray()}
    given = 0
    deadline = time.monotonic() + _AGENT_SECONDS
    with selectors.DefaultSelector() as selector:
        for fd in kept:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                seen.problem = f"the agent was not done after {_AGENT_SECONDS:.0f} s"
                break
            for key, _ in selector.select(left):
                data = os.read(key.fd, 1 << 16)
                kept[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
            while (end := kept[stdout].find(b"\n", given)) >= 0:
                line, given = bytes(kept[stdout][given:end]), end + 1
                yield line
    seen.printed = {"stdout": bytes(kept[stdout]), "stderr": bytes(kept[stderr])}


def _plan(stage: Stage, bank: Bank, abstract: str) -> dict[str, Any]:
    """What the agent is told: where everything is, so that no attempt fails by ignorance."""
    assert stage.daemon is not None
    addresses = ["127.0.0.1", "::1", "::ffff:127.0.0.1"]
    for interface in psutil.net_if_addrs().values():
        addresses += [
            entry.address.partition("%")[0]
            for entry in interface
            if entry.family in (socket.AF_INET, socket.AF_INET6)
        ]
    return {
        "paths": [str(path) for path in _places(stage)],
        "open_path": str(stage.open_file),
        "open_value": stage.opened,
        "admin": str(stage.paths.admin_socket),
        "abstract": abstract,
        "addresses": list(dict.fromkeys(addresses)),
        "port": bank.port,
        "metadata": ["169.254.169.254", "fd00:ec2::254"],
        "pids": [stage.daemon.pid, os.getpid()],
        "since": stage.since,
    }


def _places(stage: Stage) -> list[Path]:
    where = stage.paths
    return [
        stage.key,
        stage.log,
        where.store,
        where.audit,
        where.lock,
        where.state,
        where.config,
        where.admin_socket,
        where.sessions,
    ]


@contextmanager
def _baits(stage: Stage) -> Iterator[str]:
    """Values like the secret in places that only an escape would reach; any found one is a breach.

    An abstract socket, whose name it returns, a shared segment, and a key in a session keyring
    that the daemon inherits. The daemon's environment has another one.
    """
    with ExitStack() as undo:
        name = f"sandboxd-demo-{stage.top.name}"
        listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind("\0" + name)
        listener.listen()
        with suppress(OSError):  # a kernel without System V IPC has nothing to hide there
            undo.callback(reach.unshare, reach.share(decoy()))
        with suppress(OSError):  # nor has one that refuses keys to everybody, as containers do
            reach.new_session_keyring()
            reach.add_key(b"sandboxd-demo-bait", decoy())
        yield name


def _judge(
    stage: Stage,
    bank: Bank,
    seen: _Seen,
    records: list[dict[str, Any]],
    verified: dict[str, Any],
    abstract: str,
) -> Result:
    own = _own_controls(stage, bank, records, abstract)
    rows = [_row(name, seen.lines.get(name), own.get(name, (True, ""))) for name in ATTEMPTS]
    result = Result(rows)
    if seen.problem:
        result.problems.append(seen.problem)
    leaks = [f"the agent's {n}" for n, data in seen.printed.items() if _holds(stage, data)]
    result.searched, control = 0, False
    for path in sorted(stage.top.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            result.searched += 1
            control = control or stage.opened.encode() in data
            if _holds(stage, data):
                leaks.append(str(path.relative_to(stage.top)))
    result.leaks = leaks
    if not control or VARIABLE.encode() not in stage.paths.store.read_bytes():
        result.problems.append("the search of files missed its control")
    paid = [payment for payment in bank.payments if payment["payee"] == "ACME"]
    answered = seen.lines.get(PAYMENT, {}).get("control") is True
    result.used = bool(paid) and answered and not bank.refused
    result.payments = len(bank.payments)
    result.audit_ok, result.records = bool(verified["ok"]), int(verified["records"])
    if verified["problem"]:
        result.problems.append(f"audit: {verified['problem']}")
    return result


def _row(name: str, line: dict[str, Any] | None, own: tuple[bool, str]) -> Row:
    """The agent's line and our own control, as one row. No line means that it was not tried."""
    if line is None:
        return Row(name, found=True, result="was not tried", control=False, how="")
    control, how = line["control"], str(line["control_detail"])
    if isinstance(control, str) and name in probes.CONTROLS:
        # The kernel refuses it even on the agent's own things. That is no weaker, if the same
        # code works out here, or is refused by the whole host.
        outside = probes.CONTROLS[name]()
        how = f"{control}, outside: {'works' if outside is True else outside}"
        control = outside is not False
    passed, more = own
    loot = [text[:12] + text[40:] if text.startswith("sk_demo_") else text for text in line["loot"]]
    return Row(
        name,
        found=bool(line["found"]),
        result="; ".join(loot) if line["found"] else str(line["detail"]),
        control=control in (True, None) and passed,
        how=more or how,
    )


def _own_controls(
    stage: Stage, bank: Bank, records: list[dict[str, Any]], abstract: str
) -> dict[str, tuple[bool, str]]:
    """The controls that only this process has: whether each passed, and what it shows."""
    reached = _connects((socket.AF_INET, ("127.0.0.1", bank.port)))
    listens = _connects((socket.AF_UNIX, "\0" + abstract))
    there = all(path.exists() or path == stage.paths.admin_socket for path in _places(stage))
    injected, masked = _told_of(records, "report")
    tempted = _option_works(stage)
    held = any(payment["payee"] == HELD for payment in bank.payments)
    return {
        "the host's network": (reached, "this process connects"),
        "Unix sockets: admin, docker, D-Bus": (listens, "own and this process's answer"),
        "store, key and log by their paths": (there, "a file mounted there is read"),
        "a tool that prints its secret": (
            injected > 0 and masked > 2,
            f"audit: {injected} secret injected, {masked} masked",
        ),
        "loader variables, options, planted code": (tempted, "the option works outside"),
        "spying while a tool holds the secret": (held, "the tool ran meanwhile"),
    }


def _connects(target: tuple[int, Any]) -> bool:
    family, address = target
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        try:
            sock.connect(address)
        except OSError:
            return False
    return True


def _told_of(records: list[dict[str, Any]], tool: str) -> tuple[int, int]:
    """What the audit log says of a tool's calls: secrets injected into one, values masked."""
    calls = {
        record["call"]: len(record["injected"])
        for record in records
        if record["event"] == "call.decided"
        and record.get("tool") == tool
        and any(secret["name"] == VARIABLE for secret in record["injected"])
    }
    masked = sum(
        int(record.get("redactions") or 0)
        for record in records
        if record["event"] == "call.ended" and record.get("call") in calls
    )
    return max(calls.values(), default=0), masked


def _option_works(stage: Stage) -> bool:
    """The paying tool, started by hand with the option that the agent smuggles, prints it all."""
    value = decoy()
    program = stage.paths.config / "tools" / "pay" / "program.py"
    done = subprocess.run(
        [sys.executable, "-I", str(program), "--amount=1", "x", "--dump-environment"],
        env={VARIABLE: value.decode(), "BANK_URL": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )
    return value in done.stdout


def _holds(stage: Stage, data: bytes) -> bool:
    """Whether ``data`` holds the secret, as it is or in a usual encoding."""
    return any(form in data for form in _forms(stage.secret.reveal()))


def _forms(value: bytes) -> list[bytes]:
    forms = [value, value.hex().encode(), value.hex().upper().encode(), value[::-1]]
    for shift in range(3):  # base64 groups three bytes: what surrounds the value shifts it
        whole = base64.b64encode(b"\0" * shift + value)
        forms.append(whole[(4 if shift else 0) : -4])
    return forms
