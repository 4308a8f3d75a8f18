"""The installed units on a booted systemd host: who may do what, and what each phase leaves."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = pytest.mark.host

UNITS = ("/usr/local/lib/systemd/system/sandboxd.service",
         "/usr/local/lib/systemd/system/sandboxd.socket")  # fmt: skip

INSTALL = """
import argparse, sys
from sandboxd import host
parser = argparse.ArgumentParser()
(host.add_uninstall_arguments if sys.argv[1] == "uninstall" else host.add_install_arguments)(parser)
sys.exit(getattr(host, sys.argv[1])(parser.parse_args(sys.argv[2:])))
"""


def host_command(host, *arguments: str) -> dict:
    """sandboxd.host run in the container; its report."""
    return json.loads(host.out("/opt/sandboxd/bin/python", "-c", INSTALL, *arguments, "--json"))


def states(report: dict) -> list[str]:
    return [step["state"] for step in report["steps"]]


@pytest.fixture(scope="module")
def installed(host):
    host_command(host, "install")
    return host


def test_a_dry_run_plans_every_step_and_changes_nothing(host) -> None:
    report = host_command(host, "install", "--dry-run", "--enable")
    assert states(report) == ["planned"] * 8
    assert host.run("test", "-e", UNITS[0], check=False).returncode != 0
    assert host.run("id", "sandboxd", check=False).returncode != 0


def test_installing_makes_user_directories_and_units(host) -> None:
    report = host_command(host, "install")
    assert states(report) == ["done"] * 7
    assert host.out("id", "-gn", "sandboxd") == "sandboxd"
    assert host.out("getent", "passwd", "sandboxd").endswith(":/var/lib/sandboxd:/usr/sbin/nologin")
    listing = host.out("stat", "-c", "%n %A %U:%G", "/run/sandboxd", "/var/lib/sandboxd",
                       "/etc/sandboxd").splitlines()  # fmt: skip
    assert listing == [
        "/run/sandboxd drwxr-xr-x sandboxd:sandboxd",
        "/var/lib/sandboxd drwx------ sandboxd:sandboxd",
        "/etc/sandboxd drwxr-x--- root:sandboxd",
    ]
    assert host.property("sandboxd.service", "LoadState") == "loaded"


def test_installing_starts_and_enables_nothing(installed) -> None:
    for unit in ("sandboxd.service", "sandboxd.socket"):
        assert installed.property(unit, "ActiveState") == "inactive"
        assert installed.property(unit, "UnitFileState") == "disabled"


def test_installing_again_changes_nothing(installed) -> None:
    assert states(host_command(installed, "install")) == ["unchanged"] * 7


def test_the_units_are_verified_without_a_complaint(installed) -> None:
    done = installed.run("systemd-analyze", "verify", *UNITS)
    assert done.stdout + done.stderr == ""


def test_the_programs_are_those_of_the_environment_that_installed(installed) -> None:
    start = installed.property("sandboxd.service", "ExecStart")
    assert "path=/opt/sandboxd/bin/sandboxd ;" in start


def test_the_unit_is_as_closed_as_it_can_bear(installed) -> None:
    said = installed.out("systemd-analyze", "security", "--no-pager", "sandboxd.service")
    match = re.search(r"Overall exposure level for sandboxd.service: ([\d.]+)", said)
    assert match is not None, said
    assert float(match[1]) <= 5.2, said


def test_the_socket_belongs_to_operators(installed) -> None:
    installed.run("systemctl", "start", "sandboxd.socket")
    try:
        listing = installed.out("stat", "-c", "%F %a %U:%G", "/run/sandboxd/admin.sock")
        assert listing == "socket 660 root:sandboxd"
        connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/sandboxd/admin.sock')"
        refused = installed.run(
            "setpriv", "--reuid=65534", "--clear-groups", "--regid=65534",
            "python3", "-c", connect, check=False,
        )  # fmt: skip
        assert "PermissionError" in refused.stderr
    finally:
        installed.run("systemctl", "stop", "sandboxd.socket")
    assert installed.run("test", "-e", "/run/sandboxd/admin.sock", check=False).returncode != 0


# What the unit's hardening leaves, seen from inside: it is inherited by every sandbox.
PROBE = """
import ctypes, errno, json, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    done = libc.syscall(number, *arguments)
    return "ok" if done >= 0 else errno.errorcode[ctypes.get_errno()]
