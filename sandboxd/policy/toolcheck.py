"""Checks of one tool manifest that need more than types: its schema, program, secrets, template."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from sandboxd import names
from sandboxd.errors import Invalid
from sandboxd.policy.arguments import check_schema
from sandboxd.policy.egress import check_egress
from sandboxd.policy.files import Trust, sha256_of
from sandboxd.policy.model import Mount, SecretSpec, Tool
from sandboxd.policy.problems import Problems
from sandboxd.policy.programs import (
    Interpreter,
    Refused,
    hold_program,
    interpreters_of,
    is_native,
)
from sandboxd.policy.values import ProgramPath, Wrong, nearest
from sandboxd.policy.yamlpos import Document

__all__ = ["check_environment", "check_mounts", "check_program", "complete_tool"]

#: Seconds that a program may take to end by itself.
MAX_GRACE = 60.0

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

#: Never a constant of a tool or an agent: the broker sets them itself.
_OURS = ("SANDBOXD_", "LISTEN_", "NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "WATCHDOG_")

#: Places in a sandbox that its own build fills.
_RESERVED = ("/proc", "/sys", "/dev", "/run/sandboxd", "/run/secrets")
_RESERVED_ALONE = frozenset(
    (
        "/",
        "/bin",
        "/sbin",
        "/lib",
        "/lib32",
        "/lib64",
        "/usr",
        "/etc",
        "/run",
        "/tmp",  # noqa: S108 - a place in the sandbox
        "/home",
        "/var",
        "/root",
        "/workspace",
    )
)
#: Where the system's programs are, in a sandbox as on the host.
_PROGRAM_PLACES = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
#: Host trees that would open the sandbox.
_HOST_TREES = ("/proc", "/sys", "/dev")


def complete_tool(tool: Tool, document: Document, trust: Trust, problems: Problems) -> Tool | None:
    """The tool with its validator, real program path and digest; None after noting problems."""
    before = len(problems.errors)
    validator = _schema(tool.input_schema, "input", document, problems)
    output_validator = None
    if tool.output_schema is not None:
        output_validator = _schema(tool.output_schema, "output", document, problems)
    _check_output(tool, document, problems)
    _check_arguments_used(tool, document, problems)
    _check_secrets(tool, document, problems)
    check_environment(
        tool.environment,
        tool.allow_environment,
        document,
        problems,
        refuse=False,
        quiet=tool.shipped,
    )
    check_mounts(tool.mounts, document, problems)
    check_egress(tool.egress, tool.network, document, problems)
    program, digest = _program(tool, document, trust, problems)
    if len(problems.errors) == before:
        tool = _with_interpreters(tool, program, document, trust, problems)
    if len(problems.errors) > before:
        return None
    _warn_of_unused(tool, document, problems)
    if tool.input_schema.get("additionalProperties") is not False and not tool.shipped:
        problems.warn(
            document.file,
            document.key_at(("input",)),
            f"{tool.name} takes arguments that its schema doesn't name; "
            "add additionalProperties: false",
        )
    return attrs.evolve(
        tool,
        validator=validator,
        output_validator=output_validator,
        output_format=tool.output_format if tool.output_schema is None else "json",
        program=program,
        digest=digest,
    )


def check_program(tool: Tool) -> None:
    """Raise Denied if the program is no longer the one that was loaded."""
    hold_program(tool).close()


def check_environment(
    environment: Mapping[str, str],
    allowed: Mapping[str, str],
    document: Document,
    problems: Problems,
    *,
    refuse: bool,
    quiet: bool = False,
) -> None:
    """Constants: values that execve takes, and names that steer a loader only on purpose.

    With ``refuse`` such a name is a problem unless ``allow_environment`` gives a reason for it;
    without, it is a warning that says what the variable does (none when ``quiet``).
    """
    for name, value in environment.items():
        path = ("environment", name)
        try:
            names.variable_name(name)
        except Invalid as refused:
            problems.add(document.file, document.key_at(path), refused.message, refused.hint)
            continue
        if name.upper().startswith(_OURS):
            problems.add(document.file, document.key_at(path), f"{name} is set by sandboxd alone")
            continue
        try:
            names.variable_value(name, value.encode("utf-8", "surrogatepass"))
        except Invalid as refused:
            problems.add(document.file, document.at(path), refused.message, refused.hint)
        reason = names.loader_reason(name)
        if not reason or name in allowed or quiet:
            continue
        if refuse:
            problems.add(
                document.file,
                document.key_at(path),
                f"{name} is refused: {reason}",
                f"if it must be: allow_environment: {{{name}: the reason}}",
            )
        else:
            problems.warn(document.file, document.key_at(path), f"{name} is set: {reason}")
    for name in allowed:
        if name not in environment:
            problems.add(
                document.file,
                document.key_at(("allow_environment", name)),
                f"{name} is not in environment",
                nearest(name, environment),
            )


def check_mounts(mounts: tuple[Mount, ...], document: Document, problems: Problems) -> None:
    """Mounts that neither hide what the sandbox is made of nor open the host."""
    targets: set[Path] = set()
    for index, mount in enumerate(mounts):
        path = ("mounts", index)
        source, target = os.fspath(mount.source), os.fspath(mount.target)
        if source == "/" or _within(source, _HOST_TREES):
            problems.add(
                document.file,
                document.at((*path, "source")),
                f"{source} of the host is never mounted",
            )
        elif _is_socket(source):
            problems.add(
                document.file,
                document.at((*path, "source")),
                f"{source} is a socket, a way out of the sandbox",
            )
        if target in _RESERVED_ALONE or _within(target, _RESERVED):
            problems.add(
                document.file,
                document.at((*path, "target")),
                f"{target} belongs to the sandbox itself",
                "mount below another place",
            )
        if mount.target in targets:
            problems.add(
                document.file, document.at((*path, "target")), f"{target} is mounted twice"
            )
        targets.add(mount.target)


def _within(path: str, trees: tuple[str, ...]) -> bool:
    return any(path == tree or path.startswith(f"{tree}/") for tree in trees)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError:
        return False


def _schema(schema: Any, key: str, document: Document, problems: Problems) -> Any:
    try:
        return check_schema(schema, key)
    except Wrong as wrong:
        place = document.at((key, *wrong.path))
        problems.add(document.file, place, wrong.message, wrong.hint)
        return None


def _check_output(tool: Tool, document: Document, problems: Problems) -> None:
    if tool.output_schema is not None and tool.output_format not in ("auto", "json"):
        problems.add(
            document.file,
            document.at(("output_format",)),
            f"output describes JSON, and output_format is {tool.output_format}",
            "leave output_format out",
        )
    if tool.grace is not None and tool.grace > MAX_GRACE:
        problems.add(
            document.file,
            document.at(("grace",)),
            f"expected a grace of at most {MAX_GRACE:g} s",
            "the call's slot stays taken meanwhile; raise timeout instead",
        )
    most, each = tool.concurrency.total, tool.concurrency.per_session
    if most is not None and each is not None and each > most:
        problems.add(
            document.file,
            document.at(("concurrency", "per_session")),
            f"per_session: {each} is more than the {most} of all sessions together",
        )


def _check_arguments_used(tool: Tool, document: Document, problems: Problems) -> None:
    properties = tool.input_schema.get("properties")
    if not isinstance(properties, dict):
        properties = {}
    for name in sorted(tool.argv.names - set(properties)):
        problems.add(
            document.file,
            document.at(("argv",)),
            f"argv uses {names.shown(name)}, which input has no property for",
            nearest(name, properties),
        )
    if tool.stdin.kind == "text" and tool.stdin.argument not in properties:
        problems.add(
            document.file,
            document.at(("stdin", "text")),
            f"stdin uses {names.shown(tool.stdin.argument)}, which input has no property for",
            nearest(tool.stdin.argument, properties),
        )


def _warn_of_unused(tool: Tool, document: Document, problems: Problems) -> None:
    """An argument that reaches the program on no way can only be a mistake."""
    properties = tool.input_schema.get("properties")
    if tool.stdin.kind == "json" or tool.shipped or not isinstance(properties, dict):
        return
    for name in properties:
        if name not in tool.argv.names and name != tool.stdin.argument:
            problems.warn(
                document.file,
                document.key_at(("input", "properties", name)),
                f"the argument {names.shown(name)} is in neither argv nor stdin: "
                "the program never sees it",
            )


def _check_secrets(tool: Tool, document: Document, problems: Problems) -> None:
    taken: dict[tuple[str, str], int] = {}
    for index, secret in enumerate(tool.secrets):
        at = document.at(("secrets", index))
        reason = names.loader_reason(secret.variable)
        if reason:
            problems.add(
                document.file,
                at,
                f"no store takes {secret.variable}: {reason}",
                f"name the variable otherwise: {{variable: OTHER, as: {secret.as_name}}}",
            )
        message = _secret_problem(secret, tool)
        place = ("env" if secret.delivery == "fd" else secret.delivery, secret.as_name)
        if not message and secret.as_name and place in taken:
            message = f"'{secret.as_name}' is delivered twice"
        taken[place] = index
        if message:
            problems.add(document.file, at, message)
        elif secret.delivery in ("env", "fd") and not tool.shipped:
            loader = names.loader_reason(secret.as_name)
            if loader:
                problems.warn(document.file, at, f"{secret.as_name} is set: {loader}")
    if sum(secret.delivery == "stdin" for secret in tool.secrets) > 1:
        problems.add(document.file, document.at(("secrets",)), "two secrets on one standard input")


def _secret_problem(secret: SecretSpec, tool: Tool) -> str:
    if secret.delivery == "stdin":
        if secret.as_name != secret.variable:
            return "'as' has no meaning with delivery: stdin"
        if tool.stdin.kind != "none":
            return f"delivery: stdin doesn't go with stdin: {tool.stdin.kind}"
    elif secret.delivery == "file":
        if not _FILE_NAME.fullmatch(secret.as_name):
            return f"{names.shown(secret.as_name)} is not a file name for /run/secrets"
    else:
        try:
            names.variable_name(secret.as_name)
        except Invalid as refused:
            return refused.message
        if secret.as_name in tool.environment:
            return f"{secret.as_name} is a constant in environment already"
        if secret.as_name.upper().startswith(_OURS):
            return f"{secret.as_name} is set by sandboxd alone"
    return ""


def _program(
    tool: Tool, document: Document, trust: Trust, problems: Problems
) -> tuple[ProgramPath, str]:
    """The program's real path and digest, if it and its folder can be trusted."""
    at = document.at(("program",))
    inside = not tool.program.is_absolute()
    path = tool.directory / tool.program
    real = Path(os.path.realpath(path))
    message = hint = digest = ""
    if inside and real != path:
        message = f"{tool.program} is or is below a symbolic link; expected a file in the folder"
    elif not os.path.lexists(real):
        message = f"no file {real}"
        hint = nearest(str(tool.program), _siblings(tool)) if inside else ""
    else:
        message = trust.refusal(tool.directory) or trust.tree_refusal(tool.directory)
        message = message or trust.refusal(real) or _not_runnable(real, tool)
    if not message:
        try:
            digest = sha256_of(real)
        except OSError as error:
            message = f"{real} can't be read: {os.strerror(error.errno or 0)}"
    if message:
        problems.add(document.file, at, message, hint)
    return ProgramPath(real), digest


