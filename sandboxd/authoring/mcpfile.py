"""From an ``mcpServers`` file to manifests: which program, what is a key, what needs a mount.

The format that desktop and coding agents share: an object of servers, each with ``command``,
``args`` and ``env``. Pure but for looks at the file system; no message holds a value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandboxd.authoring.mcpprograms import Found, Missing, program_of
from sandboxd.errors import Invalid
from sandboxd.names import loader_reason, server_name, shown, variable_name
from sandboxd.secret import Secret

__all__ = ["Entry", "Problem", "convert"]

_REMOTE = ("http", "sse", "streamable-http", "streamableHttp", "ws", "websocket")
#: Keys of an entry that say nothing about how the server is started.
_PASSED_OVER = frozenset(
    (
        *("type", "command", "args", "env", "disabled", "description", "timeout", "name"),
        *("alwaysAllow", "autoApprove", "disabledTools", "enabledTools", "trust"),
        *("note", "gallery", "version"),
    )
)

_SECRET_NAME = re.compile(
    r"(?i)(?:^|[_-])(?:key|apikey|token|secret|pass|passwd|password|pwd|credentials?|auth|dsn|"
    r"private|pat|cookie|session|signature|bearer)(?:$|[_-])"
)
_SECRET_VALUE = re.compile(
    r"(?:sk|pk|rk)[-_][A-Za-z0-9_-]{12,}|gh[opsur]_\w{20,}|github_pat_\w{20,}|glpat-\S{16,}|"
    r"xox[abprs]-\S{10,}|AKIA[A-Z0-9]{12,}|AIza\S{20,}|eyJ[\w-]{8,}\.[\w-]+\.\S*|"
    r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@\S*"
)
_SETTING = re.compile(
    r"(?i)|true|false|yes|no|on|off|none|null|[0-9]{1,6}(?:\.[0-9]+)?|/[^\s]*|"
    r"https?://[^\s@?#]+|debug|info|warn(?:ing)?|error|trace|production|development|"
    r"[a-z]{2}(?:[-_][a-z]{2})?(?:\.utf-?8)?|[a-z_]+/[a-z_]+|utc|stdio"
)
_REFERENCE = re.compile(r"\$\{(?:env:|input:)?([A-Za-z_][A-Za-z0-9_-]*)\}|\$([A-Z_][A-Z0-9_]*)")
_PLACEHOLDER = re.compile(r"(?i)<[^<>]*>|\[[^\[\]]*\]|your[-_ ].*|.*[-_ ]here|x{4,}.*|changeme.*")


@dataclass(frozen=True)
class Problem:
    """Why one server can't be imported, and what to do."""

    server: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Entry:
    """One server of the file: its manifest, what goes into the store, and the file without it.

    ``unset``: variables that the file only refers to, which are still to be set.
    """

    name: str
    original: str
    manifest: dict[str, Any]
    values: Mapping[str, Secret] = field(repr=False)
    unset: tuple[str, ...]
    notes: tuple[str, ...]
    cleaned: dict[str, Any]


def convert(
    data: bytes,
    *,
    source: str,
    packages: Sequence[Path] = (),
    prefix: str = "",
    only: Collection[str] = (),
    taken: Collection[str] = (),
    plain: Collection[str] = (),
    reserved: Collection[str] = (),
) -> tuple[list[Entry], list[Problem]]:
    """The servers of a file and everything that stands in their way.

    ``taken`` are variables that are in use: a key of that name gets another one. ``plain`` are
    names in ``env`` that are settings, whatever they look like. ``reserved`` are names of tools: a
    server of that name gets ``mcp-`` before it. Raises Invalid for a file that isn't of the format.
    """
    servers = _servers(data)
    unknown = sorted(set(only) - set(servers))
    if unknown:
        raise Invalid(
            f"the file has no server {shown(unknown[0])}",
            hint=f"it has: {', '.join(map(shown, servers)) or 'none'}",
        )
    entries: list[Entry] = []
    problems: list[Problem] = []
    used = set(taken)
    names: set[str] = set()
    for original, raw in servers.items():
        if only and original not in only:
            continue
        try:
            entry = _Reader(
                original, raw, source, packages, _name(prefix, original, reserved), used, plain
            ).entry()
        except _Refused as refused:
            problems.append(Problem(original, refused.message, refused.hint))
            continue
        if entry.name in names:
            problems.append(Problem(original, f"another server becomes {entry.name} as well"))
        names.add(entry.name)
        used |= set(entry.values) | set(entry.unset)
        entries.append(entry)
    return entries, problems


