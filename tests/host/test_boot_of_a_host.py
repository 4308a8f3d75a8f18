"""An enabled service over reboots, on this machine's cgroup tree and on a unified one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.host


@pytest.mark.parametrize("cgroups", ["as here", "unified"])
def test_an_enabled_daemon_is_there_after_every_boot(image, boot_host, cgroups: str) -> None:
    with boot_host(image, cgroups=cgroups) as host:
        host.run("sandboxctl", "install", "--enable")
        host.run("sandboxctl", "init", check=False)  # there already at the second round
        host.run("systemctl", "start", "sandboxd")
        host.run("sandboxctl", "run", "example", "--", "-c", "echo first > /workspace/f")
    with boot_host(image, cgroups=cgroups) as host:
        assert host.property("sandboxd.service", "ActiveState") == "active"
        assert host.property("sandboxd.socket", "ActiveState") == "active"
        done = host.run("sandboxctl", "run", "example", "--", "-c", "cat /workspace/f")
        assert done.stdout == "first\n"
        assert host.run("sandboxctl", "audit", "verify").returncode == 0
        doctor = json.loads(host.run("sandboxctl", "--json", "doctor", check=False).stdout)
        found = {c["name"]: c for c in doctor["checks"]}
        unified = cgroups == "unified" or Path("/sys/fs/cgroup/cgroup.controllers").exists()
        assert found["cgroups"]["detail"].startswith("v2") == unified
        assert doctor["ready"]
