"""A daemon with tools that are called over HTTP, and the calls themselves on the bare wire."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from real_daemon import RealDaemon

MODERN, HANDSHAKE = "2026-07-28", "2025-11-25"
TOKEN = "hunter2-is-the-value"

_NO_INPUT = "input: {type: object, additionalProperties: false}\n"
_ids = itertools.count(10_000)


def configure(daemon: RealDaemon) -> None:
    """Agents ``client`` and ``other``, each with tools; the daemon is not started yet."""
    daemon.tool(
        "use",
        '#!/bin/sh\nprintf "%s used " "$1"\nprintf %s "$TOKEN" | wc -c\necho "it is $TOKEN"\n',
        """
        argv: ["{word}"]
        input:
          type: object
          additionalProperties: false
          properties: {word: {type: string}}
        secrets: [{variable: TOKEN}]
        annotations: {title: Uses the token}
        """,
    )
    daemon.tool("fail", "#!/bin/sh\necho out\necho err >&2\nexit 3\n", _NO_INPUT)
    daemon.tool(
        "talk",
        '#!/bin/sh\necho "one $TOKEN"\nsleep 0.4\necho two\nsleep 0.4\n',
        _NO_INPUT + "secrets: [{variable: TOKEN}]\n",
    )
    daemon.tool("long", "#!/bin/sh\nsleep 88202\n", _NO_INPUT)
    daemon.tool("look", "#!/bin/sh\ncat /workspace/there\n", _NO_INPUT + "workspace: ro\n")
    daemon.tool("foreign", "#!/bin/sh\necho not yours\n", _NO_INPUT)
    daemon.write(
        "policies/asking.yaml",
        """
        version: 1
        description: somebody is asked about one tool
        rules:
          - ask: fail
          - allow: "*"
        """,
    )
    wait = "echo mine > /workspace/there; exec sleep 88203"
    daemon.agent("client", wait, tools="[use, fail, talk, long, look]")
    daemon.agent("careful", wait, tools="[fail]", policy="asking")
    daemon.agent("other", wait, tools="[foreign, look]")


def key(daemon: RealDaemon, role: str = "operator", **params: Any) -> tuple[str, str]:
    """A new API key: its id, and itself."""
    made = daemon.call("keys.create", role=role, label=f"key of a {role}", **params)
    return str(made["key"]["id"]), str(made["secret"])


def token(daemon: RealDaemon, key: str, *agents: str, **params: Any) -> tuple[str, str]:
    """A new token for these agents: its id, and itself."""
    made = daemon.call("tokens.create", key=key, agents=list(agents), **params)
    return str(made["id"]), str(made["token"])


class Wire:
    """Requests as bytes, for one bearer at one address."""

    def __init__(self, url: str, bearer: str, version: str = MODERN) -> None:
        self.url, self.version = url, version
        self.headers = {
            "authorization": f"Bearer {bearer}",
            "accept": "application/json, text/event-stream",
            "content-type": "application/json",
            "mcp-protocol-version": version,
        }

    def body(self, method: str, id: int | None = None, **params: Any) -> bytes:
        meta = params.pop("meta", {})
        if self.version == MODERN:
            meta = {
                "io.modelcontextprotocol/protocolVersion": MODERN,
                "io.modelcontextprotocol/clientInfo": {"name": "wire", "version": "1"},
                "io.modelcontextprotocol/clientCapabilities": {},
                **meta,
            }
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        if meta:
            params["_meta"] = meta
        if id != 0:
            message["id"] = id or next(_ids)
        return json.dumps(message).encode()

    def routed(self, method: str, params: dict[str, Any]) -> dict[str, str]:
        """The headers that the modern protocol repeats parts of the body in."""
        if self.version != MODERN:
            return {}
        name = params.get("name")
        return {"mcp-method": method, **({"mcp-name": name} if name else {})}

    def post(self, method: str, **params: Any) -> httpx2.Response:
        headers = self.headers | self.routed(method, params)
        return self.send("POST", self.body(method, **params), headers)

    def raw(self, body: bytes, **headers: str) -> httpx2.Response:
        given = self.headers | {name.replace("_", "-"): text for name, text in headers.items()}
        return self.send("POST", body, given)

    def send(
        self, verb: str, body: bytes = b"", headers: dict[str, str] | None = None, wait: float = 30
    ) -> httpx2.Response:
        with httpx2.Client(timeout=wait, verify=False) as client:
            return client.request(verb, self.url, headers=headers or self.headers, content=body)

    def shake(self) -> httpx2.Response:
        """The handshake of protocols before 2026."""
        got = self.post(
            "initialize",
            protocolVersion=self.version,
            capabilities={},
            clientInfo={"name": "wire", "version": "1"},
        )
        if got.status_code == 200:
            self.headers["mcp-session-id"] = got.headers["mcp-session-id"]
            done = self.raw(self.body("notifications/initialized", id=0))
            assert done.status_code == 202, done.text
        return got

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        return answer(self.post("tools/call", name=tool, arguments=arguments))

    @contextmanager
    def calling(self, tool: str, id: int, **params: Any) -> Iterator[httpx2.Response]:
        """A call whose answer streams in; leaving hangs up."""
        fields = {"name": tool, "arguments": {}, **params}
        headers = self.headers | self.routed("tools/call", fields)
        body = self.body("tools/call", id=id, **fields)
        with (
            httpx2.Client(timeout=30, verify=False) as client,
            client.stream("POST", self.url, headers=headers, content=body) as answer,
        ):
            yield answer


def answer(got: httpx2.Response) -> dict[str, Any]:
    """The one JSON-RPC answer in a response, be it JSON or a stream's last event."""
    text = got.text
    if got.headers["content-type"].startswith("text/event-stream"):
        text = [line[6:] for line in text.splitlines() if line.startswith("data: {")][-1]
    found: dict[str, Any] = json.loads(text)
    return found


def texts(found: dict[str, Any]) -> list[str]:
    return [block["text"] for block in found["result"]["content"]]


def ended(daemon: RealDaemon, tool: str) -> list[str]:
    """How the calls of a tool ended, as the audit log has it."""
    records = [r for r in daemon.audit() if r["event"] == "call.ended" and r["tool"] == tool]
    return [r["outcome"] for r in records]
