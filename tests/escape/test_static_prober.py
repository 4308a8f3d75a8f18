"""A small static C program tries what Python can't: other ABIs, and every bit of an argument.

``prober.c`` is built here, and runs outside as the control, in an agent's and in a tool's sandbox
of a real daemon, and in a sandbox of each kind of launcher.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from real_daemon import RealDaemon, directories

from sandboxd.isolation.client import Launcher
from sandboxd.isolation.wire import LaunchSpec, MountSpec
from sandboxd.trial.archive import pack

pytestmark = pytest.mark.soak

SOURCE = Path(__file__).parent / "prober.c"

#: What is allowed, or the one right denial; anything else in the prober's output is EPERM.
ALLOWED = {
    "native:getpid",
    "clone:none",
    "tty:size",
    "socket:unix",
    "socket:unix-high",
    "personality:query",
    "i386:getpid",
    "i386:tty-size",
}
DENIALS = {
    "native:no-such-call": "ENOSYS",
    "native:no-such-call-high": "ENOSYS",
    "clone3:user": "ENOSYS",
    "clone3:time": "ENOSYS",
    "socket:vsock": "EAFNOSUPPORT",
    "socket:vsock-high": "EAFNOSUPPORT",
    "socket:alg-high": "EAFNOSUPPORT",
    "i386:socket-unix": "EAFNOSUPPORT",  # socketcall hides its arguments: no socket at all
    "i386:socket-vsock": "EAFNOSUPPORT",
    "i386:socket-netfilter": "EAFNOSUPPORT",
    "i386:socket-direct": "EAFNOSUPPORT",
    "i386:no-such-call": "ENOSYS",
    "x32:getpid": "ENOSYS",
    "x32:ioctl": "ENOSYS",
    "x32:execve": "ENOSYS",
    "x32:ptrace": "ENOSYS",
    "x32:kexec_load": "ENOSYS",
    "x32:io_uring_setup": "ENOSYS",
    "x32:native-io_uring": "ENOSYS",
}
#: Speaks to the broker by the demo's client, which ``mcp.zip`` holds.
AGENT = """
import json, subprocess, sys
own = subprocess.run(["/opt/escape/prober"], stdout=subprocess.PIPE, check=True).stdout
sys.path.insert(0, "/opt/escape/mcp.zip")
from sandboxd.trial.mcp import Client
answer = Client({}).call("probe", {})["result"]
print(json.dumps({"agent": own.decode(), "tool": answer["content"][0]["text"]}))
"""

INPUT = "input: {type: object, additionalProperties: false}\n"

Outcomes = dict[str, str]


def outcomes(printed: str) -> Outcomes:
    """Name and outcome of each line: ``ok``, an errno's name, or ``signal N``."""
    lines = dict(line.split(" ", 1) for line in printed.strip().splitlines())
    return {
        name: errno.errorcode[int(word)] if word.isdigit() else word for name, word in lines.items()
    }


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """A directory that everybody may read, with the prober in it."""
    ready = os.environ.get("SANDBOXD_TEST_PROBER", "")  # on a host without a compiler
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None and not ready:
        pytest.skip("no C compiler (Debian: apt install gcc libc6-dev)")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="escape-") as name:
        top = Path(name)
        if ready:
            shutil.copy(ready, top / "prober")
        else:
            command = [str(compiler), "-static", "-O1", "-Wall", "-Werror"]
            subprocess.run([*command, "-o", str(top / "prober"), str(SOURCE)], check=True)
        pack(top / "mcp.zip", ["sandboxd.trial.mcp"], "sandboxd.trial.mcp:Client")
        top.chmod(0o755)
        (top / "mcp.zip").chmod(0o644)
        yield top


@pytest.fixture(scope="module")
def outside(built: Path) -> Outcomes:
    done = subprocess.run([built / "prober"], capture_output=True, text=True, check=True)
    return outcomes(done.stdout)


def without_ia32(outside: Outcomes) -> set[str]:
    """A kernel without 32-bit emulation kills whoever knocks at that gate (SIGSEGV)."""
    if outside.get("i386:getpid", "ok") == "ok":
        return set()
    return {name for name in outside if name.startswith("i386:")}


def check(seen: Outcomes, outside: Outcomes) -> None:
    assert set(seen) == set(outside)
    expected = {
        name: "ok" if name in ALLOWED else DENIALS.get(name, "EPERM")
        for name in outside
        if name not in without_ia32(outside)
    }
    assert {name: seen[name] for name in expected} == expected


def test_outside_most_of_it_works(outside: Outcomes) -> None:
    gone = without_ia32(outside)
    assert {name for name in ALLOWED & set(outside) - gone if outside[name] != "ok"} == set()
    works = {
        name
        for name, outcome in outside.items()
        if name not in ALLOWED and outcome not in (DENIALS.get(name), "EPERM")
    }
    for name in ("unshare:files", "socket:netfilter-high", "personality:fixed-high"):
        assert name in works, outside[name]
    if platform.machine() == "x86_64" and not gone:
        for name in ("i386:ptrace", "i386:mount", "i386:personality", "i386:modify_ldt"):
            assert name in works, outside[name]
    assert len(works) >= (40 if not gone else 15), sorted(set(outside) - works)


@pytest.fixture(scope="module")
def inside(built: Path) -> Iterator[dict[str, Any]]:
    """What it prints in an agent's and in a tool's sandbox of a real daemon, and the layers."""
    shown = f"{{source: {built}, target: /opt/escape}}"
    with directories() as daemon:
        daemon.python_agent("prober", AGENT, tools="[probe]", mounts=f"[{shown}]")
        daemon.write(
            "agents/idle.yaml",
            "version: 1\ndescription: shows its layers\ncommand: [/bin/sleep, '60']\n",
        )
        daemon.tool("probe", "#!/bin/sh\nexec /opt/escape/prober\n", f"{INPUT}mounts: [{shown}]\n")
        daemon.start()
        yield {**_run(daemon), "layers": _layers(daemon)}


def _run(daemon: RealDaemon) -> dict[str, str]:
    done = daemon.run("prober")
    assert done.returncode == 0, done.stderr
    printed: dict[str, str] = json.loads(done.stdout)
    return printed


def _layers(daemon: RealDaemon) -> dict[str, str]:
    id = daemon.call("session.start", agent="idle", args=[], tty=False, attach=False)["id"]
    shown = daemon.call("session.show", id=id)["isolation"]
    return {layer["layer"]: layer["state"] for layer in shown}


@pytest.mark.parametrize("where", ["agent", "tool"])
def test_every_way_into_the_kernel_is_filtered(
    inside: dict[str, Any], outside: Outcomes, where: str
) -> None:
    if inside["layers"].get("seccomp") != "on":
        pytest.skip("this kernel has no system call filters")
    check(outcomes(inside[where]), outside)


async def test_the_filter_is_the_same_without_root(
    launcher: Launcher, built: Path, outside: Outcomes
) -> None:
    if not getattr(launcher, "seccomp", False):
        pytest.skip("this kernel has no system call filters")
    read, write = trio.socket.socketpair()
    spec = LaunchSpec(
        id="prober",
        argv=(b"/opt/escape/prober",),
        env=(),
        uid=1_900_000_777,
        mounts=(MountSpec(str(built), "/opt/escape"),),
    )
    ends = write.fileno()
    process = await launcher.launch(spec, stdin=ends, stdout=ends, stderr=ends)
    write.close()
    printed = b""
    while chunk := await read.recv(65536):
        printed += chunk
    read.close()
    assert (await process.wait()).code == 0
    check(outcomes(printed.decode()), outside)
