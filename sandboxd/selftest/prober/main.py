"""The prober's life: read the plan, try every probe in a process of its own, print the outcomes.

``agent`` runs in the agent's sandbox and has the broker start ``tool`` and ``hold`` in theirs;
``host`` and ``scratch`` run outside and are the controls. One JSON object a line:
``{"place", "probe", "got", "detail", "control", "fallback"}``.
"""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH110, PTH123

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

from sandboxd.selftest.prober import before, catalogue, kernel
from sandboxd.selftest.prober.probe import AGENT, SCRATCH, TOOL, Attack, Plan, Probe, word_for
from sandboxd.trial.mcp import Client

__all__ = ["main", "try_one"]

_WORKSPACE = "/workspace"
_PLAN = f"{_WORKSPACE}/plan.json"
_HOLDING, _RELEASE = f"{_WORKSPACE}/holding", f"{_WORKSPACE}/release"
#: Times the patience that the runner asks for.
_SECONDS = 20.0
_HOLD_SECONDS = 110.0
_LEAVING_SECONDS = 0.5
_ANSWER_SECONDS = 60.0
#: user, mount, pid, network, ipc, uts and cgroup namespaces.
_NEW_USER, _NEW_MOUNTS, _NEW_REST = 0x10000000, 0x20000, 0x6E020000
_SET_DEATH_SIGNAL = 1
_MS_REC_PRIVATE, _MS_NOSUID_NODEV_NOEXEC = 0x44000, 0xE


def main() -> int:
    """0 when every probe was tried."""
    place = sys.argv[1]
    _be_patient(float(sys.argv[2]))
    if place == "hold":
        return _hold()
    if place == TOOL and not os.path.exists(_PLAN):
        return before.leave()
    if place == TOOL:
        with open(_PLAN) as file:
            plan = Plan.of({**json.load(file), "place": TOOL})
        _try_all(plan)
        return 0
    if place == AGENT and os.environ.get("PROBE") == "nothing":
        return 0  # only there so that the next one's sandbox is one that was ready
    if place == AGENT:
        return _agent()
    plan = Plan.of({**json.loads(sys.stdin.readline()), "place": place})
    if place == SCRATCH:
        return _in_scratch(plan)
    _try_all(plan)
    return 0


def _be_patient(factor: float) -> None:
    global _SECONDS, _HOLD_SECONDS, _LEAVING_SECONDS, _ANSWER_SECONDS
    _SECONDS, _HOLD_SECONDS = _SECONDS * factor, _HOLD_SECONDS * factor
    _LEAVING_SECONDS *= factor
    _ANSWER_SECONDS *= factor


def _agent() -> int:
    """Have a tool hold the secret, then probe here and in a second tool, then let go."""
    client = Client({}, patience=_ANSWER_SECONDS)
    holding = client.submit("tools/call", name="hold", arguments={})
    deadline = time.monotonic() + _SECONDS
    while not os.path.exists(_HOLDING):
        if time.monotonic() > deadline:
            _say(event="problem", detail=f"no tool held the secret: {client.wait(holding)}"[:500])
            return 1
        time.sleep(0.01)
    _say(event="holding")
    given = sys.stdin.readline()
    leaving = client.wait(client.submit("tools/call", name="probe", arguments={}))
    if leaving.get("result", {}).get("isError", True):
        _say(event="problem", detail=f"the call before: {leaving}"[:500])
    with open(_PLAN, "w") as file:
        file.write(given)
    probing = client.submit("tools/call", name="probe", arguments={})
    _try_all(Plan.of({**json.loads(given), "place": AGENT}))
    for name, number in (("tool", probing), ("held", holding)):
        if name == "held":
            with open(_RELEASE, "w"):
                pass
        _say(event=name, result=client.wait(number))
    client.close()
    _say(event="done")
    return 0


