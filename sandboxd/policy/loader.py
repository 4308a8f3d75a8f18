"""Loading a configuration directory: all files, all problems, one frozen result.

``CONFIG/sandboxd.yaml``, ``CONFIG/agents/*.yaml``, ``CONFIG/tools/*/tool.yaml`` and
``CONFIG/policies/*.yaml``, with the shipped tools and policies beside them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import attrs

from sandboxd import names
from sandboxd.errors import ConfigError, Invalid
from sandboxd.policy import crosscheck
from sandboxd.policy.egress import placed
from sandboxd.policy.files import Source, Trust, list_directory, read_source
from sandboxd.policy.mcpserver import SEPARATOR, McpServer, complete_server
from sandboxd.policy.model import Agent, Config, Settings, Tool
from sandboxd.policy.policyfile import PolicyFile, Written, resolve_policies
from sandboxd.policy.problems import Problems
from sandboxd.policy.structure import structure
from sandboxd.policy.toolcheck import complete_tool
from sandboxd.policy.yamlpos import Document, parse

__all__ = ["Loaded", "lint_tools", "load_config", "load_settings"]

T = TypeVar("T")


@dataclass
class Loaded:
    """What was read so far, with positions, for the checks across files."""

    settings: Settings = field(default_factory=Settings)
    settings_document: Document | None = None
    #: sandboxd.yaml is there and wrong: already reported, so what it lacks is not "missing".
    broken_settings: bool = False
    agents: dict[str, tuple[Agent, Document]] = field(default_factory=dict)
    tools: dict[str, tuple[Tool, Document]] = field(default_factory=dict)
    servers: dict[str, tuple[McpServer, Document]] = field(default_factory=dict)
    policies: dict[str, Written] = field(default_factory=dict)
    private: dict[str, Path] = field(default_factory=dict)
    #: Names whose files are there and wrong: already reported, so not "missing" as well.
    broken: dict[str, set[str]] = field(
        default_factory=lambda: {"agents": set(), "tools": set(), "policies": set()}
    )


def load_config(
    directory: Path,
    *,
    shipped_policies: Path,
    shipped_tools: Path,
    private: Mapping[str, Path] = MappingProxyType({}),
) -> Config:
    """The whole configuration, checked across files.

    ``private`` are more directories, by what they are, that no sandbox may show.

    Raises :class:`~sandboxd.policy.ConfigErrors` with every problem of every file, each with
    file, line and column.
    """
    loader = _Loader(directory, shipped_policies, shipped_tools)
    loader.loaded.private.update(private)
    return loader.load()


def load_settings(directory: Path) -> Settings:
    """Only sandboxd.yaml, for what has to be known before anything else; defaults without one.

    Raises :class:`~sandboxd.policy.ConfigErrors`.
    """
    loader = _Loader(directory, directory, directory)
    loader.check_directory()
    loader.settings()
    crosscheck.check_settings(loader.loaded, loader.problems)
    loader.problems.check()
    return loader.loaded.settings


def lint_tools(
    directory: Path, *, shipped_tools: Path, only: str = ""
) -> tuple[list[Tool], Problems]:
    """The tools below ``directory`` (or the one in its folder ``only``), and all that is wrong.

    What depends on other files (agents, policies, who mounts what) is not looked at.
    """
    loader = _Loader(directory, directory, shipped_tools)
    own = loader.directory == loader.shipped_tools
    if not own:
        loader.tools(loader.shipped_tools, shipped=True)
    loader.tools(loader.directory, shipped=False, only=only)
    found = [tool for tool, _ in loader.loaded.tools.values() if not tool.shipped]
    found += [server.launch for server, _ in loader.loaded.servers.values()]
    return found, loader.problems


class _Loader:
    def __init__(self, directory: Path, shipped_policies: Path, shipped_tools: Path) -> None:
        self.directory = Path(os.path.realpath(directory))
        self.shipped_policies = Path(os.path.realpath(shipped_policies))
        self.shipped_tools = Path(os.path.realpath(shipped_tools))
        self.given = directory
        self.problems = Problems()
        self.trust = Trust()
        self.loaded = Loaded()
        self.sources: list[Source] = []

    def load(self) -> Config:
        self.check_directory()
        self.settings()
        self._policies(self.shipped_policies, shipped=True)
        self._policies(self.directory / "policies", shipped=False)
        self.tools(self.shipped_tools, shipped=True)
        self.tools(self.directory / "tools", shipped=False)
        self._agents()
        loaded, problems = self.loaded, self.problems
        policies = resolve_policies(loaded.policies, frozenset(loaded.broken["policies"]), problems)
        crosscheck.check(loaded, policies, self.directory, problems)
        problems.check()
        return Config(
            settings=loaded.settings,
            agents=MappingProxyType({slug: agent for slug, (agent, _) in loaded.agents.items()}),
            tools=MappingProxyType({name: tool for name, (tool, _) in loaded.tools.items()}),
            policies=MappingProxyType(policies),
            generation=self._generation(),
            warnings=tuple(problems.warnings),
            servers=MappingProxyType({name: s for name, (s, _) in loaded.servers.items()}),
        )

    def check_directory(self) -> None:
        """Nothing below an untrusted or missing directory is worth reading."""
        name = os.fspath(self.given)
        if not self.directory.is_dir():
            what = "expected a directory" if self.directory.exists() else "no such directory"
            self.problems.add(name, None, what, "make one with: sandboxctl init")
        else:
            refusal = self.trust.refusal(self.directory)
            if refusal:
                self.problems.add(name, None, f"can't be trusted: {refusal}")
        self.problems.check()

    def settings(self) -> None:
        path = self.directory / "sandboxd.yaml"
        if os.path.lexists(path):
            document = self._document(path, "sandboxd.yaml", shipped=False)
            settings = structure(document, Settings, self.problems) if document else None
            self.loaded.settings_document = document
            self.loaded.broken_settings = settings is None
            self.loaded.settings = settings or self.loaded.settings

    def _policies(self, directory: Path, *, shipped: bool) -> None:
        for path, name in self._yaml_files(directory, "policies"):
            label = f"policies/{path.name}"
            document = self._document(path, label, shipped=shipped)
            file = structure(document, PolicyFile, self.problems) if document else None
            if document is None or file is None:
                self.loaded.broken["policies"].add(name)
                self.loaded.policies.pop(name, None)
            else:
                self.loaded.policies[name] = Written(document, label, shipped, file)

    def _agents(self) -> None:
        for path, slug in self._yaml_files(self.directory / "agents", "agents"):
            label = f"agents/{path.name}"
            document = self._document(path, label, shipped=False)
            agent = structure(document, Agent, self.problems) if document else None
            if document is None or agent is None:
                self.loaded.broken["agents"].add(slug)
            else:
                agent = attrs.evolve(
                    agent,
                    slug=slug,
                    source=label,
                    egress=placed(agent.egress, document, label),
                    places=document.places(label),
                )
                self.loaded.agents[slug] = (agent, document)

    def tools(self, directory: Path, *, shipped: bool, only: str = "") -> None:
        """Read the tools below ``directory``, or the one in the folder ``only``."""
        for folder, path in self._tool_folders(directory):
            if only and folder.name != only:
                continue
            label = f"tools/{folder.name}/tool.yaml"
            document = self._document(path, label, shipped=shipped)
            if document is not None and _kind_of(document) == "mcp":
                self._add_server(folder, label, document)
                continue
            tool = structure(document, Tool, self.problems) if document else None
            if document is not None and tool is not None:
                tool = attrs.evolve(
                    tool,
                    directory=folder,
                    source=label,
                    shipped=shipped,
                    egress=placed(tool.egress, document, label),
                    places=document.places(label),
                )
                tool = complete_tool(tool, document, self.trust, self.problems)
            if document is None or tool is None:
                stated = document.value if document else None
                name = stated.get("name") if isinstance(stated, dict) else None
                self.loaded.broken["tools"] |= {folder.name, str(name)}
            else:
                self._add_tool(tool, document)

    def _add_server(self, folder: Path, label: str, document: Document) -> None:
        server = structure(document, McpServer, self.problems)
        if server is not None:
            server = complete_server(server, document, folder, label, self.trust, self.problems)
        if server is None:
            self.loaded.broken["tools"] |= {folder.name, str(document.value.get("name"))}
            return
        tool, other = self.loaded.tools.get(server.name), self.loaded.servers.get(server.name)
        if tool or other:
            taken = tool[0].source if tool else other[0].source if other else ""
            self.problems.add(
                document.file,
                document.at(("name",)),
                f"the tool name '{server.name}' is taken by {taken}",
                "give it another name",
            )
            return
        self.loaded.servers[server.name] = (server, document)

    def _add_tool(self, tool: Tool, document: Document) -> None:
        other = self.loaded.tools.get(tool.name)
        at = document.at(("name",))
        if SEPARATOR in tool.name or tool.name in self.loaded.servers:
            self.problems.add(
                document.file,
                at,
                f"the tool name '{tool.name}' could be taken for an MCP server's",
                f"give it a name without {SEPARATOR}"
                if SEPARATOR in tool.name
                else "give it another name",
            )
            self.loaded.broken["tools"].add(tool.name)
            return
        if other is not None and not (other[0].shipped and tool.replaces == "shipped"):
            hint = "give it another name"
            if other[0].shipped:
                hint += ", or add 'replaces: shipped' to take the shipped one's place"
            where = "a shipped tool" if other[0].shipped else other[0].source
            self.problems.add(
                document.file, at, f"the tool name '{tool.name}' is taken by {where}", hint
            )
            return
        if other is None and tool.replaces is not None:
            self.problems.add(
                document.file,
                document.at(("replaces",)),
                f"no shipped tool '{tool.name}' to replace",
            )
        self.loaded.tools[tool.name] = (tool, document)

    def _document(self, path: Path, label: str, *, shipped: bool) -> Document | None:
        source = read_source(path, label, self.trust, self.problems, shipped=shipped)
        if source is None:
            return None
        self.sources.append(source)
        try:
            return parse(source.data, source.file)
        except ConfigError as error:
            self.problems.errors.append(error)
            return None

    def _yaml_files(self, directory: Path, kind: str) -> Iterator[tuple[Path, str]]:
        if not self._trusted_folder(directory):
            listed = list_directory(directory, Problems())
            self.loaded.broken[kind] |= {name.removesuffix(".yaml") for name in listed}
            return
        for name in list_directory(directory, self.problems):
            path = directory / name
            if name.endswith(".yml"):
                self.problems.add(os.fspath(path), None, "is not read", f"name it {name[:-4]}.yaml")
            if not name.endswith(".yaml"):
                continue
            stem = name.removesuffix(".yaml")
            try:
                names.agent_slug(stem)
            except Invalid as refused:
                self.problems.add(os.fspath(path), None, f"bad file name: {refused}", refused.hint)
                self.loaded.broken[kind].add(stem)
                continue
            yield path, stem

    def _tool_folders(self, directory: Path) -> Iterator[tuple[Path, Path]]:
        if not self._trusted_folder(directory):
            self.loaded.broken["tools"] |= set(list_directory(directory, Problems()))
            return
        for name in list_directory(directory, self.problems):
            folder = directory / name
            try:
                status = folder.lstat()
            except OSError as error:
                self.problems.add(os.fspath(folder), None, os.strerror(error.errno or 0))
                continue
            if stat.S_ISLNK(status.st_mode):
                self.problems.add(
                    os.fspath(folder),
                    None,
                    "is a symbolic link; expected a directory",
                    "copy the tool's folder here",
                )
                self.loaded.broken["tools"].add(name)
            elif stat.S_ISDIR(status.st_mode):
                manifest = folder / "tool.yaml"
                if os.path.lexists(manifest):
                    yield folder, manifest
                elif not name.startswith("_"):
                    self.problems.add(os.fspath(folder), None, "has no tool.yaml")
                    self.loaded.broken["tools"].add(name)

    def _trusted_folder(self, directory: Path) -> bool:
        if not os.path.lexists(directory):
            return False
        refusal = ""
        if directory.is_symlink() or not directory.is_dir():
            refusal = "expected a directory, not a symbolic link or file"
        else:
            refusal = self.trust.refusal(directory)
        if refusal:
            self.problems.add(os.fspath(directory), None, refusal.removeprefix(f"{directory} "))
        return not refusal

    def _generation(self) -> str:
        """One digest for all that was read: files, and the programs that the tools name."""
        digest = hashlib.sha256()
        for source in sorted(self.sources, key=lambda s: (s.label, s.shipped)):
            _feed(digest, source.label.encode(), bytes([source.shipped]), source.data)
        for name, (tool, _) in sorted(self.loaded.tools.items()):
            _feed(digest, name.encode(), os.fsencode(tool.program), tool.digest.encode())
        for name, (server, _) in sorted(self.loaded.servers.items()):
            launch = server.launch
            _feed(digest, name.encode(), os.fsencode(launch.program), launch.digest.encode())
        return digest.hexdigest()


def _kind_of(document: Document) -> Any:
    return document.value.get("kind") if isinstance(document.value, dict) else None


def _feed(digest: Any, *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
