"""Listening sockets inside a sandbox's network namespace, served by who is outside of it.

A sandbox without a network can still be given single destinations: a socket that listens on its
loopback is made in here and passed out, and belongs to this network namespace for good
(network_namespaces(7)). No process of ours stays in the sandbox for it.

Standard library only.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from sandboxd.errors import Invalid, KernelError

__all__ = ["Listener", "check_listeners", "provide", "take"]

#: What one sandbox may have passed out of it.
MAX_LISTENERS = 64
#: Connections that wait to be accepted; more are made to wait by TCP itself.
_BACKLOG = 128
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914  # netdevice(7)
_IFF_UP = 1
_IFREQ = struct.Struct("16sh22x")
_LOOPBACK = re.compile(r"127(?:\.(?:0|[1-9][0-9]{0,2})){3}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket on the sandbox's loopback that is passed out of it.

    ``name``: a host name that leads to ``address`` in there (hosts(5)), or empty.
    """

    address: str
    port: int
    name: str = ""


def check_listeners(listeners: Sequence[Listener]) -> None:
    """Invalid when one can't be made, or two are the same."""
    places = {(one.address, one.port) for one in listeners}
    if len(listeners) > MAX_LISTENERS or len(places) < len(listeners):
        raise Invalid(f"listeners are different addresses and ports, at most {MAX_LISTENERS}")
    for one in listeners:
        if not _LOOPBACK.fullmatch(one.address) or not 0 < one.port < 65536:
            raise Invalid(f"a listener is on loopback and has a port, not {one.address}:{one.port}")
        if one.name and not _HOST.fullmatch(one.name):
            raise Invalid(f"a listener can't have the name {one.name!r}")


def provide(listeners: Sequence[Listener], outlet: int) -> None:
    """Bring loopback up, make the sockets and pass them out through the Unix socket ``outlet``.

    Needs CAP_NET_ADMIN over the current network namespace. Raises KernelError.
    """
    made: list[socket.socket] = []
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            _bring_up(control.fileno())
        for listener in listeners:
            one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            made.append(one)
            try:
                one.bind((listener.address, listener.port))
                one.listen(_BACKLOG)
            except OSError as failure:
                where = f"{listener.address}:{listener.port}"
                raise KernelError("bind", failure.errno or 0, where) from None
        numbers = array.array("i", [one.fileno() for one in made])
        with socket.socket(fileno=os.dup(outlet)) as out:
            out.sendmsg([b"L"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
    except KernelError:
        raise
    except OSError as failure:
        raise KernelError("sendmsg", failure.errno or 0, "listening sockets") from None
    finally:
        for one in made:
            one.close()


def take(inlet: socket.socket, count: int) -> list[socket.socket]:
    """The sockets that :func:`provide` passed out, in its order. Doesn't wait.

    Raises KernelError when they are not all there.
    """
    size = socket.CMSG_SPACE(count * struct.calcsize("i"))
    try:
        _, ancillary, _, _ = inlet.recvmsg(1, size, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    except OSError as failure:
        raise KernelError("recvmsg", failure.errno or 0, "listening sockets") from None
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    taken = [socket.socket(fileno=number) for number in numbers]
    if len(taken) != count:
        for one in taken:
            one.close()
        raise KernelError("recvmsg", errno.EPROTO, "listening sockets")
    return taken


def _bring_up(control: int) -> None:
    try:
        request = _IFREQ.pack(b"lo", 0)
        _, flags = _IFREQ.unpack(fcntl.ioctl(control, _SIOCGIFFLAGS, request))
        fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))
    except OSError as failure:
        raise KernelError("ioctl", failure.errno or 0, "lo (SIOCSIFFLAGS)") from None
