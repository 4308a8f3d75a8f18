"""The performance: baits laid out, the daemon started, both places probed, the controls run."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from sandboxd.admin.client import AdminClient
from sandboxd.errors import KernelError, Unavailable
from sandboxd.selftest.baits import Baits, open_baits, open_bystander
from sandboxd.selftest.judge import OUTSIDE, Result, judge, places_of
from sandboxd.selftest.prober.catalogue import PROBES
from sandboxd.selftest.prober.probe import (
    AGENT,
    BOTH,
    HOST,
    OWN_UID,
    TOOL,
    Layers,
    Plan,
    Probe,
    word_for,
)
from sandboxd.selftest.stage import AGENT as SLUG
from sandboxd.selftest.stage import IO, MEMORY, PROCESSES, PROCESSORS, TMP_SIZE, VARIABLE, Stage

__all__ = ["THREATS", "probes_for", "run"]

#: What the probes are for, in the order of the table.
THREATS = tuple(dict.fromkeys(probe.threat for probe in PROBES))

#: Times the stage's patience.
_SECONDS = 150.0
_READY_SECONDS = 15.0
_KINDS = ("user", "mnt", "pid", "ipc", "uts", "cgroup", "net", "time")
_LEFT = "leave a daemon behind"


def run(stage: Stage, threats: Sequence[str] = ()) -> Result:
    """Perform on ``stage`` and judge; ``threats`` are words that leave out other threats' probes.

    Raises Unavailable when the host can't isolate.
    """
    with ExitStack() as undo:
        baits = undo.enter_context(open_baits(stage.top))
        stage.start()
        undo.enter_context(open_bystander(baits))
        client = undo.enter_context(AdminClient.connect(stage.paths))
        value = base64.b64encode(stage.secret.reveal()).decode()
        client.call("env.set", agent=SLUG, values={VARIABLE: value}, now=False)
        marker = f"sandboxd-selftest-{secrets.token_hex(8)}"
        seen = _Seen(marker, tuple(threats))
        mode = client.call("status")["mode"]
        layers = _perform(client, stage, baits, seen)
        records = list(client.stream("audit.tail", n=10_000))
        stage.stop()
        return _judge(stage, seen, records, layers, mode)


def probes_for(threats: Sequence[str]) -> list[Probe]:
    """Probes for threats that contain one of these words; all without any."""
    return list(filter(Plan(threats=tuple(threats)).wants, PROBES))


@dataclass
class _Seen:
    """What came back: every prober's lines, what the tools answered, and who was watched."""

    marker: str
    threats: tuple[str, ...]
    lines: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    printed: bytes = b""
    lingering: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    done: bool = False

    def take(self, text: str) -> list[dict[str, Any]]:
        """Keep the probers' lines of ``text``; the events among them are the caller's."""
        events = []
        for line in text.splitlines():
            try:
                told = json.loads(line)
                if "event" in told:
                    events.append(told)
                else:
                    self.lines.setdefault(told["place"], {})[told["probe"]] = told
            except (ValueError, TypeError, KeyError):
                self.problems.append(f"a prober's line can't be read: {line[:200]!r}")
        return events


def _perform(
    client: AdminClient, stage: Stage, baits: Baits, seen: _Seen
) -> dict[str, list[dict[str, str]]]:
    """Run the agent to its end, attached, and the controls meanwhile. Returns the layers."""
    neighbour = client.call("session.start", agent="neighbour", args=[], tty=False, attach=False)
    try:
        _have_one_ready(client, neighbour["pid"], stage.patience)
        started, fds = client.call_with_fds(
            "session.start", agent=SLUG, args=[], tty=False, attach=True
        )
    except KernelError as failure:
        raise Unavailable(
            f"this host does not let a sandbox be built: {failure.message}",
            hint="see what it lacks: sandboxctl doctor",
        ) from None
    shown = client.call("session.show", id=started["id"])
    explained = client.call("policy.explain", agent=SLUG, tool="probe", arguments={})
    outside: list[tuple[str, subprocess.Popen[str]]] = []
    watching = threading.Event()
    watcher = threading.Thread(target=_watch, args=(seen, watching), daemon=True)
    watcher.start()
    try:
        for event in _events(fds, seen, _SECONDS * stage.patience):
            if event["event"] == "holding":
                plan = _plan(stage, baits, seen, shown["pid"], neighbour)
                _observe(plan, seen)
                os.write(fds[0], plan.encode() + b"\n")
                outside = [(place, _control(stage, place, plan)) for place in OUTSIDE]
            else:
                _note(event, seen)
        for place, process in outside:
            printed, complaint = process.communicate(timeout=_SECONDS * stage.patience)
            for event in seen.take(printed):
                seen.lines.setdefault(place, {})
                seen.problems += [] if event["event"] == "no scratch" else [str(event)]
            if process.returncode != 0:
                seen.problems.append(f"the controls in {place} ended early: {complaint[-300:]}")
    finally:
        watching.set()
        for fd in fds:
            os.close(fd)
        for _, process in outside:
            process.kill()
    if not seen.done:
        ending = client.call("session.wait", id=started["id"])
        last = seen.printed[-400:].decode(errors="replace")
        seen.problems.append(f"the prober ended early, {ending['reason']}: {last}")
    else:
        client.call("session.wait", id=started["id"])
    watcher.join()
    return {AGENT: shown["isolation"], TOOL: explained["isolation"]}


