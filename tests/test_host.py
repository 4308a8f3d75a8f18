"""Installing into a directory that stands for a root filesystem, with systemd's own tools."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from public_copy import public_copy

from sandboxd import host
from sandboxd.errors import Denied, Invalid, NotFound, SandboxdError
from sandboxd.paths import shipped

SERVICE = "usr/local/lib/systemd/system/sandboxd.service"
SOCKET = "usr/local/lib/systemd/system/sandboxd.socket"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="installs as root")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-sysusers") is None, reason="needs systemd's tools: apt install systemd"
)


def arguments(*words: str, uninstall: bool = False, bindir: Path | None = None):
    parser = argparse.ArgumentParser()
    add = host.add_uninstall_arguments if uninstall else host.add_install_arguments
    add(parser)
    return parser.parse_args(words, SimpleNamespace(bindir=bindir))


def programs(bindir: Path) -> Path:
    """A directory with stand-ins for the installed programs."""
    bindir.mkdir(parents=True)
    for name in ("sandboxd", "sandboxctl"):
        (bindir / name).write_text("#!/bin/sh\n")
        (bindir / name).chmod(0o755)
    return bindir


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root filesystem with the programs in /opt/agents/bin."""
    (tmp_path / "etc").mkdir()
    programs(tmp_path / "opt/agents/bin")
    return tmp_path


def run(root: Path, *words: str, uninstall: bool = False, bindir: str = "opt/agents/bin") -> dict:
    """install or uninstall below ``root``; its JSON report."""
    args = arguments(
        f"--prefix={root}", "--json", *words, uninstall=uninstall, bindir=root / bindir
    )
    status = host.uninstall(args) if uninstall else host.install(args)
    assert status == 0
    return json.loads(CAPTURE.readouterr().out)


@pytest.fixture(autouse=True)
def _captured(capsys: pytest.CaptureFixture[str]) -> None:
    global CAPTURE
    CAPTURE = capsys


def states(report: dict) -> list[str]:
    return [step["state"] for step in report["steps"]]


