"""The prompt of ``sandboxctl approvals watch``: one call at a time, answered by a key and Enter."""

from __future__ import annotations

import os
import select
import termios
import time
from collections import OrderedDict
from typing import Any

from sandboxd.admin.client import Client
from sandboxd.cli import output
from sandboxd.cli.approvals import details, ended
from sandboxd.errors import SandboxdError

__all__ = ["Desk"]

#: Seconds that a call must have been shown before an answer counts: what is typed in that time
#: was meant for the one before.
_PAUSE = 0.5

_QUESTION = "approve? [y]es, yes for this [s]ession, [n]o, [l]ater, [q]uit: "


class Desk:
    """Shows what waits and sends the answers, on the standard streams, which are a terminal."""

    def __init__(self, daemon: Client) -> None:
        self._daemon = daemon
        self._open: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._left: set[str] = set()
        self._shown: dict[str, Any] | None = None
        self._since = 0.0

    def run(self) -> int:
        """Until the operator quits or the input ends."""
        request = self._daemon.follow("approvals.watch")
        self._idle()
        while True:
            for item in self._daemon.arrived(request):
                self._take(item)
            if self._shown is None:
                self._present()
            ready, _, _ = select.select([self._daemon.fileno(), 0], [], [])
            if 0 in ready and self._typed(os.read(0, 4096)):
                return 0

    def _take(self, item: dict[str, Any]) -> None:
        if item["event"] == "asked":
            self._open[item["id"]] = item
            return
        self._open.pop(item["id"], None)
        self._left.discard(item["id"])
        if self._shown is not None and self._shown["id"] == item["id"]:
            self._shown = None
            print(f"\n{ended(item)}", flush=True)

    def _present(self) -> None:
        id = next((id for id in self._open if id not in self._left), None)
        if id is None:
            return
        self._shown = self._open[id]
        print("\a" + "\n".join(details(self._shown)))
        print(_QUESTION, end="", flush=True)
        termios.tcflush(0, termios.TCIFLUSH)  # typed before it was shown, so not meant for it
        self._since = time.monotonic()

    def _typed(self, data: bytes) -> bool:
        """Carry out what was typed; whether that is to quit."""
        words = data.decode("utf-8", "replace").strip()
        letter, _, reason = words.partition(" ")
        if not data or letter in ("q", "quit"):
            return True
        if self._shown is None:
            return False
        if time.monotonic() - self._since < _PAUSE:
            print(f"too fast to have been read\n{_QUESTION}", end="", flush=True)
        elif letter in ("y", "yes"):
            self._answer("approvals.approve", scope="once")
        elif letter in ("s", "session"):
            self._answer("approvals.approve", scope="session")
        elif letter in ("n", "no"):
            self._answer("approvals.deny", reason=reason.strip())
        elif letter in ("l", "later"):
            self._left.add(self._shown["id"])
            print(f"{self._shown['id']} goes on waiting")
            self._shown = None
            self._idle()
        else:
            print(_QUESTION, end="", flush=True)
        return False

    def _answer(self, method: str, **params: Any) -> None:
        shown, self._shown = self._shown, None
        assert shown is not None
        id = shown["id"]
        try:
            got = self._daemon.call(method, id=id, digest=shown["digest"], **params)
            print(f"{id} {got['outcome']}", flush=True)
        except SandboxdError as error:
            output.note(error.message)
        # Answered or not to be answered: either way it isn't asked about again.
        self._left.add(id)
        self._idle()

    def _idle(self) -> None:
        if all(id in self._left for id in self._open):
            print("waiting for calls; q and Enter quits", flush=True)
