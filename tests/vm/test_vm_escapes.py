"""Every known way out of a sandbox, tried on the machine's own kernel by root and by a user."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from vm_inside import run_inside
from vm_machine import Begun, Done, Machine

from sandboxd.selftest.prober.catalogue import PROBES

pytestmark = pytest.mark.vm

MODES = ("root", "user")
#: What there is no layer for, and the product says so: an ordinary user has one uid, and the
#: service manager of a user is given no io controller to pass on (user@.service).
LACKING: dict[str, set[str]] = {
    "root": set(),
    "user": {
        "share a host uid",
        "supplementary groups of the daemon",
        "whole sandbox: no limit of disk traffic",
    },
}
_SECONDS = 1800
#: How an ordinary user gets cgroups: docs/systemd.md.
_DELEGATED = (
    "XDG_RUNTIME_DIR=/run/user/$(id -u) exec systemd-run -q --user --scope -p Delegate=yes "
)
#: A selftest of a daemon whose sandboxes share the host's network and IPC.
HOLES = r"""
import argparse, sys
from sandboxd import selftest
from sandboxd.trial import stage
DAEMON = '''
import sys
from sandboxd.isolation import launcher
launcher._BOOT = (
    "import sys; sys.path.append(sys.argv[2])\\n"
    "from sandboxd.isolation import kernel, sandbox\\n"
    "sandbox._NAMESPACES &= ~(kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC)\\n"
    "kernel.CLONE_NEWNET = 0\\n"
    "from sandboxd.isolation.launcher import main; main()"
)
from sandboxd.main import main
sys.exit(main())
'''
stage.daemon_program = lambda: [sys.executable, "-c", DAEMON]
words = argparse.Namespace(json=True, verbose=False, threat=["shared"], patience=15.0)
sys.exit(selftest.main(words))
"""


def begin(machine: Machine, mode: str, *words: str) -> Begun:
    """A command of the product's in a delegated cgroup, by root or by an ordinary user."""
    if mode == "root":
        unit = ("systemd-run", "--quiet", "--wait", "--pipe", "--property=Delegate=yes")
        return machine.begin(*unit, *words, timeout=_SECONDS)
    script = _DELEGATED + shlex.join(words)
    return machine.begin("sh", "-c", script, user="alice", timeout=_SECONDS)


@dataclass(frozen=True)
class Shows:
    """What the product shows of itself here, all of it run at once to use both processors."""

    selftest: dict[str, Done]
    demo: dict[str, Done]


@pytest.fixture(scope="module")
def shows(machine: Machine) -> Shows:
    selftests = {mode: begin(machine, mode, "sandboxctl", "selftest", "--json", "--patience", "15")
                 for mode in MODES}  # fmt: skip
    ended = {mode: begun.end() for mode, begun in selftests.items()}
    demos = {mode: begin(machine, mode, "sandboxctl", "demo", "--json") for mode in MODES}
    return Shows(ended, {mode: begun.end() for mode, begun in demos.items()})


def printed(done: Done) -> dict[str, Any]:
    assert done.stdout.startswith("{"), str(done)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(done: Done, mode: str = "root") -> None:
    """AssertionError unless every probe was tried and refused, and every control worked."""
    told = printed(done)
    lacking = {row["name"] for row in told["rows"] if row["state"] == "no such layer"}
    assert lacking == LACKING[mode]
    bad = [
        f"{row['where']}: {row['name']}: {row['state']}: {row['got']}; {row['control']}"
        for row in told["rows"]
        if not (row["ok"] and row["control_ok"] and row["got"] in row["expected"])
        and row["name"] not in lacking
    ]
    assert told["problems"] == [], f"{done.argv}: {len(bad)} rows: {bad[:5]}"
    assert bad == []
    assert {row["name"] for row in told["rows"]} == {probe.name for probe in PROBES}
    where = Counter(row["where"] for row in told["rows"])
    assert where["agent"] >= 150
    assert where["tool"] >= 150
    assert done.status == 0


@pytest.mark.parametrize("mode", MODES)
def test_nothing_gets_through_and_every_control_works(shows: Shows, mode: str) -> None:
    check(shows.selftest[mode], mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_layer_is_on(shows: Shows, machine: Machine, mode: str) -> None:
    told = printed(shows.selftest[mode])
    assert (told["mode"], told["kernel"]) == (mode, machine.out("uname", "-r"))
    for place in ("agent", "tool"):
        layers = told["layers"][place]
        off = [row["layer"] for row in layers if row["state"] != "on"]
        assert off == ([] if mode == "root" else ["cgroup io"])
        cgroup = next(row for row in layers if row["layer"] == "cgroup")
        assert "whole tree (v2)" in cgroup["remark"]


@pytest.mark.parametrize("mode", MODES)
def test_most_controls_are_the_probe_itself_where_it_is_allowed(shows: Shows, mode: str) -> None:
    rows = printed(shows.selftest[mode])["rows"]
    replaced = [row["name"] for row in rows if "this host itself" in row["control"]]
    assert len(replaced) < len(rows) / 3, replaced


def test_a_hole_in_the_machines_sandboxes_fails_this_very_check(machine: Machine) -> None:
    done = machine.run("/opt/sandboxd/bin/python", "-", stdin=HOLES, check=False, timeout=_SECONDS)
    told = printed(done)
    assert done.status == 1
    through = {row["name"] for row in told["rows"] if row["state"] == "got through"}
    assert {"System V segment by its key", "names of abstract sockets"} <= through
    with pytest.raises(AssertionError, match="System V segment by its key: got through"):
        check(done)


def test_the_static_prober_is_refused_by_every_abi(machine: Machine) -> None:
    outcomes = run_inside(machine, "tests/escape/test_static_prober.py")
    outcomes.check()
    assert not outcomes.skipped
    assert "test_every_way_into_the_kernel_is_filtered[agent]" in outcomes.passed
    assert "test_the_filter_is_the_same_without_root[user]" in outcomes.passed


@pytest.mark.parametrize("mode", MODES)
def test_the_demonstration_finds_nothing_and_uses_the_secret(shows: Shows, mode: str) -> None:
    told = printed(shows.demo[mode])
    assert shows.demo[mode].status == 0
    assert [row for row in told["attempts"] if not row["ok"]] == []
    assert (told["leaks"], told["problems"], told["tool_used_secret"]) == ([], [], True)
