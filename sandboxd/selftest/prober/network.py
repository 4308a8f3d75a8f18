"""The network: there is none. The runner's own server is what must not be reached."""

# Paths here are spoken to as the kernel does: by system calls, without a library between.
# ruff: noqa: PTH123

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Callable

from sandboxd.selftest.prober.probe import HOST, SCRATCH, Plan, add

_THREAT = "Escape: network"
_SAME = "the same reaches the runner outside"
_LOOPBACK = "127.0.0.1"
#: From its fourth ABI on, Landlock refuses TCP before there is a route to look for.
_TCP = (4, "EACCES")


def _connect(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.5)
        sock.connect((host, port))


def _tcp(host: str) -> Callable[[Plan], None]:
    return lambda plan: _connect(host, plan.port)


def _own_addresses(plan: Plan) -> None:
    """Each of the host's addresses; the last refusal is what is told."""
    refusal: OSError = OSError(101, "no address")
    for address in plan.addresses:
        try:
            return _connect(address, plan.port)
        except OSError as failure:
            refusal = failure
    raise refusal


def _elsewhere(host: str, port: int) -> Callable[[Plan], None]:
    """Outside, the same code goes to the runner: nobody else is bothered for a control."""
    return lambda plan: _connect(*((host, port) if plan.inside else (_LOOPBACK, plan.port)))


def _by_name(plan: Plan) -> str:
    """getaddrinfo(3) of a name that needs a resolver; outside, of the host's own."""
    name = "example.com" if plan.inside else "localhost"
    try:
        socket.getaddrinfo(name, 80)
    except socket.gaierror:
        return "no answer"
    return "ok"


def _datagram(host: str, port: int = 0) -> Callable[[Plan], None]:
    def attack(plan: Plan) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        target = (host, port or plan.udp_port) if plan.inside else (_LOOPBACK, plan.udp_port)
        if not plan.inside:
            family = socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1.5)
            sock.sendto(b"ping", target)
            sock.recv(16)

    return attack


def _own_port(plan: Plan) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((_LOOPBACK, 0))
        listener.listen()
        _connect(_LOOPBACK, listener.getsockname()[1])


for _words, _host in (
    ("the host's loopback", _LOOPBACK),
    ("127.0.0.2", "127.0.0.2"),
    ("in decimal", "2130706433"),
    ("in octal", "0177.0.0.1"),
    ("short", "127.1"),
    ("as 0.0.0.0", "0.0.0.0"),  # noqa: S104
):
    add(f"TCP: {_words}", _THREAT, _tcp(_host), "ENETUNREACH", landlocked=_TCP, outside=HOST,
        says=_SAME)  # fmt: skip
add("TCP: IPv6 loopback", _THREAT, _tcp("::1"), "EADDRNOTAVAIL", "ENETUNREACH", landlocked=_TCP,
    outside=HOST, fallback=lambda plan: socket.socket(socket.AF_INET6).close(),
    says=_SAME)  # fmt: skip
add("TCP: IPv4 in IPv6", _THREAT, _tcp("::ffff:127.0.0.1"), "ENETUNREACH", landlocked=_TCP,
    outside=HOST,
    fallback=lambda plan: socket.socket(socket.AF_INET6).close(), says=_SAME)  # fmt: skip
add("TCP: the host's other addresses", _THREAT, _own_addresses, "ENETUNREACH", "EADDRNOTAVAIL",
    landlocked=_TCP, outside=HOST, says=_SAME)  # fmt: skip
for _words, _host, _port in (
    ("metadata service", "169.254.169.254", 80),
    ("metadata service, IPv6", "fd00:ec2::254", 80),
    ("metadata service, container credentials", "169.254.170.2", 80),
    ("the internet", "1.1.1.1", 443),
    ("a private network", "10.0.0.1", 80),
    ("DNS over TCP", "8.8.8.8", 53),
):
    add(f"TCP: {_words}", _THREAT, _elsewhere(_host, _port), "ENETUNREACH",
        "EADDRNOTAVAIL", landlocked=_TCP, outside=HOST, says=_SAME)  # fmt: skip
