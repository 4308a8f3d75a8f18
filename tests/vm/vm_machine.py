"""The virtual machine: booted with qemu, without hardware acceleration, and given commands."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vm_image import CHANNEL, Image

#: Seconds from switching on to the first command; a quiet machine takes 40.
BOOT_SECONDS = 400


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"{' '.join(self.argv)}: status {self.status}\n{self.stdout}{self.stderr}"


class Machine:
    """A booted machine. Commands run as its root, or as ``user``."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._waiting: dict[int, Future[dict[str, Any]]] = {0: Future()}
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def booted(self, timeout: float) -> None:
        """Wait until it takes commands; TimeoutError."""
        self._waiting[0].result(timeout)

    def begin(self, *argv: str, user: str = "", stdin: str = "", timeout: float = 600) -> Begun:
        """Start a command. ``timeout`` is the machine's own limit for it, in seconds."""
        with self._lock:
            number = max(self._waiting) + 1
            answer = self._waiting[number] = Future()
            wanted = {"id": number, "argv": argv, "user": user, "stdin": stdin, "timeout": timeout}
            self._channel.sendall(json.dumps(wanted).encode() + b"\n")
        return Begun(argv, answer, timeout)

    def run(self, *argv: str, check: bool = True, **options: Any) -> Done:
        """Run a command to its end; with ``check``, its failure fails the test."""
        done = self.begin(*argv, **options).end()
        if check and done.status != 0:
            pytest.fail(f"{done}\n{self.journal()}")
        return done

    def out(self, *argv: str, **options: Any) -> str:
        return self.run(*argv, **options).stdout.strip()

    def json(self, *argv: str, **options: Any) -> Any:
        return json.loads(self.run(*argv, **options).stdout)

    def python(self, code: str, *arguments: str, **options: Any) -> Any:
        """What a Python program of Debian's prints as JSON."""
        return self.json("python3", "-I", "-c", code, *arguments, **options)

    def write(self, path: str, content: str, mode: str = "644") -> None:
        self.run("install", "-D", "-m", mode, "/dev/stdin", path, stdin=content)

    def property(self, unit: str, name: str) -> str:
        return self.out("systemctl", "show", "--value", f"--property={name}", unit)

    def journal(self, lines: int = 60) -> str:
        done = self.begin("journalctl", "--no-pager", f"--lines={lines}", "-o", "cat").end()
        return "the journal's end:\n" + done.stdout

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            for line in self._channel.makefile("rb"):
                answer = json.loads(line)
                self._waiting[answer["id"]].set_result(answer)
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(ConnectionError("the virtual machine is gone"))


@dataclass(frozen=True)
class Begun:
    """A command that runs."""

    argv: tuple[str, ...]
    answer: Future[dict[str, Any]]
    timeout: float

    def end(self) -> Done:
        """Wait for its end. The machine ends it after its time; ours is for one that hangs."""
        told = self.answer.result(self.timeout + 120)
        return Done(self.argv, told["status"], told["stdout"], told["stderr"])


@contextlib.contextmanager
def booted(image: Image, carried: Path, at: Path) -> Iterator[Machine]:
    """Boot ``image``, which stays as it is; ``at`` gets the console's log, ``console.log``."""
    path = at / "channel"
    console = at / "console.log"
    command = [
        "setpriv", "--pdeathsig", "KILL", "--",  # its parent may be killed, too
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
        "-m", "2048", "-nodefaults", "-no-reboot", "-display", "none", "-monitor", "none",
        "-kernel", str(image.kernel), "-initrd", str(image.initrd),
        "-append", "root=/dev/vda rw console=ttyS0 panic=-1 quiet systemd.show_status=1",
        "-drive", f"file={image.disk},if=virtio,format=raw,snapshot=on",
        "-drive", f"file={carried},if=virtio,format=raw,readonly=on",
        "-serial", f"file:{console}",
        "-device", "virtio-serial", "-device", f"virtserialport,chardev=channel,name={CHANNEL}",
        "-chardev", f"socket,id=channel,path={path},server=on,wait=on",
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
    ]  # fmt: skip
    with (at / "qemu.log").open("w") as log:
        qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        with _connected(path, qemu) as channel:
            machine = Machine(channel)
            try:
                machine.booted(BOOT_SECONDS)
            except (TimeoutError, ConnectionError) as error:
                said = console.read_text(errors="replace")[-3000:]
                pytest.fail(f"it did not boot: {error!r}\n{said}\n{(at / 'qemu.log').read_text()}")
            yield machine
            (at / "journal.log").write_text(machine.journal(2000))
    finally:
        qemu.kill()
        qemu.wait()


@contextlib.contextmanager
def _connected(path: Path, qemu: subprocess.Popen[bytes]) -> Iterator[socket.socket]:
    deadline = time.monotonic() + 60
    with socket.socket(socket.AF_UNIX) as channel:
        while True:
            try:
                channel.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if qemu.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"qemu did not start: {(path.parent / 'qemu.log').read_text()}")
                time.sleep(0.05)
        yield channel
        channel.shutdown(socket.SHUT_RDWR)
