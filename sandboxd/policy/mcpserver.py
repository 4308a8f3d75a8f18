"""MCP servers as tools: ``tools/NAME/tool.yaml`` with ``kind: mcp``, and what was accepted of them.

A server is configured like a program; what its tools are, only the server can say. So its manifest
and its *pin* make the tools together: the pin holds the definitions that an operator accepted, and
only those are offered, under ``NAME__TOOL``. Without a pin a server has no tools.
"""

# ruff: noqa: RUF009 - every default is a frozen value
from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import attrs

from sandboxd.policy.definitions import Definition, digest_of, exposed, validator_of
from sandboxd.policy.egress import Egress, placed
from sandboxd.policy.files import Trust
from sandboxd.policy.model import (
    Agent,
    Annotations,
    Config,
    Limits,
    Mount,
    Network,
    SecretSpec,
    Stdin,
    Tool,
)
from sandboxd.policy.problems import Problems
from sandboxd.policy.template import Template
from sandboxd.policy.toolcheck import complete_tool
from sandboxd.policy.values import (
    Digest,
    Duration,
    Line,
    ProgramPath,
    RemoteName,
    ServerName,
    Size,
)
from sandboxd.policy.yamlpos import Document

__all__ = ["SEPARATOR", "McpServer", "McpTool", "Pin", "complete_server", "server_of", "with_pins"]

#: Between a server's name and its tool's. No tool of another kind has it in its name.
SEPARATOR = "__"
#: Files of a server's installed packages that are looked at.
MAX_CODE_FILES = 50_000


@attrs.frozen
class McpServer:
    """A stdio MCP server, started in a sandbox of its own for one call or for a session.

    ``tools``: what it may offer at most; empty: whatever is accepted. ``definitions``: the digest
    that what it offers must have, for those who keep approvals in their configuration.
    """

    kind: Literal["mcp"]
    name: ServerName
    description: Line
    program: ProgramPath
    runtime: Literal["none", "python", "node"] = "none"
    argv: Template = Template()
    tools: tuple[RemoteName, ...] = ()
    definitions: Digest = Digest("")
    lifetime: Literal["call", "session"] = "call"
    idle: Duration = Duration(300.0)
    startup: Duration = Duration(30.0)
    environment: Mapping[str, str] = attrs.field(factory=lambda: MappingProxyType({}))
    allow_environment: Mapping[str, Line] = attrs.field(factory=lambda: MappingProxyType({}))
    secrets: tuple[SecretSpec, ...] = ()
    workspace: Literal["none", "ro", "rw"] = "none"
    mounts: tuple[Mount, ...] = ()
    network: Network = "none"
    egress: Egress = Egress()
    timeout: Duration = Duration(60.0)
    output_limit: Size = Size(1 << 20)
    on_overflow: Literal["truncate", "kill"] = "truncate"
    limits: Limits = Limits()
    approval: Literal["none", "ask"] = "none"
    source: str = attrs.field(default="", metadata={"loaded": True})
    #: The server as a program to launch; its schema and standard input mean nothing.
    launch: Tool = attrs.field(default=None, metadata={"loaded": True})

    def may_offer(self, remote: str) -> bool:
        return not self.tools or remote in self.tools


@attrs.frozen
class McpTool(Tool):
    """One accepted tool of a server. It launches as its server does; ``stdin`` are its arguments.

    ``pin`` is the digest of the definition that was accepted.
    """

    server: McpServer = attrs.field(default=None, metadata={"loaded": True})
    remote: str = attrs.field(default="", metadata={"loaded": True})
    pin: str = attrs.field(default="", metadata={"loaded": True})


@attrs.frozen
class Pin:
    """What an operator accepted of one server, when, and who."""

    server: str
    definitions: tuple[Definition, ...]
    by: str
    at: float

    @property
    def digest(self) -> str:
        return digest_of(self.definitions)


def complete_server(
    server: McpServer,
    document: Document,
    folder: Path,
    label: str,
    trust: Trust,
    problems: Problems,
) -> McpServer | None:
    """The server with its program's real path and digest; None after noting problems."""
    before = len(problems.errors)
    for index, secret in enumerate(server.secrets):
        if secret.delivery == "stdin":
            problems.add(
                document.file,
                document.at(("secrets", index)),
                "a server's standard input is the protocol; it carries no secret",
                "take delivery: env, file or fd",
            )
    _check_argv(server, document, problems)
    launch = Tool(
        name=server.name,  # type: ignore[arg-type]
        description=server.description,
        program=server.program,
        input_schema={"type": "object", "additionalProperties": False},
        runtime=server.runtime,
        argv=server.argv if not _secret_words(server) else Template(),
        environment=server.environment,
        allow_environment=server.allow_environment,
        secrets=server.secrets,
        workspace=server.workspace,
        mounts=server.mounts,
        network=server.network,
        egress=placed(server.egress, document, label),
        timeout=server.timeout,
        output_limit=server.output_limit,
        on_overflow=server.on_overflow,
        limits=server.limits,
        approval=server.approval,
        directory=folder,
        source=label,
    )
    completed = complete_tool(launch, document, trust, problems)
    _check_code(server, document, trust, problems)
    if completed is None or len(problems.errors) > before:
        return None
    return attrs.evolve(server, launch=completed, source=label)


