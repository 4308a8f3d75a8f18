"""Which installed program a ``command`` of an ``mcpServers`` file means.

``npx`` and ``uvx`` fetch what they run when they run it. A server that holds a key is installed
once instead, looked at, and started by its path; here its path is found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Found", "Missing", "program_of"]

Runtime = Literal["none", "python", "node"]

_PACKAGE = re.compile(r"((?:@[\w.-]+/)?[\w.-]+)(?:@([^\s/]+))?")
_CONTAINERS = ("docker", "podman", "nerdctl")


@dataclass(frozen=True)
class Found:
    """The program, what runs it, the arguments that are left, and the mounts that it needs."""

    program: Path
    runtime: Runtime
    args: tuple[str, ...]
    mounts: tuple[Path, ...]


class Missing(Exception):
    """There is no such program, or none that can be started by its path."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def program_of(command: str, args: Sequence[str], packages: Sequence[Path]) -> Found:
    """The installed program. Raises :class:`Missing` with what to install, and how."""
    base = Path(command).name.removesuffix(".cmd").removesuffix(".exe")
    if base in ("npx", "bunx", "pnpx"):
        return _npm(list(args), packages)
    if base in ("npm", "pnpm", "yarn", "bun") and args[:1] in (["exec"], ["dlx"], ["x"]):
        return _npm([word for word in args[1:] if word != "--"], packages)
    if base in ("uvx", "pipx", "uv"):
        return _python(base, list(args), packages)
    if base in ("node", "nodejs"):
        return _interpreted(args, "node")
    if re.fullmatch(r"python[0-9.]*", base):
        return _by_python(command, args)
    if base in _CONTAINERS:
        raise Missing(
            f"it runs a container with {base}, and a sandbox has none",
            "install the server itself, and name its program",
        )
    if not command.startswith("/"):
        for folder in packages:
            for place in (folder / "bin" / command, folder / command / "bin" / command):
                if place.is_file():
                    return _script(place, args)
        raise Missing(
            f"its command {command!r} is no path",
            "write the program's absolute path, or say where it is installed: --packages DIR",
        )
    path = Path(command)
    if not path.is_file():
        raise Missing(f"there is no program {command}")
    return _script(path, args)


def _npm(args: list[str], packages: Sequence[Path]) -> Found:
    wanted = binary = ""
    while args and args[0].startswith("-"):
        option = args.pop(0)
        name, _, value = option.partition("=")
        if name in ("-p", "--package"):
            wanted = value or (args.pop(0) if args else "")
        elif option not in ("-y", "--yes", "-q", "--quiet", "--silent", "--prefer-offline"):
            raise Missing(f"its option {name} of npx means nothing to an installed server")
    if not args:
        raise Missing("it names no package")
    if wanted:
        binary = args.pop(0)
    else:
        wanted = args.pop(0)
    match = _PACKAGE.fullmatch(wanted)
    if match is None:
        raise Missing("its package is no name of the npm registry", "install it, and name its path")
    name, version = match[1], match[2] or ""
    for folder in packages:
        for modules in (folder / "node_modules", folder / "lib/node_modules", folder):
            about = modules / name / "package.json"
            if modules.name == "node_modules" and about.is_file():
                return _npm_program(name, version, binary, about, modules, args)
    place = packages[0] if packages else Path("/opt/mcp")
    shown = f"{name}@{version}" if version and version != "latest" else f"{name}@VERSION"
    raise Missing(
        f"the package {name} isn't installed in {_spelled(packages)}",
        f"npm install --prefix {place} --ignore-scripts {shown}; then import with "
        f"--packages {place}",
    )


def _npm_program(
    name: str, version: str, binary: str, about: Path, modules: Path, args: list[str]
) -> Found:
    held = json.loads(about.read_text(encoding="utf-8"))
    if re.match(r"[0-9]", version) and held.get("version") != version:
        raise Missing(
            f"the file wants {name} {version}, and {held.get('version')} is installed",
            "install that version, or change the file",
        )
    programs = held.get("bin")
    if isinstance(programs, str):
        programs = {name.rpartition("/")[2]: programs}
    if not isinstance(programs, dict) or not programs:
        raise Missing(f"the package {name} has no program")
    chosen = programs.get(binary or name.rpartition("/")[2])
    if chosen is None and len(programs) == 1:
        chosen = next(iter(programs.values()))
    if chosen is None:
        raise Missing(
            f"the package {name} has several programs: {', '.join(programs)}",
            "say which: npx -p PACKAGE PROGRAM",
        )
    program = (about.parent / chosen).resolve()
    if not program.is_file():
        raise Missing(f"{program} of the package {name} is missing")
    return Found(program, "node", tuple(args), (modules.resolve(),))


