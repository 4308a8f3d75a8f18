"""A selftest that can't fail proves nothing: sandboxes with holes, and probers that see nothing."""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sandboxd import selftest
from sandboxd.selftest import stage as selftest_stage
from sandboxd.trial import stage as trial_stage

pytestmark = pytest.mark.soak

#: The daemon, with a launcher that first runs the code in the first argument's place.
DAEMON = """
import sys
from sandboxd.isolation import launcher
launcher._BOOT = (
    "import sys; sys.path.append(sys.argv[2])\\n" + {sabotage!r}
    + "\\nfrom sandboxd.isolation.launcher import main; main()"
)
from sandboxd.main import main
sys.exit(main())
"""

#: The host's network and IPC, its /proc, and every capability that a user namespace gives.
HOLES = """
from sandboxd.isolation import kernel, root, sandbox
sandbox._NAMESPACES &= ~(kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC)
kernel.CLONE_NEWNET = 0
kernel.drop_capabilities = kernel.no_new_privileges = lambda: None
def proc(self, masks):
    import os
    tree = kernel.clone_tree(kernel.AT_FDCWD, "/proc", recursive=True)
    self.place_own("proc", tree, close=False)
    return os.open("sys", os.O_RDONLY | os.O_DIRECTORY, dir_fd=tree)
root.Root._proc = proc
"""


def run(
    capsys: pytest.CaptureFixture[str], *threats: str
) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
    status = selftest.main(
        argparse.Namespace(json=True, verbose=False, threat=threats, patience=1.0)
    )
    printed = json.loads(capsys.readouterr().out)
    return status, {(row["name"], row["where"]): row for row in printed["rows"]}


def test_holes_in_the_sandbox_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", DAEMON.format(sabotage=HOLES)]
    monkeypatch.setattr(trial_stage, "daemon_program", lambda: command)
    status, rows = run(
        capsys, "processes of the host", "network", "shared", "privileges", "files", "mounts"
    )
    assert status == 1
    for where in ("agent", "tool"):
        for name in (
            "host processes: see them in /proc",
            "host processes: read their arguments",
            "whose process 1 is",
            "interfaces that are up",
            "UDP: the host's loopback",
            "connections of the host",
            "names of abstract sockets",
            "be reached by an abstract socket",
            "System V segment by its key",
            "System V message queue",
            "bounding capabilities",
            "no_new_privs is set",
            "mounts without nodev",
        ):
            row = rows[name, where]
            assert row["state"] == "got through", row
        assert rows["see /etc/shadow", where]["ok"] is True
        assert rows["open the master key", where]["ok"] is True


def test_a_canary_in_the_agents_environment_is_found_and_blind_searches_fail_their_controls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written, pack = selftest_stage.configuration, selftest_stage.pack

    def leaking(on: selftest_stage.Stage) -> dict[str, str]:
        files = written(on)
        token = on.secret.reveal().decode()
        files["agents/selftest.yaml"] += f"environment:\n  TOKEN: {token}\n"
        files["tools/probe/tool.yaml"] += f"environment:\n  TOKEN: {token}\n"
        return files

    def blind(target: Path, modules: Iterable[str], main: str) -> None:
        """Only in the tool's sandbox: the agent's still sees."""
        pack(target, modules, main)
        with zipfile.ZipFile(target) as archive:
            texts = {name: archive.read(name) for name in archive.namelist()}
        hunt = "sandboxd/trial/hunt.py"
        texts[hunt] = texts[hunt].replace(
            b"PATTERN = re.compile(PREFIX",
            b"import sys\nPATTERN = re.compile((b'(?!)' if 'tool' in sys.argv else b'') + PREFIX",
        )
        with zipfile.ZipFile(target, "w") as archive:
            for name, text in texts.items():
                archive.writestr(name, text)

    monkeypatch.setattr(selftest_stage, "configuration", leaking)
    monkeypatch.setattr(selftest_stage, "pack", blind)
    status, rows = run(capsys, "canary", "shared")
    assert status == 1
    for name in ("own environment", "environments of all processes", "memory of all processes",
                 "every readable file of /proc"):  # fmt: skip
        assert rows[name, "agent"]["state"] == "got through", rows[name, "agent"]
        assert rows[name, "tool"]["state"] == "control failed", rows[name, "tool"]
        assert rows[name, "tool"]["got"] == "nothing"
    assert rows["inherited descriptors", "agent"]["ok"] is True


def test_a_sandbox_that_is_not_cleared_for_the_next_call_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sabotage = "from sandboxd.isolation import lasting; lasting.Traces.clear = lambda self: True"
    command = [sys.executable, "-c", DAEMON.format(sabotage=sabotage)]
    monkeypatch.setattr(trial_stage, "daemon_program", lambda: command)
    status, rows = run(capsys, "the call before")
    assert status == 1
    through = {name for (name, _), row in rows.items() if row["state"] == "got through"}
    assert through >= {
        "call before: its files in /tmp",
        "call before: its files in HOME",
        "call before: its files in /dev/shm",
        "call before: its System V segment",
        "call before: its System V queue",
        "call before: its System V semaphores",
    }
    assert rows["call before: its process", "tool"]["state"] == "ok"
