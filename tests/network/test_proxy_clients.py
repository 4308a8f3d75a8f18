"""curl, git, pip, npm, requests, httpx and undici as clients of the proxy, on hosts of our own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from real_daemon import RealDaemon
from world import METADATA, OURS, World

pytestmark = pytest.mark.services

#: Ends with the name of each client that got what it wanted, on a line with its output before it.
CLIENTS = r"""
cd /tmp
export SSL_CERT_FILE=$CA CURL_CA_BUNDLE=$CA REQUESTS_CA_BUNDLE=$CA PIP_CERT=$CA GIT_SSL_CAINFO=$CA
export NODE_EXTRA_CA_CERTS=$CA npm_config_cache=/tmp/npm npm_config_cafile=$CA
try() { name=$1; shift; out=$("$@" 2>&1); echo "$name $? $(echo "$out" | tail -n 1)"; }
try curl curl -sS --fail https://$API/hello
try curl-http curl -sS --fail http://$API/hello
try git git clone -q https://$GIT/repo.git cloned
try git-file cat cloned/README
try pip "$PYTHON" -m pip download -q --no-deps --disable-pip-version-check -d /tmp/pip \
    --index-url https://$PYPI/simple demopkg
try pip-file ls /tmp/pip/demopkg-1.0-py3-none-any.whl
try npm npm pack --loglevel error --registry https://$NPM tinypkg
try requests "$PYTHON" -I -c "import sys; sys.path.insert(0, '$SITE'); import requests
print(requests.get('https://$API/hello').text.strip())"
try httpx "$PYTHON" -I -c "import sys; sys.path.insert(0, '$SITE'); import httpx
print(httpx.get('https://$API/hello').raise_for_status().text.strip())"
try undici node -e "const {fetch, EnvHttpProxyAgent} = require('$NODE_MODULES/undici')
const dispatcher = new EnvHttpProxyAgent()
fetch('https://$API/hello', {dispatcher}).then(r => r.text()).then(console.log)"
"""
WANTED = {
    "curl": "hello from the internet",
    "curl-http": "hello from the internet",
    "git": "",
    "git-file": "cloned",
    "pip": "",
    "pip-file": "/tmp/pip/demopkg-1.0-py3-none-any.whl",
    "npm": "tinypkg-1.0.0.tgz",
    "requests": "hello from the internet",
    "httpx": "hello from the internet",
    "undici": "hello from the internet",
}
HOSTS = ("api.example.com", "git.example.com", "pypi.test.example", "npm.test.example")


def agent(
    daemon: RealDaemon, script: str, certificate: Path, packages: Path, *allowed: str
) -> None:
    rules = [{"host": host, "ports": [80, 443]} for host in allowed]
    agent_file(daemon, script, certificate, packages, {"allow": rules})


def agent_file(
    daemon: RealDaemon,
    script: str,
    certificate: Path,
    packages: Path,
    egress: dict[str, Any],
) -> None:
    """An agent ``clients`` that runs ``script`` with all the clients there are."""
    node = Path(shutil.which("node") or "").resolve().parents[1]
    names = dict(zip(("API", "GIT", "PYPI", "NPM"), HOSTS, strict=True))
    environment = {
        "CA": certificate / "ca.pem", "PYTHON": sys.executable, "SITE": packages / "site",
        "NODE_MODULES": packages / "node_modules", **names,
    }  # fmt: skip
    exports = "\n".join(f"export {name}='{value}'" for name, value in environment.items())
    mounts = [{"source": str(p), "target": str(p)} for p in (certificate, packages)]
    if not node.is_relative_to("/usr"):
        mounts.append({"source": str(node), "target": str(node)})
        exports += f"\nexport PATH=$PATH:{node}/bin"
    daemon.agent(
        "clients", exports + script, policy="agent", mounts=json.dumps(mounts),
        egress=json.dumps(egress), limits="{memory: 8G, processes: 256, files: 4096}",
    )  # fmt: skip


def told(daemon: RealDaemon) -> dict[str, tuple[int, str]]:
    done = daemon.ctl("run", "clients", timeout=300)
    assert done.returncode == 0, done.stderr
    rows = (line.split(" ", 2) for line in done.stdout.splitlines())
    return {row[0]: (int(row[1]), row[2] if len(row) > 2 else "") for row in rows}


def test_every_client_gets_what_is_allowed(
    daemon: RealDaemon, internet: World, certificate: Path, packages: Path
) -> None:
    agent(daemon, CLIENTS, certificate, packages, *HOSTS)
    daemon.start()
    assert told(daemon) == {name: (0, text) for name, text in WANTED.items()}
    assert set(internet.asked()) == set(HOSTS)
    closed = [row for row in daemon.audit() if row["event"] == "egress.closed"]
    assert {row["host"] for row in closed} == set(HOSTS)
    assert all(row["received"] > 0 for row in closed if row["outcome"] == "closed")


def test_no_client_gets_what_is_not_allowed_and_each_is_told_at_once(
    daemon: RealDaemon, internet: World, certificate: Path, packages: Path
) -> None:
    agent(daemon, CLIENTS, certificate, packages, "elsewhere.example.net")
    daemon.start()
    found = told(daemon)
    assert [name for name, (status, _) in found.items() if status == 0] == []
    assert "403" in found["curl"][1]
    assert internet.asked() == []  # not even as names
    assert not [row for row in daemon.audit() if row["event"] == "egress.opened"]


def test_a_name_that_leads_to_the_metadata_service_is_refused_and_its_server_is_there(
    daemon: RealDaemon, internet: World, certificate: Path, packages: Path
) -> None:
    script = f"""
    curl -sS -o /dev/null -w '%{{http_code}} ' http://rebound.example.com/hello
    curl -sS -o /dev/null -w '%{{http_code}} ' http://{METADATA}/hello
    curl -sS -o /dev/null -w '%{{http_code}}' http://api.example.com/hello
    """
    agent(daemon, script, certificate, packages, "rebound.example.com", "api.example.com")
    daemon.start()
    done = daemon.ctl("run", "clients")
    assert done.stdout == "403 403 200", done.stderr
    reasons = [row["reason"] for row in daemon.audit() if row["event"] == "egress.refused"]
    assert reasons[0].endswith(f"{METADATA} is an address of a cloud's metadata service")
    # The control: that server answers whoever may ask, such as a rule that names its address.
    allow = {"allow": [{"host": "rebound.example.com", "ports": [80], "addresses": [METADATA]}]}
    daemon.agent("named", "curl -sS http://rebound.example.com/hello", policy="agent",
                 egress=json.dumps(allow))  # fmt: skip
    assert daemon.ctl("reload").returncode == 0
    assert daemon.ctl("run", "named").stdout == "not for you\n"


def test_a_session_keeps_the_rules_that_it_began_with(
    daemon: RealDaemon, certificate: Path, packages: Path
) -> None:
    """A reload changes the next session; the one that runs is never without rules."""
    script = """
    while read -r host; do
        curl -sS -o /dev/null -w "$host %{http_code}\\n" http://$host/hello
    done
    """
    agent(daemon, script, certificate, packages, "api.example.com")
    daemon.start()
    with daemon.client() as client:
        _, fds = client.call_with_fds(
            "session.start", agent="clients", args=[], tty=False, attach=True
        )
        stdin, stdout, stderr = fds
        with open(stdin, "w") as asks, open(stdout) as answers, open(stderr):

            def code(host: str) -> str:
                asks.write(host + "\n")
                asks.flush()
                return answers.readline().split()[1]

            assert (code("api.example.com"), code("other.example.org")) == ("200", "403")
            agent(daemon, script, certificate, packages, "other.example.org")
            assert daemon.ctl("reload").returncode == 0
            assert (code("api.example.com"), code("other.example.org")) == ("200", "403")
    done = daemon.ctl("run", "clients", input="api.example.com\nother.example.org\n")
    assert done.stdout == "api.example.com 403\nother.example.org 200\n"


def test_a_public_address_of_this_host_is_refused_and_its_server_is_there(
    daemon: RealDaemon, internet: World, content: Path
) -> None:
    folder = content / "api.example.com"
    command = [sys.executable, "-I", "-u", "-m", "http.server", "80", "--bind", OURS]
    server = internet.inside(
        internet.host, *command, "--directory", folder, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert server.stdout is not None
    assert server.stdout.readline().startswith("Serving HTTP")
    for slug, addresses in (("refused", []), ("named", [OURS])):
        allow = [{"host": "ours.example.com", "ports": [80], "addresses": addresses}]
        script = "curl -sS -w '%{http_code}' http://ours.example.com/hello"
        daemon.agent(slug, script, policy="agent", egress=json.dumps({"allow": allow}))
    daemon.start()
    assert daemon.ctl("run", "refused").stdout.endswith("403")
    (row,) = [row for row in daemon.audit() if row["event"] == "egress.refused"]
    assert row["reason"] == f"ours.example.com: {OURS} is an address of this host itself"
    assert daemon.ctl("run", "named").stdout == "hello from the internet\n200"


#: Asks for a tunnel to port 443 and speaks in it as to another proxy, then as TLS does.
CHAINED = """
import os, socket, ssl, sys
host, _, port = os.environ["HTTPS_PROXY"].removeprefix("http://").rpartition(":")
def tunnel():
    client = socket.create_connection((host, int(port)), timeout=30)
    client.sendall(b"CONNECT api.example.com:443 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    head = b""
    while not head.endswith(b"\\r\\n\\r\\n"):
        head += client.recv(1)
    return client
with tunnel() as client:
    client.sendall(b"CONNECT 169.254.169.254:80 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    print(repr(client.recv(100)))
context = ssl.create_default_context(cafile=sys.argv[1])
for name in ("api.example.com", "other.example.org"):
    try:
        with tunnel() as client, context.wrap_socket(client, server_hostname=name) as secured:
            secured.sendall(b"GET /hello HTTP/1.0\\r\\nHost: " + name.encode() + b"\\r\\n\\r\\n")
            print(secured.recv(15).decode())
    except (OSError, ssl.SSLError) as failure:
        print(type(failure).__name__)
"""


def test_a_tunnel_is_for_tls_to_its_own_host(
    daemon: RealDaemon, internet: World, certificate: Path
) -> None:
    """Neither another proxy behind it nor another host of the same server can be asked."""
    daemon.python_agent(
        "clients", CHAINED, policy="agent",
        mounts=json.dumps([{"source": str(certificate), "target": str(certificate)}]),
        egress=json.dumps({"allow": [{"host": "api.example.com"}]}),
    )  # fmt: skip
    daemon.start()
    done = daemon.run("clients", str(certificate / "ca.pem"))
    chained, right, other = done.stdout.splitlines()
    assert chained == "b''", done.stderr
    assert right == "HTTP/1.1 200 OK"
    assert other in ("SSLEOFError", "ConnectionResetError", "SSLError")
    reasons = [row["reason"] for row in daemon.audit() if row["event"] == "egress.refused"]
    assert reasons == [
        "port 443 takes TLS only",
        "the tunnel is for api.example.com and its TLS asks for another host",
    ]
