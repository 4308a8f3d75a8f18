"""Two teams on one daemon, everybody who may come in, and what must not be seen, for the walk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
from real_daemon import RealDaemon, directories, until

#: A session of this agent waits, and ends at once when it is told to.
SCRIPT = "echo begun; while :; do sleep 0.2; done"

_AGENTS = {
    # name: team, tools, workspace
    "red-target": ("red", "[ask-red, plain-red, kit-red]", "{mode: overlay}"),
    "red-beside": ("red", "[ask-beside]", "{mode: none}"),
    "blue-agent": ("blue", "[ask-blue]", "{mode: none}"),
}


@dataclass(frozen=True)
class Names:
    """What a request is about: the target of the walk, or what never existed."""

    team: str
    agent: str
    tool: str
    live: str
    ended: str
    call: str
    key: str

    def in_place_of(self, other: Names, text: str) -> str:
        """``text`` with the other's names replaced by these."""
        for name, replaced in zip(self.__dict__.values(), other.__dict__.values(), strict=True):
            text = text.replace(replaced, name)
        return text


GHOST = Names(
    team="nob",
    agent="no-target",
    tool="no-tool",
    live="s-0000000000000000",
    ended="s-0000000000000001",
    call="c-0000000000000000",
    key="key_000000000000",
)


@dataclass
class World:
    """A running daemon with teams ``red``, whose ``red-target`` is walked around, and ``blue``."""

    daemon: RealDaemon
    client: httpx2.Client
    #: Credentials by who holds them; see :func:`_credentials`.
    bearers: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    real: Names = GHOST
    #: Texts that tell of the target or its team.
    marks: list[str] = field(default_factory=list)
    fresh: int = 0

    def ask(
        self, who: str, method: str, path: str, *, body: Any = None, first_line: bool = False
    ) -> tuple[int, str]:
        """Status and text of one answer; of a stream that doesn't end its ``first_line``."""
        headers = {"authorization": f"Bearer {self.bearers[who]}"} if self.bearers[who] else {}
        if not first_line:
            got = self.client.request(method, path, json=body, headers=headers)
            return got.status_code, got.text
        with self.client.stream(method, path, json=body, headers=headers) as streamed:
            return streamed.status_code, next((line for line in streamed.iter_lines() if line), "")

    def operate(self, who: str, method: str, params: Any, **options: Any) -> tuple[int, str]:
        """One admin method over HTTP."""
        return self.ask(who, "POST", f"/api/v1/operator/{method}", body=params, **options)

    def session(self) -> str:
        """A live session of the target, started by ann's token."""
        status, text = self.operate("ann", "session.start", {"agent": "red-target"})
        assert status == 200, text
        id: str = json.loads(text)["id"]
        self.marks.append(id)
        return id

    def ended(self) -> str:
        """An ended session of the target, whose changes nobody landed yet."""
        id = self.session()
        self.daemon.call(
            "session.files.write", id=id, files=[{"path": "made", "content": "by the walk\n"}]
        )
        self.daemon.call("session.stop", id=id, grace=0)
        return id

    def unique(self) -> str:
        self.fresh += 1
        return f"walked{self.fresh}"


@contextmanager
def world() -> Iterator[World]:
    with directories() as daemon, ExitStack() as left:
        _configure(daemon)
        daemon.start()
        client = left.enter_context(httpx2.Client(base_url=daemon.url, timeout=60))
        made = World(daemon, client)
        _credentials(made)
        daemon.set("red-target", RED_VARIABLE="a-value-of-the-walk")
        live, ended = made.session(), made.ended()
        calls = {}
        asked = (
            ("red-target", "ask-red", {"session": live}),
            ("red-beside", "ask-beside", {"agent": "red-beside"}),
            ("blue-agent", "ask-blue", {"agent": "blue-agent"}),
        )
        for agent, tool, place in asked:
            waiting = left.enter_context(daemon.client())
            waiting.submit("tools.run", tool=tool, arguments={}, **place)
            calls[agent] = _call_of(daemon, agent)
        made.real = Names(
            team="red",
            agent="red-target",
            tool="ask-red",
            live=live,
            ended=ended,
            call=calls["red-target"],
            key=made.ids["operator"],
        )
        made.marks += [
            *("red-target", "RED_VARIABLE", "ask-red", "plain-red", "kit-red", "Team of Red"),
            *(made.real.call, made.real.key, "label-of-operator"),
        ]
        yield made


def _configure(daemon: RealDaemon) -> None:
    daemon.write("sandboxd.yaml", """
        version: 1
        teams:
          red: {name: Team of Red}
          blue: {name: Team of Blue}
    """)  # fmt: skip
    daemon.http("listen: 127.0.0.1:0\nlimits: {requests: 100000, failures: 100000}")
    daemon.write(
        "policies/asking.yaml",
        "version: 1\ndescription: asks\nnetwork: none\n"
        "rules: [{ask: 'ask-*', reason: it costs}, {allow: '*'}]\n",
    )
    for slug, (team, tools, workspace) in _AGENTS.items():
        daemon.agent(
            slug, SCRIPT, team=team, tools=tools, workspace=workspace, policy="asking"
        )  # fmt: skip
    none = "argv: []\ninput: {type: object, additionalProperties: false}\n"
    for tool in ("ask-red", "ask-beside", "ask-blue", "plain-red"):
        daemon.tool(tool, "#!/bin/sh\necho ran\n", none)
    program = daemon.write("tools/kit-red/program", "#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    daemon.write(
        "tools/kit-red/tool.yaml",
        "version: 1\nkind: mcp\nname: kit-red\ndescription: a server\nprogram: program\n"
        "lifetime: session\n",
    )


def _credentials(made: World) -> None:
    """Keys of every role, one of them for another agent, one of another team; users' tokens."""
    keys: list[tuple[str, str, str, list[str] | None]] = [
        ("owner", "red", "owner", None),
        ("operator", "red", "operator", None),
        ("developer", "red", "developer", ["red-target"]),
        ("viewer", "red", "viewer", None),
        ("beside", "red", "operator", ["red-beside"]),
        ("developer beside", "red", "developer", ["red-beside"]),
        ("stranger", "blue", "owner", None),
        ("spare", "red", "viewer", None),
    ]
    for who, team, role, agents in keys:
        scope = {} if agents is None else {"agents": agents}
        got = made.daemon.call(
            "keys.create", team=team, role=role, label=f"label-of-{who.replace(' ', '-')}", **scope
        )
        made.bearers[who], made.ids[who] = got["secret"], got["key"]["id"]
    for who, maker, agent, subject in (
        ("ann", "operator", "red-target", "ann"),
        ("bob", "operator", "red-target", "bob"),
        ("ann beside", "operator", "red-beside", "ann"),
        ("ann of blue", "stranger", "blue-agent", "ann"),
    ):
        params = {"agents": [agent], "subject": subject}
        status, text = made.operate(maker, "tokens.create", params)
        assert status == 200, text
        made.bearers[who], made.ids[who] = json.loads(text)["token"], json.loads(text)["id"]
    made.bearers |= {"nobody": "", "guesser": "an_sk_" + "0" * 64}


def _call_of(daemon: RealDaemon, agent: str) -> str:
    found: list[str] = []

    def waits() -> bool:
        rows = daemon.call("approvals.list")["approvals"]
        found[:] = [row["id"] for row in rows if row["agent"] == agent]
        return bool(found)

    until(waits)
    return found[0]


def wait_until_alive(made: World, id: str) -> None:
    """The session runs: what was refused to others did not touch it."""
    assert made.daemon.call("session.show", id=id)["state"] == "running", time.time()
