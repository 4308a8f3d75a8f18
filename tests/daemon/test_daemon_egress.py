"""What an agent and its tools reach through the daemon, what they don't, and what is recorded."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from real_daemon import RealDaemon, until

#: Asks the proxy of the environment for each target and prints the first line of the answer.
ASK = """
import os, socket, sys
host, _, port = os.environ["HTTPS_PROXY"].removeprefix("http://").rpartition(":")
for target in sys.argv[1:]:
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(f"CONNECT {target} HTTP/1.1\\r\\nHost: {target}\\r\\n\\r\\n".encode())
        answer = client.makefile("rb")
        line = answer.readline().decode().strip()
        while answer.readline().strip():
            pass
        if " 200 " in line:
            client.sendall(b"ping")
            line += " " + answer.read(4).decode()
        print(target, line, flush=True)
"""
#: Connects to each target itself.
DIRECT = """
import errno, socket, sys
for target in sys.argv[1:]:
    host, _, port = target.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(b"ping")
            print(target, client.recv(4).decode(), flush=True)
    except socket.gaierror:
        print(target, "no such name", flush=True)
    except OSError as failure:
        print(target, errno.errorcode.get(failure.errno, failure), flush=True)
"""


@contextmanager
def echo_server() -> Iterator[int]:
    """A server on the host's loopback; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                with client:
                    client.sendall(client.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def port() -> Iterator[int]:
    with echo_server() as one:
        yield one


def policy(daemon: RealDaemon, *lines: str) -> None:
    text = "\n".join(
        (
            "version: 1", "description: a bounded way out", "rules:", '  - allow: "*"',
            "egress:", *(f"  - {line}" for line in lines),
        )
    )  # fmt: skip
    daemon.write("policies/bounded.yaml", text + "\n")


def allow(*lines: str) -> str:
    return "\n" + "\n".join(("  allow:", *(f"    - {line}" for line in lines)))


def said(daemon: RealDaemon, agent: str, *args: str) -> dict[str, str]:
    done = daemon.ctl("run", agent, "--", *args)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_an_agent_reaches_what_its_file_and_its_policy_name_and_nothing_else(
    configured: RealDaemon, port: int
) -> None:
    with echo_server() as other:
        here, there = f"127.0.0.1:{port}", f"127.0.0.1:{other}"
        policy(configured, f"{{host: 127.0.0.1, ports: [{port}]}}")
        both = allow(f"{{host: 127.0.0.1, ports: [{port}, {other}]}}")
        configured.python_agent("caller", ASK, policy="bounded", egress=both)
        configured.python_agent("direct", DIRECT, policy="bounded", egress=both)
        configured.start()
        told = said(configured, "caller", here, there, "169.254.169.254:80", "example.com:443")
        assert told[here].endswith(" ping")
        for refused in (there, "169.254.169.254:80", "example.com:443"):
            assert told[refused] == "HTTP/1.1 403 Forbidden"
        # Around the proxy there is nothing.
        direct = said(configured, "direct", here, "93.184.216.34:80", "example.com:443")
        assert direct[here] in ("EACCES", "ECONNREFUSED")
        assert direct["93.184.216.34:80"] in ("EACCES", "ENETUNREACH")
        assert direct["example.com:443"] == "no such name"
    rows = [row for row in configured.audit() if row["event"].startswith("egress.")]
    opened = [row for row in rows if row["event"] == "egress.opened"]
    closed = [row for row in rows if row["event"] == "egress.closed"]
    refused_rows = [row for row in rows if row["event"] == "egress.refused"]
    assert [(r["agent"], r["host"], r["port"], r["kind"]) for r in opened] == [
        ("caller", "127.0.0.1", port, "connect")
    ]
    assert opened[0]["rule"].startswith("agents/caller.yaml:")
    assert [(r["sent"], r["received"]) for r in closed] == [(4, 4)]
    assert [(r["host"], r["port"]) for r in refused_rows] == [
        ("127.0.0.1", other), ("169.254.169.254", 80), ("example.com", 443),
    ]  # fmt: skip


def test_a_relay_appears_under_its_name_and_port(configured: RealDaemon, port: int) -> None:
    policy(configured, f'{{host: "*.internal.test", ports: [{port}], addresses: [127.0.0.0/8]}}')
    relays = f"\n  relays: [{{to: 'db.internal.test:{port}', address: 127.0.0.1}}]"
    configured.python_agent("direct", DIRECT, policy="bounded", egress=relays)
    configured.start()
    wanted = f"db.internal.test:{port}"
    told = said(
        configured, "direct", wanted, "other.internal.test:80", f"db.internal.test:{port + 1}"
    )
    assert told[wanted] == "ping"
    assert told["other.internal.test:80"] == "no such name"
    assert told[f"db.internal.test:{port + 1}"] in ("EACCES", "ECONNREFUSED")
    until(lambda: any(row["event"] == "egress.closed" for row in configured.audit()))


def test_a_tool_reaches_what_its_manifest_names(configured: RealDaemon, port: int) -> None:
    policy(configured, f"{{host: 127.0.0.1, ports: [{port}]}}")
    program = f"#!/usr/bin/python3 -I\n{ASK}"
    manifest = f"""
        input: {{type: object, additionalProperties: false}}
        argv: [127.0.0.1:{port}, "127.0.0.1:1"]
        egress: {{allow: [{{host: 127.0.0.1, ports: [{port}]}}]}}
    """
    configured.tool("fetch", program, manifest)
    configured.tool("quiet", program, manifest.replace("egress: ", "# "))
    configured.agent("user", "sleep 1000", tools="[fetch, quiet]", policy="bounded")
    configured.start()
    done = configured.ctl("tools", "run", "fetch", "--agent", "user", "--json")
    if done.returncode:
        raise AssertionError(done.stderr)
    text = json.loads(done.stdout)["stdout"]
    assert f"127.0.0.1:{port} HTTP/1.1 200" in text
    assert "127.0.0.1:1 HTTP/1.1 403 Forbidden" in text
    quiet = configured.ctl("tools", "run", "quiet", "--agent", "user", "--json")
    assert "KeyError" in quiet.stdout + quiet.stderr  # it isn't told of any proxy


def test_an_agent_without_egress_is_told_of_no_proxy_and_reaches_nothing(
    configured: RealDaemon, port: int
) -> None:
    configured.python_agent("direct", "import os\nprint('x', sorted(os.environ))\n" + DIRECT)
    configured.start()
    told = said(configured, "direct", f"127.0.0.1:{port}", "127.0.0.1:3128")
    assert "PROXY" not in told["x"].upper()
    for target in (f"127.0.0.1:{port}", "127.0.0.1:3128"):
        assert told[target] in ("EACCES", "ENETUNREACH")


def test_what_a_policy_does_not_bound_is_refused_when_the_configuration_is_read(
    configured: RealDaemon,
) -> None:
    configured.python_agent("caller", ASK, egress=allow("{host: example.com}"))
    refused = configured.fail_to_start()
    assert refused.returncode == 2
    assert "agents/caller.yaml" in refused.stderr
    assert "egress, and policy 'default' allows its agents none" in refused.stderr


def test_policy_egress_shows_and_decides(configured: RealDaemon) -> None:
    policy(configured, '{host: "*.example.com", methods: [GET]}')
    configured.python_agent(
        "caller", ASK, policy="bounded", egress=allow("{host: api.example.com, ports: [443, 80]}")
    )
    configured.start()
    shown = configured.ctl("policy", "egress", "caller")
    assert shown.returncode == 0
    assert "api.example.com:443,80" in shown.stdout
    assert "within: *.example.com:443 (GET)" in shown.stdout
    good = configured.ctl("policy", "egress", "caller", "api.example.com:443")
    assert (good.returncode, good.stdout.split()[:2]) == (0, ["verdict", "allow"])
    bad = configured.ctl("policy", "egress", "caller", "api.example.com:80", "--json")
    assert bad.returncode == 4
    assert json.loads(bad.stdout)["reason"] == "no rule allows port 80 of api.example.com"


#: Asks the gateway that the environment names, with a credential of its own, and prints the answer.
THROUGH_GATEWAY = """
import os, urllib.error, urllib.request
base = os.environ["ANTHROPIC_BASE_URL"]
print("key", os.environ["ANTHROPIC_API_KEY"])
request = urllib.request.Request(base + "/v1/messages", b"{}", {"x-api-key": "mine"})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    print("answer", opener.open(request, timeout=30).read().decode())
except urllib.error.HTTPError as error:
    print("answer", error.code, error.read().decode().replace(chr(10), " "))
"""


@contextmanager
def key_server(key: str) -> Iterator[int]:
    """An API on the host's loopback that says which key it was asked with, and repeats it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            right = self.headers["x-api-key"] == key
            body = f"{'right' if right else 'wrong'} {self.headers['x-api-key']}".encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_an_agent_uses_a_key_that_it_never_holds(configured: RealDaemon) -> None:
    key = "sk-ant-0123456789abcdefghijklmnop"
    with key_server(key) as port:
        gateway = (
            f"{{port: 4000, upstream: 'http://127.0.0.1:{port}', header: x-api-key, "
            "secret: MODEL_KEY}"
        )
        policy(configured, f"{{host: 127.0.0.1, ports: [{port}]}}")
        # What the preset would set; its own upstream is not on this host.
        known = "{ANTHROPIC_BASE_URL: 'http://127.0.0.1:4000', ANTHROPIC_API_KEY: placeholder}"
        egress = f"{{gateways: [{gateway}]}}"
        configured.python_agent(
            "caller", THROUGH_GATEWAY, policy="bounded", egress=egress, environment=known
        )
        configured.start()
        refused = configured.ctl("run", "caller")
        assert refused.returncode == 125
        assert "sandboxctl env set caller MODEL_KEY" in refused.stderr
        configured.set("caller", MODEL_KEY=key)
        told = said(configured, "caller")
        assert told == {"key": "placeholder", "answer": "right [redacted:MODEL_KEY]"}
    rows = configured.audit()
    (asked,) = [row for row in rows if row["event"] == "gateway.request"]
    assert asked["injected"] == [{"name": "MODEL_KEY", "version": 1}]
    assert (asked["method"], asked["path"], asked["team"]) == ("POST", "/v1/messages", "default")
    assert key not in json.dumps(rows)