def _hold() -> int:
    """A tool that has the secret in every way there is, and tells only its digest."""
    secret = os.environb[b"CANARY"]
    with open("/run/secrets/canary", "rb") as file:
        in_file = file.read()
    in_descriptor = os.read(int(os.environ["CANARY_FD"]), 4096)
    ways = [hashlib.sha256(way).hexdigest() for way in (secret, in_file, in_descriptor)]
    with open(_HOLDING, "w") as marker:
        marker.write("holding")
    deadline = time.monotonic() + _HOLD_SECONDS
    while not os.path.exists(_RELEASE) and time.monotonic() < deadline:
        time.sleep(0.02)
    print(json.dumps({"held": ways, "seconds": time.monotonic() - deadline + _HOLD_SECONDS}))
    return 0


def _in_scratch(plan: Plan) -> int:
    """Try as the root of new namespaces, below a new init with a /proc of its own."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        if uid:
            kernel.call("unshare", _NEW_USER)
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"0 {uid} 1"),
                ("gid_map", f"0 {gid} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        kernel.call("unshare", _NEW_REST)
    except OSError as failure:
        _say(place=SCRATCH, event="no scratch", detail=word_for(failure))
        return 0
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    kernel.libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    with contextlib.suppress(OSError):
        kernel.call("mount", b"", b"/", None, _MS_REC_PRIVATE, None)
        kernel.call("mount", b"proc", b"/proc", b"proc", _MS_NOSUID_NODEV_NOEXEC, None)
        for place in (b"/mnt", b"/tmp"):
            kernel.call("mount", b"tmpfs", place, b"tmpfs", 0, b"size=1m")
    _try_all(plan)
    sys.stdout.flush()
    os._exit(0)


def _try_all(plan: Plan) -> None:
    for probe in filter(plan.wants, catalogue.PROBES):
        if probe.observed:
            continue
        if plan.inside:
            if plan.place in probe.places:
                _say(**_inside(probe, plan))
        elif probe.outside == plan.place:
            got, detail = try_one(probe.attack, plan)
            _say(place=plan.place, probe=probe.name, got=got, detail=detail)


def _inside(probe: Probe, plan: Plan) -> dict[str, Any]:
    got, detail = try_one(probe.attack, plan)
    line: dict[str, Any] = {"place": plan.place, "probe": probe.name, "got": got, "detail": detail}
    for name, control in (("control", probe.inside), ("fallback", probe.fallback)):
        line[name] = None if control is None else try_one(control, plan)[0]
    return line


def try_one(attack: Attack, plan: Plan) -> tuple[str, str]:
    """What came of it, as a word and in more words; in a process group that is gone afterwards."""
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            os.setpgid(0, 0)
            _tell(write, attack, plan)
        finally:
            os._exit(0)
    os.close(write)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    data = b""
    deadline = time.monotonic() + _SECONDS
    while select.select([read], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(read, 65536)
        data += chunk
        if not chunk or data.endswith(b"\n"):
            break
    else:
        data = b'["hung", ""]\n'
    os.close(read)
    status = 0
    if not data:
        status = os.waitpid(pid, 0)[1]
    _end_group(pid)
    if data:
        got, detail = json.loads(data)
        return got, detail
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name, ""
    return f"exit {os.WEXITSTATUS(status)}", ""


def _end_group(leader: int) -> None:
    """Kill what is left and wait for it: to the last, its processes count against our limit."""
    deadline = time.monotonic() + _LEAVING_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(leader, signal.SIGKILL)
        except OSError:
            return  # all gone, or (outside) no longer ours to signal
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-leader, os.WNOHANG)[0]:
                pass
        time.sleep(0.001)


def _tell(write: int, attack: Attack, plan: Plan) -> None:
    detail = ""
    try:
        if plan.place == SCRATCH:
            kernel.call("unshare", _NEW_MOUNTS)  # what is done to mounts is gone afterwards
        result = attack(plan)
        if type(result) is tuple:
            word, detail = result
        else:
            word = result if isinstance(result, str) else "ok"
    except OSError as failure:
        word, detail = word_for(failure), str(failure.filename or "")
    except Exception as failure:  # noqa: BLE001 - a probe that breaks is told as what it is
        word, detail = "broke", f"{type(failure).__name__}: {failure}"
    os.write(write, json.dumps([word, detail[:300]]).encode() + b"\n")


def _say(**line: Any) -> None:
    print(json.dumps(line), flush=True)
