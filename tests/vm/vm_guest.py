"""Runs inside the virtual machine: takes commands from the tests, one line of JSON each.

A command is ``{id, argv, stdin, user, timeout}``, its answer ``{id, status, stdout, stderr}``.
Several may run at once. Debian's own Python, standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any, BinaryIO

_ENVIRONMENT = {
    "PATH": "/opt/sandboxd/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def main(port: str) -> None:
    """Serve the other end of ``port`` for ever."""
    answering = threading.Lock()
    with open(port, "r+b", buffering=0) as channel:  # the kernel lets one open it
        with open(channel.fileno(), "rb", closefd=False) as commands:
            _say(channel, answering, {"id": 0})
            for line in commands:
                threading.Thread(target=_run, args=(json.loads(line), channel, answering)).start()


def _run(wanted: dict[str, Any], channel: BinaryIO, answering: threading.Lock) -> None:
    user = wanted["user"]
    more: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
    home = f"/home/{user}" if user else "/root"
    answer: dict[str, Any] = {"id": wanted["id"]}
    try:
        process = subprocess.Popen(
            wanted["argv"],
            env={**_ENVIRONMENT, "HOME": home},
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **more,
        )
        try:
            out, err = process.communicate(wanted["stdin"].encode(), wanted["timeout"])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err += b"\nended after %d s" % wanted["timeout"]
        answer["status"] = process.returncode
        answer["stdout"], answer["stderr"] = (x.decode(errors="replace") for x in (out, err))
    except OSError as failure:
        answer |= {"status": 127, "stdout": "", "stderr": str(failure)}
    _say(channel, answering, answer)


def _say(channel: BinaryIO, answering: threading.Lock, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    with answering:
        while data:
            data = data[channel.write(data) :]


if __name__ == "__main__":
    main(sys.argv[1])
