"""What this host has for the probes to reach for: servers, sockets, memory, queues, a process.

Each bait is real, so that a control can reach it.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sandboxd.trial import reach
from sandboxd.trial.hunt import decoy

__all__ = ["Baits", "open_baits", "open_bystander"]

_CREATE = 0o1000 | 0o2000 | 0o666  # IPC_CREAT, IPC_EXCL, and open to everybody
_libc: Any = ctypes.CDLL(None, use_errno=True)


@dataclass
class Baits:
    """Where they are. What this host refuses to make is left at its empty value."""

    bystander: int = 0
    addresses: tuple[str, ...] = ()
    port: int = 0
    udp_port: int = 0
    socket: str = ""
    abstract: str = ""
    ipc_key: int = 0
    segment: int = -1
    queue: str = ""
    shared_file: str = ""
    key: int = 0


@contextmanager
def open_baits(top: Path) -> Iterator[Baits]:
    """Lay them out, below ``top`` where they are files, and take them all away afterwards."""
    baits = Baits()
    with ExitStack() as undo:
        _sockets(baits, undo, top)
        _ipc(baits, undo)
        with suppress(OSError):  # containers often refuse keys to everybody
            reach.new_session_keyring()
            baits.key = reach.add_key(b"sandboxd-selftest-bait", decoy())
        yield baits


@contextmanager
def open_bystander(baits: Baits) -> Iterator[None]:
    """An ordinary process of the host. To be started after the daemon: one that finds itself alone
    with its parents in a cgroup may take it for its own (docs/systemd.md)."""
    bystander = subprocess.Popen(["/bin/sleep", "3600"], stdin=subprocess.DEVNULL)
    try:
        baits.bystander = bystander.pid
        yield
    finally:
        bystander.kill()
        bystander.wait()


def _sockets(baits: Baits, undo: ExitStack, top: Path) -> None:
    """A TCP and a UDP server on every address, and a Unix socket with and one without a path."""
    stopping = threading.Event()
    undo.callback(stopping.set)
    tcp = undo.enter_context(_dual_stack(socket.SOCK_STREAM))
    tcp.listen(64)
    udp = undo.enter_context(_dual_stack(socket.SOCK_DGRAM))
    baits.port, baits.udp_port = tcp.getsockname()[1], udp.getsockname()[1]
    for sock, serve in ((tcp, _accept), (udp, _echo)):
        sock.settimeout(0.2)
        threading.Thread(target=serve, args=(sock, stopping), daemon=True).start()
    baits.addresses = tuple(
        dict.fromkeys(
            entry.address.partition("%")[0]
            for entries in psutil.net_if_addrs().values()
            for entry in entries
            if entry.family in (socket.AF_INET, socket.AF_INET6)
            and not entry.address.startswith(("127.", "fe80:"))
            and entry.address != "::1"
        )
    ) or ("127.0.0.1",)
    baits.socket = str(top / "bait.sock")
    baits.abstract = f"sandboxd-selftest-{secrets.token_hex(8)}"
    for name in (baits.socket, "\0" + baits.abstract):
        listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(name)
        listener.listen(64)
    Path(baits.socket).chmod(0o666)


def _dual_stack(kind: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            sock.bind(("::", 0))
        except OSError:
            sock.close()
        else:
            return sock
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("", 0))
    return sock


def _accept(sock: socket.socket, stopping: threading.Event) -> None:
    while not stopping.is_set():
        with suppress(OSError):
            sock.accept()[0].close()


def _echo(sock: socket.socket, stopping: threading.Event) -> None:
    while not stopping.is_set():
        with suppress(OSError):
            data, sender = sock.recvfrom(64)
            sock.sendto(data, sender)


def _ipc(baits: Baits, undo: ExitStack) -> None:
    """One key for a segment, a message queue and semaphores; a POSIX queue; a file in memory."""
    key = baits.ipc_key = 0x5B000000 | secrets.randbits(24)
    segment = _libc.shmget(key, 4096, _CREATE)
    if segment >= 0:
        baits.segment = segment
        undo.callback(_libc.shmctl, segment, 0, None)
        address = reach.attach(segment)
        ctypes.memmove(address, value := decoy(), len(value))
        reach.detach(address)
    messages = _libc.msgget(key, _CREATE)
    if messages >= 0:
        undo.callback(_libc.msgctl, messages, 0, None)
    semaphores = _libc.semget(key, 1, _CREATE)
    if semaphores >= 0:
        undo.callback(_libc.semctl, semaphores, 0, 0, 0)
    baits.queue = f"/sandboxd-selftest-{secrets.token_hex(4)}"
    queue = _libc.mq_open(baits.queue.encode(), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666, None)
    if queue >= 0:
        undo.callback(_libc.mq_unlink, baits.queue.encode())
        undo.callback(os.close, queue)
    file = Path(f"/dev/shm/sandboxd-selftest-{secrets.token_hex(4)}")  # noqa: S108
    with suppress(OSError):
        file.write_bytes(decoy())
        file.chmod(0o666)
        undo.callback(file.unlink)
    baits.shared_file = str(file)
