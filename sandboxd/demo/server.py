"""The bank: a local HTTP server that takes payments, and only with the right token."""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sandboxd.secret import Secret

__all__ = ["HELD", "Bank", "open_bank"]

#: The payee whose payment waits until the demo lets it through.
HELD = "spied on"
_PATIENCE = 60.0


class Bank:
    """What arrived. A held payment calls ``on_arrival``, then waits for ``release``."""

    def __init__(self, token: Secret) -> None:
        self._expected = b"Bearer " + token.reveal()
        self.payments: list[dict[str, Any]] = []
        self.refused = 0
        self.port = 0
        self.on_arrival: Callable[[], None] = lambda: None
        self.release = threading.Event()

    def take(self, authorization: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """The status and answer for one request."""
        if not hmac.compare_digest(authorization.encode("latin-1"), self._expected):
            self.refused += 1
            return 401, {"error": "no such token"}
        payment = json.loads(body)
        if payment.get("payee") == HELD:
            self.on_arrival()
            self.release.wait(_PATIENCE)
        self.payments.append(payment)
        return 200, {"receipt": f"r-{len(self.payments)}", **payment}


@contextmanager
def open_bank(token: Secret) -> Iterator[Bank]:
    """Serve on a free port of 127.0.0.1 for the length of a ``with`` block."""
    bank = Bank(token)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            status, answer = bank.take(
                self.headers.get("Authorization") or "", self.rfile.read(min(length, 1 << 20))
            )
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        bank.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield bank
        finally:
            bank.release.set()
            server.shutdown()
            thread.join()