def tree(root: Path) -> dict[str, tuple[int, str]]:
    """Every path with its mode and content, except systemd-sysusers's lock and backups."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if re.search(r"etc/(\.pwd\.lock|passwd-|group-|shadow-|gshadow-)$", name):
            continue
        content = path.read_text() if path.is_file() else ""
        found[name] = (path.lstat().st_mode, content)
    return found


@needs_root
@needs_systemd
def test_installing_writes_units_user_and_directories(root: Path) -> None:
    report = run(root)
    assert states(report) == ["done"] * 6
    assert report["dry_run"] is False
    service = (root / SERVICE).read_text()
    assert "ExecStart=/opt/agents/bin/sandboxd\n" in service
    assert "ExecReload=/opt/agents/bin/sandboxctl reload\n" in service
    assert "/opt/sandboxd" not in service
    assert stat.S_IMODE((root / SERVICE).stat().st_mode) == 0o644
    (line,) = [x for x in (root / "etc/passwd").read_text().splitlines() if "sandboxd" in x]
    name, _, uid, gid, gecos, home, shell = line.split(":")
    assert (name, gecos, home, shell) == (
        "sandboxd", "sandboxd broker", "/var/lib/sandboxd", "/usr/sbin/nologin",
    )  # fmt: skip
    for path, mode, owner in (
        ("run/sandboxd", 0o755, int(uid)),
        ("var/lib/sandboxd", 0o700, int(uid)),
        ("etc/sandboxd", 0o750, 0),
    ):
        at = (root / path).stat()
        assert (stat.S_IMODE(at.st_mode), at.st_uid, at.st_gid) == (mode, owner, int(gid)), path
    assert not (root / "etc/systemd").exists()


@needs_root
@needs_systemd
def test_installing_again_changes_nothing(root: Path) -> None:
    run(root, "--enable")
    before = tree(root)
    assert set(states(run(root, "--enable"))) == {"unchanged"}
    assert tree(root) == before


@needs_root
@needs_systemd
def test_a_changed_unit_a_link_and_a_loose_mode_are_put_right(root: Path) -> None:
    run(root)
    (root / SERVICE).write_text("[Service]\n")
    (root / SOCKET).rename(root / "elsewhere")
    (root / SOCKET).symlink_to(root / "elsewhere")
    (root / "etc/sandboxd").chmod(0o777)
    report = run(root)
    done = [s["what"] for s in report["steps"] if s["state"] == "done"]
    assert [Path(w.split()[0]).name for w in done] == [
        "sandboxd.service", "sandboxd.socket", "systemd-tmpfiles",
    ]  # fmt: skip
    assert "Type=notify" in (root / SERVICE).read_text()
    assert not (root / SOCKET).is_symlink()
    assert stat.S_IMODE((root / "etc/sandboxd").stat().st_mode) == 0o750


@needs_root
def test_a_dry_run_plans_and_changes_nothing(root: Path) -> None:
    before = tree(root)
    report = run(root, "--dry-run", "--enable")
    assert report["dry_run"] is True
    assert states(report) == ["planned"] * 7
    assert tree(root) == before


@needs_root
@needs_systemd
def test_only_enable_enables(root: Path) -> None:
    run(root)
    wants = root / "etc/systemd/system"
    assert not wants.exists()
    run(root, "--enable")
    assert (wants / "multi-user.target.wants/sandboxd.service").is_symlink()
    assert (wants / "sockets.target.wants/sandboxd.socket").is_symlink()


@needs_root
@needs_systemd
def test_uninstalling_leaves_state_configuration_and_user(root: Path) -> None:
    run(root, "--enable")
    (root / "var/lib/sandboxd/store.sqlite").write_text("kept")
    report = run(root, uninstall=True)
    assert states(report) == ["done"] * 5
    assert not (root / SERVICE).exists()
    assert not list((root / "etc/systemd").rglob("*sandboxd*"))
    assert (root / "var/lib/sandboxd/store.sqlite").read_text() == "kept"
    assert "sandboxd:" in (root / "etc/passwd").read_text()
    assert (root / "etc/sandboxd").is_dir()
    assert set(states(run(root, uninstall=True))) == {"unchanged"}


@needs_root
@needs_systemd
def test_every_step_is_printed_for_people(root: Path) -> None:
    args = arguments(f"--prefix={root}", bindir=root / "opt/agents/bin")
    host.install(args)
    printed = CAPTURE.readouterr().out.splitlines()
    assert printed[2] == f"done       write   {root / SERVICE}"
    assert printed[4] == f"done       run     systemd-sysusers --root={root} -"
    assert len(printed) == 6


@needs_root
@needs_systemd
def test_a_failing_step_is_told_and_those_before_it_stay_reported(root: Path) -> None:
    (root / "etc/passwd").mkdir()
    with pytest.raises(SandboxdError, match=r"systemd-sysusers .* failed with status 1") as caught:
        run(root)
    assert "run the same command again" in caught.value.hint
    report = json.loads(CAPTURE.readouterr().out)
    assert states(report) == ["done"] * 4


@needs_root
def test_a_failing_write_leaves_no_half_file(root: Path) -> None:
    (root / "usr/local/lib/systemd/system").mkdir(parents=True)
    (root / SERVICE).mkdir()
    with pytest.raises(SandboxdError, match=r"can't write .*sandboxd\.service"):
        run(root)
    assert [p.name for p in (root / SERVICE).parent.iterdir()] == ["sandboxd.service"]


def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
    """install as an ordinary user, its expected failure printed as the command line does."""
    code = """
import argparse, sys
from sandboxd import host
from sandboxd.errors import SandboxdError
parser = argparse.ArgumentParser()
host.add_install_arguments(parser)
args = parser.parse_args(sys.argv[2:])
args.bindir = sys.argv[1]
try:
    sys.exit(host.install(args))
except SandboxdError as error:
    print(error, error.hint, sep="\\n", file=sys.stderr)
    sys.exit(error.exit_code)
