"""Where the HTTP API listens: TLS, a Unix socket, a port that is taken; before root is given up."""

from __future__ import annotations

import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from real_daemon import directories

from sandboxd.errors import Conflict, Denied, Invalid, SandboxdError, Unavailable
from sandboxd.http.listen import open_listening
from sandboxd.policy import ConfigErrors, load_settings
from sandboxd.policy.model import HttpSettings, Tls
from sandboxd.policy.values import AbsolutePath, ListenAddress


def test_it_serves_tls_with_a_key_that_only_root_reads(certificate: tuple[str, str]) -> None:
    with directories() as daemon:
        daemon.http(
            "listen: 127.0.0.1:0\ntls: {certificate: %s, key: %s}" % certificate  # noqa: UP031
        )
        daemon.start()
        assert daemon.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=certificate[0])
        assert httpx2.get(f"{daemon.url}/healthz", verify=trusting).json() == {"status": "ok"}
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE"):
            httpx2.get(f"{daemon.url}/healthz")
        with pytest.raises(httpx2.HTTPError):
            httpx2.get(f"{daemon.url.replace('https', 'http')}/healthz")


def test_it_serves_a_unix_socket_and_takes_it_away() -> None:
    with directories() as daemon:
        path = daemon.paths.runtime / "http.sock"
        daemon.http(f"listen: unix:{path}")
        daemon.start()
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        transport = httpx2.HTTPTransport(uds=str(path))
        with httpx2.Client(transport=transport, base_url="http://localhost") as client:
            assert client.get("/healthz").json() == {"status": "ok"}
            assert client.get("/api/v1/me").status_code == 401
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait()
        assert path.exists()
        daemon.start()  # a socket of its last life is not in the way
        assert daemon.stop() == 0
        assert not path.exists()


def test_a_reload_leaves_the_address_and_says_so() -> None:
    with directories() as daemon:
        daemon.http()
        daemon.start()
        url = daemon.url
        daemon.write("sandboxd.yaml", "version: 1\nhttp: {listen: '127.0.0.1:1'}\n")
        assert any("new http" in line for line in daemon.call("reload")["warnings"])
        assert daemon.url == url
        assert httpx2.get(f"{url}/healthz").status_code == 200


def test_the_framework_is_not_loaded_where_it_is_not_used() -> None:
    code = "import sys, sandboxd.daemon; print('fastapi' in sys.modules, 'trio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"


def opened(listen: str, tls: Tls | None = None) -> None:
    open_listening(HttpSettings(ListenAddress(listen), tls)).close()


def test_an_address_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(Conflict, match=r"listens on 127\.0\.0\.1:"):
            opened(f"127.0.0.1:{taken.getsockname()[1]}")
    opened("127.0.0.1:0")


def test_a_socket_that_is_served_and_a_file_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(Conflict, match="taken by something else"):
            opened(f"unix:{path}")
    opened(f"unix:{path}")  # nobody serves it any more
    path.write_text("mine")
    with pytest.raises(Conflict, match="taken by something else"):
        opened(f"unix:{path}")
    assert path.read_text() == "mine"
    with pytest.raises(Invalid, match="too long"):
        opened(f"unix:/{'x' * 120}")


def _tls(certificate: str | Path, key: str | Path) -> Tls:
    return Tls(AbsolutePath(Path(certificate)), AbsolutePath(Path(key)))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda c, k, p: (c, p / "none"), Unavailable, "can't open"),
        (lambda c, k, p: (p / "none", k), Unavailable, "can't open"),
        (lambda c, k, p: (c, c), Invalid, "no certificate with its key"),
        (lambda c, k, p: (k, k), Invalid, "no certificate with its key"),
    ],
)
def test_a_certificate_that_is_none_is_told(
    certificate: tuple[str, str], tmp_path: Path, make: object, kind: type, text: str
) -> None:
    assert callable(make)
    Path(certificate[0]).chmod(0o600)
    with pytest.raises(SandboxdError, match=text) as refused:
        opened("127.0.0.1:0", _tls(*make(*certificate, tmp_path)))
    assert isinstance(refused.value, kind)
    assert refused.value.hint


def test_a_key_that_others_read_is_refused(certificate: tuple[str, str], tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(Path(certificate[1]).read_bytes())
    key.chmod(0o644)
    with pytest.raises(Denied, match="open to other users"):
        opened("127.0.0.1:0", _tls(certificate[0], key))
    key.chmod(0o640)  # a group may, as Debian's ssl-cert does
    opened("127.0.0.1:0", _tls(certificate[0], key))


@pytest.mark.parametrize(
    ("http", "text"),
    [
        ("{listen: '0.0.0.0:80'}", "which needs tls"),
        ("{listen: '[::]:80'}", "which needs tls"),
        ("{listen: 'localhost:80'}", "expected an address to listen on"),
        ("{listen: '127.0.0.1'}", "expected an address to listen on"),
        ("{listen: '127.0.0.1:65536'}", "expected an address to listen on"),
        ("{listen: '::1:80'}", "expected an address to listen on"),
        ("{listen: 'unix:relative'}", "expected an absolute path"),
        ("{listen: 'unix:/s', tls: {certificate: /c, key: /k}}", "not served with TLS"),
        ("{tls: {certificate: /c}}", "missing key 'key' in http.tls"),
        ("{hosts: ['Example.com:80']}", "expected the name of a host"),
        ("{limits: {requests: 0}}", "expected a whole number from 1"),
        ("{prot: 1}", "unknown key 'prot' in http"),
    ],
)
def test_settings_that_are_wrong_are_told_by_place(tmp_path: Path, http: str, text: str) -> None:
    file = tmp_path / "sandboxd.yaml"
    file.write_text(f"version: 1\nhttp: {http}\n")
    file.chmod(0o644)
    with pytest.raises(ConfigErrors) as refused:
        load_settings(tmp_path)
    assert any(f"{file}:2:" in e.message and text in e.message for e in refused.value.errors)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:7621", "127.8.0.1:80", "unix:/run/s"])
def test_addresses_of_this_host_need_no_tls(tmp_path: Path, listen: str) -> None:
    (tmp_path / "sandboxd.yaml").write_text(f"version: 1\nhttp: {{listen: '{listen}'}}\n")
    settings = load_settings(tmp_path)
    assert settings.http is not None
    assert settings.http.listen == listen
    assert settings.http.limits.body == 16 << 20
