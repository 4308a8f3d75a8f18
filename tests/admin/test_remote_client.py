"""The client of the operator route: where its key goes, and what odd servers make of an answer."""

from __future__ import annotations

import socket
import ssl
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hook_servers import make_certificates

import sandboxd
from sandboxd.admin.remote import RemoteClient, Server
from sandboxd.errors import Denied, Invalid, NotFound, SandboxdError, Unauthenticated, Unavailable
from sandboxd.secret import Secret

KEY = "an_sk_" + "5ec7e7" * 10
LINES = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n"


@contextmanager
def answering(
    answer: bytes, tls: ssl.SSLContext | None = None, at: Path | None = None
) -> Iterator[tuple[int, list[bytes]]]:
    """Somebody's server: it reads one request whole and sends ``answer``. Its port, what it got."""
    if at is None:
        listener = socket.create_server(("127.0.0.1", 0))
    else:
        listener = socket.create_server(str(at), family=socket.AF_UNIX)
    got: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            with plain:
                try:
                    peer = tls.wrap_socket(plain, server_side=True) if tls else plain
                    with peer:
                        got.append(_request(peer))
                        peer.sendall(answer)
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield 0 if at else listener.getsockname()[1], got
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=10)


def _request(peer: socket.socket) -> bytes:
    def more() -> bytes:
        found = peer.recv(65536)
        if not found:
            raise ConnectionError("it left")
        return found

    data = b""
    while b"\r\n\r\n" not in data:
        data += more()
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = [
        int(h[16:]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:")
    ]
    while len(body) < length:
        body += more()
    return head + b"\r\n\r\n" + body


def asked(port: int, use: Callable[[RemoteClient], object], path: str = "") -> object:
    with RemoteClient(Server(f"http://127.0.0.1:{port}{path}"), Secret(KEY)) as client:
        return use(client)


def test_a_request_carries_key_parameters_and_what_it_takes() -> None:
    with answering(LINES + b'\n\n{"result":{"id":"s-1"}}\n') as (port, got):
        result = asked(port, lambda c: c.call("session.start", agent="a"), "/box/")
    assert result == {"id": "s-1"}
    head, _, body = got[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /box/api/v1/operator/session.start HTTP/1.1\r\n")
    assert f"\r\nAuthorization: Bearer {KEY}\r\n".encode() in head + b"\r\n"
    assert b"\r\nAccept: application/x-ndjson" in head
    assert body.strip() == b'{"agent":"a"}'


def test_a_server_can_be_at_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with answering(LINES + b'{"result":1}\n', at=path) as (_, got):
        with RemoteClient(Server(f"unix:{path}"), Secret(KEY)) as client:
            assert client.call("status") == 1
        assert b"\r\nHost: localhost\r\n" in got[0]
    with RemoteClient(Server(f"unix:{path}"), Secret(KEY)) as client:
        with pytest.raises(Unavailable, match=f"no sandboxd answers at unix:{path}"):
            client.call("status")


def test_a_stream_comes_item_by_item() -> None:
    with answering(LINES + b'{"item":1}\n\n{"item":{"a":2}}\n{"result":{}}\n') as (port, _):
        assert asked(port, lambda c: list(c.stream("audit.tail"))) == [1, {"a": 2}]


def test_an_error_in_a_stream_is_the_error_that_the_daemon_raised() -> None:
    line = b'{"error":{"message":"no","data":{"code":"conflict","hint":"later","exit_code":5}}}\n'
    with (
        answering(LINES + b'{"item":1}\n' + line) as (port, _),
        pytest.raises(SandboxdError) as told,
    ):
        asked(port, lambda c: list(c.stream("audit.tail")))
    assert (told.value.code, told.value.message, told.value.hint) == ("conflict", "no", "later")


@pytest.mark.parametrize("answer", [b"", b'{"item":1}\n', b'{"item":1}\n{"resu'])
def test_an_answer_without_its_end_is_not_taken_for_a_whole_one(answer: bytes) -> None:
    with answering(LINES + answer) as (port, _), pytest.raises(Unavailable, match="broke before"):
        asked(port, lambda c: list(c.stream("audit.tail")))


def plain(status: str, body: bytes, *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{lines}\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (plain("401 Unauthorized", b'{"error":"invalid_api_key","message":"invalid key"}'),
         Unauthenticated, "invalid key"),
        (plain("404 Not Found", b"<html>nginx</html>"), NotFound, "has no operator API"),
        (plain("421 Misdirected Request", b'{"message":"this server is not x"}'), Invalid,
         "this server is not x"),
        (plain("429 Too Many Requests", b'{"message":"try again in 3 s"}'), Unavailable,
         "try again in 3 s"),
        (plain("502 Bad Gateway", b"<html>"), Unavailable, "answered with 502"),
        (plain("200 OK", b"<html>welcome</html>", "Content-Type: text/html"), Unavailable,
         "is not a sandboxd"),
        (plain("200 OK", b"[1]", "Content-Type: application/json"), Unavailable,
         "is not a sandboxd"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", Unavailable, "does not speak HTTP"),
        (LINES + b"[]\n", Unavailable, "can't be read"),
    ],
)  # fmt: skip
def test_what_is_no_answer_of_ours_is_a_readable_error(
    answer: bytes, kind: type[SandboxdError], text: str
) -> None:
    with answering(answer) as (port, _), pytest.raises(kind, match=text) as told:
        asked(port, lambda c: c.call("status"))
    assert told.value.exit_code == kind.exit_code


def test_a_redirect_takes_the_key_nowhere() -> None:
    with answering(LINES + b'{"result":1}\n') as (other, elsewhere):
        moved = plain("307 Temporary Redirect", b"", f"Location: http://127.0.0.1:{other}/")
        with answering(moved) as (port, got), pytest.raises(Unavailable, match="in between"):
            asked(port, lambda c: c.call("status"))
        # The same server does answer when it is named.
        assert asked(other, lambda c: c.call("status")) == 1
    assert (len(got), len(elsewhere)) == (1, 1)


def test_no_proxy_of_the_environment_gets_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(plain("502 Bad Gateway", b"")) as (proxy, proxied):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy}")
        with answering(LINES + b'{"result":1}\n') as (port, _):
            assert asked(port, lambda c: c.call("status")) == 1
    assert proxied == []


@pytest.mark.parametrize(
    "url",
    [
        *("sandboxd.example", "ftp://sandboxd.example", "https://", "https://a:b", "unix:run/x"),
        *("https://a.example/?key=1", "https://a.example/#x", "http://[::1"),
        "https://me:secret-in-url@a.example",
    ],
)
def test_what_is_no_url_of_a_server_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(Invalid) as told:
        Server(url)
    assert "secret-in-url" not in f"{told.value.message} {told.value.hint}"
    assert told.value.__cause__ is None
    assert told.value.__suppress_context__ or told.value.__context__ is None


@pytest.mark.parametrize(
    "url",
    ["http://sandboxd.example", "http://10.0.0.1", "http://127.0.0.1.nip.io", "http://0.0.0.0"],
)
def test_a_key_never_travels_unencrypted(url: str) -> None:
    with pytest.raises(Denied, match="unencrypted"):
        Server(url)
    for fine in (
        "http://127.0.0.1:7621",
        "http://[::1]:7621",
        "http://localhost",
        "https://a.example",
    ):
        Server(fine)


def test_nobody_at_the_address_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Unavailable, match="no sandboxd answers") as told:
        asked(port, lambda c: c.call("status"))
    assert told.value.hint


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