def server_of(config: Config, tool: str) -> McpServer | None:
    """The server that ``tool`` is the name of, or a tool's prefix."""
    return config.servers.get(tool.partition(SEPARATOR)[0])


def with_pins(config: Config, pins: Mapping[str, Pin]) -> Config:
    """The configuration with the accepted tools of its servers.

    An agent that lists a server has all of them. Servers without a pin, and what a pin holds of
    tools that the manifest doesn't allow, come to nothing but a warning.
    """
    if not config.servers:
        return config
    tools: dict[str, Tool] = dict(config.tools)
    offered: dict[str, list[str]] = {}
    warnings = list(config.warnings)
    used = hashlib.sha256(config.generation.encode())
    for name, server in sorted(config.servers.items()):
        pin = pins.get(name)
        reason = _unusable(server, pin)
        if reason:
            warnings.append(f"{server.source}: {reason}; see: sandboxctl tools accept {name}")
        made = _tools(server, pin) if pin is not None and not reason else []
        offered[name] = [tool.name for tool in made]
        for tool in made:
            tools[tool.name] = tool
            used.update(f"{tool.name}\0{tool.pin}\0".encode())
    agents = {
        slug: attrs.evolve(agent, tools=_expanded(agent, offered))
        for slug, agent in config.agents.items()
    }
    return attrs.evolve(
        config,
        tools=MappingProxyType(tools),
        agents=MappingProxyType(agents),
        generation=used.hexdigest(),
        warnings=tuple(warnings),
    )


def _unusable(server: McpServer, pin: Pin | None) -> str:
    if pin is None:
        return f"the tools of {server.name} were never accepted, so it has none"
    allowed = [d for d in pin.definitions if server.may_offer(d.name)]
    if server.definitions and digest_of(allowed) != server.definitions:
        return f"what was accepted of {server.name} isn't what its 'definitions' names"
    return ""


def _tools(server: McpServer, pin: Pin) -> list[McpTool]:
    return [_tool(server, d) for d in pin.definitions if server.may_offer(d.name)]


def _tool(server: McpServer, definition: Definition) -> McpTool:
    launch = server.launch
    validator, _ = validator_of(definition.input_schema)
    fields = {field.name: getattr(launch, field.name) for field in attrs.fields(Tool) if field.init}
    fields |= {
        "name": exposed(server.name, definition.name),
        "description": definition.description,
        "input_schema": definition.input_schema,
        "output_schema": definition.content.get("outputSchema"),
        "argv": Template(),
        "stdin": Stdin("json"),
        "validator": validator,
        "annotations": _annotations(definition),
    }
    return McpTool(**fields, server=server, remote=definition.name, pin=definition.digest)


def _annotations(definition: Definition) -> Annotations:
    """The hints that are what the protocol says they are; a title may stand beside them."""
    given: dict[str, Any] = dict(definition.content.get("annotations") or {})
    if definition.content.get("title"):
        given["title"] = definition.content["title"]
    kept = {
        field.name: given[field.name]
        for field in attrs.fields(Annotations)
        if isinstance(given.get(field.name), str if field.name == "title" else bool)
    }
    return Annotations(**kept)


def _expanded(agent: Agent, offered: Mapping[str, list[str]]) -> tuple[Any, ...]:
    names: dict[str, None] = {}
    for name in agent.tools:
        names.update(dict.fromkeys((name, *offered.get(name, ()))))
    return tuple(names)


def _secret_words(server: McpServer) -> bool:
    return bool(server.argv.names)


def _check_argv(server: McpServer, document: Document, problems: Problems) -> None:
    """A placeholder in argv is a secret, put in by the runtime after the program has started."""
    known = {s.as_name for s in server.secrets if s.delivery == "env"}
    for name in sorted(server.argv.names - known):
        problems.add(
            document.file,
            document.at(("argv",)),
            f"argv uses {{{name}}}, which no secret with delivery: env is called",
            "a server's argv is fixed; only secrets are put in",
        )
    if server.argv.names and server.runtime == "none":
        problems.add(
            document.file,
            document.at(("argv",)),
            "a secret in argv needs runtime: node or python",
            "every user of the host can read the arguments of a running program; the runtimes put "
            "the value in after the start",
        )
    if any(group.condition for group in server.argv.groups):
        problems.add(document.file, document.at(("argv",)), "a server's argv has no conditions")


def _check_code(server: McpServer, document: Document, trust: Trust, problems: Problems) -> None:
    """A read-only mount that holds the program holds its code: nobody else may change it."""
    for index, mount in enumerate(server.mounts):
        if not Path(server.program).is_relative_to(mount.source):
            continue
        at = document.at(("mounts", index))
        if mount.mode == "rw":
            problems.add(
                document.file, at, f"the server could change its own program in {mount.source}"
            )
            continue
        refusal = trust.refusal(mount.source)
        refusal = refusal or trust.tree_refusal(Path(mount.source), most=MAX_CODE_FILES)
        if refusal:
            problems.add(document.file, at, refusal)