def _with_interpreters(
    tool: Tool, program: Path, document: Document, trust: Trust, problems: Problems
) -> Tool:
    """The tool with what its program needs to be started, all of it trusted and in the sandbox."""
    if tool.runtime != "none":
        return tool
    at = document.at(("program",))
    invoked = str(tool.program) if tool.program.is_absolute() else ""
    found: list[Interpreter] = []
    try:
        for one in interpreters_of(program, tool.environment):
            refusal = trust.refusal(one.path) or _not_visible(one, tool)
            if refusal:
                problems.add(document.file, at, f"the interpreter of {program}: {refusal}")
            found.append(attrs.evolve(one, digest=sha256_of(one.path)))
        native = not found and is_native(program)
    except Refused as refused:
        problems.add(document.file, at, str(refused))
        return tool
    except OSError as error:
        problems.add(document.file, at, f"{program} can't be read: {os.strerror(error.errno or 0)}")
        return tool
    if not found and not native:
        problems.warn(
            document.file,
            at,
            f"{program} is neither a native program nor a script that begins with #!: "
            "the kernel may not know how to start it",
        )
    return attrs.evolve(tool, invoked=invoked, native=native, interpreters=tuple(found))


def _not_visible(interpreter: Interpreter, tool: Tool) -> str:
    places = [Path(path) for path in _PROGRAM_PLACES] + [tool.directory]
    places += [Path(m.target) for m in tool.mounts if m.source == m.target]
    for path in dict.fromkeys((Path(interpreter.name), interpreter.path)):
        if not any(path.is_relative_to(place) for place in places):
            return f"{path} is not in the sandbox; mount what holds it at its own path"
    return ""


def _siblings(tool: Tool) -> list[str]:
    try:
        return [p.name for p in tool.directory.iterdir() if p.name != "tool.yaml"]
    except OSError:
        return []


def _not_runnable(real: Path, tool: Tool) -> str:
    status = real.stat()
    if not stat.S_ISREG(status.st_mode):
        return f"{real} is not a regular file"
    if status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        return f"{real} is setuid or setgid"
    if tool.runtime == "none" and not status.st_mode & 0o111:
        return f"{real} is not executable"
    return ""
