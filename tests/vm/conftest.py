"""One virtual machine for all tests here: a Debian 12 host with systemd and unified cgroups.

Nothing here is skipped: whoever asks for these tests wants them, so what is missing fails them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import debian
import pytest
import vm_image
from vm_machine import Machine, booted

ARTIFACTS = debian.PROJECT / "artifacts" / "vm"
_PROBER = debian.PROJECT / "tests/escape/prober.c"
_OUTCOMES = "/run/outcomes.xml"


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
                running.run("loginctl", "enable-linger", "alice")
                yield running
        finally:
            if request.session.testsfailed:
                ARTIFACTS.mkdir(parents=True, exist_ok=True)
                for log in at.glob("*.log"):
                    shutil.copy(log, ARTIFACTS)


class Outcomes:
    """What the machine's own pytest reported: the names of tests by what became of them."""

    def __init__(self, report: str) -> None:
        self.passed: list[str] = []
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        for case in ET.fromstring(report).iter("testcase"):
            name = case.get("name", "")
            failures = [*case.iter("failure"), *case.iter("error")]
            skips = [*case.iter("skipped")]
            if failures:
                self.failed[name] = failures[0].text or failures[0].get("message", "")
            elif skips:
                self.skipped[name] = skips[0].get("message", "")
            else:
                self.passed.append(name)

    def check(self) -> None:
        """AssertionError unless tests ran, and all of them passed or were skipped."""
        failed = "\n\n".join(f"{name}: {text[-3000:]}" for name, text in self.failed.items())
        assert not self.failed, failed
        assert self.passed, self.skipped


def tests_inside(
    machine: Machine, *words: str, user: str = "", delegated: bool = True, timeout: float = 600
) -> Outcomes:
    """Run the project's tests in the machine, by default in a cgroup that systemd delegates.

    The outcomes come back as a file, so that what a crash leaves behind isn't taken for success.
    """
    test = [
        "/opt/sandboxd/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider",
        "-o", "addopts=--strict-markers", f"--junitxml={_OUTCOMES}", *words,
    ]  # fmt: skip
    settings = {
        "WorkingDirectory": vm_image.CARRIED,
        "TasksMax": "infinity",
        "OOMPolicy": "continue",
        **({"Delegate": "yes"} if delegated else {}),
        **({"User": user} if user else {}),
    }
    environment = {
        "PYTHONPATH": vm_image.TEST_PACKAGES,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": "/opt/sandboxd/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "SANDBOXD_TEST_PROBER": f"{vm_image.CARRIED}/prober",
    }
    options = [f"--property={name}={value}" for name, value in settings.items()]
    options += [f"--setenv={name}={value}" for name, value in environment.items()]
    machine.run("rm", "-f", _OUTCOMES)
    machine.run("install", "-m", "666", "/dev/null", _OUTCOMES)
    done = machine.run(
        "systemd-run", "--quiet", "--wait", "--pipe", *options, *test, check=False, timeout=timeout
    )
    report = machine.out("cat", _OUTCOMES)
    assert report, str(done)
    return Outcomes(report)
