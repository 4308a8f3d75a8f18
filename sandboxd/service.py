"""What the daemon and its service manager say to each other: sd_notify(3) and sd_listen_fds(3).

The two protocols are a datagram socket and three environment variables, so they are spoken here
directly instead of through libsystemd. Without a service manager everything is a quiet no-op: the
same daemon runs under systemd, in a container and in a terminal.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

from sandboxd.errors import Invalid, Unavailable

__all__ = ["LISTEN_FDS_START", "Service"]

#: The first descriptor that a service manager passes (sd_listen_fds(3)).
LISTEN_FDS_START = 3

#: Everything that tells a process about its service manager; no child may inherit any of it.
_VARIABLES = (
    "NOTIFY_SOCKET",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)

#: A service manager that takes no datagram for this long must not freeze the daemon.
_SEND_TIMEOUT = 2.0


@dataclass
class Service:
    """The service manager as one process sees it.

    ``listen_fds`` maps the name of each passed socket (``FileDescriptorName=``) to its descriptor,
    close-on-exec and checked to be a listening Unix stream socket. ``watchdog_interval`` is how
    often, in seconds, :meth:`watchdog` has to be called: half of what the manager allows, as
    sd_watchdog_enabled(3) advises; None where no watchdog was asked for.
    """

    listen_fds: dict[str, int] = field(default_factory=dict)
    watchdog_interval: float | None = None
    _socket: socket.socket | None = field(default=None, repr=False)

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str] = os.environ) -> Service:
        """Read what the manager said and remove every trace of it from ``environ``.

        Call it once, before anything forks: the variables are addressed to one process id, and a
        child that inherited NOTIFY_SOCKET could declare the daemon ready or stopping. Raises
        :class:`Invalid` when the variables contradict themselves or the passed sockets aren't
        what the daemon can serve, and :class:`Unavailable` when the manager can't be reached:
        better a start that fails at once than one that runs into its timeout.
        """
        said = {name: environ.pop(name, "") for name in _VARIABLES}
        return cls(
            listen_fds=_listen_fds(said),
            watchdog_interval=_watchdog_interval(said),
            _socket=_connect(said["NOTIFY_SOCKET"]),
        )

    @property
    def managed(self) -> bool:
        """Whether a service manager waits to be told."""
        return self._socket is not None

    def ready(self, status: str = "") -> bool:
        """The daemon serves, or a reload is over, whichever was pending."""
        return self._send("READY=1", status)

    def reloading(self, status: str = "") -> bool:
        """A reload begins; :meth:`ready` ends it, also when the new configuration was refused.

        The time stamp is what Type=notify-reload needs to tell this reload from an earlier one.
        """
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return self._send(f"RELOADING=1\nMONOTONIC_USEC={now}", status)

    def stopping(self, status: str = "") -> bool:
        return self._send("STOPPING=1", status)

    def status(self, status: str) -> bool:
        """One line for people, shown by ``systemctl status``."""
        return self._send("", status)

    def watchdog(self) -> bool:
        """The daemon is alive. Call it from the loop that would hang, not from a thread."""
        return self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> bool:
        """Starting or stopping goes on: ask for ``seconds`` more, counted from now."""
        return self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def close(self) -> None:
        """Close the notification socket. The listening sockets belong to who serves them."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, state: str, status: str = "") -> bool:
        """Whether the manager took the message. Losing one must not take the daemon down."""
        if self._socket is None:
            return False
        if status:
            # One assignment per line: a line feed in a status would be a forged assignment.
            state = f"{state}\nSTATUS={' '.join(status.split())}".lstrip("\n")
        try:
            self._socket.send(state.encode())
        except OSError:
            return False
        return True


def _connect(address: str) -> socket.socket | None:
    """A socket connected to NOTIFY_SOCKET: a path, or @ and an abstract name.

    It is connected while the daemon still has its first identity, so that a later change of user
    or root directory doesn't cut the daemon off.
    """
    if not address:
        return None
    if address[0] not in "/@":
        raise Invalid(
            "NOTIFY_SOCKET is neither a path nor an abstract name",
            hint="sandboxd speaks to a service manager over a Unix socket only (sd_notify(3))",
        )
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    notify.settimeout(_SEND_TIMEOUT)
    try:
        notify.connect("\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        notify.close()
        raise Unavailable(
            f"the service manager's socket NOTIFY_SOCKET can't be reached: {error.strerror}",
            hint="run sandboxd without NOTIFY_SOCKET when no service manager waits for it",
        ) from None
    return notify


def _listen_fds(said: Mapping[str, str]) -> dict[str, int]:
    """The passed sockets by name; none when they are addressed to another process."""
    if not said["LISTEN_FDS"] or not said["LISTEN_PID"]:
        return {}
    if _number("LISTEN_PID", said["LISTEN_PID"]) != os.getpid():
        return {}
    count = _number("LISTEN_FDS", said["LISTEN_FDS"])
    names = said["LISTEN_FDNAMES"].split(":") if said["LISTEN_FDNAMES"] else ["unknown"] * count
    if len(names) != count:
        raise Invalid(
            f"LISTEN_FDS passes {count} sockets and LISTEN_FDNAMES names {len(names)}",
            hint="start sandboxd from its own units (sandboxctl install)",
        )
    passed: dict[str, int] = {}
    for fd, name in enumerate(names, LISTEN_FDS_START):
        if name in passed:
            raise Invalid(
                f"two passed sockets are named {name!r}",
                hint="give each socket unit one ListenStream= and its own FileDescriptorName=",
            )
        _check_listener(name, fd)
        os.set_inheritable(fd, False)
        passed[name] = fd
    return passed


def _check_listener(name: str, fd: int) -> None:
    """Refuse a descriptor that is anything but a listening Unix stream socket."""
    hint = "the socket unit needs ListenStream=/PATH and Accept=no"
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise Invalid(f"the passed descriptor {name!r} is not a socket", hint=hint)
    except OSError:
        raise Invalid(f"the passed descriptor {name!r} is not open", hint=hint) from None
    # dup: the probe's own socket object closes its copy and leaves the passed one alone.
    with contextlib.closing(socket.socket(fileno=os.dup(fd))) as probe:
        if (probe.family, probe.type) != (socket.AF_UNIX, socket.SOCK_STREAM) or not (
            probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ):
            raise Invalid(
                f"the passed socket {name!r} is not a listening Unix stream socket", hint=hint
            )


def _watchdog_interval(said: Mapping[str, str]) -> float | None:
    if not said["WATCHDOG_USEC"]:
        return None
    if said["WATCHDOG_PID"] and _number("WATCHDOG_PID", said["WATCHDOG_PID"]) != os.getpid():
        return None
    usec = _number("WATCHDOG_USEC", said["WATCHDOG_USEC"])
    return usec / 2_000_000 if usec else None


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise Invalid(
            f"{name} is not a number", hint="it is set by the service manager, never by hand"
        )
    return int(text)
