"""Readiness, watchdog and socket activation, spoken to a real datagram socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandboxd.errors import Invalid, Unavailable
from sandboxd.service import Service


class Manager:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(5)
        self.socket.bind("\0" + address[1:] if address[0] == "@" else address)

    def hears(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")


@pytest.fixture
def manager(tmp_path: Path):
    m = Manager(str(tmp_path / "notify"))
    yield m
    m.socket.close()


@pytest.fixture
def service(manager: Manager):
    s = Service.from_environ({"NOTIFY_SOCKET": manager.address})
    yield s
    s.close()


def test_without_a_manager_everything_is_a_quiet_no_op() -> None:
    service = Service.from_environ({"PATH": "/bin"})
    assert not service.managed
    assert service.listen_fds == {}
    assert service.watchdog_interval is None
    assert [service.ready("up"), service.reloading(), service.stopping(), service.watchdog()] == [
        False
    ] * 4


def test_ready_says_so_with_a_status(manager: Manager, service: Service) -> None:
    assert service.ready("serving 3 agents")
    assert manager.hears() == ["READY=1", "STATUS=serving 3 agents"]


def test_ready_without_a_status_is_one_line(manager: Manager, service: Service) -> None:
    service.ready()
    assert manager.hears() == ["READY=1"]


def test_reloading_carries_the_monotonic_time(manager: Manager, service: Service) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    service.reloading()
    state, stamp = manager.hears()
    assert state == "RELOADING=1"
    name, value = stamp.split("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_stopping_status_watchdog_and_more_time(manager: Manager, service: Service) -> None:
    service.stopping("ending 2 sessions")
    assert manager.hears() == ["STOPPING=1", "STATUS=ending 2 sessions"]
    service.status("busy")
    assert manager.hears() == ["STATUS=busy"]
    service.watchdog()
    assert manager.hears() == ["WATCHDOG=1"]
    service.extend_timeout(1.5)
    assert manager.hears() == ["EXTEND_TIMEOUT_USEC=1500000"]


def test_a_status_cannot_forge_an_assignment(manager: Manager, service: Service) -> None:
    service.status("agent\nMAINPID=1\r\nREADY=1")
    assert manager.hears() == ["STATUS=agent MAINPID=1 READY=1"]


def test_an_abstract_address_works() -> None:
    manager = Manager(f"@sandboxd-test-{os.getpid()}")
    service = Service.from_environ({"NOTIFY_SOCKET": manager.address})
    service.ready()
    assert manager.hears() == ["READY=1"]
    service.close()
    manager.socket.close()


def test_a_manager_that_went_away_loses_messages_and_nothing_else(
    manager: Manager, service: Service
) -> None:
    assert service.watchdog()
    manager.socket.close()
    assert not service.watchdog()


def test_a_full_manager_does_not_freeze_the_daemon(manager: Manager, service: Service) -> None:
    assert service._socket is not None
    service._socket.settimeout(0.01)
    for _ in range(10_000):
        if not service.watchdog():
            break
    else:
        pytest.fail("the socket never filled")


def test_a_manager_out_of_reach_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="NOTIFY_SOCKET"):
        Service.from_environ({"NOTIFY_SOCKET": str(tmp_path / "nobody")})


def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(Invalid, match="neither a path nor an abstract name"):
        Service.from_environ({"NOTIFY_SOCKET": "vsock:2:1234"})


def test_every_trace_leaves_the_environment(manager: Manager) -> None:
    environ = {
        "NOTIFY_SOCKET": manager.address,
        "LISTEN_PID": "1",
        "LISTEN_PIDFDID": "77",
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "admin",
        "WATCHDOG_PID": "1",
        "WATCHDOG_USEC": "30000000",
        "PATH": "/bin",
    }
    Service.from_environ(environ).close()
    assert environ == {"PATH": "/bin"}


def test_the_notification_socket_is_not_inherited(service: Service) -> None:
    assert service._socket is not None
    assert not os.get_inheritable(service._socket.fileno())


def test_the_watchdog_interval_is_half_of_what_is_allowed() -> None:
    environ = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    assert Service.from_environ(environ).watchdog_interval == 15.0
    assert Service.from_environ({"WATCHDOG_USEC": "3000000"}).watchdog_interval == 1.5
    assert Service.from_environ({"WATCHDOG_USEC": "0"}).watchdog_interval is None


def test_a_watchdog_for_another_process_is_not_ours() -> None:
    environ = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}
    assert Service.from_environ(environ).watchdog_interval is None


@pytest.mark.parametrize("bad", ["-1", "ten", "1 0", "٣", "9" * 30])
def test_numbers_are_digits(bad: str) -> None:
    with pytest.raises(Invalid, match="WATCHDOG_USEC is not a number"):
        Service.from_environ({"WATCHDOG_USEC": bad})


def test_sockets_for_another_process_are_left_alone() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    assert Service.from_environ(environ).listen_fds == {}


# Descriptor 3 and up belong to pytest in this process, so activation runs in a process of its own,
# exec'd with the sockets in place as a service manager does it.
ACTIVATED = """
import os, sys
from sandboxd.errors import SandboxdError
from sandboxd.service import Service
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    service = Service.from_environ()
except SandboxdError as error:
    print("refused:", error)
