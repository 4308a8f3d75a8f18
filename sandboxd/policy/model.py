"""What the configuration files say, as frozen classes. cattrs builds them from YAML.

A field whose metadata has ``loaded`` is not a key of the file: the loader fills it in. ``places``
says where each key stands, as ``FILE:LINE``. A field
with ``key`` has another name in the file. Limits are in bytes and seconds; None means that the
file doesn't say.
"""

# ruff: noqa: RUF009 - every default is a frozen value
from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import attrs

from sandboxd.isolation.uids import DEFAULT_COUNT, DEFAULT_FIRST
from sandboxd.policy.destinations import DestinationRule
from sandboxd.policy.egress import Egress
from sandboxd.policy.programs import Interpreter
from sandboxd.policy.template import Template
from sandboxd.policy.values import (
    AbsolutePath,
    Ask,
    Count,
    Duration,
    Glob,
    HostName,
    Line,
    ListenAddress,
    Processors,
    ProgramPath,
    Size,
    Slug,
    ToolName,
    VariableName,
    WebAddress,
)

if TYPE_CHECKING:
    from sandboxd.policy.mcpserver import McpServer

__all__ = [
    "DEFAULT_TEAM",
    "Agent",
    "Annotations",
    "ApprovalSettings",
    "CommandHook",
    "Concurrency",
    "Condition",
    "Config",
    "HttpLimits",
    "HttpSettings",
    "Key",
    "Limits",
    "Mount",
    "Policy",
    "Rule",
    "SecretSpec",
    "Settings",
    "Stdin",
    "Team",
    "Tls",
    "Tool",
    "UidRange",
    "Webhook",
    "Workspace",
]

Network = Literal["none", "host"]
#: What a tool's standard output is.
OutputFormat = Literal["auto", "text", "json", "binary"]
#: What becomes of a call: it runs, it doesn't, or an operator is asked first.
Verdict = Literal["allow", "deny", "ask"]
#: The team of agents whose files name none.
DEFAULT_TEAM = Slug("default")
#: What may be done with a workspace, least first. ``overlay``: everything, and nothing lands.
Access = Literal["none", "ro", "overlay", "rw"]
Bound = TypeVar("Bound", bound=float)  # int is fine where float is (PEP 484)

#: What a host can be asked to have, by the names that `sandboxctl doctor` prints.
Feature = Literal[
    "user_namespace",
    "mount_namespace",
    "pid_namespace",
    "network_namespace",
    "ipc_namespace",
    "uts_namespace",
    "cgroup_namespace",
    "time_namespace",
    "landlock",
    "seccomp",
    "cgroup",
    "cgroup_io",
]


def _loaded(default: Any, **options: Any) -> Any:
    return attrs.field(default=default, metadata={"loaded": True}, **options)


def _empty() -> Mapping[str, Any]:
    return MappingProxyType({})


@attrs.frozen
class Limits:
    """Bounds of one sandbox. None: not limited by this file.

    ``memory``, ``processes`` and ``cpus`` hold for all its processes together where the host has
    cgroups; ``cpu`` is processor time that one process may use up, ``cpus`` what all of them get
    at a time. ``io`` is bytes a second, for each disk and direction.
    """

    memory: Size | None = None
    processes: Count | None = None
    files: Count | None = None
    cpu: Duration | None = None
    file_size: Size | None = None
    tmp_size: Size | None = None
    cpus: Processors | None = None
    io: Size | None = None

    def narrowed(self, other: Limits) -> Limits:
        """The smaller of the two, field by field."""
        return Limits(*(least(a, b) for a, b in zip(_fields(self), _fields(other), strict=True)))

    def over(self, base: Limits) -> Limits:
        """These limits, with ``base`` where they say nothing."""
        pairs = zip(_fields(self), _fields(base), strict=True)
        return Limits(*(b if a is None else a for a, b in pairs))


#: The values of all fields, in order; several times in each decision.
_fields: Callable[[Limits], tuple[Any, ...]] = attrgetter(
    *(field.name for field in attrs.fields(Limits))
)