for _words, _host, _port in (
    ("the host's loopback", _LOOPBACK, 0),
    ("DNS of the stub resolver", "127.0.0.53", 53),
    ("DNS of the internet", "8.8.8.8", 53),
    ("multicast DNS", "224.0.0.251", 5353),
    ("NTP", "162.159.200.1", 123),
):
    add(f"UDP: {_words}", _THREAT, _datagram(_host, _port), "ENETUNREACH", outside=HOST,
        says=_SAME)  # fmt: skip
add("resolve a name", _THREAT, _by_name, "no answer", outside=HOST, says="localhost outside")
add("own loopback", _THREAT, _own_port, "ENETUNREACH", landlocked=_TCP, outside=HOST, says=_SAME)


def _broadcast(plan: Plan) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        target = ("255.255.255.255", 9) if plan.inside else (_LOOPBACK, plan.udp_port)
        sock.sendto(b"x", target)


add("UDP: broadcast", _THREAT, _broadcast, "ENETUNREACH", outside=HOST, says=_SAME)


def _interfaces(plan: Plan) -> tuple[str, str]:
    names = [name for _, name in socket.if_nameindex()]
    up = [name for name in names if _flags(name) & 1]
    # A kernel may put unconfigured tunnels into every network namespace; they are down.
    return ("none is up" if not up else "ok"), ", ".join(names)


def _flags(name: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", name.encode(), 0).ljust(40, b"\0")
        answer = fcntl.ioctl(sock, 0x8913, request)  # SIOCGIFFLAGS
        return int(struct.unpack_from("H", answer, 16)[0])


def _bring_up(plan: Plan) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 0x49).ljust(40, b"\0")
        fcntl.ioctl(sock, 0x8914, request)  # SIOCSIFFLAGS


def _set_address(plan: Plan) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        address = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton("127.0.0.9"))
        fcntl.ioctl(sock, 0x8916, (struct.pack("16s", b"lo") + address).ljust(40, b"\0"))


def _add_link(plan: Plan) -> None:
    """RTM_NEWLINK of a dummy device, by rtnetlink(7)."""
    name = b"selftest0\0\0\0"
    kind = struct.pack("HH", 4 + 8, 1) + b"dummy\0\0\0"
    attributes = struct.pack("HH", 4 + len(name), 3) + name
    attributes += struct.pack("HH", 4 + len(kind), 18) + kind
    body = struct.pack("BxHiII", 0, 0, 0, 0, 0) + attributes
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(2)
        sock.send(struct.pack("IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)
        error = struct.unpack_from("i", sock.recv(4096), 16)[0]
        if error and not (error == -95 and not plan.inside):  # no dummy driver: past the check
            raise OSError(-error, os.strerror(-error))


def _firewall(plan: Plan) -> None:
    """IPT_SO_GET_INFO, by which iptables reads its rules."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.getsockopt(0, 64, 84)


def _routes(plan: Plan) -> str:
    with open("/proc/net/route") as table:
        return "ok" if len(table.readlines()) > 1 else "none listed"


def _connections(plan: Plan) -> str:
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as table:
            if f":{plan.port:04X} " in table.read():
                return "ok"
    return "none listed"


def _names(plan: Plan) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()


def _queries(plan: Plan) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8912, struct.pack("iP", 0, 0))  # SIOCGIFCONF
    array.array("B")


_ROOT = "the same as root of scratch namespaces"
add("interfaces that are up", _THREAT, _interfaces, "none is up", outside=HOST,
    says="outside there are some")  # fmt: skip
add("bring lo up", _THREAT, _bring_up, "EPERM", outside=SCRATCH, says=_ROOT)
add("give lo an address", _THREAT, _set_address, "EPERM", outside=SCRATCH, says=_ROOT)
add("add a network device", _THREAT, _add_link, "EPERM", outside=SCRATCH, fallback=_names,
    says=_ROOT)  # fmt: skip
add("read the firewall", _THREAT, _firewall, "EPERM", outside=SCRATCH,
    allowed=("ok", "ENOPROTOOPT", "EINVAL"), fallback=_queries, says=_ROOT)  # fmt: skip
add("routes of the host", _THREAT, _routes, "none listed", outside=HOST, fallback=_names,
    says="outside there are some")  # fmt: skip
add("connections of the host", _THREAT, _connections, "none listed", outside=HOST,
    says="outside the runner's port is listed")  # fmt: skip
