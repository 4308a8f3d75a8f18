"""Places that processes share without being asked: IPC, keyrings, abstract sockets, descriptors."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH115, PTH123, PTH208

from __future__ import annotations

import ctypes
import fcntl
import os
import socket

from sandboxd.selftest.prober.kernel import call, checked, libc
from sandboxd.selftest.prober.probe import HOST, Plan, add

_THREAT = "Secret: shared places"
_CREATE, _PRIVATE = 0o1000, 0
_SESSION_KEYRING = -3
_SAME = "the same outside"

libc.shmat.restype = ctypes.c_void_p


def _segment_by_key(plan: Plan) -> None:
    checked(libc.shmget(plan.ipc_key, 0, 0))


def _segment_by_id(plan: Plan) -> None:
    if libc.shmat(plan.segment, None, 0o10000) in (None, ctypes.c_void_p(-1).value):
        checked(-1)


def _own_segment(plan: Plan) -> None:
    segment = checked(libc.shmget(_PRIVATE, 4096, _CREATE | 0o600))
    checked(libc.shmctl(segment, 0, None))


def _messages(plan: Plan) -> None:
    checked(libc.msgget(plan.ipc_key, 0))


def _semaphores(plan: Plan) -> None:
    checked(libc.semget(plan.ipc_key, 0, 0))


def _listed(kind: str) -> str:
    with open(f"/proc/sysvipc/{kind}") as table:
        count = len(table.readlines()) - 1
    return "ok" if count else "none listed"


def _queue(plan: Plan) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    opened = library.mq_open(plan.queue.encode(), os.O_RDONLY)
    if opened < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _own_queue(plan: Plan) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    name = b"/sandboxd-selftest-own"
    opened = library.mq_open(name, os.O_RDONLY | os.O_CREAT, 0o600, None)
    if opened < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    library.mq_unlink(name)


def _shared_file(plan: Plan) -> None:
    os.close(os.open(plan.shared_file, os.O_RDONLY))


def _empty(directory: str) -> str:
    """Only what this sandbox's own processes made."""
    names = os.listdir(directory)
    return "ok" if any(name.startswith("sandboxd-selftest") for name in names) else "none listed"


def _abstract(plan: Plan) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect("\0" + plan.abstract)


def _own_abstract(plan: Plan) -> None:
    name = f"\0selftest-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(name)
        listener.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(name)


def _reachable(plan: Plan) -> str:
    """Listen under a name that the runner, outside, tries to reach all the while."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0{plan.marker}-{plan.place}")
        listener.settimeout(0.7)
        listener.listen()
        try:
            listener.accept()[0].close()
        except TimeoutError:
            return "nobody came"
    return "ok"


def _abstract_names(plan: Plan) -> str:
    with open("/proc/net/unix") as table:
        return "ok" if any(plan.abstract in line for line in table) else "none listed"


def _key_by_number(plan: Plan) -> None:
    buffer = ctypes.create_string_buffer(256)
    call("keyctl", 11, plan.key, buffer, 256, 0)


def _key_by_name(plan: Plan) -> None:
    call("request_key", b"user", b"sandboxd-selftest-bait", None, 0)


def _add_key(plan: Plan) -> None:
    key = call("add_key", b"user", b"sandboxd-selftest-own", b"x", 1, _SESSION_KEYRING)
    call("keyctl", 9, key, _SESSION_KEYRING, 0, 0)


def _session_keyring(plan: Plan) -> None:
    call("keyctl", 0, _SESSION_KEYRING, 0, 0, 0)


def _user_keyring(plan: Plan) -> None:
    call("keyctl", 0, -4, 1, 0, 0)


def _listed_keys(plan: Plan) -> str:
    with open("/proc/keys") as keys:
        return "ok" if keys.read(1) else "none listed"


def _inherited(plan: Plan) -> tuple[str, str]:
    """What was open when this program started: three streams, and nothing else."""
    extra = []
    for name in os.listdir("/proc/self/fd"):
        try:
            own = fcntl.fcntl(int(name), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
        # Python opens everything close-on-exec; what came through execve(2) is not.
        if int(name) > 2 and not own:
            extra.append(f"{name} -> {target}")
    return f"{len(extra)} extra", ", ".join(extra)


def _sees_inherited(plan: Plan) -> str:
    os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
    return "ok" if _inherited(plan)[0] == "1 extra" else "missed"


add("System V segment by its key", _THREAT, _segment_by_key, "ENOENT", outside=HOST,
    fallback=_own_segment, says=_SAME)  # fmt: skip
add("System V segment by its number", _THREAT, _segment_by_id, "EINVAL", outside=HOST,
    fallback=_own_segment, says=_SAME)  # fmt: skip
add("System V message queue", _THREAT, _messages, "ENOENT", outside=HOST,
    fallback=_own_segment, says=_SAME)  # fmt: skip
add("System V semaphores", _THREAT, _semaphores, "ENOENT", outside=HOST,
    fallback=_own_segment, says=_SAME)  # fmt: skip
for _kind in ("shm", "msg", "sem"):
    add(f"list of System V objects: {_kind}", _THREAT, lambda plan, kind=_kind: _listed(kind),
        "none listed", outside=HOST, fallback=_own_segment, says=_SAME)  # fmt: skip
add("POSIX message queue", _THREAT, _queue, "ENOENT", outside=HOST, fallback=_own_queue,
    says=_SAME)  # fmt: skip
add("file in /dev/shm", _THREAT, _shared_file, "ENOENT", outside=HOST, says=_SAME)
add("names in /dev/shm", _THREAT, lambda plan: _empty("/dev/shm"), "none listed",  # noqa: S108
    outside=HOST, says=_SAME)  # fmt: skip
add("abstract socket of the host", _THREAT, _abstract, "ECONNREFUSED", outside=HOST, says=_SAME)
add("be reached by an abstract socket", _THREAT, _reachable, "nobody came", inside=_own_abstract,
    says="from the sandbox it is reached")  # fmt: skip
add("names of abstract sockets", _THREAT, _abstract_names, "none listed", outside=HOST, says=_SAME)
add("key of the host by its number", _THREAT, _key_by_number, "EACCES", "ENOKEY", filtered="EPERM",
    outside=HOST, fallback=_own_abstract, says=_SAME)  # fmt: skip
add("key of the host by its name", _THREAT, _key_by_name, "ENOKEY", filtered="EPERM",
    outside=HOST, fallback=_own_abstract, says=_SAME)  # fmt: skip
add("add a key", _THREAT, _add_key, filtered="EPERM", outside=HOST, fallback=_own_abstract,
    says=_SAME)  # fmt: skip
add("session keyring", _THREAT, _session_keyring, filtered="EPERM", outside=HOST,
    fallback=_own_abstract, says=_SAME)  # fmt: skip
add("user keyring", _THREAT, _user_keyring, filtered="EPERM", outside=HOST,
    fallback=_own_abstract, says=_SAME)  # fmt: skip
add("list of keys", _THREAT, _listed_keys, "none listed", outside=HOST,
    fallback=_own_abstract, says=_SAME)  # fmt: skip
add("inherited descriptors", _THREAT, _inherited, "0 extra", inside=_sees_inherited,
    says="an inheritable one is seen")  # fmt: skip
