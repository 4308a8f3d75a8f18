"""The bridge between an MCP client's pipes and the session socket."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandboxd.broker.bridge as bridge

SOURCE = Path(bridge.__file__)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "b.sock"))
        sock.listen()
        sock.settimeout(20)
        yield sock


def start(listener: socket.socket, script: Path = SOURCE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-IS", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"SANDBOXD_SOCKET": listener.getsockname()},
    )


def connect(
    listener: socket.socket, script: Path = SOURCE
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    process = start(listener, script)
    broker, _ = listener.accept()
    broker.settimeout(20)
    return process, broker


def everything(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def test_bytes_pass_both_ways_unchanged(listener: socket.socket) -> None:
    process, broker = connect(listener)
    data = random.Random(1).randbytes(3_000_000)
    with process, broker:
        assert process.stdin is not None
        assert process.stdout is not None

        def echo() -> None:
            while chunk := broker.recv(65536):
                broker.sendall(chunk)
            broker.shutdown(socket.SHUT_WR)

        def feed() -> None:
            assert process.stdin is not None
            process.stdin.write(data)
            process.stdin.close()

        threads = [threading.Thread(target=echo), threading.Thread(target=feed)]
        for thread in threads:
            thread.start()
        assert process.stdout.read() == data
        for thread in threads:
            thread.join()
        assert process.wait(20) == 0


def test_the_end_of_input_is_passed_on_and_answers_still_come(listener: socket.socket) -> None:
    process, broker = connect(listener)
    with process, broker:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"question\n")
        process.stdin.close()
        assert everything(broker) == b"question\n"
        broker.sendall(b"answer\n")
        broker.close()
        assert process.stdout.read() == b"answer\n"
        assert process.wait(20) == 0


def test_it_ends_when_the_broker_closes_while_input_is_open(listener: socket.socket) -> None:
    process, broker = connect(listener)
    with process:
        broker.close()
        assert process.wait(20) == 0


def test_it_ends_when_a_client_that_ended_its_input_is_gone(listener: socket.socket) -> None:
    process, broker = connect(listener)
    with process, broker:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        assert everything(broker) == b""
        process.stdout.close()
        assert process.wait(20) == 0


def test_it_ends_when_the_client_stops_reading(listener: socket.socket) -> None:
    process, broker = connect(listener)
    with process, broker:
        assert process.stdout is not None
        process.stdout.close()
        broker.sendall(b"answer\n")
        assert process.wait(20) == 0


def test_descriptors_that_were_made_non_blocking_work(listener: socket.socket) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    process = subprocess.Popen(
        [sys.executable, "-IS", str(SOURCE)],
        stdin=theirs,
        stdout=theirs,
        env={"SANDBOXD_SOCKET": listener.getsockname()},
    )
    theirs.close()
    broker, _ = listener.accept()
    ours.settimeout(20)
    with process, broker, ours:
        ours.sendall(b"question")
        assert broker.recv(100) == b"question"
        data = b"x" * 2_000_000
        thread = threading.Thread(target=broker.sendall, args=(data,))
        thread.start()
        received = b""
        while len(received) < len(data):
            received += ours.recv(65536)
        thread.join()
        assert received == data
        broker.close()
        assert process.wait(20) == 0


def test_it_runs_as_a_single_file_from_elsewhere(listener: socket.socket, tmp_path: Path) -> None:
    script = tmp_path / "sandboxd-mcp"
    script.write_bytes(b"#!" + os.fsencode(sys.executable) + b" -IS\n" + SOURCE.read_bytes())
    process, broker = connect(listener, script)
    with process:
        broker.close()
        assert process.wait(20) == 0


def test_it_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1]);"
        "print(*sorted(m for m in sys.modules if m.split('.')[0] not in sys.stdlib_module_names))"
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", code, str(SOURCE)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["__main__"]


def run(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-IS", str(SOURCE), *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=20,
    )


def test_without_a_socket_it_says_what_is_missing() -> None:
    done = run({})
    assert done.returncode == 2
    assert done.stderr.startswith("sandboxd-mcp: SANDBOXD_SOCKET is not set\nhint: ")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("path", "reason"), [("/nonexistent", "No such file"), ("/" + "x" * 200, "too long")]
)
def test_a_socket_that_nobody_serves_is_told(path: str, reason: str) -> None:
    done = run({"SANDBOXD_SOCKET": path})
    assert done.returncode == 6
    assert reason in done.stderr
    assert "hint: " in done.stderr


def test_help_is_its_docstring() -> None:
    done = run({}, "--help")
    assert (done.returncode, done.stdout) == (0, bridge.__doc__)