else:
    print(service.listen_fds, [os.get_inheritable(fd) for fd in service.listen_fds.values()],
          [name for name in os.environ if name.startswith("LISTEN")])
"""


def activate(*sockets: socket.socket, names: str | None, count: int | None = None) -> str:
    """Run :data:`ACTIVATED` with these sockets as descriptors 3, 4 ...; what it printed."""
    environ = dict(os.environ, LISTEN_FDS=str(len(sockets) if count is None else count))
    if names is not None:
        environ["LISTEN_FDNAMES"] = names
    moves = " ".join(f"{at}<&{s.fileno()}" for at, s in enumerate(sockets, 3))
    run = subprocess.run(
        ["/bin/bash", "-c", f'exec "$@" {moves}', "-", sys.executable, "-c", ACTIVATED],
        env=environ,
        pass_fds=[s.fileno() for s in sockets],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return run.stdout.strip()


@pytest.fixture
def listener(tmp_path: Path):
    s = high(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    s.bind(str(tmp_path / "admin.sock"))
    s.listen()
    yield s
    s.close()


def high(sock: socket.socket) -> socket.socket:
    """The same socket under a descriptor far above the ones that the child's shell moves."""
    import fcntl

    fd = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 100)
    sock.close()
    return socket.socket(fileno=fd)


def test_a_passed_socket_is_found_by_its_name_and_closed_on_exec(listener: socket.socket) -> None:
    assert activate(listener, names="admin") == "{'admin': 3} [False] []"


def test_a_passed_socket_without_a_name_is_unknown(listener: socket.socket) -> None:
    assert activate(listener, names=None) == "{'unknown': 3} [False] []"


def test_two_sockets_of_one_name_are_refused(listener: socket.socket) -> None:
    said = activate(listener, listener, names="admin:admin")
    assert said == "refused: two passed sockets are named 'admin'"


def test_more_names_than_sockets_are_refused(listener: socket.socket) -> None:
    said = activate(listener, names="admin:http")
    assert said == "refused: LISTEN_FDS passes 1 sockets and LISTEN_FDNAMES names 2"


def test_a_descriptor_that_is_not_open_is_refused(listener: socket.socket) -> None:
    said = activate(listener, names="admin:http", count=2)
    assert said == "refused: the passed descriptor 'http' is not open"


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_INET, socket.SOCK_STREAM),
    ],
)
def test_a_socket_that_nobody_can_connect_to_is_refused(family: int, kind: int) -> None:
    with high(socket.socket(family, kind)) as sock:
        said = activate(sock, names="admin")
    assert said == "refused: the passed socket 'admin' is not a listening Unix stream socket"


def test_a_pipe_is_refused() -> None:
    with open("/dev/null", "rb") as null:

        class Plain:
            def fileno(self) -> int:
                return null.fileno()

        said = activate(Plain(), names="admin")  # type: ignore[arg-type]
    assert said == "refused: the passed descriptor 'admin' is not a socket"