def _python(base: str, args: list[str], packages: Sequence[Path]) -> Found:
    if base == "pipx" and args[:1] == ["run"]:
        args.pop(0)
    elif base == "uv" and args[:2] == ["tool", "run"]:
        del args[:2]
    elif base != "uvx":
        raise Missing(
            f"it is run by {base} from a project",
            "install the project into a virtual environment, and name the program in its bin",
        )
    package = ""
    while args and args[0].startswith("-"):
        option = args.pop(0)
        name, _, value = option.partition("=")
        value = value or (args.pop(0) if args and name in ("--from", "--spec", "--python") else "")
        if name in ("--from", "--spec"):
            package = value
        elif name not in ("--python", "-q", "--quiet", "--isolated", "--offline"):
            raise Missing(f"its option {name} of {base} means nothing to an installed server")
    if not args:
        raise Missing("it names no program")
    program = re.split(r"[@=<>\[~!]", args.pop(0))[0]
    package = re.split(r"[@=<>\[~!]", package)[0] or program
    for folder in packages:
        for place in (folder, folder / package, folder / program, folder / "venv"):
            if (place / "bin" / program).is_file():
                return _script(place / "bin" / program, args)
    place = (packages[0] if packages else Path("/opt/mcp")) / package
    raise Missing(
        f"the program {program} isn't installed in {_spelled(packages)}",
        f"python3 -m venv {place} && {place}/bin/pip install {package}==VERSION; then import "
        f"with --packages {place.parent}",
    )


def _by_python(command: str, args: Sequence[str]) -> Found:
    script = args[0] if args else ""
    if not script.startswith("/") or Path(command).resolve().is_relative_to("/usr") is False:
        raise Missing(
            "it is started through a Python interpreter",
            "name the program that pip put beside it, such as VENV/bin/mcp-server-git; for a "
            "script of your own, give the script a #! line and name it",
        )
    path = Path(script)
    if not path.is_file():
        raise Missing(f"there is no program {script}")
    return Found(Path(command).resolve(), "none", tuple(args), (path.resolve().parent,))


def _interpreted(args: Sequence[str], runtime: Runtime) -> Found:
    script = args[0] if args else ""
    if not script.startswith("/"):
        raise Missing("its first argument is no absolute path of a program", "write it out")
    path = Path(script)
    if not path.is_file():
        raise Missing(f"there is no program {script}")
    return Found(path.resolve(), runtime, tuple(args[1:]), _modules_of(path.resolve()))


def _script(path: Path, args: Sequence[str]) -> Found:
    """A program by its path: what its first line says decides what runs it."""
    real = path.resolve()
    with real.open("rb") as file:
        first = file.readline(512)
    words = first[2:].decode("utf-8", "replace").split() if first.startswith(b"#!") else []
    if words and Path(words[-1]).name in ("node", "nodejs"):
        return Found(real, "node", tuple(args), _modules_of(real))
    mounts: tuple[Path, ...] = ()
    if words:
        mounts = _environment_of(Path(words[0])) or (real.parent,)
    return Found(real, "none", tuple(args), tuple(m for m in mounts if not _shown(m)))


def _modules_of(program: Path) -> tuple[Path, ...]:
    """The outermost node_modules around a program, or its own folder."""
    around = [parent for parent in program.parents if parent.name == "node_modules"]
    chosen = around[-1] if around else program.parent
    return () if _shown(chosen) else (chosen,)


def _environment_of(interpreter: Path) -> tuple[Path, ...]:
    """The virtual environment of a Python, and the installation that it was made from."""
    root = interpreter.parent.parent
    if not (root / "pyvenv.cfg").is_file():
        return ()
    installation = interpreter.resolve().parent.parent
    return (root.resolve(), installation)


def _shown(path: Path) -> bool:
    """Whether every sandbox shows it anyway."""
    return path.is_relative_to("/usr")


def _spelled(packages: Sequence[Path]) -> str:
    return " or ".join(map(str, packages)) or "a place that sandboxctl knows"