def least(a: Bound | None, b: Bound | None) -> Bound | None:
    """The smaller of two bounds, where None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def place(stated: Agent | Tool | Policy, key: str) -> str:
    """Where ``key`` stands, as ``FILE:LINE key``; only the file where it isn't stated."""
    return f"{stated.places.get(key, stated.source)} {key}"


#: What a tool call gets where its manifest says nothing.
TOOL_LIMITS = Limits(
    memory=Size(1 << 30),
    processes=Count(64),
    files=Count(256),
    cpu=Duration(60.0),
    file_size=Size(1 << 30),
    tmp_size=Size(64 << 20),
)

#: What an agent gets where its file says nothing. No CPU limit: an agent runs as long as it must.
AGENT_LIMITS = Limits(
    memory=Size(4 << 30),
    processes=Count(256),
    files=Count(1024),
    tmp_size=Size(256 << 20),
)


@attrs.frozen
class Key:
    """Where the master key comes from: ``kind`` is file, credential or passphrase."""

    file: AbsolutePath | None = None
    credential: str | None = None
    passphrase: Ask = Ask(False)
    passphrase_file: AbsolutePath | None = None

    @property
    def kind(self) -> Literal["file", "credential", "passphrase"]:
        if self.file is not None:
            return "file"
        return "credential" if self.credential is not None else "passphrase"


@attrs.frozen
class UidRange:
    """Host user ids that sandboxes run as when the launcher is privileged."""

    first: int
    count: Count


@attrs.frozen
class Webhook:
    """Where each question to an operator is posted. ``secret_file`` or ``credential`` signs it."""

    url: WebAddress
    secret_file: AbsolutePath | None = None
    credential: str | None = None
    ca_file: AbsolutePath | None = None
    timeout: Duration = Duration(10.0)
    arguments: bool = False


@attrs.frozen
class CommandHook:
    """A program of the operator's that is told of each question, on its standard input."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = attrs.field(factory=_empty)
    timeout: Duration = Duration(10.0)


@attrs.frozen
class ApprovalSettings:
    """How many calls may wait for an operator, and who is told that one does."""

    max_waiting: Count = Count(64)
    max_waiting_per_session: Count = Count(8)
    webhook: Webhook | None = None
    command: CommandHook | None = None


@attrs.frozen
class Team:
    """Who shares agents, their variables, sessions and records, and sees nobody else's."""

    name: Line


@attrs.frozen
class Tls:
    """A certificate (with its chain) and its private key, as PEM files."""

    certificate: AbsolutePath
    key: AbsolutePath


@attrs.frozen
class HttpLimits:
    """What one client of the HTTP API may take. ``requests`` are a second, ``failures`` a minute.

    ``requests`` holds for each key or token, four times as much for each source address;
    ``failures`` are attempts with wrong keys from one source.
    """

    body: Size = Size(16 << 20)
    connections: Count = Count(256)
    requests: Count = Count(50)
    failures: Count = Count(10)


@attrs.frozen
class HttpSettings:
    """Where the HTTP API listens, for whom, and by which names clients may call it."""

    listen: ListenAddress = ListenAddress("127.0.0.1:7621")
    tls: Tls | None = None
    hosts: tuple[HostName, ...] = ()
    limits: HttpLimits = HttpLimits()


@attrs.frozen
class Settings:
    """sandboxd.yaml. The team ``default`` is there without being named."""

    key: Key | None = None  # None: the daemon's default
    user: str = "sandboxd"
    admin_group: str = "sandboxd"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    max_sessions: Count = Count(64)
    max_concurrent_calls: Count = Count(16)
    uid_range: UidRange = UidRange(first=DEFAULT_FIRST, count=Count(DEFAULT_COUNT))
    approvals: ApprovalSettings = ApprovalSettings()
    teams: Mapping[Slug, Team] = attrs.field(factory=_empty)
    http: HttpSettings | None = None  # None: not served

    def has_team(self, team: str) -> bool:
        """Whether agents and keys can be of this team."""
        return team == DEFAULT_TEAM or team in self.teams


