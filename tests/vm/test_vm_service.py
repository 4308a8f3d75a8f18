"""The product's own unit on the machine: installed, started, used, bounded and stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vm_machine import Machine

pytestmark = pytest.mark.vm

UNIT = "sandboxd.service"
ROOT = Path("/sys/fs/cgroup/system.slice") / UNIT
MIB = 1 << 20

AGENT = """
version: 1
description: runs what it is told
command: [/bin/sh]
args_allowed: true
tools: [hoard, fine]
policy: work
limits: {memory: 200M, processes: 40, cpus: 0.5}
"""
POLICY = """
version: 1
description: everything that is declared, on hosts that can bound it
require: [cgroup, landlock, seccomp]
rules:
  - allow: "*"
"""
HOARD = """#!/usr/bin/python3
import os, time
for _ in range(8):
    if os.fork() == 0:
        block = bytearray(24 << 20)
        time.sleep(300)
time.sleep(300)
"""
FINE = """#!/bin/sh
printf 'fine, with %s letters: %s\\n' "${#TOKEN}" "$TOKEN"
"""
MANIFEST = """
version: 1
name: {name}
description: a tool of the tests
program: program
input: {{type: object, additionalProperties: false}}
limits: {{memory: 96M, processes: 30}}
timeout: 300s
secrets: [{{variable: TOKEN}}]
"""
# What an agent's own client does, as small as it gets: MCP over the session's socket.
CALL = """
import json, os, socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(os.environ["SANDBOXD_SOCKET"]); f = s.makefile("rw")
def ask(number, method, **params):
    f.write(json.dumps(dict(jsonrpc="2.0", id=number, method=method, params=params)) + chr(10))
    f.flush()
    while True:
        answer = json.loads(f.readline())
        if answer.get("id") == number:
            return answer
ask(1, "initialize", protocolVersion="2025-06-18", capabilities={},
    clientInfo=dict(name="t", version="1"))
f.write(json.dumps(dict(jsonrpc="2.0", method="notifications/initialized")) + chr(10))
for number, tool in enumerate(sys.argv[1:], 2):
    print(json.dumps(ask(number, "tools/call", name=tool, arguments={})["result"]))
"""
#: What a unit on an emulated processor beside others' work has to be given.
SLOW = """
[Service]
TimeoutStartSec=600s
TimeoutStopSec=300s
WatchdogSec=600s
"""
SECRET = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def service(machine: Machine) -> Machine:
    """Installed as docs/systemd.md says, configured, started."""
    machine.run("sandboxctl", "install", "--enable")
    machine.run("sandboxctl", "init")
    machine.write(f"/etc/systemd/system/{UNIT}.d/slow.conf", SLOW)
    machine.run("systemctl", "daemon-reload")
    machine.write("/etc/sandboxd/agents/worker.yaml", AGENT)
    machine.write("/etc/sandboxd/policies/work.yaml", POLICY)
    for name, program in (("hoard", HOARD), ("fine", FINE)):
        machine.write(f"/etc/sandboxd/tools/{name}/tool.yaml", MANIFEST.format(name=name))
        machine.write(f"/etc/sandboxd/tools/{name}/program", program, "755")
    machine.run("systemctl", "start", UNIT)
    machine.run("sandboxctl", "env", "set", "--stdin", "worker", "TOKEN", stdin=SECRET)
    return machine


def groups(machine: Machine) -> list[str]:
    """The cgroups below the unit's, without their own leaf for the daemon."""
    found = machine.out("find", str(ROOT), "-mindepth", "2", "-type", "d")
    return [line for line in found.splitlines() if "/sandboxd-" in line]


def test_the_host_is_ready_and_has_unified_cgroups(service: Machine) -> None:
    assert service.out("stat", "-f", "-c", "%T", "/sys/fs/cgroup") == "cgroup2fs"
    told = service.json("sandboxctl", "doctor", "--json")
    assert told["ready"]
    found = {row["name"]: row for row in told["checks"]}
    assert found["cgroups"]["detail"].startswith("v2: ")
    assert {"memory", "pids", "cpu"} <= set(found["cgroups"]["detail"].split()[1:])
    for name in ("cgroups", "systemd", "idmapped mounts", "seccomp filters"):
        assert found[name]["state"] == "ok", found[name]


