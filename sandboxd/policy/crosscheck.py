"""Checks across files: names that must exist, ceilings, and mounts that reach the daemon's own."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sandboxd import names
from sandboxd.errors import Invalid
from sandboxd.policy.decide import matches_glob
from sandboxd.policy.definitions import exposed
from sandboxd.policy.egress import check_egress
from sandboxd.policy.files import Trust
from sandboxd.policy.mcpserver import SEPARATOR
from sandboxd.policy.model import Agent, ApprovalSettings, HttpSettings, Mount, Policy, Tool
from sandboxd.policy.policyfile import Written
from sandboxd.policy.problems import Problems
from sandboxd.policy.toolcheck import check_environment, check_mounts
from sandboxd.policy.values import nearest
from sandboxd.policy.yamlpos import Document
from sandboxd.policy.yamlpos import Path as Place

if TYPE_CHECKING:
    from sandboxd.policy.loader import Loaded

__all__ = ["check", "check_settings"]

#: Less would not hold the copy of one ordinary file.
MIN_QUOTA = 1 << 20

#: A host path that a sandbox gets: where the file says so, which, and whether it can write there.
Reach = tuple[Place, Path, bool]


def check(
    loaded: Loaded, policies: Mapping[str, Policy], directory: Path, problems: Problems
) -> None:
    """Note every problem that needs more than one file to see."""
    for agent, document in loaded.agents.values():
        _check_agent(agent, document, loaded, policies, problems)
        _check_reach(_agent_places(agent), document, loaded, directory, problems)
    _warn_of_shared_places(loaded, problems)
    for tool, document in loaded.tools.values():
        _check_reach(_mount_places(tool.mounts), document, loaded, directory, problems)
        _check_home(tool, document, loaded, problems)
    for server, document in loaded.servers.values():
        _check_reach(_mount_places(server.mounts), document, loaded, directory, problems)
        _check_home(server.launch, document, loaded, problems)
    for written in loaded.policies.values():
        _check_rules(written, loaded, problems)
        _warn_of_shadowed(written, problems)
    check_settings(loaded, problems)


def check_settings(loaded: Loaded, problems: Problems) -> None:
    """Note what is wrong in sandboxd.yaml beyond types."""
    document, settings = loaded.settings_document, loaded.settings
    if document is None:
        return
    key = settings.key
    if key is not None:
        kinds = [
            key.file is not None,
            key.credential is not None,
            key.passphrase or key.passphrase_file is not None,
        ]
        if sum(kinds) != 1:
            problems.add(
                document.file,
                document.at(("key",)),
                "expected exactly one of file, credential and passphrase",
            )
        if key.credential is not None:
            _check_credential(key.credential, ("key", "credential"), document, problems)
    uids = settings.uid_range
    # 0xFFFF and 0xFFFFFFFF are no users (setreuid(2)); below 65536 are the host's own.
    if uids.first < 65_536 or uids.first + uids.count > 0x7FFF_FFFF:
        problems.add(
            document.file,
            document.at(("uid_range",)),
            "expected a range of user ids between 65536 and 2147483646",
        )
    _check_hooks(settings.approvals, document, problems)
    if settings.http is not None:
        _check_http(settings.http, document, problems)


def _check_http(http: HttpSettings, document: Document, problems: Problems) -> None:
    """Keys travel in every request: nothing but this host may be reached without TLS."""
    place: Place = ("http", "listen")
    if http.listen.startswith("unix:"):
        if http.tls is not None:
            problems.add(
                document.file, document.at(("http", "tls")), "a Unix socket is not served with TLS"
            )
        return
    host = http.listen.rpartition(":")[0].strip("[]")
    if http.tls is None and not ipaddress.ip_address(host).is_loopback:
        problems.add(
            document.file,
            document.at(place),
            f"{http.listen} can be reached from other hosts, which needs tls",
            "add tls: {certificate: PATH, key: PATH}, or listen on 127.0.0.1 behind a proxy",
        )


def _check_hooks(approvals: ApprovalSettings, document: Document, problems: Problems) -> None:
    """Who is told of a call that waits: a server that can be trusted, a program that is ours."""
    webhook, command = approvals.webhook, approvals.command
    if webhook is not None:
        place: Place = ("approvals", "webhook")
        if webhook.secret_file is not None and webhook.credential is not None:
            problems.add(
                document.file,
                document.at(place),
                "expected at most one of secret_file and credential",
            )
        if webhook.credential is not None:
            _check_credential(webhook.credential, (*place, "credential"), document, problems)
        url = urlsplit(webhook.url)
        if url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            problems.warn(
                document.file,
                document.at((*place, "url")),
                "http: others on the way can read and change what is posted; use https",
            )
    if command is not None:
        program = command.argv[0] if command.argv else ""
        refusal = ""
        if not program.startswith("/"):
            refusal = "expected a program by its absolute path, then its arguments"
        elif not os.access(program, os.X_OK) or not Path(program).is_file():
            refusal = f"{program} is not a program"
        elif untrusted := Trust().refusal(os.path.realpath(program)):
            refusal = f"can't be trusted: {untrusted}"
        if refusal:
            problems.add(document.file, document.at(("approvals", "command", "argv")), refusal)
        for name, value in command.environment.items():
            try:
                names.variable_value(names.variable_name(name), value.encode(errors="replace"))
            except Invalid as refused:
                at = document.key_at(("approvals", "command", "environment", name))
                problems.add(document.file, at, refused.message, refused.hint)


def _check_credential(name: str, at: Place, document: Document, problems: Problems) -> None:
    if not name or "/" in name or name.startswith("."):
        problems.add(
            document.file,
            document.at(at),
            "expected a credential's name",
            "it is a file in $CREDENTIALS_DIRECTORY",
        )


def _check_agent(
    agent: Agent,
    document: Document,
    loaded: Loaded,
    policies: Mapping[str, Policy],
    problems: Problems,
) -> None:
    file = document.file
    if not loaded.settings.has_team(agent.team) and not loaded.broken_settings:
        problems.add(
            file,
            document.at(("team",)),
            f"no team '{agent.team}'",
            nearest(agent.team, loaded.settings.teams)
            or f"add it in sandboxd.yaml: teams: {{{agent.team}: {{name: ...}}}}",
        )
    if not agent.command or not agent.command[0]:
        problems.add(file, document.at(("command",)), "expected at least a program in command")
    check_environment(agent.environment, agent.allow_environment, document, problems, refuse=True)
    check_mounts(agent.mounts, document, problems)
    _check_quota(agent, document, problems)
    seen: set[str] = set()
    for index, name in enumerate(agent.tools):
        at = document.at(("tools", index))
        if name in seen:
            problems.add(file, at, f"the tool '{name}' is listed twice")
        elif not _is_tool(name, loaded):
            problems.add(
                file, at, f"no tool '{name}'", nearest(name, (*loaded.tools, *loaded.servers))
            )
        seen.add(name)
    policy = policies.get(agent.policy)
    if policy is None:
        if agent.policy not in loaded.broken["policies"] and agent.policy not in loaded.policies:
            problems.add(
                file,
                document.at(("policy",)),
                f"no policy '{agent.policy}'",
                nearest(agent.policy, policies),
            )
        return
    if agent.network == "host" and policy.agent_network == "none":
        problems.add(
            file,
            document.at(("network",)),
            f"network: host, and policy '{policy.name}' allows its agents none",
            "take a policy with agent_network: host, such as 'agent'",
        )
    check_egress(agent.egress, agent.network, document, problems)
    if agent.egress.stated and policy.egress_bounds(agent=True) == ((),):
        problems.add(
            file,
            document.at(("egress",)),
            f"egress, and policy '{policy.name}' allows its agents none",
            "name what they may reach under egress in a policy of your own that extends it",
        )
    for index, name in enumerate(agent.tools):
        tool = loaded.tools.get(name) or loaded.servers.get(name.partition(SEPARATOR)[0])
        if tool and tool[0].network == "host" and policy.network == "none":
            problems.warn(
                file,
                document.at(("tools", index)),
                f"{name} needs network: host, and policy '{policy.name}' allows none: "
                "every call will be denied",
            )
        if tool and tool[0].egress.stated and policy.egress_bounds(agent=False) == ((),):
            problems.warn(
                file,
                document.at(("tools", index)),
                f"{name} names what it reaches under egress, and policy '{policy.name}' allows "
                "none: it will reach nothing",
            )


def _check_quota(agent: Agent, document: Document, problems: Problems) -> None:
    quota = agent.workspace.quota
    if quota is None:
        return
    at = document.at(("workspace", "quota"))
    if agent.workspace.mode != "overlay":
        problems.add(
            document.file,
            at,
            f"a workspace of mode {agent.workspace.mode} has no quota",
            "only mode: overlay can hold one",
        )
    elif quota < MIN_QUOTA:
        problems.add(document.file, at, "expected a quota of at least 1M")


def _check_rules(written: Written, loaded: Loaded, problems: Problems) -> None:
    document = written.document
    tools = {*loaded.tools, *loaded.broken["tools"], *_exposed(loaded)}
    kinds: tuple[tuple[str, str, set[str]], ...] = (
        ("allow", "tool", tools),
        ("deny", "tool", tools),
        ("ask", "tool", tools),
        ("agents", "agent", {*loaded.agents, *loaded.broken["agents"]}),
    )
    for index, rule in enumerate(written.file.rules):
        for key, kind, known in kinds:
            globs = getattr(rule, key)
            stated = isinstance(document.value["rules"][index].get(key), list)
            for position, pattern in enumerate(globs.patterns if globs else ()):
                path: Place = ("rules", index, key, *((position,) if stated else ()))
                if kind == "tool" and _is_of_server(pattern, loaded):
                    continue  # only the server itself knows them
                if "*" not in pattern and pattern not in known:
                    problems.add(
                        document.file,
                        document.at(path),
                        f"no {kind} '{pattern}'",
                        nearest(pattern, known),
                    )
                elif pattern != "*" and not any(matches_glob(pattern, name) for name in known):
                    problems.warn(
                        document.file, document.at(path), f"'{pattern}' matches no {kind}"
                    )
        patterns = rule.chosen[1].patterns if rule.chosen else ()
        for name in rule.when if patterns else ():
            _check_argument(name, patterns, index, document, loaded, problems)


def _warn_of_shadowed(written: Written, problems: Problems) -> None:
    """A rule that an earlier one of its file always decides before."""
    if written.shipped:
        return
    rules, document = written.file.rules, written.document
    for index, rule in enumerate(rules):
        for before, other in enumerate(rules[:index]):
            if rule.chosen is None or other.chosen is None or other.when:
                continue
            pairs = ((other.chosen[1], rule.chosen[1]), (other.agents, rule.agents))
            if all(_covers(wide.patterns, narrow.patterns) for wide, narrow in pairs):
                line = document.at(("rules", before)).line
                at = document.at(("rules", index))
                problems.warn(
                    document.file, at, f"this rule decides nothing: the one in line {line} does"
                )
                break


def _covers(wide: Iterable[str], narrow: Iterable[str]) -> bool:
    """Whether every name that ``narrow`` matches is matched by ``wide``.

    A pattern covers another that it matches as a text, for then only * stands for its *.
    """
    wide = tuple(wide)
    return all(any(matches_glob(one, other) for one in wide) for other in narrow)


def _check_argument(
    name: str,
    patterns: Iterable[str],
    index: int,
    document: Document,
    loaded: Loaded,
    problems: Problems,
) -> None:
    """A condition on an argument that no matching tool has can only be a mistake."""
    if any(_may_match(pattern, loaded) for pattern in patterns):
        return  # of a server's tools the arguments are known when they are accepted
    matching = [
        tool
        for tool, _ in loaded.tools.values()
        if any(matches_glob(pattern, tool.name) for pattern in patterns)
    ]
    properties = {key for tool in matching for key in tool.input_schema.get("properties", {})}
    if matching and name not in properties:
        problems.add(
            document.file,
            document.key_at(("rules", index, "when", name)),
            f"no tool that this rule matches has an argument '{name}'",
            nearest(name, properties),
        )


def _is_tool(name: str, loaded: Loaded) -> bool:
    """Whether an agent may list ``name``: a tool, a server, or one tool that a server may offer."""
    if name in loaded.tools or name in loaded.servers or name in loaded.broken["tools"]:
        return True
    return name in _exposed(loaded) or _is_of_server(name, loaded)


def _exposed(loaded: Loaded) -> set[str]:
    """The names of tools that the manifests of servers name themselves."""
    return {
        exposed(server.name, remote)
        for server, _ in loaded.servers.values()
        for remote in server.tools
    }


def _is_of_server(pattern: str, loaded: Loaded) -> bool:
    """Whether it is the name or a pattern of tools of a server that names none itself."""
    name, separator, _ = pattern.partition(SEPARATOR)
    if not separator:
        return False
    if name in loaded.broken["tools"]:
        return True
    found = loaded.servers.get(name)
    return found is not None and not found[0].tools


def _may_match(pattern: str, loaded: Loaded) -> bool:
    """Whether ``pattern`` could match a tool of a server."""
    name = pattern.partition(SEPARATOR)[0] if SEPARATOR in pattern else pattern
    return any(
        matches_glob(name, server) or (name.endswith("*") and server.startswith(name[:-1]))
        for server in loaded.servers
    )


def _warn_of_shared_places(loaded: Loaded, problems: Problems) -> None:
    """A directory that one team's agents write and another's see is a way between them."""
    places = [
        (agent, document, path, Path(os.path.realpath(place)), writable)
        for agent, document in loaded.agents.values()
        for path, place, writable in _agent_places(agent)
    ]
    for agent, document, path, place, _ in places:
        for other, _, _, its, writable in places:
            if writable and other.team != agent.team and _overlap(place, its):
                problems.warn(
                    document.file,
                    document.at(path),
                    f"{place} is shared with agent {other.slug} of team {other.team}, "
                    "which can write there",
                )


def _agent_places(agent: Agent) -> list[Reach]:
    places = _mount_places(agent.mounts)
    if agent.workspace.path is not None:
        writable = agent.workspace.mode in ("rw", "overlay")  # what is reviewed may land
        places.append((("workspace", "path"), agent.workspace.path, writable))
    return places


def _mount_places(mounts: Iterable[Mount]) -> list[Reach]:
    return [
        (("mounts", index, "source"), Path(mount.source), mount.mode == "rw")
        for index, mount in enumerate(mounts)
    ]


def _check_reach(
    places: Iterable[Reach],
    document: Document,
    loaded: Loaded,
    directory: Path,
    problems: Problems,
) -> None:
    """No sandbox shows the configuration or the key, nor writes where a tool's program lives."""
    for path, place, writable in places:
        for what, own in _own(loaded, directory):
            if _overlap(place, own):
                problems.add(document.file, document.at(path), f"{place} would show {what}, {own}")
        command = loaded.settings.approvals.command
        command_program = Path(command.argv[0]) if command and command.argv else None
        if writable and command_program is not None and _overlap(place, command_program):
            problems.add(
                document.file,
                document.at(path),
                f"{place} would let an agent change the program that operators are told by",
            )
        for name, program in _programs(loaded) if writable else ():
            if _overlap(place, program):
                problems.add(
                    document.file,
                    document.at(path),
                    f"{place} would let an agent change the program of {name}",
                )
                break


