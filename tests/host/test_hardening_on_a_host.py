"""The unit's hardening, weighed: nothing more can be taken, and nothing in it is for show.

A small program does what the daemon does with its privileges (drop them, launch a sandbox with
idmapped workspaces, end it) under the unit's own settings, as they are and changed one by one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandboxd.paths import shipped

pytestmark = pytest.mark.host

PROGRAM = """
import json, os, sys, tempfile, trio
from sandboxd.isolation.launcher import fork_launcher
sock = fork_launcher()
from sandboxd.isolation.client import open_launcher
from sandboxd.isolation.wire import Limits, LaunchSpec, MountSpec
from sandboxd.privileges import become, identity

who = identity("sandboxd")
own = tempfile.mkdtemp(dir="/var/lib/sandboxd")
os.chown(own, who.uid, who.gid)
workspaces = (own, "/srv/closed/workspace")
become(who)
bounding = [l for l in open("/proc/self/status") if l.startswith("CapBnd")][0].split()[1]

async def main():
    told = {"bounding": int(bounding, 16), "runs": []}
    null = os.open("/dev/null", os.O_RDWR)
    async with open_launcher(sock) as launcher:
        told["mode"] = launcher.mode
        for path in workspaces:
            for network in ("none", "host"):
                spec = LaunchSpec(
                    id="x", uid=524289, network=network, env=(),
                    argv=(b"/bin/sh", b"-c", b"echo hi > /workspace/f && test $(id -u) = 1000"),
                    mounts=(MountSpec(path, "/workspace", readonly=False, idmap=True),),
                    limits=Limits(memory=1 << 28, processes=50, open_files=4096))
                process = await launcher.launch(spec, stdin=null, stdout=1, stderr=2)
                told["runs"].append((await process.wait()).code)
        spec = LaunchSpec(id="y", uid=524290, env=(), argv=(b"/bin/sleep", b"60"))
        process = await launcher.launch(spec, stdin=null, stdout=null, stderr=null)
        await process.kill()
        with trio.fail_after(5):
            told["killed"] = (await process.wait()).signal
    print(json.dumps(told))
trio.run(main)
"""
EXPECTED = {"bounding": 0, "mode": "root", "runs": [0, 0, 0, 0], "killed": 9}

#: How the service runs, not what it may do: these don't fit a program run once.
_PROCEDURE = (
    "Type NotifyAccess ExecStart ExecReload Sockets Restart RestartSec RestartPreventExitStatus "
    "WatchdogSec TimeoutStartSec TimeoutStopSec KillMode CapabilityBoundingSet"
)


def settings() -> tuple[list[str], list[str]]:
    """The unit's settings as ``Name=value``, and its capabilities."""
    text = (shipped("systemd") / "sandboxd.service").read_text()
    section = text.split("[Service]")[1].split("[Install]")[0]
    lines = [x for x in section.splitlines() if "=" in x and not x.startswith("#")]
    kept = [x for x in lines if x.split("=")[0] not in _PROCEDURE.split()]
    capabilities = " ".join(
        x.split("=")[1] for x in lines if x.startswith("CapabilityBoundingSet=")
    )
    return kept, capabilities.split()


SETTINGS, CAPABILITIES = settings()


@pytest.fixture(scope="module")
def prepared(host):
    host.run("useradd", "--system", "sandboxd")
    host.write("/opt/program.py", PROGRAM)
    host.run("install", "-d", "-o", "sandboxd", "-m", "0700", "/var/lib/sandboxd")
    host.run("install", "-d", "-o", "1234", "-g", "1234", "-m", "0700", "/srv/closed")
    host.run("install", "-d", "-o", "1234", "-g", "1234", "-m", "0700", "/srv/closed/workspace")
    return host


def attempt(host, *, more: str = "", without: str = ""):
    """Run the program under the unit's settings; the finished process."""
    kept = [c for c in CAPABILITIES if c != without]
    chosen = [*SETTINGS, f"CapabilityBoundingSet={' '.join(kept)}", *([more] if more else [])]
    options = [word for setting in chosen for word in ("-p", setting)]
    return host.run(
        "systemd-run", "--quiet", "--wait", "--pipe", *options,
        "/opt/sandboxd/bin/python", "/opt/program.py", check=False,
    )  # fmt: skip


def test_a_sandbox_can_be_built_under_the_unit(prepared) -> None:
    done = attempt(prepared)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXPECTED
    assert prepared.out("stat", "-c", "%u", "/srv/closed/workspace/f") == "1234"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_is_needed(prepared, capability: str) -> None:
    done = attempt(prepared, without=capability)
    assert done.returncode != 0 or json.loads(done.stdout) != EXPECTED


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("RestrictSUIDSGID=yes", "openat2"),
        ("ProtectHostname=yes", "sethostname"),
        ("RestrictNamespaces=yes", "unshare"),
        ("PrivateUsers=yes", ""),
    ],
)
def test_what_is_left_out_would_break_a_sandbox(prepared, setting: str, why: str) -> None:
    done = attempt(prepared, more=setting)
    assert done.returncode != 0
    assert why in done.stderr


def test_the_program_under_test_is_the_one_that_is_installed(image: Path) -> None:
    package = image / "opt/sandboxd/lib/python3.11/site-packages/sandboxd"
    assert (package / "isolation/launcher.py").read_text() == (
        Path(__file__).parents[2] / "sandboxd/isolation/launcher.py"
    ).read_text()