@attrs.frozen
class Workspace:
    """The agent's own files, at /workspace. ``path`` None: STATE/workspaces/SLUG.

    ``quota``: with mode overlay, the bytes that a session may change, which are kept in memory.
    """

    path: AbsolutePath | None = None
    mode: Access = "rw"
    quota: Size | None = None


@attrs.frozen
class Mount:
    """A host file or directory that appears in the sandbox."""

    source: AbsolutePath
    target: AbsolutePath
    mode: Literal["ro", "rw"] = "ro"


@attrs.frozen
class Agent:
    """agents/SLUG.yaml."""

    description: Line
    command: tuple[str, ...]
    team: Slug = DEFAULT_TEAM
    args_allowed: bool = False
    policy: Slug = Slug("default")
    tools: tuple[ToolName, ...] = ()
    environment: Mapping[str, str] = attrs.field(factory=_empty)
    allow_environment: Mapping[str, Line] = attrs.field(factory=_empty)
    workspace: Workspace = Workspace()
    mounts: tuple[Mount, ...] = ()
    network: Network = "none"
    egress: Egress = Egress()
    limits: Limits = Limits()
    slug: str = _loaded("")
    source: str = _loaded("")
    places: Mapping[str, str] = _loaded(MappingProxyType({}), eq=False, repr=False)


@attrs.frozen
class SecretSpec:
    """One variable of the agent's store that a tool gets, and how.

    ``env``: in the environment as ``as_name``. ``file``: at /run/secrets/``as_name``. ``fd``: on a
    descriptor whose number stands in the environment variable ``as_name``. ``stdin``: it is the
    whole standard input. ``redact`` is false for a plain setting, which output may show.
    """

    variable: VariableName
    as_name: str = attrs.field(default="", metadata={"key": "as"})
    delivery: Literal["env", "file", "stdin", "fd"] = "env"
    required: bool = True
    redact: bool = True


@attrs.frozen
class Stdin:
    """Standard input of a tool: nothing, the arguments as JSON, or one argument's text."""

    kind: Literal["none", "json", "text"] = "none"
    argument: str = ""


@attrs.frozen
class Concurrency:
    """How many calls of one tool run at once, over all sessions and in each. None: as many as the
    daemon's own bounds let. Calls beyond it wait in their session's queue.
    """

    total: Count | None = None
    per_session: Count | None = None


@attrs.frozen
class Annotations:
    """Hints for MCP clients; no decision depends on them."""

    title: Line | None = None
    readOnlyHint: bool | None = None  # noqa: N815, RUF100 - the protocol's own spelling
    destructiveHint: bool | None = None  # noqa: N815, RUF100
    idempotentHint: bool | None = None  # noqa: N815, RUF100
    openWorldHint: bool | None = None  # noqa: N815, RUF100

    def as_dict(self) -> dict[str, Any]:
        """Only what the manifest says, as MCP spells it."""
        return {name: value for name, value in attrs.asdict(self).items() if value is not None}


