"""One virtual machine for all tests here: a Debian 12 host with systemd and unified cgroups.

Nothing here is skipped: whoever asks for these tests wants them, so what is missing fails them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import debian
import pytest
import vm_image
from vm_machine import Machine, booted

ARTIFACTS = debian.PROJECT / "artifacts" / "vm"
_PROBER = debian.PROJECT / "tests/escape/prober.c"


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """The machine, with today's wheel installed as an operator would. Its logs are kept when a
    test fails, in artifacts/vm."""
    if os.geteuid() != 0:
        pytest.fail("making the machine's disk takes root", pytrace=False)
    debian.need(("qemu-system-x86_64", "qemu-system-x86"), ("gcc", "gcc libc6-dev"))
    image = vm_image.image()
    with tempfile.TemporaryDirectory(prefix="sandboxd-vm-") as name:
        at = Path(name)
        subprocess.run(["gcc", "-static", "-O1", "-o", at / "prober", _PROBER], check=True)
        try:
            with booted(image, vm_image.carried(at), at) as running:
                running.run("systemctl", "is-system-running", "--wait")
                running.run("sh", "-c", "/opt/sandboxd/bin/pip install -q --no-index --no-deps "
                            f"{vm_image.CARRIED}/dist/sandboxd-*.whl")  # fmt: skip
                running.run("python3", "-m", "compileall", "-q", vm_image.CARRIED, timeout=300)
                running.run("loginctl", "enable-linger", "alice")
                manager = f"user@{running.out('id', '-u', 'alice')}.service"
                running.run("systemctl", "start", manager)  # there when that returns
                yield running
        finally:
            if request.session.testsfailed:
                ARTIFACTS.mkdir(parents=True, exist_ok=True)
                for log in at.glob("*.log"):
                    shutil.copy(log, ARTIFACTS)