class _Refused(Exception):
    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def _servers(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except RecursionError:
        raise Invalid("the file is nested too deeply") from None
    except UnicodeDecodeError:
        raise Invalid("the file is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Invalid(
            f"the file is not JSON: line {error.lineno}, column {error.colno}",
            hint="comments and trailing commas are no JSON; take them out",
        ) from None
    if isinstance(value, dict) and isinstance(value.get("mcp"), dict):
        value = value["mcp"]
    for key in ("mcpServers", "servers"):
        found = value.get(key) if isinstance(value, dict) else None
        if isinstance(found, dict):
            return found
    raise Invalid("the file has no object 'mcpServers'", hint="see docs/mcp-servers.md")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Invalid("the file has the same key twice in one object")
    return made


class _Reader:
    """Reads one entry. What it finds is gathered in its attributes."""

    def __init__(
        self,
        original: str,
        raw: Any,
        source: str,
        packages: Sequence[Path],
        name: str,
        used: Collection[str],
        plain: Collection[str],
    ) -> None:
        self.original, self.raw, self.source = original, raw, source
        self.packages, self.used, self.plain = packages, used, plain
        self.name = name
        self.values: dict[str, Secret] = {}
        self.unset: dict[str, None] = {}
        self.notes: list[str] = []
        self.secrets: list[dict[str, str]] = []
        self.environment: dict[str, str] = {}
        self.mounts: list[dict[str, str]] = []
        self.workspace = False

    def entry(self) -> Entry:
        raw = self.raw
        if not isinstance(raw, dict):
            raise _Refused("it is not an object")
        if raw.get("url") is not None or raw.get("type") in _REMOTE:
            raise _Refused(
                "it is a remote server (http or sse): there is nothing to start in a sandbox",
                "import the others with --only; for an http API, see http_request in docs/tools.md",
            )
        unknown = sorted(set(raw) - _PASSED_OVER)
        if unknown:
            raise _Refused(
                f"sandboxd has nothing like its {', '.join(map(shown, unknown))}",
                "take it out, or write the manifest by hand: docs/mcp-servers.md",
            )
        command, args, env = raw.get("command"), raw.get("args", []), raw.get("env", {})
        if not isinstance(command, str) or not command:
            raise _Refused("it has no command")
        if not isinstance(args, list) or not all(isinstance(word, str) for word in args):
            raise _Refused("its args are not a list of texts")
        if not isinstance(env, dict) or not all(isinstance(v, str) for v in env.values()):
            raise _Refused("its env is not an object of texts")
        try:
            found = program_of(command, args, self.packages)
        except Missing as missing:
            raise _Refused(missing.message, missing.hint) from None
        cleaned_env = {key: self._variable(key, value) for key, value in env.items()}
        self.mounts += [{"source": str(path), "target": str(path)} for path in found.mounts]
        argv, cleaned_args = self._arguments(found)
        cleaned = dict(raw)
        if env:
            cleaned["env"] = cleaned_env
        if args:
            cleaned["args"] = [*args[: len(args) - len(cleaned_args)], *cleaned_args]
        return Entry(
            name=self.name,
            original=self.original,
            manifest=self._manifest(found, argv),
            values=self.values,
            unset=tuple(self.unset),
            notes=tuple(self.notes),
            cleaned=cleaned,
        )

    def _manifest(self, found: Found, argv: list[str]) -> dict[str, Any]:
        made: dict[str, Any] = {
            "version": 1,
            "kind": "mcp",
            "name": self.name,
            "description": f"{_printable(self.original)}, imported from {_printable(self.source)}",
            "program": str(found.program),
        }
        if found.runtime != "none":
            made["runtime"] = found.runtime
        if argv:
            made["argv"] = argv
        made |= {"lifetime": "session", "idle": "5m"}
        if self.environment:
            made["environment"] = self.environment
        if self.secrets:
            made["secrets"] = self.secrets
        if self.workspace:
            made["workspace"] = "rw"
        if self.mounts:
            made["mounts"] = self.mounts
        if self.secrets:
            made["network"] = "host"
            self.notes.append("network: host, since it has a key; drop the line if it needs none")
        return made

    def _variable(self, key: str, value: str) -> str:
        """Sort one variable into constants and secrets; what the cleaned file has for it."""
        try:
            variable_name(key)
        except Invalid:
            raise _Refused(f"{shown(key)} in its env is not a variable name") from None
        if key in ("PATH", "HOME"):
            self.notes.append(f"{key} was left out: the sandbox has its own")
            return value
        reference = _REFERENCE.fullmatch(value)
        if reference is not None or (_is_secret_name(key) and _PLACEHOLDER.fullmatch(value)):
            name = self._name_for(key)
            self._secret(name, key)
            self.unset[name] = None
            return value
        if _REFERENCE.search(value):
            raise _Refused(f"{key} in its env is put together from variables", "write it out")
        if self._is_setting(key, value):
            self.environment[key] = value
            return value
        if len(value.strip()) < 4:
            raise _Refused(
                f"{key} in its env is too short for a key", f"if it is a setting: --plain {key}"
            )
        name = self._name_for(key)
        self._secret(name, key)
        self.values[name] = Secret(value)
        return f"${{{name}}}"

    def _is_setting(self, key: str, value: str) -> bool:
        if key in self.plain:
            return True
        if _SECRET_VALUE.search(value) or _is_secret_name(key):
            return not value
        return _SETTING.fullmatch(value) is not None

    def _name_for(self, key: str) -> str:
        """The variable's name in the store: its own, unless that is taken or steers programs."""
        if not loader_reason(key) and key not in self.used and key not in self.values:
            return key
        base = f"{self.name}_{key}".upper().replace("-", "_")
        name, number = base, 2
        while name in self.used or name in self.values or loader_reason(name):
            name, number = f"{base}_{number}", number + 1
        return name

    def _secret(self, variable: str, key: str) -> None:
        spec = {"variable": variable}
        if variable != key:
            spec["as"] = key
        self.secrets.append(spec)

    def _arguments(self, found: Found) -> tuple[list[str], list[str]]:
        """The template of the command line, and what the cleaned file has for it."""
        argv: list[str] = []
        cleaned: list[str] = []
        flag = ""
        for word in found.args:
            option, equals, rest = word.partition("=")
            named = option if equals and option.startswith("-") else flag
            value = rest if equals and option.startswith("-") else word
            before = f"{option}=" if equals and option.startswith("-") else ""
            flag = word if word.startswith("-") and not equals else ""
            is_value = bool(before) or not word.startswith("-")
            if is_value and (_SECRET_VALUE.search(value) or (named and _is_secret_name(named))):
                if found.runtime == "none":
                    raise _Refused(
                        "its args hold a credential, which every user of the host could read "
                        "while it runs",
                        "if the server takes it from its environment, move it to env; only servers "
                        "that run on Node.js can be given one in args",
                    )
                words = re.sub(r"[^A-Za-z0-9]+", "_", named.strip("-")) or (
                    "URL" if "://" in value else "ARGUMENT"
                )
                name = self._name_for(f"{self.name}_{words}".upper().replace("-", "_"))
                self._secret(name, name)
                self.values[name] = Secret(value)
                argv.append(f"{before}{{{name}}}")
                cleaned.append(f"{before}${{{name}}}")
                continue
            if _REFERENCE.search(word):
                raise _Refused("its args refer to variables", "write them out")
            self._path(value)
            argv.append(word.replace("{", "{{").replace("}", "}}"))
            cleaned.append(word)
        return argv, cleaned

    def _path(self, word: str) -> None:
        """A directory or file of the host that is named on the command line has to be there."""
        if word == "/workspace" or word.startswith("/workspace/"):
            self.workspace = True
        elif word.startswith("/") and len(word) > 1 and Path(word).exists():
            path = Path(word).resolve()
            if not any(path.is_relative_to(mount["source"]) for mount in self.mounts):
                self.mounts.append({"source": str(path), "target": word.rstrip("/")})
                self.notes.append(
                    f"{word} is mounted read-only; if it should write there: mode: rw"
                )


def _name(prefix: str, original: str, reserved: Collection[str]) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", f"{prefix}{original}".lower()).strip("-")[:32].strip("-")
    if not words:
        raise _Refused("its name has no letter or digit", "give it another one")
    if words in reserved or not words[:1].isalpha():
        words = f"mcp-{words}"[:32].strip("-")
    return server_name(words)


def _is_secret_name(name: str) -> bool:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return _SECRET_NAME.search(spaced) is not None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:80]
