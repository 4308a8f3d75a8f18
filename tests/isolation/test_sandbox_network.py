"""No network, and none of the shared memory and message channels of the host."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from isolation_support import Box, read

Outside = Callable[..., dict[str, Any]]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A TCP listener on the host's loopback."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        yield server


async def test_the_only_interface_is_a_loopback_that_is_down(box: Box) -> None:
    probe = """
import fcntl, struct
def flags(name):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        request = struct.pack("16sH14x", name, 0)
        return struct.unpack("16sH14x", fcntl.ioctl(s, 0x8913, request))[1]
def bring_up():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 1))
tell(names=[name for _, name in socket.if_nameindex()], up=flags(b"lo") & 1,
     bring_up=attempt(bring_up),
     raw=attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1),
     packet=attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW))
"""
    seen = await box.probe(probe)
    assert "lo" in seen["names"]
    # Some kernels add tunnel devices to every namespace (net.core.fb_tunnels_only_for_init_net).
    assert not {name for name in seen["names"] if name.startswith(("e", "w", "docker", "br"))}
    assert seen["up"] == 0
    assert (seen["bring_up"], seen["raw"]) == ("EPERM", "EPERM")
    assert seen["packet"] == ("EAFNOSUPPORT" if box.launcher.seccomp else "EPERM")
    assert (await box.probe(probe, network="host"))["up"] == 1


async def test_a_listener_on_the_hosts_loopback_is_out_of_reach(
    box: Box, listener: socket.socket
) -> None:
    probe = f"""
def connect(family, address):
    with socket.socket(family) as s:
        s.connect(address)
port = {listener.getsockname()[1]}
tell(
    loopback=attempt(connect, socket.AF_INET, ("127.0.0.1", port)),
    any=attempt(connect, socket.AF_INET, ("0.0.0.0", port)),
    six=attempt(connect, socket.AF_INET6, ("::1", port)),
    mapped=attempt(connect, socket.AF_INET6, ("::ffff:127.0.0.1", port)),
)"""
    seen = await box.probe(probe)
    # Landlock comes before the network that isn't there.
    denied = {"EACCES"} if box.launcher.landlock >= 4 else {"ENETUNREACH", "EADDRNOTAVAIL"}
    assert set(seen.values()) <= denied, seen
    shared = await box.probe(probe, network="host")
    assert (shared["loopback"], shared["any"], shared["mapped"]) == ("ok", "ok", "ok")


async def test_no_address_is_routed(box: Box) -> None:
    seen = await box.probe("""
def connect(kind, address):
    with socket.socket(socket.AF_INET, kind) as s:
        s.connect((address, 53))
tell(all=[attempt(connect, kind, address) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
          for address in ("192.0.2.1", "169.254.169.254", "10.0.0.1", "8.8.8.8")])""")
    tcp = "EACCES" if box.launcher.landlock >= 4 else "ENETUNREACH"
    assert seen == {"all": [tcp] * 4 + ["ENETUNREACH"] * 4}


async def test_the_resolvers_files_are_there_only_with_the_hosts_network(box: Box) -> None:
    probe = """tell(resolv=os.path.exists("/etc/resolv.conf"), hosts=open("/etc/hosts").read())"""
    alone = await box.probe(probe)
    assert alone == {"resolv": False, "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n"}
    shared = await box.probe(probe, network="host")
    assert shared["hosts"] == read("/etc/hosts")
    assert shared["resolv"] == ("resolv.conf" in os.listdir("/etc"))


async def test_abstract_sockets_are_not_shared(box: Box, outside: Outside) -> None:
    name = f"\0sandboxd-test-{os.getpid()}"
    probe = f"""
def connect():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect({name!r})
tell(connect=attempt(connect))"""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen(4)
        assert await box.probe(probe) == {"connect": "ECONNREFUSED"}
        shared = "EPERM" if box.launcher.landlock >= 6 else "ok"
        assert await box.probe(probe, network="host") == {"connect": shared}
        assert outside(probe) == {"connect": "ok"}


async def test_system_v_shared_memory_is_not_shared(box: Box, outside: Outside) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    key = 0x5BD00000 | os.getpid() & 0xFFFFF
    memory = libc.shmget(key, 4096, 0o1666)  # IPC_CREAT
    assert memory >= 0
    probe = f"tell(get=call('shmget', {key}, 0, 0))"
    try:
        assert outside(probe) == {"get": "ok"}
        assert await box.probe(probe) == {"get": "ENOENT"}
    finally:
        libc.shmctl(memory, 0, None)  # IPC_RMID


async def test_posix_message_queues_are_not_shared(box: Box, outside: Outside) -> None:
    librt = ctypes.CDLL("librt.so.1", use_errno=True)
    name = f"/sandboxd-test-{os.getpid()}".encode()
    queue = librt.mq_open(name, os.O_CREAT | os.O_RDWR, 0o666, None)
    assert queue >= 0
    probe = f"""
libc = ctypes.CDLL("librt.so.1", use_errno=True)
tell(open=call("mq_open", {name!r}, os.O_RDONLY))"""
    try:
        assert outside(probe) == {"open": "ok"}
        assert await box.probe(probe) == {"open": "ENOENT"}
    finally:
        os.close(queue)
        librt.mq_unlink(name)


async def test_the_host_name_is_the_specs(box: Box) -> None:
    probe = "tell(name=socket.gethostname(), file=open('/etc/hostname').read())"
    assert await box.probe(probe, hostname="toolbox") == {"name": "toolbox", "file": "toolbox\n"}
