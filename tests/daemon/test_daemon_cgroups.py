"""Limits of whole sandboxes through a real daemon: what is required, told, bounded and survived."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest
from real_daemon import RealDaemon, until
from test_daemon_calls import AGENT, calls, text

from sandboxd.errors import Denied

#: Several processes, each below the limit of one, that together take more than there is.
HOARD = """#!/usr/bin/env python3
import os, time
for _ in range(8):
    if os.fork() == 0:
        block = bytearray(24 << 20)
        time.sleep(300)
time.sleep(300)
"""
FORK_BOMB = """#!/usr/bin/env python3
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
NO_CGROUPS = (
    "for point in $(awk '$(NF-2) ~ /^cgroup2?$/ {print $5}' /proc/self/mountinfo | tac); do "
    'umount -l "$point"; done; exec "$@"'
)


def layer(daemon: RealDaemon, session: str) -> dict[str, Any]:
    shown = daemon.call("session.show", id=session)["isolation"]
    return next(row for row in shown if row["layer"] == "cgroup")


@pytest.fixture
def bombed(configured: RealDaemon) -> RealDaemon:
    """A running daemon with an agent that may call ``hoard``, ``bomb`` and ``fine``."""
    configured.python_agent("caller", AGENT, tools="[hoard, bomb, fine]")
    bounds = "input: {type: object}\nlimits: {memory: 96M, processes: 30}\n"
    configured.tool("hoard", HOARD, bounds)
    configured.tool("bomb", FORK_BOMB, bounds + "timeout: 2s\n")
    configured.tool("fine", "#!/bin/sh\necho fine $(echo too)\n", bounds)
    configured.agent("idle", "sleep 300")
    configured.agent("hoarder", 'exec /usr/bin/env python3 -c "$SCRIPT"', limits="{memory: 96M}")
    script = json.dumps(HOARD.partition("\n")[2])
    path = configured.paths.config / "agents/hoarder.yaml"
    path.write_text(path.read_text() + f"environment: {{SCRIPT: {script}}}\n")
    configured.start()
    probe = configured.call("session.start", agent="idle")["id"]
    if layer(configured, probe)["state"] != "on":
        pytest.skip(layer(configured, probe)["remark"])
    return configured


def test_a_tool_whose_processes_take_too_much_together_is_ended_and_told(
    bombed: RealDaemon,
) -> None:
    hoarded, fine = calls(bombed, ("hoard", {}), ("fine", {}))
    assert hoarded["result"]["isError"]
    assert "hoard was ended: its processes ran out of memory" in text(hoarded)
    assert text(fine).startswith("fine too")
    ended = [r for r in bombed.audit() if r["event"] == "call.ended"]
    assert [(r["tool"], r["outcome"], r["out_of_memory"]) for r in ended] == [
        ("hoard", "failed", True),
        ("fine", "ok", False),
    ]
    assert 64 << 10 < ended[0]["peak_kib"] <= (96 + 16) << 10
    assert ended[0]["max_rss_kib"] < 64 << 10


def test_a_fork_bomb_ends_by_its_timeout_while_others_work(bombed: RealDaemon) -> None:
    bomb, fine = calls(bombed, ("bomb", {}), ("fine", {}))
    assert "bomb was ended after 2 s" in text(bomb)
    assert text(fine).startswith("fine too")
    assert [s["state"] for s in bombed.call("session.list")["sessions"]] == ["running"]


def test_an_agent_that_takes_too_much_ends_its_own_session_alone(bombed: RealDaemon) -> None:
    session = bombed.call("session.start", agent="hoarder")["id"]
    assert bombed.call("session.wait", id=session)["reason"] == "out of memory"
    ended = next(r for r in bombed.audit() if r["event"] == "session.ended")
    assert (ended["session"], ended["reason"]) == (session, "out of memory")
    (other,) = bombed.call("session.list")["sessions"]
    assert (other["agent"], other["state"]) == ("idle", "running")


def test_a_policy_can_require_limits_of_whole_sandboxes(bombed: RealDaemon) -> None:
    bombed.write(
        "policies/bounded.yaml",
        "version: 1\ndescription: bounded as a whole\nrequire: [cgroup]\nrules: []\n",
    )
    bombed.agent("bounded", "sleep 300", policy="bounded")
    bombed.call("reload")
    session = bombed.call("session.start", agent="bounded")["id"]
    assert layer(bombed, session)["remark"].startswith("memory, processes and processors of")
    assert "whole sandboxes" not in bombed.log.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_host_without_cgroups_is_told_and_what_requires_them_is_refused(
    configured: RealDaemon,
) -> None:
    configured.wrapper = ("unshare", "--mount", "sh", "-c", NO_CGROUPS, "sh")
    configured.write(
        "policies/bounded.yaml",
        "version: 1\ndescription: bounded as a whole\nrequire: [cgroup]\nrules: []\n",
    )
    configured.write(
        "policies/lowered.yaml",
        "version: 1\ndescription: asks for less\nextends: bounded\nlower: [cgroup]\n",
    )
    configured.agent("bounded", "sleep 300", policy="bounded")
    configured.agent("lowered", "sleep 300", policy="lowered")
    configured.agent("plain", "sleep 300")
    configured.start()
    until(lambda: "limits hold for single processes, not for whole" in configured.log.read_text())
    with pytest.raises(Denied, match=r"would not have: cgroup$"):
        configured.call("session.start", agent="bounded")
    session = configured.call("session.start", agent="plain")["id"]
    shown = layer(configured, session)
    assert shown["state"] == "missing"
    assert shown["remark"].endswith("no cgroup file system is mounted")
    printed = configured.ctl("session", "show", session).stdout
    assert "cgroup: missing (limits hold for single processes: no cgroup file system" in printed
    # An operator may lower what is required, by name; and that is seen everywhere.
    assert "lowered.yaml:4:9: lower: sessions under this policy" in configured.log.read_text()
    session = configured.call("session.start", agent="lowered")["id"]
    assert layer(configured, session)["state"] == "lowered"
    (row,) = (
        row
        for row in configured.call("session.list", all=False)["sessions"]
        if row["id"] == session
    )
    assert row["lowered"] == ["cgroup"]
    assert "cgroup" in configured.ctl("session", "list").stdout
    (record,) = (
        record
        for record in configured.audit()
        if (record["event"], record.get("session")) == ("session.started", session)
    )
    assert record["lowered"] == ["cgroup"]
    assert "mount namespace: on\n" in printed
