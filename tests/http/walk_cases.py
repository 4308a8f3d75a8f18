"""For every admin method and every HTTP route: a request about the walk's target, and who may.

A method or a route without a case fails the walk. ``allowed`` says it anew, by hand, so that the
walk is more than the code agreeing with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from walk_world import Names, World

VIEW = frozenset({"owner", "operator", "developer", "viewer"})
WRITE = frozenset({"owner", "operator", "developer"})
RUN = frozenset({"owner", "operator", "application"})
READ_SESSIONS = VIEW | {"application"}
OPERATE = frozenset({"owner", "operator"})
OWN = frozenset({"owner"})
HOST: frozenset[str] = frozenset()

#: ``one``: about one thing, which for outsiders does not exist. ``list``: outsiders get theirs.
#: ``own``: nobody's in particular. ``host``: no team's. ``open``: for everybody, key or none.
Kind = Literal["one", "list", "own", "host", "open"]


@dataclass(frozen=True)
class Case:
    """One request, made by everybody."""

    kind: Kind
    allowed: frozenset[str]
    #: What is sent, about the target or about what never existed.
    body: Callable[[World, Names], Any] = lambda made, names: {}
    #: Below what each user's token sees its own alone.
    users: bool = False
    #: Doing it ends what it is about: which of the names is made anew for it, and done once.
    ends: Literal["", "live", "ended", "call", "key", "agent", "file", "variable"] = ""
    #: The answer is a stream without an end.
    first_line: bool = False
    #: What the right key gets.
    status: tuple[int, ...] = (200,)
    #: What outsiders get where the case is about one thing.
    gone: tuple[int, ...] = (404,)
    #: Which keys are tried as controls; all that are allowed where none is named.
    controls: tuple[str, ...] = ()
    #: Who is outside; all that aren't of the target's team and agent where none is named.
    outside: tuple[str, ...] = ()


def _about(**names: str) -> Callable[[World, Names], Any]:
    """Parameters whose values are names: ``_about(id="live")``."""
    return lambda made, known: {key: getattr(known, name) for key, name in names.items()}


def _with(base: Callable[[World, Names], Any], **more: Any) -> Callable[[World, Names], Any]:
    return lambda made, names: {**base(made, names), **more}


def _in_live(**more: Any) -> Case:
    return Case("one", RUN, _with(_about(id="live"), **more), users=True)


def _on_file(key: str = "path", ends: bool = False, **more: Any) -> Case:
    body = _with(_about(**{"id": "live", key: "file"}), **more)
    return Case("one", RUN, body, users=True, ends="file" if ends else "")


#: Every admin method, called at ``/api/v1/operator``.
METHODS: dict[str, tuple[Case, ...]] = {
    "status": (Case("own", READ_SESSIONS),),
    "reload": (Case("host", HOST),),
    "config.check": (Case("host", HOST),),
    "agents.list": (Case("list", READ_SESSIONS),),
    "agents.show": (Case("one", READ_SESSIONS, _about(agent="agent")),),
    "agents.delete": (Case("one", OWN, _about(agent="agent"), ends="agent"),),
    "env.list": (Case("one", VIEW, _about(agent="agent")),),
    "env.set": (
        Case("one", WRITE, _with(_about(agent="agent"), values={"RED_VARIABLE": "eC12YWx1ZS14"})),
    ),
    "env.revoke": (
        Case("one", WRITE, _with(_about(agent="agent"), names=["RED_VARIABLE"]), ends="variable"),
    ),
    "env.remove": (
        Case(
            "one",
            WRITE,
            lambda made, names: {"agent": names.agent, "names": [names.variable]},
            ends="variable",
        ),
    ),
    "session.start": (Case("one", RUN, _about(agent="agent")),),
    "session.run": (Case("one", RUN, _about(agent="agent"), first_line=True),),
    "session.list": (Case("list", READ_SESSIONS, lambda made, names: {"all": True}, users=True),),
    "session.show": (
        Case("one", READ_SESSIONS, _about(id="live"), users=True),
        Case("one", READ_SESSIONS, _about(id="ended"), users=True),
        # An abbreviation of an id is no way around either.
        Case("one", READ_SESSIONS, _about(id="short"), users=True),
    ),
    "session.wait": (Case("one", READ_SESSIONS, _about(id="ended"), users=True),),
    "session.logs": (Case("one", READ_SESSIONS, _about(id="ended"), users=True),),
    "session.stop": (Case("one", RUN, _with(_about(id="live"), grace=0), users=True, ends="live"),),
    "session.signal": (_in_live(signal=18),),
    "session.exec": (_in_live(argv=["/bin/true"]),),
    "session.files.write": (_in_live(files=[{"path": "written", "content": "x"}]),),
    "session.files.list": (_in_live(),),
    "session.files.read": (_on_file(),),
    "session.files.info": (_on_file(),),
    "session.files.exists": (_on_file(),),
    "session.files.remove": (_on_file(ends=True),),
    "session.files.rename": (_on_file("old", ends=True, new="renamed"),),
    "session.files.mkdir": (
        Case("one", RUN, lambda made, names: {"id": names.live, "path": made.unique()}, users=True),
    ),
    "session.diff": (Case("one", VIEW, _about(id="ended")),),
    # While the live session runs nothing is landed below it; the answer is about the workspace.
    "session.apply": (Case("one", OPERATE, _about(id="ended"), ends="ended", status=(409,)),),
    "session.discard": (Case("one", OPERATE, _about(id="ended"), ends="ended"),),
    "approvals.list": (Case("list", VIEW),),
    "approvals.watch": (Case("list", VIEW, first_line=True),),
    "approvals.show": (Case("one", VIEW, _about(id="call")),),
    "approvals.approve": (Case("one", OPERATE, _about(id="call"), ends="call"),),
    "approvals.deny": (Case("one", OPERATE, _about(id="call"), ends="call"),),
    "tools.list": (Case("list", VIEW), Case("one", VIEW, _about(agent="agent"))),
    "tools.show": (Case("one", VIEW, _about(tool="tool")),),
    "tools.pins": (Case("list", VIEW),),
    "tools.run": (
        Case("one", RUN, _with(_about(session="live"), tool="plain-red"), users=True),
        # Its workspace is copy-on-write, so outside of a session the call can't be made.
        Case("one", RUN, _with(_about(agent="agent"), tool="plain-red"), status=(409,)),
    ),
    "tools.place": (
        Case("one", RUN, _about(session="live"), users=True),
        Case("one", RUN, _about(agent="agent")),
    ),
    "tools.inspect": (Case("host", HOST, lambda made, names: {"server": "kit-red"}),),
    "tools.accept": (
        Case("host", HOST, lambda made, names: {"server": "kit-red", "digest": "sha256:0"}),
    ),
    "tools.forget": (Case("host", HOST, lambda made, names: {"server": "kit-red"}),),
    "policy.explain": (
        Case("one", VIEW, _with(_about(agent="agent"), tool="plain-red", arguments={})),
    ),
    "policy.egress": (
        Case("one", VIEW, _about(agent="agent")),
        Case("one", VIEW, _about(agent="agent", tool="tool")),
    ),
    "policy.outlook": (Case("list", VIEW),),
    "keys.list": (Case("list", OPERATE),),
    "keys.show": (Case("one", OPERATE, _about(key="key")),),
    "keys.create": (
        Case(
            "one",
            OWN,
            lambda made, names: {
                "team": names.team,
                "role": "viewer",
                "label": "of the walk",
                "agents": [names.agent],
            },
        ),
        Case(
            "one",
            OWN,
            lambda made, names: {
                "role": "viewer",
                "label": "of the walk",
                "agents": [names.agent],
            },
        ),
    ),
    "keys.deactivate": (Case("one", OWN, _about(key="key"), ends="key"),),
    "keys.rotate": (Case("one", OWN, _about(key="key"), ends="key"),),
    "tokens.create": (
        Case("one", OPERATE, lambda made, names: {"agents": [names.agent]}),
        Case("one", OPERATE, _about(team="team"), controls=("owner",), outside=("stranger",)),
    ),
    "tokens.revoke": (Case("own", OPERATE, lambda made, names: {"id": f"tok_{made.fresh:024x}"}),),
    "tokens.rotate_key": (Case("host", HOST),),
    "tokens.jwks": (Case("own", READ_SESSIONS),),
    "audit.tail": (Case("list", VIEW, lambda made, names: {"n": 100_000}),),
    "audit.state": (Case("own", VIEW),),
    "audit.verify": (Case("host", HOST),),
    "dashboard.link": (Case("own", VIEW),),
    "dashboard.end": (Case("own", VIEW),),
}
