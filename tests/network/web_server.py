"""Files over HTTP and HTTPS for tests: DIRECTORY/HOST/..., CERTIFICATE, addresses to serve on."""

from __future__ import annotations

import http.server
import os
import ssl
import sys
import threading
from pathlib import Path


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def translate_path(self, path: str) -> str:
        host = (self.headers.get("host") or "").partition(":")[0]
        top = Path(sys.argv[1]) / os.path.basename(host)
        relative = path.partition("?")[0].lstrip("/")
        found = (top / relative).resolve()
        return str(found if found.is_relative_to(top) else top / "none")

    def do_GET(self) -> None:
        """/echo tells what the request's X-Key is; other paths are files."""
        if self.path.partition("?")[0] != "/echo":
            return super().do_GET()
        body = f"{self.headers.get('x-key')}\n".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[2])
    for address in sys.argv[3].split(","):
        for port in (80, 443):
            server = http.server.ThreadingHTTPServer((address, port), Handler)
            if port == 443:
                server.socket = context.wrap_socket(
                    server.socket, server_side=True, do_handshake_on_connect=False
                )
            threading.Thread(target=server.serve_forever).start()
    print("ready", flush=True)


main()