"""
    with public_copy() as top:
        bindir = programs(top / "bin")
        return subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
             "/usr/bin/python3", "-B", "-c", code, str(bindir), *words],
            cwd=top, capture_output=True, text=True, check=False,
        )  # fmt: skip


@needs_root
def test_an_ordinary_user_is_refused_with_the_way_out() -> None:
    done = as_nobody()
    assert done.returncode == 4
    assert done.stderr.splitlines() == [
        "only root may install the service",
        "sudo sandboxctl install, or see what it would do: sandboxctl install --dry-run",
    ]
    assert done.stdout == ""


@needs_root
def test_an_ordinary_user_may_look_at_the_plan() -> None:
    done = as_nobody("--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"planned    write   /{SERVICE}" in done.stdout


@needs_root
def test_missing_programs_are_refused_before_anything_is_written(root: Path) -> None:
    (root / "opt/agents/bin/sandboxctl").unlink()
    before = tree(root)
    with pytest.raises(NotFound, match=r"no program .*/sandboxctl") as caught:
        run(root)
    assert "pip install sandboxd" in caught.value.hint
    assert tree(root) == before


@needs_root
@pytest.mark.parametrize("directory", ["opt/a b", "opt/100%h", "opt/$HOME", "opt/a;b", "opt/ü"])
def test_a_path_that_a_unit_would_misread_is_refused(root: Path, directory: str) -> None:
    programs(root / directory)
    with pytest.raises(Invalid, match="characters that mean something in a unit"):
        run(root, bindir=directory)


@needs_root
@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("opt/agents/bin/sandboxd", lambda p: p.chmod(0o775)),
        ("opt/agents/bin/sandboxctl", lambda p: os.chown(p, 1000, 0)),
        ("opt/agents/bin", lambda p: p.chmod(0o777)),
        ("opt/agents", lambda p: os.chown(p, 1000, 0)),
        ("opt", lambda p: p.chmod(0o757)),
    ],
)
def test_programs_that_others_could_change_are_refused(root: Path, path: str, change) -> None:
    change(root / path)
    before = tree(root)
    with pytest.raises(Denied, match="can be changed by somebody other than root") as caught:
        run(root)
    assert str(root / path) in caught.value.message
    assert tree(root) == before


@needs_root
def test_a_link_that_others_could_turn_is_refused(root: Path) -> None:
    (root / "home").mkdir()
    (root / "home").chmod(0o777)
    (root / "home/agents").symlink_to(root / "opt/agents")
    with pytest.raises(Denied, match=f"{root}/home can be changed"):
        run(root, bindir="home/agents/bin")


@needs_root
def test_a_sticky_directory_above_is_fine(root: Path) -> None:
    (root / "opt").chmod(0o1777)
    assert states(run(root, "--dry-run")) == ["planned"] * 6


def test_a_prefix_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not a directory"):
        host.install(arguments(f"--prefix={tmp_path}/none", "--dry-run"))


def test_the_user_of_the_units_is_the_user_that_the_settings_default_to() -> None:
    sysusers = (shipped("systemd") / "sysusers.d/sandboxd.conf").read_text()
    assert re.search(r"^u\s+sandboxd\s", sysusers, re.MULTILINE)


# The shipped units themselves, without a booted systemd.


@pytest.fixture
def units(tmp_path: Path) -> Iterator[Path]:
    """The units as installed, with programs that exist."""
    bindir = programs(tmp_path / "bin")
    for name in ("sandboxd.service", "sandboxd.socket"):
        text = (shipped("systemd") / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/sandboxd/bin", str(bindir)))
    return tmp_path


needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt install systemd"
)


@needs_analyze
def test_the_units_verify_without_a_complaint(units: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", units / "sandboxd.service", units / "sandboxd.socket"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_analyze
def test_a_misspelled_setting_would_be_noticed(units: Path) -> None:
    service = units / "sandboxd.service"
    service.write_text(service.read_text().replace("KillMode=", "KillMod="))
    done = subprocess.run(
        ["systemd-analyze", "verify", service], capture_output=True, text=True, check=False
    )
    assert "KillMod" in done.stderr


@needs_analyze
def test_the_unit_stays_as_closed_as_it_is(units: Path) -> None:
    """5.1 is what is left when sandboxes must still be buildable; docs/systemd.md says why."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=52", "--no-pager",
         units / "sandboxd.service"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_what_would_break_a_sandbox_is_not_in_the_unit() -> None:
    text = (shipped("systemd") / "sandboxd.service").read_text()
    settings = {line.split("=")[0] for line in text.splitlines() if re.match(r"[A-Z]\w+=", line)}
    breaking = {
        "RestrictNamespaces", "PrivateUsers", "ProtectHostname", "ProtectControlGroups",
        "RestrictSUIDSGID", "MemoryDenyWriteExecute", "PrivateNetwork", "RuntimeDirectory",
        "StateDirectory", "User",
    }  # fmt: skip
    assert not settings & breaking


@needs_root
def test_installing_on_this_host_would_check_the_code_itself(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package directory too: the programs are only doors to it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as top:
        Path(top).chmod(0o755)
        package = Path(top) / "sandboxd"
        package.mkdir()
        (package / "host.py").touch()
        os.chown(package, pwd.getpwnam("nobody").pw_uid, 0)
        monkeypatch.setattr(host, "__file__", str(package / "host.py"))
        with pytest.raises(Denied, match=re.escape(str(package))):
            host.install(arguments("--dry-run", bindir=programs(Path(top) / "bin")))