def _check_home(tool: Tool, document: Document, loaded: Loaded, problems: Problems) -> None:
    """No program lives where the daemon keeps what sessions write."""
    for path in (tool.program, *(interpreter.path for interpreter in tool.interpreters)):
        for what, place in loaded.private.items():
            if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(place)):
                problems.add(
                    document.file,
                    document.at(("program",)),
                    f"{path} is in {what}, {place}, where sessions write",
                    "keep it in the tool's folder, or where only root writes",
                )


def _programs(loaded: Loaded) -> Iterator[tuple[str, Path]]:
    """Where the code of tools and servers lives."""
    servers = [server for server, _ in loaded.servers.values()]
    for tool in (*(tool for tool, _ in loaded.tools.values()), *(s.launch for s in servers)):
        yield tool.name, tool.directory
        yield tool.name, tool.program
        for interpreter in tool.interpreters:
            yield tool.name, interpreter.path
    for server in servers:
        for mount in server.mounts:
            if server.launch.program.is_relative_to(mount.source):
                yield server.name, mount.source


def _own(loaded: Loaded, directory: Path) -> Iterator[tuple[str, Path]]:
    yield "the configuration", directory
    yield from loaded.private.items()
    key = loaded.settings.key
    for path in (key.file, key.passphrase_file) if key else ():
        if path is not None:
            yield "the master key", Path(path)
    webhook = loaded.settings.approvals.webhook
    if webhook is not None and webhook.secret_file is not None:
        yield "the webhook's secret", Path(webhook.secret_file)


def _overlap(one: Path, other: Path) -> bool:
    one, other = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    return one == other or one in other.parents or other in one.parents