def test_only_a_certificate_that_verifies_gets_the_key(certificates: tuple[Path, Path]) -> None:
    ca, certificate = certificates
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def call(server: Server) -> object:
        with RemoteClient(server, Secret(KEY)) as client:
            return client.call("status")

    with answering(LINES + b'{"result":"seen"}\n', context) as (port, got):
        with pytest.raises(Denied, match="not to be trusted") as told:
            call(Server(f"https://127.0.0.1:{port}"))
        assert "--ca" in told.value.hint
        with pytest.raises(Denied, match="mismatch"):
            call(Server(f"https://localhost:{port}", ca=ca))
        assert got == []
        assert call(Server(f"https://127.0.0.1:{port}", ca=ca)) == "seen"
    assert len(got) == 1


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    nothing = tmp_path / "ca.pem"
    nothing.write_text("not PEM")
    for path in (nothing, tmp_path / "missing.pem"):
        client = RemoteClient(Server("https://localhost:1", ca=path), Secret(KEY))
        with pytest.raises(Invalid, match=path.name):
            client.call("status")


@pytest.mark.parametrize("answer", [plain("500 Oops", b"{}"), b"garbage\r\n\r\n", LINES])
def test_no_error_holds_the_key(answer: bytes) -> None:
    with answering(answer) as (port, _), pytest.raises(SandboxdError) as told:
        asked(port, lambda c: c.call("status"))
    found: BaseException | None = told.value
    package = str(Path(sandboxd.__file__).parent)
    while found is not None:
        shown = traceback.TracebackException.from_exception(found, capture_locals=True)
        locals_ = [f.locals or {} for f in shown.stack if f.filename.startswith(package)]
        assert locals_
        assert KEY not in str(locals_)
        found = found.__cause__ or found.__context__


def test_following_can_be_waited_for_with_select() -> None:
    import select

    with answering(LINES + b'{"item":1}\n{"item":2}\n{"result":{}}\n') as (port, _):

        def use(client: RemoteClient) -> list[object]:
            request = client.follow("approvals.watch")
            seen: list[object] = []
            while len(seen) < 2:
                assert select.select([client.fileno()], [], [], 10)[0]
                seen += client.arrived(request)
            return seen

        assert asked(port, use) == [1, 2]