def _have_one_ready(client: AdminClient, neighbour: int, patience: float) -> None:
    """Let the agent's sandbox be one that was ready, as most are: the first session's never is."""
    nothing = {"PROBE": "nothing"}
    first = client.call("session.start", agent=SLUG, args=[], environment=nothing)
    client.call("session.wait", id=first["id"])
    launcher = psutil.Process(psutil.Process(neighbour).ppid())
    deadline = time.monotonic() + _READY_SECONDS * patience
    while time.monotonic() < deadline:
        waiting = 0
        for init in launcher.children():
            with suppress(psutil.Error):
                waiting += any(child.name() == init.name() for child in init.children())
        if waiting == 2:  # the agent's, and its neighbour's
            return
        time.sleep(0.05)


def _note(event: dict[str, Any], seen: _Seen) -> None:
    if event["event"] == "done":
        seen.done = True
    elif event["event"] == "problem":
        seen.problems.append(str(event["detail"]))
    elif event["event"] in ("tool", "held"):
        content = event["result"].get("result", {}).get("content", [])
        text = "\n".join(part.get("text", "") for part in content)
        seen.answers[event["event"]] = text or json.dumps(event["result"])[:500]
        if event["event"] == "tool":
            seen.take(text)


def _events(fds: list[int], seen: _Seen, seconds: float) -> Iterator[dict[str, Any]]:
    """The agent's events as they come; the rest of its lines is kept."""
    _, stdout, stderr = fds
    buffers = {stdout: b"", stderr: b""}
    deadline = time.monotonic() + seconds
    while buffers:
        ready, _, _ = select.select(list(buffers), [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            seen.problems.append(
                f"the prober was not done after {seconds:.0f} s"
                " (a slow host may get more time: --patience)"
            )
            return
        for fd in ready:
            data = os.read(fd, 1 << 16)
            seen.printed += data
            if not data:
                del buffers[fd]
                continue
            if fd == stdout:
                whole, _, buffers[fd] = (buffers[fd] + data).rpartition(b"\n")
                yield from seen.take(whole.decode(errors="replace"))


def _control(stage: Stage, place: str, plan: str) -> subprocess.Popen[str]:
    """The prober outside, where the attacks must work."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(stage.archive), place, str(stage.patience)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(plan + "\n")
    process.stdin.flush()
    return process


def _plan(stage: Stage, baits: Baits, seen: _Seen, agent: int, neighbour: dict[str, Any]) -> str:
    """All that a prober could wish to know, so that no probe fails by ignorance."""
    assert stage.daemon is not None
    where = stage.paths
    launcher = psutil.Process(agent).ppid()
    pids = {"bystander": baits.bystander, "daemon": stage.daemon.pid, "launcher": launcher}
    pids |= {"neighbour": neighbour["pid"], "selftest": os.getpid(), "agent": agent}
    others = [os.getpid(), *(child.pid for child in psutil.Process(neighbour["pid"]).children())]
    for init in psutil.Process(launcher).children():
        if init.pid in (agent, neighbour["pid"]):
            continue
        programs = [child for child in init.children() if child.name() != init.name()]
        if programs:  # else it waits for its first: a sandbox that is ready for a session
            pids |= {"holder": init.pid}
            pids |= {f"program of {child.ppid()}": child.pid for child in programs}
    paths: dict[str, Path | str] = {
        "master key": stage.key,
        "store": where.store,
        "audit log": where.audit,
        "daemon log": stage.log,
        "configuration": where.config / "agents" / f"{SLUG}.yaml",
        "state": where.state,
        "lock": where.lock,
        "session directory": where.sessions,
        "workspaces": where.workspaces,
        "bait": stage.bait,
        "admin socket": where.admin_socket,
        "bait socket": baits.socket,
        "another session's socket": where.sessions / neighbour["id"] / "broker.sock",
        "setuid id": stage.planted / "id",
        "capable cat": stage.planted / "cat",
    }
    return json.dumps(
        {
            "paths": {name: str(path) for name, path in paths.items()},
            "pids": pids,
            "addresses": baits.addresses,
            "port": baits.port,
            "udp_port": baits.udp_port,
            "abstract": baits.abstract,
            "ipc_key": baits.ipc_key,
            "segment": baits.segment,
            "queue": baits.queue,
            "shared_file": baits.shared_file,
            "key": baits.key,
            "tmp_size": TMP_SIZE,
            "processes": PROCESSES,
            "since": stage.since,
            "hostname": platform.node(),
            "booted": time.time() - time.clock_gettime(time.CLOCK_BOOTTIME),
            "namespaces": {kind: _namespaces(kind, others) for kind in _KINDS},
            "memory": MEMORY,
            "processors": PROCESSORS,
            "io": IO,
            "marker": seen.marker,
            "threats": seen.threats,
        }
    )


def _namespaces(kind: str, processes: Sequence[int]) -> list[str]:
    """Links of /proc; those that this kernel or this user can't have are left out."""
    found = []
    for pid in processes:
        with suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/ns/{kind}"))  # noqa: PTH115 - a name, no path
    return found


def _observe(plan: str, seen: _Seen) -> None:
    """What the host sees of either sandbox, and of an ordinary process."""
    given = Plan.of(json.loads(plan))
    targets = {AGENT: given.pids["agent"], TOOL: given.pids.get("holder", 0)}
    targets[HOST] = given.pids["bystander"]
    for probe in filter(given.wants, PROBES):
        for place, pid in targets.items():
            if not probe.observed or (place in BOTH and place not in probe.places):
                continue
            try:
                program = next((child.pid for child in psutil.Process(pid).children()), pid)
                where = replace(given, place=place, target=pid, program=program)
                got, detail = probe.attack(where)
            except (OSError, psutil.Error) as failure:
                got, detail = word_for(failure), str(failure)
            line = {"probe": probe.name, "place": place, "got": got, "detail": detail}
            seen.lines.setdefault(place, {})[probe.name] = line


def _watch(seen: _Seen, ended: threading.Event) -> None:
    """See each daemon that a probe leaves behind, by the marker in its arguments.

    And knock at the abstract sockets that a probe opens.
    """
    while not ended.wait(0.1):
        for place in BOTH:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(f"\0{seen.marker}-{place}")
        if len(seen.lingering) == len(BOTH):
            continue
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                for place in BOTH:
                    if f"{seen.marker}-{place}" in words:
                        seen.lingering.setdefault(place, process.pid)


def _judge(
    stage: Stage,
    seen: _Seen,
    records: list[dict[str, Any]],
    layers: dict[str, list[dict[str, str]]],
    mode: str,
) -> Result:
    _see_the_end(seen)
    rows = [
        judge(probe, place, seen.lines, _deciding(layers.get(place, []), mode))
        for probe in probes_for(seen.threats)
        for place in places_of(probe)
    ]
    problems = list(seen.problems)
    problems += _held(stage, seen, records)
    canary = stage.secret.reveal()
    if canary in seen.printed:
        problems.append("the canary is in the agent's output")
    for path in sorted(stage.top.rglob("*")):
        if path.is_file() and canary in path.read_bytes():
            problems.append(f"the canary is in {path.relative_to(stage.top)}")
    return Result(rows, mode=mode, kernel=platform.release(), layers=layers, problems=problems)


def _see_the_end(seen: _Seen) -> None:
    """What a probe left behind was there, and ended with its sandbox."""
    left = {
        word
        for process in psutil.process_iter()
        for word in _arguments(process)
        if word.startswith(seen.marker)
    }
    for place in BOTH:
        line = seen.lines.get(place, {}).get(_LEFT)
        if line is not None and line["got"] == "started":
            line["got"] = "ok" if f"{seen.marker}-{place}" in left else "gone"
            line["control"] = "ok" if place in seen.lingering else "was never seen"


def _arguments(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


def _held(stage: Stage, seen: _Seen, records: list[dict[str, Any]]) -> list[str]:
    """The searches prove something if a tool held the canary all the while, in every way."""
    digest = hashlib.sha256(stage.secret.reveal()).hexdigest()
    try:
        held = json.loads(seen.answers.get("held", "").splitlines()[0])["held"]
    except (ValueError, KeyError, IndexError, TypeError):
        answer = seen.answers.get("held", "nothing")[:200]
        return [f"no tool held the canary meanwhile, which the searches need: {answer}"]
    if held != [digest] * 3:
        return ["the tool that should hold the canary had another value"]
    if not any(r["event"] == "call.decided" and r.get("injected") for r in records):
        return ["the audit log knows of no canary given to a tool"]
    return []


def _deciding(layers: list[dict[str, str]], mode: str) -> Layers:
    """What the daemon says is on, of what changes the right denial."""
    on = {layer["layer"]: layer["remark"] for layer in layers if layer["state"] == "on"}
    abi = re.search(r"ABI (\d+)", on.get("landlock", ""))
    return Layers(
        "seccomp" in on,
        int(abi[1]) if abi else 0,
        frozenset(on) | ({OWN_UID} if mode == "root" else set()),
    )
