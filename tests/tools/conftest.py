"""Run a shipped tool as the daemon does: isolated interpreter, JSON on stdin, bare environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from git_hub import Hub, commit
from git_hub import git as run_git

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@dataclass
class Ran:
    """What a tool did: exit status, both streams, and stdout as JSON where it succeeded."""

    status: int
    stdout: str
    stderr: str

    @property
    def answer(self) -> Any:
        assert self.status == 0, self.stderr
        return json.loads(self.stdout)

    @property
    def everything(self) -> str:
        return self.stdout + self.stderr


@pytest.fixture
def run_tool() -> Callable[..., Ran]:
    def run(
        name: str,
        arguments: Any,
        environment: Mapping[str, str] | None = None,
        *argv: str | Path,
        stdin: str | None = None,
    ) -> Ran:
        done = subprocess.run(
            [sys.executable, "-I", "-B", TOOLS / name / "program.py", *argv],
            input=json.dumps(arguments) if stdin is None else stdin,
            env=dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@dataclass
class Seen:
    """One request as it reached the server."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Site:
    """A real HTTP server whose ``answer`` each test writes: (status, headers, body)."""

    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    answer: Callable[[Seen], tuple[int, Mapping[str, str], bytes]] = lambda seen: (200, {}, b"ok")

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], tls: Any = None) -> Iterator[int]:
    """The port of a server that runs until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def open_site() -> Iterator[Callable[..., Site]]:
    running: list[AbstractContextManager[int]] = []

    def start(tls: Any = None) -> Site:
        site = Site()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                seen = Seen(self.command, self.path, dict(self.headers.items()), body)
                site.seen.append(seen)
                status, headers, content = site.answer(seen)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.send_header("Connection", "close")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)
                self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = handle_any

            def log_message(self, *args: Any) -> None:
                pass

        context = serving(Handler, tls)
        site.port = context.__enter__()
        running.append(context)
        return site

    yield start
    for context in running:
        context.__exit__(None, None, None)


@pytest.fixture
def site(open_site: Callable[..., Site]) -> Site:
    return open_site()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost, with its key in the same file."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def serve() -> Any:
    """``with serve(Handler) as port``: a server of any handler class."""
    return serving


@pytest.fixture(scope="session")
def hub_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source``, a repository of two branches, and ``hub/shop.git``, its bare copy."""
    folder = tmp_path_factory.mktemp("template")
    source, bare = folder / "source", folder / "hub" / "shop.git"
    bare.parent.mkdir()
    run_git("init", "-q", "--template=", "-b", "trunk", source, cwd=folder)
    commit(source, "README", "hello\n")
    run_git("branch", "topic", cwd=source)
    run_git("clone", "-q", "--template=", "--bare", source, bare, cwd=folder)
    run_git("config", "http.receivepack", "true", cwd=bare)
    return folder


@pytest.fixture
def hub(tmp_path: Path, hub_template: Path) -> Iterator[Hub]:
    """The server, running; its files are in ``tmp_path``."""
    shutil.copytree(hub_template, tmp_path, dirs_exist_ok=True)
    made = Hub(tmp_path / "hub")
    with serving(made.handler()) as port:
        made.origin = f"http://127.0.0.1:{port}"
        yield made


@pytest.fixture
def git() -> Callable[..., str]:
    """git as a person uses it: ``git("status", cwd=path)``."""
    return run_git
