"""Two teams on one daemon, everybody who may come in, and what must not be seen, for the walk."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
from real_daemon import RealDaemon, directories, until

#: A session of this agent waits, and ends at once when it is told to.
SCRIPT = "echo begun; while :; do sleep 0.2; done"

_AGENTS = {
    # name: team, tools, workspace
    "red-target": ("ruby", "[ask-red, plain-red, kit-red]", "{mode: overlay}"),
    "red-beside": ("ruby", "[ask-beside]", "{mode: none}"),
    "blue-agent": ("sapphire", "[ask-blue]", "{mode: none}"),
}


@dataclass(frozen=True)
class Names:
    """What a request is about: the target of the walk, or what never existed."""

    team: str
    agent: str
    tool: str
    live: str
    #: The beginning of the live session's id.
    short: str
    ended: str
    call: str
    key: str
    file: str
    variable: str

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
    short="s-00000000",
    ended="s-0000000000000001",
    call="c-0000000000000000",
    key="key_000000000000",
    file="no-file",
    variable="NO_VARIABLE",
)


@dataclass
class _Page:
    client: httpx2.Client
    csrf: str


@dataclass
class World:
    """A running daemon with teams ``ruby``, whose ``red-target`` is walked, and ``sapphire``."""

    daemon: RealDaemon
    client: httpx2.Client
    #: Credentials by who holds them; see :func:`_credentials`.
    bearers: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    real: Names = GHOST
    #: Texts that tell of the target, and of its team.
    marks: list[str] = field(default_factory=list)
    team_marks: tuple[str, ...] = ("Team of Red", '"ruby"')
    fresh: int = 0
    pages: dict[str, _Page] = field(default_factory=dict)
    left: ExitStack = field(default_factory=ExitStack)

    def ask(
        self,
        who: str,
        method: str,
        path: str,
        *,
        body: Any = None,
        first_line: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        """Status and text of one answer; of a stream that doesn't end its ``first_line``."""
        bearer = self.bearers[who]
        sent = {**(headers or {}), **({"authorization": f"Bearer {bearer}"} if bearer else {})}
        if not first_line:
            got = self.client.request(method, path, json=body, headers=sent)
            return got.status_code, got.text
        with self.client.stream(method, path, json=body, headers=sent) as streamed:
            return streamed.status_code, next((line for line in streamed.iter_lines() if line), "")

    def visit(self, who: str, method: str, path: str, form: Mapping[str, str]) -> tuple[int, str]:
        """One request of a page of the dashboard, with the cookie of who signed in with a key."""
        page = self.pages.get(who) or self._signed_in(who)
        if "previewed" in form:
            key = page.csrf.encode()
            digest = hashlib.blake2b(form["text"].encode(), key=key, digest_size=32).hexdigest()
            form = {**form, "previewed": digest}
        got = page.client.request(
            method,
            path,
            data={**form, "csrf": page.csrf} if method == "POST" else None,
            headers={"origin": self.daemon.url},
        )
        if got.status_code == 303:
            page.client.get("/tools")  # shows what came of it, so that the next page doesn't
        return got.status_code, got.text + got.headers.get("location", "")

    def _signed_in(self, who: str) -> _Page:
        client = self.left.enter_context(httpx2.Client(base_url=self.daemon.url, timeout=60))
        form = {"key": self.bearers[who]}
        client.post("/sign-in", data=form, headers={"origin": self.daemon.url})
        found = re.search(r'<meta name="csrf" content="([^"]+)">', client.get("/tools").text)
        self.pages[who] = _Page(client, found[1] if found else "")
        return self.pages[who]

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

    def file(self, name: str = "") -> str:
        """A file in the live session's workspace."""
        name = name or self.unique()
        files = [{"path": name, "content": "kept by the walk"}]
        self.daemon.call("session.files.write", id=self.real.live, files=files)
        return name

    def variable(self) -> str:
        self.daemon.set("red-target", RED_VARIABLE="a-value-of-the-walk")
        return "RED_VARIABLE"

    def question(self) -> str:
        """A call of the target that waits for an operator."""
        waiting = self.left.enter_context(self.daemon.client())
        before = set(_calls(self.daemon, "red-target"))
        waiting.submit("tools.run", tool="ask-red", arguments={}, session=self.real.live)
        found: set[str] = set()

        def waits() -> bool:
            found.update(set(_calls(self.daemon, "red-target")) - before)
            return bool(found)

        until(waits)
        return found.pop()

    def key(self) -> str:
        """A new key of the target's team."""
        label = f"label-of-{self.unique()}"
        made = self.daemon.call("keys.create", team="ruby", role="viewer", label=label)
        id: str = made["key"]["id"]
        return id

    def agent(self) -> str:
        """A new agent of the target's team, whose file is the daemon's own."""
        slug = f"red-target-{self.unique()}"
        _write_agent(self.daemon, slug, "ruby", "[]", "{mode: none}")
        folder = self.daemon.paths.config / "agents"
        owner = self.daemon.paths.state.stat().st_uid
        for path in (folder, folder / f"{slug}.yaml"):
            os.chown(path, owner, -1)
        self.daemon.call("reload")
        return slug

    def anew(self, which: str) -> Names:
        """The target's names, with this one made for what ends it."""
        make = {
            "live": self.session,
            "ended": self.ended,
            "call": self.question,
            "key": self.key,
            "agent": self.agent,
            "file": self.file,
            "variable": self.variable,
        }
        return replace(self.real, **{which: make[which]()}) if which else self.real

    def unique(self) -> str:
        self.fresh += 1
        return f"walked{self.fresh}"


