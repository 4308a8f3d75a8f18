"""The host's files: not there. The system's own: not to be changed. Ways out of the root: none."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH101, PTH104, PTH108, PTH110, PTH112, PTH123, PTH208
# ruff: noqa: PTH211, S103, S108
# ruff: noqa: PTH211, S103, S108

from __future__ import annotations

import errno
import os
import shutil
import struct
import sys
from collections.abc import Callable

from sandboxd.selftest.prober.probe import AGENT, HOST, Attack, Plan, add, open_

_HOSTS = "Secret: files of the host"
_SYSTEM = "Agent steering a tool: planted files"
_PATHS = "Agent steering a tool: links and paths"
_SAME = "the same outside"
#: The id in an entry of an access list that is for no certain user (acl(5)).
_NOBODY = 0xFFFFFFFF


def _path(name: str) -> Callable[[Plan], None]:
    return lambda plan: open_(plan.paths[name])


def _own_file(plan: Plan) -> None:
    path = f"/tmp/own-{os.getpid()}"
    with open(path, "w"):
        pass
    open_(path)


def _seen(path: str) -> Callable[[Plan], object]:
    return lambda plan: os.lstat(path)


for _name in ("master key", "store", "audit log", "daemon log", "configuration", "state",
              "lock", "session directory", "bait"):  # fmt: skip
    add(f"open the {_name}", _HOSTS, _path(_name), "ENOENT", outside=HOST, says=_SAME)
for _at in ("/etc/shadow", "/var", "/var/lib", "/var/log", "/boot", "/srv", "/etc/machine-id",
            "/etc/ssh", "/etc/sudoers.d", "/mnt", "/media"):  # fmt: skip
    add(f"see {_at}", _HOSTS, _seen(_at), "ENOENT", outside=HOST, fallback=_own_file, says=_SAME)


def _through(prefix: str) -> Callable[[Plan], None]:
    return lambda plan: open_(prefix + plan.paths["bait"])


add("the host through /proc/self/root", _PATHS, _through("/proc/self/root"), "ENOENT",
    outside=HOST, says=_SAME)  # fmt: skip
add("the host through /proc/self/cwd/../..", _PATHS, _through("/proc/self/cwd" + "/.." * 12),
    "ENOENT", outside=HOST, says=_SAME)  # fmt: skip
add("the host through /proc/1/root", _PATHS, _through("/proc/1/root"), "EACCES",
    outside=HOST, fallback=lambda plan: os.listdir("/proc/self/root/usr"), says=_SAME)  # fmt: skip
add("the host through /..", _PATHS, _through("/.." * 12), "ENOENT", outside=HOST, says=_SAME)


def _through_link(plan: Plan) -> None:
    link = f"{os.environ.get('TMPDIR', '/tmp')}/link-{os.getpid()}"
    os.symlink(plan.paths["bait"], link)
    try:
        open_(link)
    finally:
        os.unlink(link)


def _through_descriptors(plan: Plan) -> None:
    """A directory of the host left open would be a way out (CVE-2024-21626)."""
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.isdir(path) and os.path.exists(path + "/.." * 12 + plan.paths["bait"]):
            return
    raise FileNotFoundError(2, "no descriptor leads there")


def _holds_directory(plan: Plan) -> None:
    held = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.listdir(f"/proc/self/fd/{held}/usr")


def _other_workspaces(plan: Plan) -> None:
    os.listdir(plan.paths["workspaces"])


add("the host through a link", _PATHS, _through_link, "ENOENT", outside=HOST, says=_SAME)
add("the host through a descriptor", _PATHS, _through_descriptors, "ENOENT",
    inside=_holds_directory, says="an own open directory leads on")  # fmt: skip
add("other agents' workspaces", _HOSTS, _other_workspaces, "ENOENT", outside=HOST, says=_SAME)


def _create(directory: str) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        path = f"{directory}/selftest-{os.getpid()}"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.unlink(path)

    return attack


_IN_TMP = "the same in /tmp"
for _at in ("", "/usr", "/usr/bin", "/usr/lib", "/etc", "/dev", "/home", "/run/sandboxd"):
    _places = (AGENT,) if _at == "/run/sandboxd" else ("agent", "tool")
    add(f"create a file in {_at or '/'}", _SYSTEM, _create(_at), "EROFS", inside=_create("/tmp"),
        places=_places, says=_IN_TMP)  # fmt: skip


def _interpreter(plan: Plan) -> None:
    _create(sys.prefix)(plan)


def _rewrite(path: str) -> Callable[[Plan], None]:
    return lambda plan: open_(path, os.O_WRONLY)


def _rewrite_self(plan: Plan) -> None:
    open_("/proc/self/exe", os.O_WRONLY)


def _rewrite_copy(plan: Plan) -> None:
    path = f"/tmp/copy-{os.getpid()}"
    with open(path, "w"):
        pass
    open_(path, os.O_WRONLY)


def _set_attribute(path: str) -> None:
    """One of a user's, or an access list where there are none: tmpfs has them from Linux 6.6 on."""
    try:
        os.setxattr(path, "user.selftest", b"x")
    except OSError as failure:
        if failure.errno != errno.ENOTSUP:
            raise
        entries = struct.pack("<I" + "HHI" * 3, 2, 1, 6, _NOBODY, 4, 4, _NOBODY, 32, 4, _NOBODY)
        os.setxattr(path, "system.posix_acl_access", entries)


