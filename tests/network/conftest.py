"""What the internet of these tests serves, and programs that are clients of the proxy."""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from real_daemon import RealDaemon, directories
from world import NAMES, World, world

#: Python's clients, as they are on PyPI.
CLIENTS = ("requests>=2.32,<3", "httpx>=0.28,<0.29")
UNDICI = "undici@7.16.0"


@pytest.fixture(scope="session")
def tools() -> None:
    """Fail, not skip, where something is missing."""
    if os.geteuid() != 0:
        pytest.fail("these tests make network namespaces: run them as root", pytrace=False)
    wanted = {
        "ip": "iproute2", "nsenter": "util-linux", "curl": "curl", "git": "git", "npm": "npm",
        "node": "nodejs", "psql": "postgresql-client", "redis-server": "redis-server",
        "redis-cli": "redis-tools",
    }  # fmt: skip
    missing = [package for program, package in wanted.items() if shutil.which(program) is None]
    if missing:
        pytest.fail(f"missing: apt-get install {' '.join(missing)}", pytrace=False)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate with its key, for every name; clients trust it by its file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "internet of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(one) for one in NAMES]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificate")
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(signed.public_bytes(pem))
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "server.pem").write_bytes(signed.public_bytes(pem) + private)
    _readable(folder)
    return folder


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory, tools: None) -> Path:
    """A directory for each host: a text, a large file, a repository, two packages."""
    top = tmp_path_factory.mktemp("internet")
    api = top / "api.example.com"
    api.mkdir()
    (api / "hello").write_text("hello from the internet\n")
    for name in ("other.example.org", "rebound.example.com"):
        (top / name).mkdir()
        (top / name / "hello").write_text("not for you\n")
    _repository(top / "git.example.com")
    _python_package(top / "pypi.test.example")
    _node_package(top / "npm.test.example")
    return top


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory, tools: None) -> Path:
    """``site`` with Python's clients, ``node_modules`` with Node's."""
    at = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(at / "site")]
    subprocess.run([*command, *CLIENTS], check=True, timeout=600)
    npm = ["npm", "install", "--prefix", str(at), "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run([*npm, "--silent", UNDICI], check=True, timeout=600)
    _readable(at)
    return at


@pytest.fixture
def internet(tmp_path: Path, content: Path, certificate: Path) -> Iterator[World]:
    with world(tmp_path, content, certificate / "server.pem") as found:
        yield found


@pytest.fixture
def daemon(internet: World) -> Iterator[RealDaemon]:
    """A daemon on the host of the world; the test writes its files and starts it."""
    with directories() as found:
        found.wrapper = internet.wrapper
        yield found


def _readable(directory: Path) -> None:
    for one in (directory, *directory.parents[:2]):
        one.chmod(0o755)


def _repository(at: Path) -> None:
    work = at / "work"
    work.mkdir(parents=True)
    (work / "README").write_text("cloned\n")
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
    for words in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "first")):
        subprocess.run(["git", *words], cwd=work, check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(work), str(at / "repo.git")], check=True)
    subprocess.run(["git", "update-server-info"], cwd=at / "repo.git", check=True)


def _python_package(at: Path) -> None:
    folder = at / "simple/demopkg"
    folder.mkdir(parents=True)
    wheel = "demopkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        archive.writestr("demopkg.py", "VALUE = 1\n")
        info = "demopkg-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demopkg\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')


def _node_package(at: Path) -> None:
    at.mkdir()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        text = json.dumps({"name": "tinypkg", "version": "1.0.0"}).encode()
        entry = tarfile.TarInfo("package/package.json")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
    data = packed.getvalue()
    (at / "tinypkg-1.0.0.tgz").write_bytes(data)
    digest = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    dist = {"tarball": "https://npm.test.example/tinypkg-1.0.0.tgz", "integrity": digest}
    version = {"name": "tinypkg", "version": "1.0.0", "dist": dist}
    about = {"name": "tinypkg", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
    (at / "tinypkg").write_text(json.dumps(about))