@contextmanager
def world() -> Iterator[World]:
    with directories() as daemon, ExitStack() as left:
        _configure(daemon)
        daemon.start()
        client = left.enter_context(httpx2.Client(base_url=daemon.url, timeout=60))
        made = World(daemon, client, left=left)
        _credentials(made)
        made.variable()
        live, ended = made.session(), made.ended()
        for tool, place in (
            ("ask-red", {"session": live}),
            ("ask-beside", {"agent": "red-beside"}),
            ("ask-blue", {"agent": "blue-agent"}),
        ):
            waiting = left.enter_context(daemon.client())
            waiting.submit("tools.run", tool=tool, arguments={}, **place)
        until(lambda: all(_calls(daemon, agent) for agent in _AGENTS))
        made.real = Names(
            team="ruby",
            agent="red-target",
            tool="ask-red",
            live=live,
            short=live[:10],
            ended=ended,
            call=_calls(daemon, "red-target")[0],
            key=made.ids["operator"],
            file="kept-by-red",
            variable="RED_VARIABLE",
        )
        made.file(made.real.file)
        made.marks += [
            *("red-target", "RED_VARIABLE", "ask-red", "plain-red", "kit-red"),
            *(made.real.call, made.real.key, "label-of-operator"),
        ]
        yield made


def _configure(daemon: RealDaemon) -> None:
    daemon.write("sandboxd.yaml", """
        version: 1
        teams:
          ruby: {name: Team of Red}
          sapphire: {name: Team of Blue}
    """)  # fmt: skip
    daemon.http("listen: 127.0.0.1:0\nlimits: {requests: 100000, failures: 100000}")
    daemon.write(
        "policies/asking.yaml",
        "version: 1\ndescription: asks\nnetwork: none\n"
        "rules: [{ask: 'ask-*', reason: it costs}, {allow: '*'}]\n",
    )
    for slug, (team, tools, workspace) in _AGENTS.items():
        _write_agent(daemon, slug, team, tools, workspace)
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


def _write_agent(daemon: RealDaemon, slug: str, team: str, tools: str, workspace: str) -> None:
    daemon.agent(slug, SCRIPT, team=team, tools=tools, workspace=workspace, policy="asking")


def _credentials(made: World) -> None:
    """Keys of every role, one of them for another agent, one of another team; users' tokens."""
    keys: list[tuple[str, str, str, list[str] | None]] = [
        ("owner", "ruby", "owner", None),
        ("operator", "ruby", "operator", None),
        ("developer", "ruby", "developer", ["red-target"]),
        ("viewer", "ruby", "viewer", None),
        ("beside", "ruby", "operator", ["red-beside"]),
        ("developer beside", "ruby", "developer", ["red-beside"]),
        ("stranger", "sapphire", "owner", None),
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


def _calls(daemon: RealDaemon, agent: str) -> list[str]:
    rows = daemon.call("approvals.list")["approvals"]
    return [row["id"] for row in rows if row["agent"] == agent]
