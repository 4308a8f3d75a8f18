"""The project's tests, run inside the machine by its own pytest, and what came of them."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import vm_image
from vm_machine import Machine

_OUTCOMES = "/run/outcomes.xml"


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


def run_inside(
    machine: Machine, *words: str, user: str = "", delegated: bool = True, timeout: float = 1200
) -> Outcomes:
    """Run the project's tests in the machine, by default in a cgroup that systemd delegates.

    The outcomes come back as a file, so that what a crash leaves behind isn't taken for success.
    """
    test = [
        "/opt/sandboxd/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider",
        "-o", "addopts=--strict-markers --durations=8", f"--junitxml={_OUTCOMES}", *words,
    ]  # fmt: skip
    settings = {
        "WorkingDirectory": vm_image.CARRIED,
        "TasksMax": "infinity",
        "OOMPolicy": "continue",
        "RuntimeMaxSec": f"{timeout:.0f}",
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
        "systemd-run",
        "--quiet",
        "--wait",
        "--pipe",
        *options,
        *test,
        check=False,
        timeout=timeout + 30,
    )
    report = machine.out("cat", _OUTCOMES)
    print(done)
    assert report, str(done)
    return Outcomes(report)