def test_the_daemon_runs_as_the_units_user_in_its_delegated_cgroup(service: Machine) -> None:
    told = service.json("sandboxctl", "--json", "status")
    assert (told["mode"], told["user"]) == ("root", "sandboxd")
    assert str(told["pid"]) == service.property(UNIT, "MainPID")
    supervisor = ROOT / "supervisor"
    assert str(told["pid"]) in service.out("cat", f"{supervisor}/cgroup.procs").split()
    # Ahead of sandboxes, which share processors and disks evenly.
    assert service.out("cat", f"{supervisor}/cpu.weight") == "1000"
    assert service.out("cat", f"{supervisor}/io.weight") == "default 1000"


def test_a_sessions_limits_are_in_its_cgroup(service: Machine) -> None:
    started = service.json("sandboxctl", "--json", "session", "start", "worker", "--", "-c",
                           "sleep 600")  # fmt: skip
    pid = service.json("sandboxctl", "--json", "session", "show", started["id"])["pid"]
    path = service.out("cat", f"/proc/{pid}/cgroup").removeprefix("0::")
    assert path.startswith(f"/system.slice/{UNIT}/sandboxd-")
    at = f"/sys/fs/cgroup{path}"
    held = service.out("cat", f"{at}/cgroup.controllers").split()
    assert {"memory", "pids", "cpu", "io"} <= set(held)
    assert service.out("cat", f"{at}/io.weight") == "default 100"
    read = {name: service.out("cat", f"{at}/{name}") for name in (
        "memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "cpu.max")}  # fmt: skip
    assert int(read["memory.max"]) == 216 * MIB
    assert (read["memory.swap.max"], read["memory.oom.group"]) == ("0", "1")
    assert (read["pids.max"], read["cpu.max"]) == ("40", "50000 100000")
    service.run("sandboxctl", "session", "stop", "--grace", "0", started["id"])
    assert service.run("test", "-e", at, check=False).status != 0


def test_a_tool_that_takes_too_much_ends_and_the_next_one_works(service: Machine) -> None:
    done = service.run("sandboxctl", "run", "worker", "--", "-c",
                       f"python3 -c '{CALL}' hoard fine")  # fmt: skip
    hoarded, fine = (json.loads(line) for line in done.stdout.splitlines())
    assert "hoard was ended: its processes ran out of memory" in hoarded["content"][0]["text"]
    text = fine["content"][0]["text"]
    assert f"fine, with {len(SECRET)} letters: [redacted:TOKEN]" in text
    assert SECRET not in done.stdout + done.stderr
    assert service.property(UNIT, "ActiveState") == "active"
    lines = service.out("sandboxctl", "--json", "audit", "tail", "-n", "50").splitlines()
    records = [json.loads(line) for line in lines]
    ended = [r for r in records if r["event"] == "call.ended"]
    assert [(r["tool"], r["out_of_memory"]) for r in ended] == [("hoard", True), ("fine", False)]


def test_a_tool_gets_the_secret_and_the_agent_does_not(service: Machine) -> None:
    script = f"env; python3 -c '{CALL}' fine; cat /proc/*/environ | tr '\\0' '\\n'"
    done = service.run("sandboxctl", "run", "worker", "--", "-c", script, check=False)
    assert f"with {len(SECRET)} letters" in done.stdout
    assert SECRET not in done.stdout + done.stderr


def test_stopping_leaves_no_process_and_no_cgroup(service: Machine) -> None:
    stubborn = "trap '' TERM HUP; (setsid sh -c 'trap \"\" TERM; sleep 611' &); sleep 611"
    service.run("sandboxctl", "session", "start", "worker", "--", "-c", stubborn)
    assert len(groups(service)) >= 1
    assert "sleep 611" in service.out("ps", "-eo", "args")
    service.run("systemctl", "stop", UNIT)
    assert service.property(UNIT, "Result") == "success"
    assert "sleep 611" not in service.out("ps", "-eo", "args")
    assert service.run("test", "-e", str(ROOT), check=False).status != 0
    assert service.out("find", "/sys/fs/cgroup", "-name", "sandboxd-*") == ""
    # The socket is still there: the next command starts the service again.
    assert service.json("sandboxctl", "--json", "audit", "verify")["ok"]
