"""The disk of the virtual machine: Debian 12 with its own kernel, systemd and our dependencies.

Made once and cached (``debian.cache``). What changes with every run, the wheel and the sources,
goes in on a second disk.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import debian
from debian import PROJECT

PACKAGES = [
    "ca-certificates", "dbus", "git", "libpam-systemd", "linux-image-cloud-amd64", "procps",
    "python3", "python3-venv", "systemd", "systemd-sysv", "udev",
]  # fmt: skip
#: Raise it when the recipe below changes.
RECIPE = 2
CHANNEL = "sandboxd.tests"
#: Where the second disk is unpacked: the sources, and the wheel beside them.
CARRIED = "/opt/carried"
#: pytest and what else the tests import, beside the product's own environment.
TEST_PACKAGES = "/opt/tests"

_GUEST = (Path(__file__).parent / "vm_guest.py").read_text()
_UNIT = f"""
[Unit]
Description=Commands of the tests
After=multi-user.target

[Service]
ExecStartPre=/bin/sh -c 'mkdir -p {CARRIED} && tar -xf /dev/vdb -C {CARRIED}'
ExecStart=/usr/bin/python3 /opt/guest.py /dev/virtio-ports/{CHANNEL}
OOMPolicy=continue
TasksMax=infinity
LimitNOFILE=65536
TimeoutStartSec=infinity

[Install]
WantedBy=default.target
"""
#: Nothing here needs them, and each takes seconds on an emulated processor.
_MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer",
           "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
           "systemd-timesyncd.service")  # fmt: skip


@dataclass(frozen=True)
class Image:
    disk: Path
    kernel: Path
    initrd: Path


def image() -> Image:
    """The cached image, built when missing."""
    debian.need(("debootstrap", "debootstrap"), ("mkfs.ext4", "e2fsprogs"))
    with debian.cache("vm", *PACKAGES, str(RECIPE)) as cache:
        root = cache / "root"
        if not root.is_dir():
            with debian.building(root) as made:
                debian.debootstrap(made, PACKAGES)
        recipe = debian.digest(*debian.dependencies(), *_testers(), _GUEST, _UNIT, *_MASKED)
        installed = cache / f"image-{recipe}"
        if not installed.is_dir():
            for stale in cache.glob("image-*"):
                shutil.rmtree(stale)
            with debian.building(installed) as made:
                made.mkdir()
                _install(root, made)
        return Image(*(installed / name for name in ("disk", "kernel", "initrd")))


def carried(to: Path) -> Path:
    """The second disk: the sources, today's wheel in ``dist``, and the prober from ``to``."""
    wheel = debian.build_wheel(to / "dist")
    disk = to / "carried.tar"
    with tarfile.open(disk, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sandboxd", "tests", "tools", "policies", "systemd", "docs",
                     "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"):  # fmt: skip
            archive.add(PROJECT / name, name, filter=_as_root)
        archive.add(wheel, f"dist/{wheel.name}", filter=_as_root)
        archive.add(to / "prober", "prober", filter=_as_root)
    return disk


def _testers() -> list[str]:
    """pytest and what else the tests import, as the project pins them."""
    wanted = ("pytest>", "pytest-trio", "hypothesis")
    return [line for line in debian.dependencies("dev") if line.startswith(wanted)]


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in member.name:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member


def _install(base: Path, to: Path) -> None:
    root = to / "root"
    debian.do("cp", "-a", str(base), str(root))
    debian.install_dependencies(root)
    debian.do(sys.executable, "-m", "pip", "install", "-q", "--target",
              str(root / TEST_PACKAGES[1:]), *_testers())  # fmt: skip
    (root / "opt/guest.py").write_text(_GUEST)
    (root / "etc/systemd/system/tests.service").write_text(_UNIT)
    (root / "etc/hostname").write_text("sandboxd-vm\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (root / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
    debian.chroot(root, "systemctl", "enable", "-q", "tests.service")
    debian.chroot(root, "systemctl", "mask", "-q", *_MASKED)
    debian.chroot(root, "useradd", "--create-home", "--shell", "/bin/bash", "alice")
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    (initrd,) = (root / "boot").glob("initrd.img-*")
    shutil.copy(kernel, to / "kernel")
    shutil.copy(initrd, to / "initrd")
    with (to / "disk").open("w") as disk:
        disk.truncate(2 << 30)
    debian.do("mkfs.ext4", "-q", "-d", str(root), str(to / "disk"))
    shutil.rmtree(root)
