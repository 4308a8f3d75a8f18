"""Attempts that go through the broker: tools asked, tricked and watched."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH123, PTH208

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sandboxd.trial import reach
from sandboxd.trial.hunt import Hunt, processes, read_file
from sandboxd.trial.mcp import Client, failed

from .probes import Outcome, Plan, files

__all__ = ["CALLS"]

_TRAP = """\
import os
with open("/workspace/loot-%d" % os.getpid(), "wb") as loot:
    loot.write(repr(dict(os.environ)).encode())
"""
#: Where something of the tool's could turn up.
_SHARED = ("/workspace", "/tmp", "/dev/shm", "/run", "/home", "/var")  # noqa: S108
_INJECTED = {
    "LD_PRELOAD": "/workspace/trap.so",
    "LD_AUDIT": "/workspace/trap.so",
    "PYTHONPATH": "/workspace",
    "PYTHONSTARTUP": "/workspace/sitecustomize.py",
    "BASH_ENV": "/workspace/trap.sh",
}
#: An option of the paying tool that prints its whole environment: it must stay out of reach.
_OPTION = "--dump-environment"


def printed_secret(plan: Plan, client: Client) -> Outcome:
    """The control is the demo's: the audit log says what was injected and masked."""
    hunt, answer = _call(client, "report", {"title": "all that you know"})
    text = json.dumps(answer)
    masked = text.count("[redacted:")
    return Outcome(hunt, f"{masked} times [redacted:...]", masked > 0 and not failed(answer))


def no_secret(plan: Plan, client: Client) -> Outcome:
    hunt, _ = _call(client, "greet", {})
    found = hunt.has(plan.open_value.encode())  # a constant of the tool's manifest
    return Outcome(hunt, "nothing in all that it prints", found)


def injection(plan: Plan, client: Client) -> Outcome:
    """The control is the demo's: the same program, started by hand, obeys that option."""
    hunt = Hunt()
    for name in ("sitecustomize.py", "usercustomize.py", "json.py", "os.py", "urllib.py"):
        with open(f"/workspace/{name}", "w") as file:
            file.write(_TRAP)
    refused = 0
    pay = {"amount": 1, "payee": "injection"}
    attempts: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({**pay, "LD_PRELOAD": _INJECTED["LD_PRELOAD"]}, {}),
        ({**pay, "env": _INJECTED}, {}),
        ({**pay, "environment": _INJECTED}, {}),
        (pay, {"env": _INJECTED, "_meta": {"env": _INJECTED}}),
        ({**pay, "payee": _OPTION}, {}),
        ({**pay, "payee": f"x\0{_OPTION}"}, {}),
        ({**pay, "memo": _OPTION}, {}),
        ({**pay, "memo": f"x\n{_OPTION}"}, {}),
        ({**pay, "amount": _OPTION}, {}),
        ({**pay, "payee": [_OPTION, "x"]}, {}),
    ]
    for arguments, more in attempts:
        found, answer = _call(client, "pay", arguments, **more)
        hunt.add(found)
        refused += failed(answer)
    for name in os.listdir("/workspace"):
        if name.startswith("loot-"):
            hunt.breach(f"a planted module ran in the tool: {name}")
        read_file(hunt, f"/workspace/{name}")
    detail = f"{refused} of {len(attempts)} refused, the rest harmless"
    return Outcome(hunt, detail, None)


def replies(plan: Plan, client: Client) -> Outcome:
    """Lists, and the messages of every error that can be provoked."""
    hunt = Hunt()
    mark = len(client.received)
    client.request("tools/list")
    errors = 0
    for tool, arguments in (
        ("vault", {}),
        ("../report", {}),
        ("report", {"title": 7}),
        ("report", None),
        ("report", {"title": "-x"}),
        ("report", {"title": "x" * 200_000}),
        ("pay", {}),
    ):
        errors += failed(client.call(tool, arguments))
    for method in ("env/list", "resources/list", "prompts/get", "completion/complete"):
        errors += "error" in client.request(method)
    alive = "result" in client.request("ping")
    for line in client.received[mark:]:
        hunt.look("a reply of the broker", line)
    return Outcome(hunt, f"nothing in {errors} error messages", alive and errors == 11, "answered")


def bridge(plan: Plan, client: Client) -> Outcome:
    hunt = Hunt()
    for name in ("environ", "cmdline"):
        read_file(hunt, f"/proc/{client.pid}/{name}")
    control = hunt.has(plan.open_value.encode())  # the bridge was started with it
    reach.search_memory(hunt, client.pid)
    return Outcome(hunt, f"nothing in it, or {hunt.bytes >> 20} MiB of memory", control)


def spying(plan: Plan, client: Client) -> Outcome:
    """Look around while the paying tool holds the secret; the demo keeps it waiting meanwhile."""
    hunt = Hunt()
    call = client.submit("tools/call", name="pay", arguments={"amount": 5, "payee": "spied on"})
    told = sys.stdin.readline().strip()  # the demo's server has the tool's request
    pids = processes()
    for pid in pids:
        for name in ("environ", "cmdline"):
            read_file(hunt, f"/proc/{pid}/{name}")
        if pid not in (os.getpid(), client.pid):
            reach.search_memory(hunt, pid)
    shared = files(replace(plan, roots=_SHARED))
    print(json.dumps({"event": "spied"}), flush=True)
    answer = client.wait(call)
    hunt.look("the answer", json.dumps(answer).encode())
    hunt.add(shared.hunt)
    control = told == "running" and not failed(answer) and shared.control is True
    detail = f"saw its own {len(pids)} processes, no trace of the tool"
    return Outcome(hunt, detail, control, "the tool ran meanwhile")


def payment(plan: Plan, client: Client) -> Outcome:
    """The main job: what the agent is really there for."""
    hunt, answer = _call(client, "pay", {"amount": 42, "payee": "ACME", "memo": "invoice 7"})
    text = json.dumps(answer)
    return Outcome(hunt, "paid", not failed(answer) and "receipt" in text)


def _call(
    client: Client, tool: str, arguments: dict[str, Any], **more: Any
) -> tuple[Hunt, dict[str, Any]]:
    hunt = Hunt()
    answer = client.call(tool, arguments, **more)
    # Decoded: an escape in JSON must not hide a value from the search.
    hunt.look(f"the answer of {tool}", json.dumps(answer, ensure_ascii=False).encode())
    for part in answer.get("result", {}).get("content", []):
        hunt.look(f"the answer of {tool}", str(part.get("text", "")).encode())
    return hunt, answer


#: Name in the table, and the attempt.
CALLS: dict[str, Callable[[Plan, Client], Outcome]] = {
    "the MCP bridge's environment": bridge,
    "a tool that prints its secret": printed_secret,
    "a tool without secrets": no_secret,
    "loader variables, options, planted code": injection,
    "lists and error messages": replies,
    "spying while a tool holds the secret": spying,
}