@attrs.frozen
class Tool:
    """tools/NAME/tool.yaml. ``program`` and ``directory`` are real paths: no symbolic links.

    ``grace``: seconds between SIGTERM and the end by force; None: none. With ``output_schema``
    the standard output is JSON and matches it. A format of ``auto`` is text where it is UTF-8.
    """

    name: ToolName
    description: Line
    program: ProgramPath
    input_schema: Mapping[str, Any] = attrs.field(metadata={"key": "input"})
    runtime: Literal["none", "python", "node"] = "none"
    argv: Template = Template()
    stdin: Stdin = Stdin()
    environment: Mapping[str, str] = attrs.field(factory=_empty)
    allow_environment: Mapping[str, Line] = attrs.field(factory=_empty)
    secrets: tuple[SecretSpec, ...] = ()
    workspace: Literal["none", "ro", "rw"] = "none"
    mounts: tuple[Mount, ...] = ()
    network: Network = "none"
    egress: Egress = Egress()
    timeout: Duration = Duration(60.0)
    grace: Duration | None = None
    output_schema: Mapping[str, Any] | None = attrs.field(default=None, metadata={"key": "output"})
    output_format: OutputFormat = "auto"
    output_limit: Size = Size(1 << 20)
    on_overflow: Literal["truncate", "kill"] = "truncate"
    limits: Limits = Limits()
    concurrency: Concurrency = Concurrency()
    approval: Literal["none", "ask"] = "none"
    annotations: Annotations = Annotations()
    replaces: Literal["shipped"] | None = None
    directory: Path = _loaded(Path())
    digest: str = _loaded("")
    #: The name that the program is started by, where that isn't its real path.
    invoked: str = _loaded("")
    #: Whether the kernel executes it itself; else a script's interpreters, innermost first.
    native: bool = _loaded(False)
    interpreters: tuple[Interpreter, ...] = _loaded(())
    source: str = _loaded("")
    shipped: bool = _loaded(False)
    places: Mapping[str, str] = _loaded(MappingProxyType({}), eq=False, repr=False)
    validator: Any = _loaded(None, eq=False, repr=False)
    output_validator: Any = _loaded(None, eq=False, repr=False)


@attrs.frozen
class Condition:
    """What one argument must be for a rule to match: one of some values, or like a pattern."""

    any_of: tuple[Any, ...] = ()
    glob: str | None = None


@attrs.frozen
class Rule:
    """One line of a policy: it matches by tool, agent and arguments, and then it decides."""

    verdict: Verdict
    tools: tuple[Glob, ...]
    agents: tuple[Glob, ...] = (Glob("*"),)
    when: Mapping[str, Condition] = attrs.field(factory=_empty)
    reason: str = ""
    source: str = ""
    #: An allowing rule that stands in for the approval which a manifest asks for.
    approved: bool = False

    @property
    def title(self) -> str:
        """How audit and explain name it: file, line and what it does."""
        return f"{self.source} {self.verdict} {', '.join(self.tools)}"


@attrs.frozen
class Policy:
    """policies/NAME.yaml, with what it extends already merged: rules joined, ceilings narrowed."""

    name: Slug
    description: Line
    rules: tuple[Rule, ...] = ()
    extends: Slug | None = None
    network: Network = "none"
    agent_network: Network = "none"
    #: Lists that each have to allow what an agent or a tool names under ``egress``.
    egress: tuple[tuple[DestinationRule, ...], ...] = ()
    workspace: Access = "rw"
    limits: Limits = Limits()
    agent_limits: Limits = Limits()
    timeout: Duration | None = None
    output_limit: Size | None = None
    approval_timeout: Duration | None = None
    require: tuple[Feature, ...] = ()
    #: What a policy that this one extends requires, and this one does not.
    lower: tuple[Feature, ...] = ()
    source: str = _loaded("")
    shipped: bool = _loaded(False)
    places: Mapping[str, str] = _loaded(MappingProxyType({}), eq=False, repr=False)

    @property
    def lowered(self) -> tuple[str, ...]:
        """Isolation layers that something under this policy may go without."""
        network = ("network",) if "host" in (self.network, self.agent_network) else ()
        return (*network, *self.lower)

    def egress_bounds(self, *, agent: bool) -> tuple[tuple[DestinationRule, ...], ...]:
        """What bounds ``egress`` under this policy: nothing where the host's network is allowed
        and no list says otherwise, and everything where neither is."""
        network = self.agent_network if agent else self.network
        return self.egress if self.egress or network == "host" else ((),)


@attrs.frozen
class Config:
    """Everything that was loaded: checked as a whole, never changed afterwards."""

    settings: Settings
    agents: Mapping[str, Agent]
    tools: Mapping[str, Tool]
    policies: Mapping[str, Policy]
    generation: str
    warnings: tuple[str, ...] = ()
    servers: Mapping[str, McpServer] = attrs.field(factory=_empty)