def _in_tmp(change: Callable[[str], object]) -> Callable[[Plan], None]:
    def control(plan: Plan) -> None:
        path = f"/tmp/changed-{os.getpid()}"
        with open(path, "w"):
            pass
        change(path)

    return control


add("create a file beside the interpreter", _SYSTEM, _interpreter, "EROFS",
    inside=_create("/tmp"), says=_IN_TMP)  # fmt: skip
add("rewrite /proc/self/exe", _SYSTEM, _rewrite_self, "EACCES", "ETXTBSY", "EROFS",
    inside=_rewrite_copy, says="an own file")  # fmt: skip
add("rewrite /etc/passwd", _SYSTEM, _rewrite("/etc/passwd"), "EACCES", inside=_rewrite_copy,
    says="an own file")  # fmt: skip
add("rewrite the bridge", _SYSTEM, _rewrite("/run/sandboxd/bin/sandboxd-mcp"), "EACCES", "EROFS",
    inside=_rewrite_copy, places=(AGENT,), says="an own file")  # fmt: skip
for _words, _path_of, _change in (
    ("remove /etc/passwd", "/etc/passwd", os.unlink),
    ("change the mode of /usr/bin", "/usr/bin", lambda path: os.chmod(path, 0o777)),
    ("change the times of /usr/bin", "/usr/bin", os.utime),
    ("rename /etc/passwd", "/etc/passwd", lambda path: os.rename(path, path + "-")),
    ("change the owner of /etc/hostname", "/etc/hostname", lambda path: os.chown(path, 1000, 1000)),
    ("give /usr/bin an attribute", "/usr/bin", _set_attribute),
):  # fmt: skip
    add(_words, _SYSTEM, lambda plan, change=_change, path=_path_of: change(path), "EROFS",
        inside=_in_tmp(_change), says=_IN_TMP)  # fmt: skip


def _run_from(directory: str) -> Attack:
    """Execute a program that was put there."""

    def attack(plan: Plan) -> None:
        path = f"{directory}/true-{os.getpid()}"
        shutil.copyfile("/bin/true", path)
        os.chmod(path, 0o755)
        try:
            os.posix_spawn(path, [path], {})
        finally:
            os.unlink(path)

    return attack


add("run a program from /dev/shm", _SYSTEM, _run_from("/dev/shm"), landlocked=(1, "EACCES"),
    inside=_run_from("/tmp"), says="one from /tmp")  # fmt: skip


def _link_out(plan: Plan) -> None:
    """A hard link would carry a file of the system into a writable place."""
    os.link("/etc/passwd", f"/tmp/linked-{os.getpid()}")


add("hard-link a system file into /tmp", _SYSTEM, _link_out, "EXDEV",
    inside=_in_tmp(lambda path: os.link(path, path + "-2")), says="an own file")  # fmt: skip
add("remove the broker's socket", _SYSTEM, lambda plan: os.unlink("/run/sandboxd/broker.sock"),
    "EBUSY", "EROFS", inside=_in_tmp(os.unlink), places=(AGENT,), says="an own file")  # fmt: skip
