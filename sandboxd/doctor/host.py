"""What the host around the kernel offers: systemd, key custody, swap, directories, limits."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sandboxd.doctor.check import Check, existing, filesystem, lines, output, read, sysctl
from sandboxd.errors import SandboxdError
from sandboxd.paths import Paths

__all__ = ["checks"]


def checks(paths: Paths) -> Iterator[Check]:
    yield _systemd()
    yield _custody()
    yield _swap()
    yield _python()
    yield _state_directory(paths.state)
    yield _runtime_directory(paths)
    yield _temporary_directory()
    yield _open_files()
    yield _keyrings()


def _systemd() -> Check:
    name = "systemd"
    version = output("systemctl", "--version").split("\n")[0]
    if version and Path("/run/systemd/system").is_dir():
        return Check(name, "ok", version)
    return Check(
        name,
        "degraded",
        f"{version or 'not installed'}; it doesn't run this host",
        "nothing restarts the daemon, watches it, or starts it at boot",
        "none needed for a trial; else start sandboxd from your own service manager with "
        "SIGTERM as its stop signal",
    )


def _custody() -> Check:
    """Where the master key can lie. A TPM makes a stolen disk useless."""
    name = "key custody"
    creds = shutil.which("systemd-creds") is not None
    tpm = Path("/dev/tpmrm0").exists() and Path("/sys/class/tpm/tpm0").exists()
    ways = ["key file", "passphrase"]
    if creds:
        ways.insert(0, f"systemd credential ({'TPM 2.0' if tpm else 'host key, no TPM'})")
    if creds and tpm:
        return Check(name, "ok", ", ".join(ways))
    return Check(
        name,
        "degraded",
        ", ".join(ways),
        "the key's last protection is a file on this host: whoever copies the whole disk has it, "
        "unless a passphrase is asked for",
        "a host or VM with a TPM 2.0, systemd 250 or later and LoadCredentialEncrypted= "
        "(docs/systemd.md); or key: passphrase"
        if creds
        else "systemd 250 or later for encrypted credentials (docs/systemd.md); or key: passphrase",
    )


def _swap() -> Check:
    """A secret in memory can reach a swap device, unless that is encrypted or in RAM."""
    name = "swap"
    plain = []
    for line in lines("/proc/swaps")[1:]:
        device = Path(line.split()[0]).resolve()
        crypt = read(f"/sys/class/block/{device.name}/dm/uuid").startswith("CRYPT-")
        if not crypt and not device.name.startswith("zram"):
            plain.append(str(device))
    if not plain:
        return Check(name, "ok", "none, or encrypted, or in memory")
    return Check(
        name,
        "degraded",
        f"unencrypted: {', '.join(plain)}",
        "a secret in use can be written to disk in the clear and outlive its removal",
        "swapoff -a, or encrypt it with a random key (crypttab(5): /dev/urandom swap)",
    )


def _python() -> Check:
    """Its version is the package's own requirement, so only told here."""
    detail = f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})"
    return Check("Python", "ok", detail, required=True)


_VOLATILE = ("tmpfs", "ramfs")
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "afs", "glusterfs")


def _state_directory(wanted: Path) -> Check:
    name = "state directory"
    there = existing(wanted)
    kind, readonly = filesystem(there)
    free = shutil.disk_usage(there).free
    detail = f"{wanted} on {kind}, {free // 2**20:,} MiB free"
    if wanted != there:
        detail += ", not made yet"
    if readonly:
        costs, fix = "no secret can be stored, nothing is audited, so nothing runs", "mount it rw"
    elif kind in _VOLATILE:
        costs = "store and audit log are gone after a reboot"
        fix = "put it on a disk: --state DIR or SANDBOXD_STATE"
    elif kind in _REMOTE or kind.startswith("fuse"):
        costs = "SQLite's locks and fsync can't be relied on there: the store may be damaged"
        fix = "put it on a local disk: --state DIR or SANDBOXD_STATE"
    elif free < 100 * 2**20:
        costs, fix = "when the audit log can't be written, nothing runs", "make room"
    else:
        return Check(name, "ok", detail)
    return Check(name, "degraded", detail, costs, fix)


def _runtime_directory(paths: Paths) -> Check:
    name = "runtime directory"
    try:
        paths.check_sockets()
    except SandboxdError as error:
        costs = "sockets can't be made: the daemon doesn't start"
        return Check(name, "missing", str(error), costs, error.hint)
    kind, _ = filesystem(existing(paths.runtime))
    return Check(name, "ok", f"{paths.runtime} on {kind}")


def _temporary_directory() -> Check:
    """Nothing secret goes there; it is named because demo and tests work in it."""
    where = Path(tempfile.gettempdir())
    kind, _ = filesystem(where)
    return Check("temporary files", "ok", f"{where} on {kind}")


def _open_files() -> Check:
    name = "open files"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{_limit(soft)}, can be raised to {_limit(hard)}"
    if hard == resource.RLIM_INFINITY or hard >= 4096:
        return Check(name, "ok", detail)
    return Check(
        name,
        "degraded",
        detail,
        f"about {hard // 10} sessions and calls at once, then new ones are refused",
        "raise the hard limit: LimitNOFILE=65536 in the unit, or nofile in "
        "/etc/security/limits.conf",
    )


#: What a session keyring takes of the quota of bytes: its description "_ses" and a NUL.
_RING_BYTES = 5
#: Sandboxes at once that nobody need think about: those of 64 sessions (`max_sessions` unless set)
#: and of their calls are far fewer.
_MANY = 1000


def _keyrings() -> Check:
    """How many sandboxes the user's quota of keys leaves room for (keyrings(7)).

    Each has a session keyring, which the kernel charges to the user that the launcher runs as.
    """
    name = "keyrings"
    prefix = "root_" if _outer_uid() == 0 else ""
    settings = [sysctl(f"kernel/keys/{prefix}{which}") for which in ("maxkeys", "maxbytes")]
    if not all(setting.isdecimal() for setting in settings):
        return Check(name, "ok", "this kernel has none")
    keys, size = map(int, settings)
    used, used_bytes = _keys_used()
    by_keys, by_bytes = keys - used, (size - used_bytes) // _RING_BYTES
    room = max(0, min(by_keys, by_bytes))
    detail = f"room for {room:,} more (kernel.keys.{prefix}maxkeys is {keys:,}; {used:,} in use)"
    if room >= _MANY:
        return Check(name, "ok", detail)
    raised = []
    if by_keys < _MANY:
        raised.append(f"kernel.keys.{prefix}maxkeys={5000 + used // _MANY * _MANY}")
    if by_bytes < _MANY:
        raised.append(f"kernel.keys.{prefix}maxbytes={25000 + used_bytes}")
    return Check(
        name,
        "degraded",
        detail,
        f"{room:,} more sandboxes at once, for each has a session keyring; then none starts",
        f"sysctl -w {' '.join(raised)}   # keep it: /etc/sysctl.d/60-sandboxd.conf",
    )


def _outer_uid() -> int:
    """This process's uid outside its user namespace: root of one has no quota of root's."""
    own = os.geteuid()
    for line in lines("/proc/self/uid_map"):
        inside, outside, count = map(int, line.split())
        if inside <= own < inside + count:
            return outside + own - inside
    return own


def _keys_used() -> tuple[int, int]:
    """Keys and bytes that this user's quota has been charged with (/proc/key-users, proc(5))."""
    for line in lines("/proc/key-users"):
        uid, _, _, keys, size = line.split()
        if uid == f"{os.geteuid()}:":
            return int(keys.split("/")[0]), int(size.split("/")[0])
    return 0, 0


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"