how = struct.pack("=QQQ", os.O_PATH, 0, 0x08)
r = {
    "openat2": call(437, os.open("/", os.O_PATH), b"etc/passwd", how, len(how)),
    "landlock": call(444, None, 0, 1),
    "keyctl": call(250, 1, None),
    "init_module": call(175, None, 0, None),
    "settimeofday": call(164, None, None),
    "swapon": call(167, None, 0),
    "unshare": call(272, 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000),
}
libc.mount(None, b"/", None, ctypes.c_ulong(0x44000), None)
r["mount"] = "ok" if libc.mount(b"none", b"/mnt", b"tmpfs", 0, None) == 0 else ctypes.get_errno()
r["hostname"] = "ok" if libc.sethostname(b"x", 1) == 0 else ctypes.get_errno()
for path in ("/usr/probe", "/etc/probe", "/srv/probe", "/home/probe"):
    try:
        os.mkdir(path); r[path] = "ok"; os.rmdir(path)
    except OSError as error:
        r[path] = errno.errorcode[error.errno]
r["devices"] = sorted(os.listdir("/dev"))
r["umask"] = oct(os.umask(0))
print(json.dumps(r))
"""


@pytest.fixture(scope="module")
def inside(installed) -> dict:
    """:data:`PROBE` run as the unit's main program, with everything else of the unit as it is."""
    installed.write("/opt/probe.py", PROBE)
    drop_in = "/run/systemd/system/sandboxd.service.d/probe.conf"
    program = "ExecStart=/opt/sandboxd/bin/python /opt/probe.py"
    installed.run(
        "python3", "-c",
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(parents=True);"
        "p.write_text(sys.argv[2])",
        drop_in, f"[Service]\nType=oneshot\nRestart=no\nExecStart=\n{program}\n"
        "StandardOutput=file:/run/probe.json\n",
    )  # fmt: skip
    installed.run("systemctl", "daemon-reload")
    installed.run("systemctl", "start", "sandboxd.service")
    result = json.loads(installed.out("cat", "/run/probe.json"))
    installed.run("rm", "-r", "/run/systemd/system/sandboxd.service.d")
    installed.run("systemctl", "daemon-reload")
    installed.run("systemctl", "stop", "sandboxd.socket")
    return result


@pytest.mark.parametrize(
    "what", ["openat2", "landlock", "keyctl", "unshare", "mount", "hostname", "/srv/probe",
             "/home/probe"]
)  # fmt: skip
def test_the_unit_leaves_what_building_a_sandbox_needs(inside: dict, what: str) -> None:
    assert inside[what] == "ok"


@pytest.mark.parametrize(
    ("what", "errno"),
    [
        ("init_module", "EPERM"),
        ("settimeofday", "EPERM"),
        ("swapon", "EPERM"),
        ("/usr/probe", "EROFS"),
        ("/etc/probe", "EROFS"),
    ],
)
def test_the_unit_takes_what_no_sandbox_needs(inside: dict, what: str, errno: str) -> None:
    assert inside[what] == errno


def test_the_unit_sees_no_device_but_the_harmless_ones(inside: dict) -> None:
    plumbing = {"char", "core", "fd", "hugepages", "log", "mqueue", "shm"}
    standard = {"stdin", "stdout", "stderr", "tty", "ptmx", "pts"}
    data = {"null", "zero", "full", "random", "urandom"}
    allowed = plumbing | standard | data
    assert set(inside["devices"]) <= allowed
    assert {"null", "zero", "urandom", "ptmx"} <= set(inside["devices"])


def test_uninstalling_leaves_state_and_configuration(host) -> None:
    host_command(host, "install", "--enable")
    assert host.property("sandboxd.socket", "UnitFileState") == "enabled"
    assert states(host_command(host, "install", "--enable")) == ["unchanged"] * 8
    host.write("/etc/sandboxd/sandboxd.yaml", "version: 1\n")
    report = host_command(host, "uninstall")
    assert states(report) == ["done"] * 6
    assert host.run("test", "-e", UNITS[0], check=False).returncode != 0
    assert host.property("sandboxd.service", "LoadState") == "not-found"
    assert host.out("cat", "/etc/sandboxd/sandboxd.yaml") == "version: 1"
    assert host.out("stat", "-c", "%U", "/var/lib/sandboxd") == "sandboxd"
    assert set(states(host_command(host, "uninstall"))) == {"unchanged"}
