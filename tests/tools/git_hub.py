"""A real smart HTTP git server behind a password, and git as a person uses it."""

from __future__ import annotations

import base64
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

TOKEN = "ghp-0123456789abcdefXYZ"
USERNAME = "x-access-token"
BACKEND = Path("/usr/lib/git-core/git-http-backend")
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not BACKEND.exists(), reason="git is not installed"
)


def git(*command: str | Path, cwd: Path) -> str:
    """git as a person uses it, with no configuration but the repository's."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@example.com",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.com",
    }
    done = subprocess.run(
        ["git", *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(repository: Path, name: str, content: str) -> str:
    (repository / name).write_text(content)
    git("add", "--", name, cwd=repository)
    git("commit", "-q", "-m", f"Write {name}", cwd=repository)
    return git("rev-parse", "HEAD", cwd=repository)


class Hub:
    """A server of ``shop.git``. Requests without the password get 401."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bare = root / "shop.git"
        self.origin = ""
        self.password = TOKEN
        self.username = USERNAME
        self.authorizations: list[str | None] = []
        self.redirect = ""

    @property
    def url(self) -> str:
        return f"{self.origin}/shop.git"

    def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                given = self.headers.get("Authorization")
                hub.authorizations.append(given)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if hub.redirect:
                    self.send_response(302)
                    self.send_header("Location", hub.redirect + self.path)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                pair = base64.b64encode(f"{hub.username}:{hub.password}".encode()).decode()
                if given != f"Basic {pair}":
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", 'Basic realm="shop"')
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                path, _, query = self.path.partition("?")
                environment = {
                    "PATH": "/usr/bin:/bin",
                    "GIT_PROJECT_ROOT": str(hub.root),
                    "GIT_HTTP_EXPORT_ALL": "1",
                    "GIT_CONFIG_COUNT": "1",
                    "GIT_CONFIG_KEY_0": "safe.directory",
                    "GIT_CONFIG_VALUE_0": "*",
                    "REMOTE_USER": "tester",
                    "REQUEST_METHOD": self.command,
                    "PATH_INFO": path,
                    "QUERY_STRING": query,
                    "CONTENT_TYPE": self.headers.get("Content-Type") or "",
                    "CONTENT_LENGTH": str(len(body)),
                    "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding") or "",
                    "GIT_PROTOCOL": self.headers.get("Git-Protocol") or "",
                }
                done = subprocess.run(
                    [BACKEND], input=body, env=environment, capture_output=True, check=False
                )
                head, _, content = done.stdout.partition(b"\r\n\r\n")
                fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
                self.send_response(int(fields.pop("Status", "200").split()[0]))
                for name, value in fields.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = handle_any

            def log_message(self, *args: Any) -> None:
                pass

        return Handler
